//! Why an attempt failed, as a word to count by. The sentence beside it says more.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// Why an attempt failed, or why its answer is incomplete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub enum ErrorKind {
    /// No setting allows the address that the URL leads to. Nothing was sent.
    AddressNotAllowed,
    /// No connection came about.
    Connect,
    /// The name leads to no address, or no name server answered.
    Dns,
    /// The receiver answered with another status than 2xx.
    HttpStatus,
    /// `HTTPS_ONLY` forbids the URL. Nothing was sent.
    HttpsRequired,
    /// The URL cannot be called.
    InvalidUrl,
    /// The worker that made the attempt did not report how it ended.
    OutcomeUnknown,
    /// The port belongs to another protocol. Nothing was sent.
    PortNotAllowed,
    /// What came is not HTTP.
    Protocol,
    /// The receiver ended the connection before its answer was complete.
    Reset,
    /// The answer did not come, or did not end, in time.
    Timeout,
    /// The TLS handshake failed, or the certificate was refused.
    Tls,
}

impl ErrorKind {
    /// All kinds, in the order of their names.
    pub const ALL: [Self; 12] = [
        Self::AddressNotAllowed,
        Self::Connect,
        Self::Dns,
        Self::HttpStatus,
        Self::HttpsRequired,
        Self::InvalidUrl,
        Self::OutcomeUnknown,
        Self::PortNotAllowed,
        Self::Protocol,
        Self::Reset,
        Self::Timeout,
        Self::Tls,
    ];

    /// As it is stored, shown and counted.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AddressNotAllowed => "address_not_allowed",
            Self::Connect => "connect",
            Self::Dns => "dns",
            Self::HttpStatus => "http_status",
            Self::HttpsRequired => "https_required",
            Self::InvalidUrl => "invalid_url",
            Self::OutcomeUnknown => "outcome_unknown",
            Self::PortNotAllowed => "port_not_allowed",
            Self::Protocol => "protocol",
            Self::Reset => "reset",
            Self::Timeout => "timeout",
            Self::Tls => "tls",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that names no kind. It must not be taken for another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no kind of error called {0:?}")]
pub struct UnknownErrorKind(String);

impl FromStr for ErrorKind {
    type Err = UnknownErrorKind;

    fn from_str(name: &str) -> Result<Self, UnknownErrorKind> {
        let is_named = |kind: &Self| kind.as_str() == name;
        Self::ALL.into_iter().find(is_named).ok_or_else(|| UnknownErrorKind(name.to_owned()))
    }
}

impl TryFrom<String> for ErrorKind {
    type Error = UnknownErrorKind;

    fn try_from(name: String) -> Result<Self, UnknownErrorKind> {
        name.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_read_as_they_are_written_and_nothing_else_is_read() {
        for kind in ErrorKind::ALL {
            assert_eq!(kind.as_str().parse(), Ok(kind));
        }
        for unknown in ["", "TIMEOUT", "timeout ", "unheard_of"] {
            assert_eq!(unknown.parse::<ErrorKind>(), Err(UnknownErrorKind(unknown.to_owned())));
        }
        assert!(ErrorKind::ALL.is_sorted_by(|a, b| a.as_str() < b.as_str()), "the order of the names");
    }
}
