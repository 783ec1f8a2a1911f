//! Describes why no answer came, and what to do about it. The receiver's URL is left out, because the audit has it.

use std::error::Error;
use std::{io, iter};

use hickory_resolver::net::{DnsError, NetError};
use rustls::CertificateError;

use super::departure::CalledOff;
use super::innermost;
use super::whereabouts::Unconnected;
use crate::domain::address::ForbiddenAddress;
use crate::domain::error_kind::ErrorKind;

/// A name that could not be resolved.
#[derive(Debug, thiserror::Error)]
#[error("the name {name} cannot be resolved: {reason}")]
pub struct UnresolvedName {
    name: String,
    reason: String,
    /// Whether no name server answered, which says nothing about the name.
    is_ours: bool,
}

impl UnresolvedName {
    /// The name has no address in DNS or the hosts file.
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

/// Whether nothing was sent for a reason on our side, not the receiver's: the address is not allowed by our settings, or no
/// name server answered.
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

/// The kind of an error, to count by.
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

/// How a connection that ended too early is reported.
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

/// The kind of an I/O error, or of the one inside it.
fn io_kind(error: &(dyn Error + 'static)) -> Option<io::ErrorKind> {
    let outer = error.downcast_ref::<io::Error>()?;
    Some(outer.get_ref().and_then(|inner| io_kind(inner)).unwrap_or(outer.kind()))
}

/// Describes an error for the audit.
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

/// Finds the error of the TLS library. I/O errors may wrap it, several deep, without naming it as their source.
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
    let unknown = "it is not signed by an authority that this machine trusts; to trust that authority, name its \
                   certificate with SSL_CERT_FILE or SSL_CERT_DIR";
    let reason = match certificate {
        CertificateError::UnknownIssuer => unknown.to_owned(),
        // a self-signed certificate: only the text of the library's error identifies this case
        CertificateError::Other(_) if certificate.to_string().contains("CaUsedAsEndEntity") => {
            format!("it is self-signed, and {unknown}")
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "it has expired; the receiver must renew it".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet; check the receiver's clock and this machine's clock".to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "it is for a name other than the one in the URL".to_owned()
        }
        CertificateError::Revoked => "it was revoked; the receiver must renew it".to_owned(),
        CertificateError::BadSignature => {
            "its signature is not valid: the certificate is damaged or forged, or was signed \
                                           by another key than that of the authority that it names"
                .to_owned()
        }
        other => other.to_string(),
    };
    format!("the receiver's certificate is refused: {reason}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_our_own_fault_if_no_name_server_answers_but_not_if_a_name_is_unknown() {
        for error in [NetError::Timeout, NetError::NoConnections] {
            assert!(is_own_fault(&UnresolvedName::new("partner.example", &error)), "{error}");
        }
        assert!(!is_own_fault(&UnresolvedName::without_address("partner.example")));
        assert!(is_own_fault(&ForbiddenAddress("10.0.0.1".parse().unwrap())));
    }

    #[test]
    fn a_refused_certificate_is_reported_with_the_reason() {
        for (error, words) in [
            (CertificateError::UnknownIssuer, "SSL_CERT_FILE"),
            (CertificateError::Expired, "it has expired"),
            (CertificateError::NotValidForName, "a name other than"),
            (CertificateError::BadSignature, "its signature is not valid"),
        ] {
            let text = describe_tls(&rustls::Error::InvalidCertificate(error));
            assert!(text.starts_with("the receiver's certificate is refused: "), "{text}");
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn a_name_that_cannot_be_resolved_is_reported_with_the_reason() {
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
    fn a_tls_error_is_found_within_an_io_error() {
        let inner = rustls::Error::InvalidCertificate(CertificateError::Revoked);
        let outer = io::Error::other(io::Error::other(inner.clone()));
        assert_eq!(tls_error(&outer), Some(&inner));
        assert_eq!(tls_error(&inner), Some(&inner));
        assert_eq!(tls_error(&io::Error::other("else")), None);
    }
}
