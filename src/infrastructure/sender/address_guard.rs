//! Name resolution that refuses names with an address that must not be called. What is checked is what is connected
//! to, so a name that changes its addresses between two look-ups gains nothing.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use hickory_resolver::TokioResolver;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::domain::address::AddressPolicy;

/// Resolves names by the system's DNS servers and hosts file, without blocking a thread.
pub struct GuardedResolver {
    resolver: Arc<TokioResolver>,
    addresses: AddressPolicy,
}

impl GuardedResolver {
    /// Reads the system's DNS settings.
    pub fn new(addresses: AddressPolicy) -> anyhow::Result<Self> {
        let resolver = TokioResolver::builder_tokio()
            .and_then(hickory_resolver::ResolverBuilder::build)
            .context("reading the system's DNS settings")?;
        Ok(Self { resolver: Arc::new(resolver), addresses })
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let resolver = self.resolver.clone();
        let policy = self.addresses.clone();
        Box::pin(async move {
            let found = resolver.lookup_ip(name.as_str()).await?;
            let mut addresses = Vec::new();
            for address in found.iter() {
                policy.check(address)?;
                // the client puts the URL's port in place of 0
                addresses.push(SocketAddr::new(address, 0));
            }
            let addresses: Addrs = Box::new(addresses.into_iter());
            Ok(addresses)
        })
    }
}
