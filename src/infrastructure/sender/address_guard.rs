//! Name resolution that leaves out forbidden addresses, and fails if a name has no others. The client connects to the
//! very addresses that were checked, so a name that changes its addresses between two look-ups gains nothing.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use anyhow::Context as _;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hyper_util::client::legacy::connect::dns::Name;
use tower::Service;

use super::errors::UnresolvedName;
use super::whereabouts;
use crate::domain::address::{AddressPolicy, ForbiddenAddress};

/// Resolves names with DNS servers and the hosts file, without blocking a thread.
#[derive(Clone)]
pub struct GuardedResolver {
    resolver: Arc<TokioResolver>,
    addresses: AddressPolicy,
}

impl GuardedResolver {
    /// Asks these name servers; if there are none, those of the system's DNS settings.
    pub fn new(addresses: AddressPolicy, name_servers: &[SocketAddr]) -> anyhow::Result<Self> {
        let builder = if name_servers.is_empty() {
            TokioResolver::builder_tokio().context("reading the system's DNS settings")?
        } else {
            let servers = name_servers.iter().map(name_server).collect();
            let config = ResolverConfig::from_parts(None, vec![], servers);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        let resolver = builder.build().context("preparing to resolve names")?;
        Ok(Self { resolver: Arc::new(resolver), addresses })
    }
}

impl Service<Name> for GuardedResolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let resolver = self.resolver.clone();
        let policy = self.addresses.clone();
        Box::pin(async move {
            let found = resolver.lookup_ip(name.as_str()).await;
            let found = found.map_err(|error| UnresolvedName::new(name.as_str(), &error))?;
            let allowed = allowed_of(found.iter(), &policy)?;
            if allowed.is_empty() {
                return Err(UnresolvedName::without_address(name.as_str()).into());
            }
            // of several, nobody can know which one is tried last
            let only = if let [only] = allowed.as_slice() { Some(only.ip()) } else { None };
            whereabouts::note(only);
            Ok(allowed.into_iter())
        })
    }
}

/// Asked by UDP, and by TCP for an answer that does not fit.
fn name_server(address: &SocketAddr) -> NameServerConfig {
    let mut server = NameServerConfig::udp_and_tcp(address.ip());
    for connection in &mut server.connections {
        connection.port = address.port();
    }
    server
}

/// The allowed addresses of a name. Fails if it has addresses, but all are forbidden.
fn allowed_of(
    addresses: impl IntoIterator<Item = IpAddr>,
    policy: &AddressPolicy,
) -> Result<Vec<SocketAddr>, ForbiddenAddress> {
    let (mut allowed, mut forbidden) = (Vec::new(), None);
    for address in addresses {
        match policy.check(address) {
            // the client replaces port 0 by the URL's port
            Ok(()) => allowed.push(SocketAddr::new(address, 0)),
            Err(error) => forbidden = forbidden.or(Some(error)),
        }
    }
    match forbidden {
        Some(error) if allowed.is_empty() => Err(error),
        Some(_) | None => Ok(allowed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(addresses: &[&str]) -> Result<Vec<String>, ForbiddenAddress> {
        let policy = AddressPolicy::new(vec!["127.0.0.0/8".parse().unwrap()]);
        let addresses = addresses.iter().map(|text| text.parse().unwrap());
        allowed_of(addresses, &policy).map(|found| found.iter().map(|found| found.ip().to_string()).collect())
    }

    #[test]
    fn only_the_allowed_addresses_of_a_name_are_called_and_a_name_without_any_is_refused() {
        assert_eq!(allowed(&["::1", "127.0.0.1"]).unwrap(), ["127.0.0.1"]);
        assert_eq!(allowed(&["1.1.1.1", "10.0.0.1", "127.0.0.1"]).unwrap(), ["1.1.1.1", "127.0.0.1"]);
        assert_eq!(allowed(&["::1", "10.0.0.1"]).unwrap_err().0.to_string(), "::1");
        assert_eq!(allowed(&[]).unwrap(), [""; 0]);
    }
}
