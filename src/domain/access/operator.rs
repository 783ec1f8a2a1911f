//! Operators: people and programs that change something. What they do is recorded.

use super::{Caller, Scope};

/// By which way an operator came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The HTTP API.
    Api,
    /// The command line.
    CommandLine,
}

impl Way {
    /// As it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::CommandLine => "cli",
        }
    }
}

/// The longest reason, in characters.
pub const REASON_CHARS_MAX: usize = 500;

/// Who changes something, and why.
#[derive(Debug, Clone)]
pub struct Operator {
    /// The name: of a key, or of a user of a machine.
    pub name: String,
    /// By which way the change is made.
    pub way: Way,
    /// The reason that was given.
    pub reason: Option<String>,
}

impl Operator {
    /// The name of a caller, as it is recorded.
    pub fn name_of(caller: &Caller) -> String {
        match caller {
            Caller::Anyone => "anyone (no key was asked for)".to_owned(),
            Caller::Key(key) => format!("key {} ({})", key.id, key.name),
        }
    }
}

/// What an operator can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// A config was registered.
    RegisterConfig,
    /// A config was changed.
    ChangeConfig,
    /// A config was deleted.
    DeleteConfig,
    /// A probe of a config's circuit was asked for.
    ProbeConfig,
    /// A delivery's next attempt was made due.
    RetryDelivery,
    /// A delivery was cancelled.
    CancelDelivery,
    /// A delivery was replayed.
    ReplayDelivery,
    /// An API key was made.
    CreateKey,
    /// An API key was revoked.
    RevokeKey,
}

impl Action {
    /// All actions.
    pub const ALL: [Self; 9] = [
        Self::RegisterConfig,
        Self::ChangeConfig,
        Self::DeleteConfig,
        Self::ProbeConfig,
        Self::RetryDelivery,
        Self::CancelDelivery,
        Self::ReplayDelivery,
        Self::CreateKey,
        Self::RevokeKey,
    ];

    /// As it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RegisterConfig => "config.register",
            Self::ChangeConfig => "config.change",
            Self::DeleteConfig => "config.delete",
            Self::ProbeConfig => "config.probe",
            Self::RetryDelivery => "delivery.retry",
            Self::CancelDelivery => "delivery.cancel",
            Self::ReplayDelivery => "delivery.replay",
            Self::CreateKey => "key.create",
            Self::RevokeKey => "key.revoke",
        }
    }

    /// The scope that allows it.
    pub fn scope(self) -> Scope {
        match self {
            Self::ProbeConfig | Self::RetryDelivery | Self::CancelDelivery | Self::ReplayDelivery => {
                Scope::Operate
            }
            Self::RegisterConfig
            | Self::ChangeConfig
            | Self::DeleteConfig
            | Self::CreateKey
            | Self::RevokeKey => Scope::Manage,
        }
    }
}
