//! Who may do what: API keys with their scopes, the callers that they make, and the operators whose changes are recorded.

mod key;
mod operator;

pub use key::{ApiKey, KeyId, NewKey, Scope, Scopes, Secret, SecretDigest, Token};
pub use operator::{Action, Operator, REASON_CHARS_MAX, Way};

use std::sync::Arc;

use super::endpoint::EndpointId;

/// Whoever a request comes from.
#[derive(Debug, Clone)]
pub enum Caller {
    /// No key was asked for: the service listens on loopback, or keys are switched off.
    Anyone,
    /// The holder of a key.
    Key(Arc<ApiKey>),
}

impl Caller {
    /// Whether this caller has `scope`.
    pub fn may(&self, scope: Scope) -> bool {
        match self {
            Self::Anyone => true,
            Self::Key(key) => key.scopes.contains(scope),
        }
    }

    /// The endpoints that this caller is bound to; `None` if it is not bound.
    pub fn bound_to(&self) -> Option<&[EndpointId]> {
        match self {
            Self::Anyone => None,
            Self::Key(key) => key.config_ids.as_deref(),
        }
    }

    /// Whether this caller may see and use `endpoint`.
    pub fn reaches(&self, endpoint: EndpointId) -> bool {
        self.bound_to().is_none_or(|bound| bound.contains(&endpoint))
    }
}
