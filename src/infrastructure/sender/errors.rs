//! Why no answer came, in words that say what to do about it. A receiver's URL is left out: the audit has it.

use std::error::Error;
use std::{io, iter};

use hickory_resolver::net::{DnsError, NetError};
use rustls::CertificateError;

use super::departure::CalledOff;
use super::innermost;
use super::whereabouts::Unconnected;
use crate::domain::address::ForbiddenAddress;
use crate::domain::error_kind::ErrorKind;

/// A name that leads to no address.
#[derive(Debug, thiserror::Error)]
#[error("the name {name} cannot be resolved: {reason}")]
pub struct UnresolvedName {
    name: String,
    reason: String,
    /// Whether no name server answers: that says nothing about the name.
    is_ours: bool,
}

impl UnresolvedName {
    /// The name servers, or the hosts file, know no address of it.
    pub fn without_address(name: &str) -> Self {
        Self { name: name.to_owned(), reason: "it has no address".to_owned(), is_ours: false }
    }

    /// The look-up failed.
    pub fn new(name: &str, error: &NetError) -> Self {
        if error.is_nx_domain() || error.is_no_records_found() {
            return Self::without_address(name);
        }
        let reason = match error {
            NetError::Timeout => "the name server did not answer in time".to_owned(),
            NetError::NoConnections | NetError::Io(_) => {
                format!("the name server cannot be reached ({error})")
            }
            NetError::Dns(DnsError::ResponseCode(code)) => format!("the name server answered {code}"),
            other => format!("the look-up failed ({other})"),
        };
        let is_ours =
            matches!(error, NetError::Busy | NetError::NoConnections | NetError::Io(_) | NetError::Timeout);
        Self { name: name.to_owned(), reason, is_ours }
    }
}

/// Whether nothing was sent for a reason that is ours, not the receiver's: an address that no setting allows, or no name
/// server that answers.
pub fn is_own_fault(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(this) = cause {
        if this.is::<ForbiddenAddress>()
            || this.downcast_ref::<UnresolvedName>().is_some_and(|name| name.is_ours)
        {
            return true;
        }
        cause = this.source();
    }
    false
}

/// What happened, in a word to count by.
pub fn kind_of(error: &(dyn Error + 'static)) -> ErrorKind {
    let causes: Vec<_> = iter::successors(Some(error), |&cause| cause.source()).collect();
    let any = |is: fn(&(dyn Error + 'static)) -> bool| causes.iter().any(|cause| is(*cause));
    let io_kinds = || causes.iter().filter_map(|cause| io_kind(*cause));
    if any(is::<ForbiddenAddress>) {
        ErrorKind::AddressNotAllowed
    } else if any(is::<UnresolvedName>) {
        ErrorKind::Dns
    } else if any(|cause| tls_error(cause).is_some()) {
        ErrorKind::Tls
    } else if any(is::<CalledOff>) || io_kinds().any(|kind| kind == io::ErrorKind::TimedOut) {
        ErrorKind::Timeout
    } else if any(is::<Unconnected>) {
        ErrorKind::Connect
    } else if any(is_early_end) || io_kinds().any(|kind| EARLY_ENDS.contains(&kind)) {
        ErrorKind::Reset
    } else {
        ErrorKind::Protocol
    }
}

fn is<T: Error + 'static>(error: &(dyn Error + 'static)) -> bool {
    error.is::<T>()
}

/// How the end of a connection is reported that came too early.
const EARLY_ENDS: [io::ErrorKind; 5] = [
    io::ErrorKind::ConnectionReset,
    io::ErrorKind::ConnectionAborted,
    io::ErrorKind::BrokenPipe,
    io::ErrorKind::NotConnected,
    io::ErrorKind::UnexpectedEof,
];

fn is_early_end(error: &(dyn Error + 'static)) -> bool {
    error
        .downcast_ref::<hyper::Error>()
        .is_some_and(|error| error.is_incomplete_message() || error.is_closed() || error.is_canceled())
}

/// The kind of an I/O error, or of the one that it holds.
fn io_kind(error: &(dyn Error + 'static)) -> Option<io::ErrorKind> {
    let outer = error.downcast_ref::<io::Error>()?;
    Some(outer.get_ref().and_then(|inner| io_kind(inner)).unwrap_or(outer.kind()))
}

/// What happened, for the audit.
pub fn describe(error: &hyper_util::client::legacy::Error) -> String {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(this) = cause {
        if let Some(forbidden) = this.downcast_ref::<ForbiddenAddress>() {
            return forbidden.to_string();
        }
        if let Some(unresolved) = this.downcast_ref::<UnresolvedName>() {
            return unresolved.to_string();
        }
        if let Some(tls) = tls_error(this) {
            return describe_tls(tls);
        }
        cause = this.source();
    }
    let what = if error.is_connect() { "cannot connect" } else { "the request failed" };
    format!("{what}: {}", innermost(error))
}

/// The error of the TLS library, which an I/O error may hold, and that one another, without naming it as its source.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    match error.downcast_ref::<io::Error>() {
        Some(outer) => outer.get_ref().and_then(|inner| tls_error(inner)),
        None => error.downcast_ref(),
    }
}

fn describe_tls(error: &rustls::Error) -> String {
    let rustls::Error::InvalidCertificate(certificate) = error else {
        return format!("TLS failed: {error}");
    };
    let unknown = "it is not signed by an authority that this machine trusts; SSL_CERT_FILE or SSL_CERT_DIR can name \
                   that authority";
    let reason = match certificate {
        CertificateError::UnknownIssuer => unknown.to_owned(),
        // a certificate that is its own authority: the library names the case only in its text
        CertificateError::Other(_) if certificate.to_string().contains("CaUsedAsEndEntity") => {
            format!("it is an authority's own (self-signed), and {unknown}")
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "it has expired; the receiver has to renew it".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet; look at the receiver's clock, and at this machine's".to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "it is for another name than the one in the URL".to_owned()
        }
        CertificateError::Revoked => "it was revoked; the receiver has to renew it".to_owned(),
        other => other.to_string(),
    };
    format!("the receiver's certificate is refused: {reason}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_no_name_server_answers_is_our_own_fault_and_that_a_name_is_unknown_is_not() {
        for error in [NetError::Timeout, NetError::NoConnections] {
            assert!(is_own_fault(&UnresolvedName::new("partner.example", &error)), "{error}");
        }
        assert!(!is_own_fault(&UnresolvedName::without_address("partner.example")));
        assert!(is_own_fault(&ForbiddenAddress("10.0.0.1".parse().unwrap())));
    }

    #[test]
    fn a_certificate_that_is_refused_is_told_in_words_with_the_remedy() {
        for (error, words) in [
            (CertificateError::UnknownIssuer, "SSL_CERT_FILE"),
            (CertificateError::Expired, "it has expired"),
            (CertificateError::NotValidForName, "another name"),
        ] {
            let text = describe_tls(&rustls::Error::InvalidCertificate(error));
            assert!(text.starts_with("the receiver's certificate is refused: "), "{text}");
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn a_name_that_leads_nowhere_is_told_with_the_reason() {
        for (error, reason) in [
            (NetError::Timeout, "the name server did not answer in time"),
            (NetError::NoConnections, "the name server cannot be reached (no connections available)"),
            (NetError::Message("odd"), "the look-up failed (odd)"),
        ] {
            let text = UnresolvedName::new("partner.example", &error).to_string();
            assert_eq!(text, format!("the name partner.example cannot be resolved: {reason}"));
        }
        assert_eq!(
            UnresolvedName::without_address("partner.example").to_string(),
            "the name partner.example cannot be resolved: it has no address"
        );
    }

    #[test]
    fn the_error_of_tls_is_found_within_an_error_of_input_and_output() {
        let inner = rustls::Error::InvalidCertificate(CertificateError::Revoked);
        let outer = io::Error::other(io::Error::other(inner.clone()));
        assert_eq!(tls_error(&outer), Some(&inner));
        assert_eq!(tls_error(&inner), Some(&inner));
        assert_eq!(tls_error(&io::Error::other("else")), None);
    }
}
