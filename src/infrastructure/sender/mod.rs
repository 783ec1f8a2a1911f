//! Requests to receivers: bounded in time and size, and only to addresses that the operator allows.

mod address_guard;
mod departure;
mod errors;
#[cfg(test)]
mod tests;
mod time_limit;
mod whereabouts;

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use async_trait::async_trait;
use axum::http::header::{ACCEPT, RETRY_AFTER, USER_AGENT};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Uri};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use hyper_rustls::{ConfigBuilderExt as _, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{HttpConnector, HttpInfo, capture_connection};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::{ClientConfig, RootCertStore};
use tracing::error;

use self::address_guard::GuardedResolver;
use self::departure::{Departure, NoBody};
use self::errors::{describe, is_own_fault, kind_of};
use self::time_limit::{Over, TimeLimit};
use self::whereabouts::Noting;
use crate::application::ports::Sender;
use crate::domain::address::ForbiddenAddress;
use crate::domain::attempt::{Answer, AttemptOutcome, BrokenOff};
use crate::domain::delivery::LeasedDelivery;
use crate::domain::egress::{Egress, Forbidden};
use crate::domain::endpoint::Endpoint;
use crate::domain::error_kind::ErrorKind;
use crate::domain::evidence::{Evidence, ResponseHeaders};

/// How long an idle connection is kept for the next request to the same host.
const IDLE_LIMIT: Duration = Duration::from_secs(15);
/// How long connecting may take, within the limit of the attempt.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The longest error text that is kept: receivers can influence some, such as those about certificates.
const ERROR_CHARS_MAX: usize = 500;

/// How requests are made.
#[derive(Debug, Clone)]
pub struct SenderSettings {
    /// Time limit of one attempt, from connecting to the end of the response body.
    pub timeout: Duration,
    /// How many bytes of a response body are read and kept.
    pub response_bytes_max: usize,
    /// How many idle connections are kept per host.
    pub idle_connections_max: usize,
    /// Where requests may go.
    pub egress: Egress,
    /// The name servers to ask; empty: those of the system.
    pub name_servers: Vec<SocketAddr>,
}

/// Sends over HTTP/1.1 and HTTP/2, with or without TLS.
pub struct HttpSender {
    client: Client<HttpsConnector<Noting<HttpConnector<GuardedResolver>>>, NoBody>,
    /// Why nothing can be sent over TLS; `None` if it can.
    tls_fault: Option<String>,
    settings: SenderSettings,
}

/// Why no answer came.
enum NoAnswer {
    /// Nothing was sent, for a reason on our side.
    NotSent { error: String, kind: ErrorKind },
    /// Nothing was sent, because this process was paused for too long.
    TooLate,
    /// The receiver cannot be reached, broke off, or did not begin to answer in time.
    Failed { error: String, kind: ErrorKind, address: Option<SocketAddr> },
}

/// The start of a body.
struct BodyStart {
    text: String,
    /// Why the body could not be read to its end.
    broken_off: Option<BrokenOff>,
    /// Whether it is not known to be the whole body.
    is_cut: bool,
}

impl HttpSender {
    /// Prepares hyper's own client. It supports no redirects and no proxies, which would lead to unchecked addresses, and no
    /// cookies. It resends a request only if no part of it was written to a connection. `docs/experiments.md` shows what
    /// reqwest would cost.
    pub fn new(settings: SenderSettings) -> anyhow::Result<Self> {
        let resolver = GuardedResolver::new(settings.egress.addresses().clone(), &settings.name_servers)?;
        let mut connector = HttpConnector::new_with_resolver(resolver);
        connector.enforce_http(false);
        connector.set_connect_timeout(Some(CONNECT_LIMIT.min(settings.timeout)));
        connector.set_nodelay(true);
        let (tls, tls_fault) = tls_config()?;
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_all_versions()
            .wrap_connector(Noting(connector));
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_LIMIT)
            .pool_max_idle_per_host(settings.idle_connections_max)
            .build(connector);
        Ok(Self { client, tls_fault, settings })
    }

    async fn get(
        &self,
        delivery: &LeasedDelivery,
        endpoint: &Endpoint,
        limit: &TimeLimit,
    ) -> Result<Answer, NoAnswer> {
        let started = Instant::now();
        let url: Uri = delivery.webhook_url.parse().map_err(|error| NoAnswer::Failed {
            error: format!("the URL is not valid: {error}"),
            kind: ErrorKind::InvalidUrl,
            address: None,
        })?;
        self.check(&url).map_err(|forbidden| NoAnswer::NotSent {
            error: forbidden.to_string(),
            kind: forbidden.kind(),
        })?;
        if let Some(fault) = self.tls_fault.as_ref().filter(|_| url.scheme_str() == Some("https")) {
            return Err(NoAnswer::NotSent { error: fault.clone(), kind: ErrorKind::Tls });
        }
        let port = url.port_u16().unwrap_or(if url.scheme_str() == Some("https") { 443 } else { 80 });
        whereabouts::note(literal(&url));
        let departure = Departure::before(limit.deadline());
        let mut request = Request::new(NoBody(departure.clone()));
        *request.uri_mut() = url;
        *request.headers_mut() = headers(delivery, endpoint);
        let connection = capture_connection(&mut request);
        let failed = |error: String, kind: ErrorKind| {
            let called = || whereabouts::called().map(|address| SocketAddr::new(address, port));
            let address = whereabouts::of_connection(&connection).or_else(called);
            NoAnswer::Failed { error, kind, address }
        };
        let has_begun = || !departure.call_off();
        let response = match limit.of_what_may_begin(self.client.request(request), has_begun).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) if is_own_fault(&error) => {
                return Err(NoAnswer::NotSent { error: describe(&error), kind: kind_of(&error) });
            }
            Ok(Err(error)) => return Err(failed(describe(&error), kind_of(&error))),
            Err(Over::Before) => return Err(NoAnswer::TooLate),
            Err(Over::Within) => {
                let error = format!("timed out after {} ms", limit.millis());
                return Err(failed(error, ErrorKind::Timeout));
            }
        };
        // from here on the receiver has answered, whatever becomes of the body
        let status = response.status().as_u16();
        let first_byte_ms = i32::try_from(started.elapsed().as_millis()).unwrap_or(i32::MAX);
        let address = response.extensions().get::<HttpInfo>().map(HttpInfo::remote_addr);
        let retry_after = retry_after(response.headers());
        let headers = response.headers().iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
        let headers = ResponseHeaders::keep(headers);
        let BodyStart { text, broken_off, is_cut } = self.start_of_body(response.into_body(), limit).await;
        let evidence = Evidence {
            address,
            first_byte_ms: Some(first_byte_ms),
            headers: Some(headers),
            body_cut: Some(is_cut),
        };
        Ok(Answer { status, body: text, retry_after, broken_off, evidence })
    }

    /// Refuses a URL that the settings forbid, as an older row may have one. Names are checked when they are resolved.
    fn check(&self, url: &Uri) -> Result<(), Forbidden> {
        self.settings.egress.check_parts(url.scheme_str().unwrap_or_default(), url.port_u16(), literal(url))
    }

    /// Reads only as much as is kept. Returns it, and why it is incomplete, if it is. Text that PostgreSQL cannot store is
    /// replaced.
    async fn start_of_body(&self, mut incoming: Incoming, limit: &TimeLimit) -> BodyStart {
        let (mut body, mut broken_off, mut is_cut) = (Vec::new(), None, false);
        while body.len() < self.settings.response_bytes_max {
            match limit.of(incoming.frame()).await {
                Some(Some(Ok(frame))) => {
                    let chunk = frame.data_ref().map_or(&[][..], |data| &data[..]);
                    let room = self.settings.response_bytes_max - body.len();
                    is_cut = chunk.len() > room;
                    body.extend_from_slice(&chunk[..chunk.len().min(room)]);
                }
                Some(None) => break,
                Some(Some(Err(error))) => {
                    let error_text = format!("the response broke off: {}", innermost(&error));
                    broken_off = Some(BrokenOff { error: error_text, kind: kind_of(&error) });
                    break;
                }
                None => {
                    let error = format!("the response did not end within {} ms", limit.millis());
                    broken_off = Some(BrokenOff { error, kind: ErrorKind::Timeout });
                    break;
                }
            }
        }
        let body_bytes = body.len();
        let text = String::from_utf8(body)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
        let text = if text.contains('\0') { text.replace('\0', "\u{FFFD}") } else { text };
        // a length that was announced tells that nothing follows; the end of other bodies is not waited for
        let is_full = body_bytes >= self.settings.response_bytes_max;
        is_cut |= broken_off.is_some() || (is_full && !incoming.is_end_stream());
        BodyStart { text, broken_off, is_cut }
    }
}

/// The configuration of TLS, and why it cannot be used, if so: a machine without certificate authorities still sends over
/// plain HTTP.
fn tls_config() -> anyhow::Result<(ClientConfig, Option<String>)> {
    let builder = || {
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .context("preparing TLS")
    };
    match builder()?.try_with_platform_verifier() {
        Ok(config) => Ok((config.with_no_client_auth(), None)),
        Err(cause) => {
            let fault = format!(
                "this machine has no certificate authorities ({cause}): install the package ca-certificates, or name a file with SSL_CERT_FILE, and restart"
            );
            error!("nothing can be sent over https: {fault}");
            let nobody_is_trusted = builder()?.with_root_certificates(RootCertStore::empty());
            Ok((nobody_is_trusted.with_no_client_auth(), Some(fault)))
        }
    }
}

#[async_trait]
impl Sender for HttpSender {
    async fn send(&self, delivery: &LeasedDelivery, endpoint: &Endpoint) -> Option<AttemptOutcome> {
        let limit = TimeLimit::new(endpoint.settings.timeout.min(self.settings.timeout));
        let shortened = |error: String| error.chars().take(ERROR_CHARS_MAX).collect();
        Some(match whereabouts::following(self.get(delivery, endpoint, &limit)).await {
            Ok(answer) => AttemptOutcome::Answered(answer),
            Err(NoAnswer::TooLate) => return None,
            Err(NoAnswer::NotSent { error, kind }) => {
                AttemptOutcome::NotSent { error: shortened(error), kind }
            }
            Err(NoAnswer::Failed { error, kind, address }) => {
                AttemptOutcome::Unanswered { error: shortened(error), kind, address }
            }
        })
    }
}

/// The host of a URL, if it is an address.
fn literal(url: &Uri) -> Option<IpAddr> {
    url.host()?.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// The endpoint's own headers, the ids of the delivery and the event, and the trace that the event belongs to.
fn headers(delivery: &LeasedDelivery, endpoint: &Endpoint) -> HeaderMap {
    const AGENT: &str = concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION"));
    // six of ours, including the host, which the client adds
    let mut headers = HeaderMap::with_capacity(6 + endpoint.settings.headers.iter().count());
    headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    for (name, value) in endpoint.settings.headers.iter() {
        if let (Ok(name), Ok(mut value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            value.set_sensitive(true);
            headers.insert(name, value);
        }
    }
    let id = delivery.queue_id.to_string();
    headers.insert("webhook-id", HeaderValue::try_from(id).expect("a UUID is a header value"));
    if let Ok(event_id) = HeaderValue::try_from(&delivery.event_id) {
        headers.insert("webhook-event-id", event_id);
    }
    if let Some(trace) = delivery.traceparent.as_deref().and_then(|text| HeaderValue::try_from(text).ok()) {
        headers.insert("traceparent", trace);
    }
    headers
}

/// `Retry-After`, in seconds or as a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = httpdate::parse_http_date(text).ok()?;
    Some(at.duration_since(SystemTime::now()).unwrap_or_default())
}

/// The innermost cause, which says what happened; outer errors only say where. Stops early at a refused address.
fn innermost<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
        if innermost.is::<ForbiddenAddress>() {
            break;
        }
    }
    innermost
}
