//! Name resolution that refuses names with an address that must not be called. What is checked is what is connected
//! to, so a name that changes its addresses between two look-ups gains nothing.

use std::error::Error;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use anyhow::Context as _;
use hickory_resolver::TokioResolver;
use hickory_resolver::net::NetError;
use hyper_util::client::legacy::connect::dns::Name;
use tower::Service;

use crate::domain::address::AddressPolicy;

/// Whether a name could not be looked up because no name server answers, which is no fault of the receiver's.
pub fn is_resolver_fault(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(current) = cause {
        if let Some(net) = current.downcast_ref::<NetError>() {
            return matches!(
                net,
                NetError::Busy | NetError::NoConnections | NetError::Io(_) | NetError::Timeout
            );
        }
        cause = current.source();
    }
    false
}

/// Resolves names by the system's DNS servers and hosts file, without blocking a thread.
#[derive(Clone)]
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
            let found = resolver.lookup_ip(name.as_str()).await?;
            let mut addresses = Vec::new();
            for address in found.iter() {
                policy.check(address)?;
                // the client puts the URL's port in place of 0
                addresses.push(SocketAddr::new(address, 0));
            }
            Ok(addresses.into_iter())
        })
    }
}
