//! A limit on connecting that a pause of this process does not lengthen.

use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::http::Uri;
use tower::Service;

/// Connects by `inner`, and gives up a connection that took longer than `limit`, be it ready. A timer would not do: while the
/// process is stopped it does not fire, and afterwards a connection that became ready meanwhile is found first. The request
/// would be sent when its lease may be over and another worker may have sent it.
#[derive(Debug, Clone)]
pub struct ConnectLimit<C> {
    inner: C,
    limit: Duration,
}

impl<C> ConnectLimit<C> {
    /// Limits `inner`, with TLS and all else that it does.
    pub fn new(inner: C, limit: Duration) -> Self {
        Self { inner, limit }
    }
}

/// Connecting took too long.
#[derive(Debug, thiserror::Error)]
#[error("it took longer than {} ms", limit.as_millis())]
pub struct TooLate {
    limit: Duration,
}

impl<C> Service<Uri> for ConnectLimit<C>
where
    C: Service<Uri, Error = Box<dyn Error + Send + Sync>>,
    C::Future: Send + 'static,
{
    type Response = C::Response;
    type Error = C::Error;
    type Future = Pin<Box<dyn Future<Output = Result<C::Response, C::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), C::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (begun, limit, connecting) = (Instant::now(), self.limit, self.inner.call(uri));
        Box::pin(async move {
            let connection = connecting.await?;
            if begun.elapsed() > limit {
                return Err(TooLate { limit }.into());
            }
            Ok(connection)
        })
    }
}

#[cfg(test)]
mod tests {
    use tower::{ServiceExt as _, service_fn};

    use super::*;

    #[tokio::test]
    async fn a_connection_that_is_ready_only_after_a_pause_is_given_up() {
        for (pause, kept) in [(Duration::ZERO, true), (Duration::from_millis(60), false)] {
            let connect = service_fn(move |_: Uri| async move {
                std::thread::sleep(pause);
                Ok::<_, Box<dyn Error + Send + Sync>>("connection")
            });
            let limited = ConnectLimit::new(connect, Duration::from_millis(50));
            let connected = limited.oneshot(Uri::from_static("http://receiver.example/")).await;
            assert_eq!(connected.is_ok(), kept, "{connected:?}");
        }
    }
}
