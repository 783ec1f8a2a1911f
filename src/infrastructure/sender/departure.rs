//! The moment when a connection begins to write a request. Until then the request can be called off. The sender and the
//! connection may run on different threads, but agree on which came first.
//!
//! The body of the request notices the moment: when a connection, idle or new, is about to write the head, its task asks the
//! body whether it is empty. The client itself reports only the earlier moment when it hands the request to the connection,
//! but a pause between the two also leaves the request unsent.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::Instant;

const WAITING: u8 = 0;
const BEGUN: u8 = 1;
const CALLED_OFF: u8 = 2;

/// Whether one request has begun, or was called off.
#[derive(Debug, Clone)]
pub struct Departure(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: AtomicU8,
    deadline: Instant,
}

impl Departure {
    /// The request may begin before `deadline`, but not after it.
    pub fn before(deadline: Instant) -> Self {
        Self(Arc::new(Shared { state: AtomicU8::new(WAITING), deadline }))
    }

    /// Calls the request off, unless a connection has begun to write it. Returns whether it is called off.
    pub fn call_off(&self) -> bool {
        self.decide(CALLED_OFF) == CALLED_OFF
    }

    /// Returns whether the request may be written: it was not called off, and it is not too late.
    fn begin_in_time(&self) -> bool {
        let in_time = Instant::now() < self.0.deadline;
        self.decide(if in_time { BEGUN } else { CALLED_OFF }) == BEGUN
    }

    /// The same without a deadline, for a head that is sent in any case.
    fn begin(&self) -> bool {
        self.decide(BEGUN) == BEGUN
    }

    /// Returns the decision: `wish`, unless something else was decided before.
    fn decide(&self, wish: u8) -> u8 {
        match self.0.state.compare_exchange(WAITING, wish, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => wish,
            Err(decided) => decided,
        }
    }
}

/// The empty body of a GET. If the request was called off, it announces a body that fails, so that an HTTP/1.1 connection
/// ends before it flushes the head.
///
/// HTTP/2 cannot hold back a head that exists, so there a late request is sent, and counts as begun. A request that was
/// called off is dropped earlier, since nobody waits for its answer.
pub struct NoBody(pub Departure);

/// Why a connection did not write a request.
#[derive(Debug, thiserror::Error)]
#[error("the request was called off")]
pub struct CalledOff;

impl Body for NoBody {
    type Data = Bytes;
    type Error = CalledOff;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, CalledOff>>> {
        Poll::Ready(if self.0.begin() { None } else { Some(Err(CalledOff)) })
    }

    // HTTP/1.1 asks this first.
    fn is_end_stream(&self) -> bool {
        self.0.begin_in_time()
    }

    // HTTP/2 asks this first. HTTP/1.1 asks it if the body is not empty, and would not wait for a body of unknown length.
    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(u64::from(!self.0.begin()))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use http_body_util::Empty;
    use hyper::body::Incoming;
    use hyper::server::conn::{http1, http2};
    use hyper::service::service_fn;
    use hyper::{Request, Response};
    use hyper_util::client::legacy::connect::HttpConnector;
    use hyper_util::client::legacy::{self, Client};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::net::TcpListener;

    use super::*;

    fn in_time() -> Departure {
        Departure::before(Instant::now() + Duration::from_mins(1))
    }

    #[tokio::test]
    async fn what_is_called_off_does_not_begin_and_what_has_begun_is_not_called_off() {
        let departure = in_time();
        assert!(departure.call_off() && departure.call_off());
        assert!(!departure.begin_in_time() && !departure.begin());

        let departure = in_time();
        assert!(departure.begin_in_time() && departure.begin());
        assert!(!departure.call_off());
    }

    #[tokio::test]
    async fn nothing_begins_after_the_deadline_but_what_has_begun_goes_on() {
        let late = Departure::before(Instant::now());
        assert!(!late.begin_in_time());
        assert!(late.call_off());

        let slow = Departure::before(Instant::now() + Duration::from_millis(50));
        assert!(slow.begin_in_time());
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert!(slow.begin_in_time() && !slow.call_off());
    }

    /// Serves requests in one version of HTTP. Returns its URL and the number of requests that arrived.
    async fn receiver(speaks_http2: bool) -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let arrived = Arc::new(AtomicUsize::new(0));
        let counted = arrived.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (stream, counted) = (TokioIo::new(stream), counted.clone());
                let answer = service_fn(move |_: Request<_>| {
                    counted.fetch_add(1, Ordering::SeqCst);
                    std::future::ready(Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())))
                });
                tokio::spawn(async move {
                    // the client may hang up in any way
                    let _ = if speaks_http2 {
                        http2::Builder::new(TokioExecutor::new()).serve_connection(stream, answer).await
                    } else {
                        http1::Builder::new().serve_connection(stream, answer).await
                    };
                });
            }
        });
        (url, arrived)
    }

    async fn answered(
        client: &Client<HttpConnector, NoBody>,
        url: &str,
        departure: &Departure,
    ) -> Result<Response<Incoming>, legacy::Error> {
        let request = Request::get(url).body(NoBody(departure.clone())).unwrap();
        client.request(request).await
    }

    #[tokio::test]
    async fn a_connection_asks_before_it_writes() {
        for speaks_http2 in [false, true] {
            let (url, arrived) = receiver(speaks_http2).await;
            let client = Client::builder(TokioExecutor::new()).http2_only(speaks_http2).build_http();
            for number in 1..=2 {
                let departure = in_time();
                assert!(answered(&client, &url, &departure).await.is_ok());
                assert!(!departure.call_off(), "it has begun");
                assert_eq!(arrived.load(Ordering::SeqCst), number);
            }
        }
    }

    #[tokio::test]
    async fn what_is_called_off_or_late_is_not_written_to_an_idle_connection() {
        let (url, arrived) = receiver(false).await;
        let client = Client::builder(TokioExecutor::new()).build_http();
        let (called_off, late) = (in_time(), Departure::before(Instant::now()));
        assert!(called_off.call_off());
        for departure in [called_off, late] {
            let before = arrived.load(Ordering::SeqCst);
            assert!(answered(&client, &url, &in_time()).await.is_ok());

            assert!(answered(&client, &url, &departure).await.is_err());

            assert!(departure.call_off());
            // the next one comes on a connection of its own
            assert!(answered(&client, &url, &in_time()).await.is_ok());
            assert_eq!(arrived.load(Ordering::SeqCst), before + 2);
        }
    }

    #[tokio::test]
    async fn what_http_2_cannot_hold_back_counts_as_begun() {
        let (url, arrived) = receiver(true).await;
        let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
        let late = Departure::before(Instant::now());
        assert!(answered(&client, &url, &late).await.is_ok());
        assert_eq!((late.call_off(), arrived.load(Ordering::SeqCst)), (false, 1));
    }
}
