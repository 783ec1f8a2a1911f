//! Who may call which route: scopes, keys, and what is refused at the door.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{ConnectInfo, FromRequestParts, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use tracing::error;
use url::Url;

use super::error::ApiError;
use crate::application::access::Access;
use crate::domain::access::{Caller, Operator, REASON_CHARS_MAX, Scope, Way};
use crate::domain::endpoint::EndpointId;
use crate::domain::invalid::bounded_text;

/// Why an operator changes something; recorded with the change.
const OPERATOR_REASON: HeaderName = HeaderName::from_static("x-operator-reason");
/// How many wrong keys an address may present at once.
const WRONG_KEYS_AT_ONCE: NonZeroU32 = NonZeroU32::new(20).expect("it is not 0");
/// After how long it may present one more.
const WRONG_KEY_EVERY: Duration = Duration::from_secs(3);
/// From this many addresses on, those that have been quiet are forgotten.
const ADDRESSES_MAX: usize = 10_000;

/// The scope that each route needs. A route that is not listed here is refused.
pub(super) const SCOPES: [(&str, &str, Scope); 18] = [
    ("POST", "/webhooks", Scope::Enqueue),
    ("POST", "/webhooks/batch", Scope::Enqueue),
    ("GET", "/webhooks", Scope::Read),
    ("GET", "/webhooks/stats", Scope::Read),
    ("GET", "/webhooks/{queue_id}", Scope::Read),
    ("POST", "/webhooks/{queue_id}/retry", Scope::Operate),
    ("POST", "/webhooks/{queue_id}/cancel", Scope::Operate),
    ("POST", "/webhooks/{queue_id}/replay", Scope::Operate),
    ("POST", "/api/webhooks/register", Scope::Manage),
    ("POST", "/api/webhooks", Scope::Manage),
    ("GET", "/api/webhooks", Scope::Read),
    ("GET", "/api/webhooks/{id}", Scope::Read),
    ("PATCH", "/api/webhooks/{id}", Scope::Manage),
    ("DELETE", "/api/webhooks/{id}", Scope::Manage),
    ("POST", "/api/webhooks/{id}/probe", Scope::Operate),
    ("GET", "/api/keys", Scope::Manage),
    ("POST", "/api/keys", Scope::Manage),
    ("DELETE", "/api/keys/{id}", Scope::Manage),
];

/// The scope that `GET /metrics` needs, if it needs a key.
pub(super) const METRICS_SCOPE: Scope = Scope::Read;

/// The scope that a route needs. HEAD is answered by the route of GET.
pub(super) fn scope_of(method: &str, path: &str) -> Option<Scope> {
    let method = if method == "HEAD" { "GET" } else { method };
    SCOPES.iter().find(|(known, route, _)| *known == method && *route == path).map(|(.., scope)| *scope)
}

/// Whom a process answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asks {
    /// Whoever presents a key.
    ForKeys,
    /// Anyone on this machine. A key that is presented counts.
    Nothing,
    /// Anyone, from anywhere.
    NothingOfAnyone,
}

/// Stands at the door of the API.
#[derive(Clone)]
pub struct Door {
    access: Arc<Access>,
    asks: Asks,
    wrong_keys: Arc<DefaultKeyedRateLimiter<IpAddr>>,
}

impl Door {
    /// A door of a process that asks for keys, or does not.
    pub fn new(access: Arc<Access>, asks: Asks) -> Self {
        let quota = Quota::with_period(WRONG_KEY_EVERY).expect("it is not 0").allow_burst(WRONG_KEYS_AT_ONCE);
        Self { access, asks, wrong_keys: Arc::new(RateLimiter::keyed(quota)) }
    }

    /// Who sends a request, if it is someone who has `scope`.
    async fn admits(&self, headers: &HeaderMap, address: IpAddr, scope: Scope) -> Result<Caller, Refusal> {
        let caller = self.caller(headers, address).await?;
        if caller.may(scope) { Ok(caller) } else { Err(Refusal::Lacks(scope)) }
    }

    /// Who sends a request.
    async fn caller(&self, headers: &HeaderMap, address: IpAddr) -> Result<Caller, Refusal> {
        if self.asks == Asks::NothingOfAnyone {
            return Ok(Caller::Anyone);
        }
        let presented = match headers.get(header::AUTHORIZATION) {
            Some(value) => bearer(value).ok_or(Refusal::WrongKey)?,
            None if self.asks == Asks::ForKeys => return Err(Refusal::NoKey),
            None if !is_from_here(headers) => return Err(Refusal::NotFromHere),
            None => return Ok(Caller::Anyone),
        };
        let recognize = async |look_again| {
            let caller = self.access.recognize(presented, look_again).await;
            caller.map_err(|error| Refusal::Other(error.into()))
        };
        // whoever has presented too many wrong keys may still present a right one
        if let Some(caller) = recognize(false).await? {
            return Ok(caller);
        }
        self.count_wrong_key(address)?;
        recognize(true).await?.ok_or(Refusal::WrongKey)
    }

    fn count_wrong_key(&self, address: IpAddr) -> Result<(), Refusal> {
        if self.wrong_keys.len() >= ADDRESSES_MAX {
            self.wrong_keys.retain_recent();
        }
        let counted = self.wrong_keys.check_key(&group_of(address));
        counted.map_err(|not_until| {
            Refusal::TooManyWrongKeys(not_until.wait_time_from(DefaultClock::default().now()))
        })
    }
}

/// Why a caller does not come in.
enum Refusal {
    NoKey,
    WrongKey,
    TooManyWrongKeys(Duration),
    NotFromHere,
    Lacks(Scope),
    Other(ApiError),
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoKey => Self::unauthorized(
                "an API key is needed, as Authorization: Bearer whk_…",
                r#"Bearer realm="webhook-processor""#,
            ),
            Refusal::WrongKey => Self::unauthorized(
                "this is not the text of a valid API key",
                r#"Bearer realm="webhook-processor", error="invalid_token""#,
            ),
            Refusal::TooManyWrongKeys(wait) => {
                Self::too_many_requests("too many wrong keys came from this address", wait)
            }
            Refusal::NotFromHere => Self::forbidden(
                "without keys, only requests to localhost are answered, and none from pages of other sites; \
                 set AUTH=keys and make a key, or set AUTH=none",
            ),
            Refusal::Lacks(scope) => Self::forbidden(format!("this key lacks the scope {scope}")),
            Refusal::Other(error) => error,
        }
    }
}

/// The text after `Bearer`.
fn bearer(value: &HeaderValue) -> Option<&str> {
    let (scheme, text) = value.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| text.trim())
}

/// Whether a request is meant for this machine, and does not come from a page of another site: names can be made to lead to
/// loopback, and browsers send what pages want.
fn is_from_here(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).map(|value: &HeaderValue| value.to_str().unwrap_or("?"));
    let host = text(header::HOST).is_none_or(|host| is_local(&format!("http://{host}")));
    let origin = text(header::ORIGIN).is_none_or(is_local);
    host && origin
}

fn is_local(url: &str) -> bool {
    match Url::parse(url).ok().as_ref().and_then(Url::host) {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// Whoever has one IPv6 address has a whole network of them.
fn group_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64))),
        address @ IpAddr::V4(_) => address,
    }
}

/// Lets in whoever may use the route. Handlers find the [`Caller`] in the request.
pub(super) async fn admit(State(door): State<Door>, mut request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>();
    let Some(scope) = route.and_then(|route| scope_of(request.method().as_str(), route.as_str())) else {
        error!(route = route.map(MatchedPath::as_str), "a route has no scope");
        return ApiError::unexpected().into_response();
    };
    match door.admits(request.headers(), address_of(&request), scope).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(refusal) => ApiError::from(refusal).into_response(),
    }
}

/// Lets in whoever may see the metrics.
pub(super) async fn admit_to_metrics(State(door): State<Door>, request: Request, next: Next) -> Response {
    match door.admits(request.headers(), address_of(&request), METRICS_SCOPE).await {
        Ok(_) => next.run(request).await,
        Err(refusal) => ApiError::from(refusal).into_response(),
    }
}

/// Where a request comes from.
fn address_of(request: &Request) -> IpAddr {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    peer.map_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED), |ConnectInfo(peer)| peer.ip())
}

/// The caller that [`admit`] let in.
pub struct Admitted(pub Caller);

impl<S: Send + Sync> FromRequestParts<S> for Admitted {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts.extensions.get::<Caller>().cloned().map(Self).ok_or_else(|| {
            error!("a route that needs a caller has no door");
            ApiError::unexpected()
        })
    }
}

impl Admitted {
    /// Refuses an event for a config that the key is not bound to.
    pub fn check_config(&self, id: EndpointId) -> Result<(), ApiError> {
        if self.0.reaches(id) {
            return Ok(());
        }
        Err(ApiError::forbidden_field("config_id", "must be a config that this key is bound to"))
    }

    /// The config that a list or a count is about. A key that is bound to one config means that one.
    pub fn config_of(&self, given: Option<EndpointId>) -> Result<Option<EndpointId>, ApiError> {
        match (given, self.0.bound_to()) {
            (given, None) => Ok(given),
            (Some(id), Some(_)) => self.check_config(id).map(|()| given),
            (None, Some([only])) => Ok(Some(*only)),
            (None, Some(_)) => {
                Err(ApiError::field("config_id", "must be given, since this key is bound to several configs"))
            }
        }
    }
}

/// The operator that a caller is, with the reason from `x-operator-reason`.
pub struct ByOperator(pub Arc<Operator>);

impl<S: Send + Sync> FromRequestParts<S> for ByOperator {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Admitted(caller) = Admitted::from_request_parts(parts, state).await?;
        let reason = parts.headers.get(&OPERATOR_REASON).map(|value| {
            let text = std::str::from_utf8(value.as_bytes())
                .map_err(|_| ApiError::field(OPERATOR_REASON.as_str(), "must be UTF-8"))?;
            bounded_text(OPERATOR_REASON.as_str(), text, REASON_CHARS_MAX)?;
            Ok::<_, ApiError>(text.to_owned())
        });
        let reason = reason.transpose()?;
        Ok(Self(Arc::new(Operator { name: Operator::name_of(&caller), way: Way::Api, reason })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_from_here_names_this_machine_and_no_other_site() {
        let is = |host: Option<&str>, origin: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(host) = host {
                headers.insert(header::HOST, host.parse().unwrap());
            }
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, origin.parse().unwrap());
            }
            is_from_here(&headers)
        };
        for host in ["localhost", "localhost:8080", "127.0.0.1:8080", "[::1]:8080", "a.localhost"] {
            assert!(is(Some(host), None), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8080",
            "10.0.0.1",
            "localhost.evil.example",
            "",
            "127.0.0.1.evil.example",
        ] {
            assert!(!is(Some(host), None), "{host}");
        }
        assert!(is(None, None));
        assert!(is(Some("localhost"), Some("http://localhost:8080")));
        assert!(!is(Some("localhost"), Some("https://evil.example")));
        assert!(!is(Some("localhost"), Some("null")));
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one() {
        let group = |text: &str| group_of(text.parse().unwrap());
        assert_eq!(group("2001:db8::1"), group("2001:db8::2:3:4:5"));
        assert_ne!(group("2001:db8::1"), group("2001:db8:0:1::1"));
        assert_eq!(group("::ffff:192.0.2.1"), group("192.0.2.1"));
        assert_ne!(group("192.0.2.1"), group("192.0.2.2"));
    }
}
