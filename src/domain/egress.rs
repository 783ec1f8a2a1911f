//! Where requests may go: to which addresses, to which ports, and whether without TLS.

use std::net::IpAddr;

use url::Url;

use super::address::{AddressPolicy, ForbiddenAddress};
use super::error_kind::ErrorKind;

/// Ports of other protocols, whose servers might take a request for a command. Browsers refuse them, too.
/// <https://fetch.spec.whatwg.org/#port-blocking>
const BAD_PORTS: [u16; 83] = [
    0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103,
    104, 109, 110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514,
    515, 526, 530, 531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723,
    2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080,
];

/// Judges where a request is about to go.
#[derive(Debug, Clone)]
pub struct Egress {
    addresses: AddressPolicy,
    ports_allowed: Vec<u16>,
    https_only: bool,
}

/// Why a URL may not be called. The text names the setting that decides.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Forbidden {
    /// The host is an address that is not public.
    #[error(transparent)]
    Address(#[from] ForbiddenAddress),
    /// The port belongs to another protocol.
    #[error("the port {0} is one of another protocol than HTTP and EGRESS_PORTS_ALLOW does not list it")]
    Port(u16),
    /// The URL is not https.
    #[error("must begin with https://, because HTTPS_ONLY is set")]
    NotHttps,
}

impl Forbidden {
    /// The reason in a word.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Address(_) => ErrorKind::AddressNotAllowed,
            Self::Port(_) => ErrorKind::PortNotAllowed,
            Self::NotHttps => ErrorKind::HttpsRequired,
        }
    }
}

impl Egress {
    /// Accepts what `addresses` accepts, bad ports that are in `ports_allowed`, and http unless `https_only`.
    pub fn new(addresses: AddressPolicy, ports_allowed: Vec<u16>, https_only: bool) -> Self {
        Self { addresses, ports_allowed, https_only }
    }

    /// Which addresses may be called.
    pub fn addresses(&self) -> &AddressPolicy {
        &self.addresses
    }

    /// Judges a URL, and its host if that is an address. Names are judged when they are resolved.
    pub fn check(&self, url: &Url) -> Result<(), Forbidden> {
        self.addresses.check_literal(url)?;
        self.check_way(url.scheme(), url.port())
    }

    /// Judges the parts of a URL that was taken apart: its scheme, its port if it names one, and its host if that is an address.
    pub fn check_parts(
        &self,
        scheme: &str,
        port: Option<u16>,
        host: Option<IpAddr>,
    ) -> Result<(), Forbidden> {
        if let Some(address) = host {
            self.addresses.check(address)?;
        }
        self.check_way(scheme, port)
    }

    /// A URL without a port has the one of its scheme, which is not a bad one.
    fn check_way(&self, scheme: &str, port: Option<u16>) -> Result<(), Forbidden> {
        if let Some(port) = port
            && BAD_PORTS.contains(&port)
            && !self.ports_allowed.contains(&port)
        {
            return Err(Forbidden::Port(port));
        }
        if self.https_only && scheme != "https" { Err(Forbidden::NotHttps) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(egress: &Egress, url: &str) -> Result<(), Forbidden> {
        egress.check(&Url::parse(url).unwrap())
    }

    #[test]
    fn ports_of_other_protocols_are_refused_unless_the_operator_lists_them() {
        let egress = Egress::new(AddressPolicy::new(vec![]), vec![6000], false);
        for port in [22, 25, 53, 110, 143, 465, 587, 993, 2049, 6667, 10080] {
            let refused = check(&egress, &format!("https://partner.example:{port}/"));
            assert_eq!(refused, Err(Forbidden::Port(port)));
        }
        for url in ["https://partner.example/", "http://partner.example:80/", "https://partner.example:6000/"]
        {
            assert_eq!(check(&egress, url), Ok(()), "{url}");
        }
        for port in [80, 443, 3000, 8000, 8080, 8443, 9000, 49152] {
            assert!(!BAD_PORTS.contains(&port), "{port}");
        }
        assert!(BAD_PORTS.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn http_is_refused_if_only_https_is_allowed() {
        let (both, https) = (AddressPolicy::new(vec![]), AddressPolicy::new(vec![]));
        let (both, https) = (Egress::new(both, vec![], false), Egress::new(https, vec![], true));
        assert_eq!(check(&both, "http://partner.example/"), Ok(()));
        assert_eq!(check(&https, "https://partner.example/"), Ok(()));
        assert_eq!(check(&https, "http://partner.example/"), Err(Forbidden::NotHttps));
        let by_parts = https.check_parts("http", Some(443), None);
        assert_eq!(by_parts, Err(Forbidden::NotHttps));
    }

    #[test]
    fn an_address_is_judged_whole_and_in_parts_alike() {
        let egress = Egress::new(AddressPolicy::new(vec![]), vec![], false);
        let forbidden = Err(Forbidden::Address(ForbiddenAddress("10.0.0.1".parse().unwrap())));
        assert_eq!(check(&egress, "http://10.0.0.1/"), forbidden);
        assert_eq!(egress.check_parts("http", None, Some("10.0.0.1".parse().unwrap())), forbidden);
        assert_eq!(egress.check_parts("http", None, Some("1.1.1.1".parse().unwrap())), Ok(()));
    }
}
