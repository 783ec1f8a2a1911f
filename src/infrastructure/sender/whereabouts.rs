//! Which address an attempt calls, for the audit: also if no connection comes of it, or none that TLS accepts.
//!
//! A response names the address of its connection. An attempt without one is told by the resolver and by the connector, which
//! run within it. They cannot know which of several addresses was tried last, so an attempt that reached none of several
//! has no address.

use std::cell::Cell;
use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::http::{Extensions, Uri};
use hyper_util::client::legacy::connect::{CaptureConnection, HttpInfo};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower::Service;

tokio::task_local! {
    static CALLED: Cell<Option<IpAddr>>;
}

/// Runs an attempt, which may ask for [`called`].
pub async fn following<T>(attempt: impl Future<Output = T>) -> T {
    CALLED.scope(Cell::new(None), attempt).await
}

/// The address that this attempt calls, as far as it has come; `None` if none is known.
pub fn called() -> Option<IpAddr> {
    CALLED.try_with(Cell::get).ok().flatten()
}

/// The only address that may come to be called, or `None` if there are several. A connection that is made for an attempt may
/// outlive it, and then nobody asks.
pub fn note(address: Option<IpAddr>) {
    // fails outside of an attempt
    let _ = CALLED.try_with(|called| called.set(address));
}

/// The address of the connection that a request was given, if it was given one.
pub fn of_connection(connection: &CaptureConnection) -> Option<SocketAddr> {
    let mut extensions = Extensions::new();
    connection.connection_metadata().as_ref()?.get_extras(&mut extensions);
    extensions.get::<HttpInfo>().map(HttpInfo::remote_addr)
}

/// A connector that notes the address of each connection, and marks its errors as those of TCP, not of TLS.
#[derive(Debug, Clone)]
pub struct Noting<C>(pub C);

/// No TCP connection came about.
#[derive(Debug, thiserror::Error)]
#[error("no connection came about")]
pub struct Unconnected(#[source] Box<dyn Error + Send + Sync>);

impl<C> Service<Uri> for Noting<C>
where
    C: Service<Uri, Response = TokioIo<TcpStream>>,
    C::Error: Into<Box<dyn Error + Send + Sync>>,
    C::Future: Send + 'static,
{
    type Response = C::Response;
    type Error = Unconnected;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Unconnected>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Unconnected>> {
        self.0.poll_ready(context).map_err(|error| Unconnected(error.into()))
    }

    fn call(&mut self, url: Uri) -> Self::Future {
        let connecting = self.0.call(url);
        Box::pin(async move {
            let stream = connecting.await.map_err(|error| Unconnected(error.into()))?;
            note(stream.inner().peer_addr().ok().map(|address| address.ip()));
            Ok(stream)
        })
    }
}
