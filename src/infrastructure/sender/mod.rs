//! Requests to receivers: bounded in time and size, and only to addresses that the operator allows.

mod address_guard;

use std::error::Error as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use async_trait::async_trait;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Client, Response, Url};

use self::address_guard::GuardedResolver;
use crate::application::ports::Sender;
use crate::domain::address::{AddressPolicy, ForbiddenAddress};
use crate::domain::attempt::{Answer, AttemptOutcome};
use crate::domain::delivery::LeasedDelivery;
use crate::domain::endpoint::Endpoint;

/// How long a connection is kept for the next request to the same host.
const IDLE_LIMIT: Duration = Duration::from_secs(15);
/// How long connecting may take, within the limit of the attempt.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The longest error that is kept: a receiver has a say in some, such as those about its certificate.
const ERROR_CHARS_MAX: usize = 500;

/// How requests are made.
#[derive(Debug, Clone)]
pub struct SenderSettings {
    /// Upper bound of one attempt, from connect to the end of the body.
    pub timeout: Duration,
    /// How many bytes of a response are read and kept.
    pub response_bytes_max: usize,
    /// How many idle connections to one host are kept.
    pub idle_connections_max: usize,
    /// Which addresses may be called.
    pub addresses: AddressPolicy,
}

/// Sends over HTTP/1.1 and HTTP/2, with or without TLS.
pub struct HttpSender {
    client: Client,
    settings: SenderSettings,
}

impl HttpSender {
    /// Prepares the client. Redirects are not followed, nothing is resent, proxies of the environment are not used:
    /// each would reach an address that nobody checked.
    pub fn new(settings: SenderSettings) -> anyhow::Result<Self> {
        let client = Client::builder()
            .user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")))
            .dns_resolver(Arc::new(GuardedResolver::new(settings.addresses.clone())?))
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .no_proxy()
            .referer(false)
            .connect_timeout(CONNECT_LIMIT.min(settings.timeout))
            .pool_idle_timeout(IDLE_LIMIT)
            .pool_max_idle_per_host(settings.idle_connections_max)
            .tcp_nodelay(true)
            .build()
            .context("preparing the HTTP client")?;
        Ok(Self { client, settings })
    }

    async fn get(
        &self,
        delivery: &LeasedDelivery,
        endpoint: &Endpoint,
        limit: Duration,
    ) -> Result<Answer, String> {
        let url =
            Url::parse(&delivery.webhook_url).map_err(|error| format!("the URL is not valid: {error}"))?;
        self.settings.addresses.check_literal(&url).map_err(|forbidden| forbidden.to_string())?;
        let headers = headers(delivery, endpoint);
        let response = self
            .client
            .get(url)
            .headers(headers)
            .timeout(limit)
            .send()
            .await
            .map_err(|error| describe(error, limit))?;
        let status = response.status().as_u16();
        let retry_after = retry_after(&response);
        let (body, broken_off) = self.start_of_body(response).await;
        let broken_off = broken_off.map(|error| describe(error, limit));
        Ok(Answer { status, body, retry_after, broken_off })
    }

    /// Reads no more than is kept; answers what came, and the error that ended it. Text that PostgreSQL cannot store is
    /// replaced.
    async fn start_of_body(&self, mut response: Response) -> (String, Option<reqwest::Error>) {
        let (mut body, mut broken_off) = (Vec::new(), None);
        while body.len() < self.settings.response_bytes_max {
            match response.chunk().await {
                Ok(Some(chunk)) => {
                    let room = self.settings.response_bytes_max - body.len();
                    body.extend_from_slice(&chunk[..chunk.len().min(room)]);
                }
                Ok(None) => break,
                Err(error) => {
                    broken_off = Some(error);
                    break;
                }
            }
        }
        (String::from_utf8_lossy(&body).replace('\0', "\u{FFFD}"), broken_off)
    }
}

#[async_trait]
impl Sender for HttpSender {
    async fn send(&self, delivery: &LeasedDelivery, endpoint: &Endpoint) -> AttemptOutcome {
        let limit = endpoint.settings.timeout.min(self.settings.timeout);
        match self.get(delivery, endpoint, limit).await {
            Ok(answer) => AttemptOutcome::Answered(answer),
            Err(error) => AttemptOutcome::Unanswered { error: error.chars().take(ERROR_CHARS_MAX).collect() },
        }
    }
}

/// The endpoint's own headers, the ids of delivery and event, and the trace that it belongs to.
fn headers(delivery: &LeasedDelivery, endpoint: &Endpoint) -> HeaderMap {
    let mut headers = HeaderMap::new();
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
fn retry_after(response: &Response) -> Option<Duration> {
    let text = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = httpdate::parse_http_date(text).ok()?;
    Some(at.duration_since(SystemTime::now()).unwrap_or_default())
}

/// Why no answer came, in words for the audit. The URL is left out: the audit has it.
fn describe(error: reqwest::Error, limit: Duration) -> String {
    let error = error.without_url();
    if error.is_timeout() && !error.is_connect() {
        return format!("timed out after {} ms", limit.as_millis());
    }
    let what = if error.is_connect() {
        "cannot connect"
    } else if error.is_body() || error.is_decode() {
        "the response broke off"
    } else {
        "the request failed"
    };
    // the last cause is the one that says what happened; those above say where
    let mut last = error.source();
    while let Some(cause) = last {
        if let Some(forbidden) = cause.downcast_ref::<ForbiddenAddress>() {
            return forbidden.to_string();
        }
        let Some(next) = cause.source() else { return format!("{what}: {cause}") };
        last = Some(next);
    }
    what.to_owned()
}
