//! Which network addresses a receiver may have: public ones, and the networks that the operator allows.
//!
//! The standard library's `is_global` is unstable and accepts IPv6 forms that carry an inner IPv4 address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use url::{Host, Url};

/// The only IPv6 addresses that are given to public hosts. Whatever lies outside is something else, or nothing yet.
/// <https://www.iana.org/assignments/ipv6-address-space>
const IPV6_UNICAST: &str = "2000::/3";

/// Networks that are not public, from the IANA special-purpose registries.
/// <https://www.iana.org/assignments/iana-ipv4-special-registry> and `…-ipv6-…`.
const NOT_PUBLIC: [&str; 19] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "2001::/23",
    "2001:db8::/32",
    // 6to4, retired, with an IPv4 address inside
    "2002::/16",
    "3fff::/20",
];

/// Judges addresses before anything is sent to them.
#[derive(Debug, Clone)]
pub struct AddressPolicy {
    allowed: Vec<IpNet>,
    forbidden: Vec<IpNet>,
    ipv6_unicast: IpNet,
}

/// An address that was refused. The error shows it, so that an operator can find the endpoint; an address is no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the address {0} is not public and EGRESS_ALLOW does not list it")]
pub struct ForbiddenAddress(pub IpAddr);

impl AddressPolicy {
    /// A policy that accepts public addresses and those within `allowed`.
    pub fn new(allowed: Vec<IpNet>) -> Self {
        let network = |text: &str| text.parse().expect("the tables hold valid networks");
        let (forbidden, ipv6_unicast) = (NOT_PUBLIC.map(network).to_vec(), network(IPV6_UNICAST));
        Self { allowed, forbidden, ipv6_unicast }
    }

    /// Fails unless `address` is public or allowed.
    pub fn check(&self, address: IpAddr) -> Result<(), ForbiddenAddress> {
        let effective = effective(address);
        let listed =
            |nets: &[IpNet]| nets.iter().any(|net| net.contains(&address) || net.contains(&effective));
        let forbidden = self.forbidden.iter().any(|net| net.contains(&effective))
            || (effective.is_ipv6() && !self.ipv6_unicast.contains(&effective));
        if forbidden && !listed(&self.allowed) { Err(ForbiddenAddress(address)) } else { Ok(()) }
    }

    /// Checks the host of `url` if it is an address. Names are checked when they are resolved.
    pub fn check_literal(&self, url: &Url) -> Result<(), ForbiddenAddress> {
        match url.host() {
            Some(Host::Ipv4(address)) => self.check(address.into()),
            Some(Host::Ipv6(address)) => self.check(address.into()),
            Some(Host::Domain(_)) | None => Ok(()),
        }
    }
}

/// The address that packets reach in the end: the inner IPv4 address of an IPv4-mapped or NAT64 address.
fn effective(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => nat64_inner(v6).map_or(IpAddr::V6(v6), IpAddr::V4),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// The inner address of `64:ff9b::/96` (RFC 6052).
fn nat64_inner(address: Ipv6Addr) -> Option<Ipv4Addr> {
    match address.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, _, _] => {
            let [.., a, b, c, d] = address.octets();
            Some(Ipv4Addr::new(a, b, c, d))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn allows(policy: &AddressPolicy, address: &str) -> bool {
        policy.check(address.parse().unwrap()).is_ok()
    }

    #[test]
    fn only_public_addresses_are_allowed_by_default() {
        let policy = AddressPolicy::new(vec![]);
        for public in ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1"] {
            assert!(allows(&policy, public), "{public}");
        }
        for private in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.31.255.255",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::1",
            "fc00::1",
            "fe80::1",
            "ff02::1",
            "2001:db8::1",
        ] {
            assert!(!allows(&policy, private), "{private}");
        }
    }

    #[test]
    fn the_operator_may_allow_networks() {
        let policy = AddressPolicy::new(vec!["127.0.0.0/8".parse().unwrap()]);
        assert!(allows(&policy, "127.0.0.1"));
        assert!(allows(&policy, "::ffff:127.0.0.1"));
        assert!(!allows(&policy, "10.0.0.1"));
        assert!(!allows(&policy, "::1"));
    }

    #[test]
    fn every_spelling_of_a_literal_is_seen() {
        let policy = AddressPolicy::new(vec![]);
        for url in [
            "http://127.0.0.1/",
            "http://0x7f.1/",
            "http://2130706433/",
            "http://[::ffff:7f00:1]/",
            "http://[::1]/",
        ] {
            assert!(policy.check_literal(&Url::parse(url).unwrap()).is_err(), "{url}");
        }
        assert!(policy.check_literal(&Url::parse("http://name.example/").unwrap()).is_ok());
    }

    /// Every range of the registries that is not global, those outside of `2000::/3` included.
    const RESERVED: [&str; 24] = [
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/128",
        "::1/128",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "fc00::/7",
        "fe80::/10",
        "4000::/2",
    ];

    proptest! {
        #[test]
        fn no_address_of_a_reserved_range_is_allowed_unless_the_operator_lists_it(index in 0..RESERVED.len(), host: u128) {
            let range: IpNet = RESERVED[index].parse().unwrap();
            let address = match range {
                IpNet::V4(net) => {
                    let host = u32::try_from(host & u128::from(u32::MAX)).unwrap() & net.hostmask().to_bits();
                    IpAddr::V4(Ipv4Addr::from_bits(net.network().to_bits() | host))
                }
                IpNet::V6(net) => {
                    IpAddr::V6(Ipv6Addr::from_bits(net.network().to_bits() | (host & net.hostmask().to_bits())))
                }
            };
            prop_assert!(AddressPolicy::new(vec![]).check(address).is_err(), "{address}");
            prop_assert!(AddressPolicy::new(vec![range]).check(address).is_ok(), "{address}");
        }

        #[test]
        fn an_address_is_judged_alike_however_it_is_wrapped(bits: u32) {
            let policy = AddressPolicy::new(vec![]);
            let v4 = Ipv4Addr::from_bits(bits);
            let [a, b, c, d] = v4.octets().map(u16::from);
            let nat64 = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, a << 8 | b, c << 8 | d);
            let plain = policy.check(v4.into()).is_ok();
            prop_assert_eq!(policy.check(v4.to_ipv6_mapped().into()).is_ok(), plain);
            prop_assert_eq!(policy.check(nat64.into()).is_ok(), plain);
        }
    }
}
