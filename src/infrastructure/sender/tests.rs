//! The sender against a receiver on a thread of its own, which answers while everything else is paused.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;
use crate::domain::address::AddressPolicy;
use crate::domain::delivery::tests::leased;
use crate::domain::endpoint_settings::EndpointParts;

const TIMEOUT: Duration = Duration::from_millis(300);

struct Receiver {
    url: String,
    requests: Arc<AtomicUsize>,
}

impl Receiver {
    /// Returns the same answer to each request, and keeps connections open.
    fn start(answer: impl Fn(&str) -> String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/postback", listener.local_addr().unwrap());
        let requests = Arc::new(AtomicUsize::new(0));
        let (answer, counted) = (answer(&url), requests.clone());
        thread::spawn(move || {
            for connection in listener.incoming() {
                let (answer, counted) = (answer.clone(), counted.clone());
                thread::spawn(move || answer_all(connection.unwrap(), &answer, &counted));
            }
        });
        Self { url, requests }
    }

    fn count(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

fn answer_all(mut connection: TcpStream, answer: &str, counted: &AtomicUsize) {
    let (mut request, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        // the sender may hang up in any way
        let length = connection.read(&mut chunk).unwrap_or(0);
        if length == 0 {
            return;
        }
        request.extend_from_slice(&chunk[..length]);
        if request.ends_with(b"\r\n\r\n") {
            counted.fetch_add(1, Ordering::SeqCst);
            request.clear();
            connection.write_all(answer.as_bytes()).unwrap();
        }
    }
}

fn sender() -> HttpSender {
    HttpSender::new(SenderSettings {
        timeout: TIMEOUT,
        response_bytes_max: 4096,
        idle_connections_max: 10,
        egress: Egress::new(AddressPolicy::new(vec!["127.0.0.0/8".parse().unwrap()]), vec![], false),
        name_servers: vec![],
    })
    .unwrap()
}

fn to(receiver: &Receiver) -> (LeasedDelivery, Endpoint) {
    let url = Some(Some(receiver.url.clone()));
    let endpoint = Endpoint::of(EndpointParts { postback_url: url, ..EndpointParts::default() });
    (LeasedDelivery { webhook_url: receiver.url.clone(), ..leased() }, endpoint)
}

fn ok(_: &str) -> String {
    "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".into()
}

// one thread: while this test sleeps, no connection writes
#[tokio::test]
async fn a_request_that_a_pause_overtook_on_the_way_to_an_idle_connection_is_not_sent() {
    let (receiver, sender) = (Receiver::start(ok), sender());
    let (delivery, endpoint) = to(&receiver);
    let first = sender.send(&delivery, &endpoint).await;
    assert_eq!(first.and_then(|outcome| outcome.status()), Some(200));

    let mut second = sender.send(&delivery, &endpoint);
    assert!(futures_util::poll!(second.as_mut()).is_pending(), "it is handed to the connection");
    thread::sleep(TIMEOUT * 2);

    assert!(second.await.is_none(), "it can be sent later");
    assert_eq!(receiver.count(), 1);
    let third = sender.send(&delivery, &endpoint).await;
    assert_eq!((third.and_then(|outcome| outcome.status()), receiver.count()), (Some(200), 2));
}

#[tokio::test]
async fn the_answer_to_a_request_that_was_sent_before_a_pause_counts() {
    let (receiver, sender) = (Receiver::start(ok), sender());
    let (delivery, endpoint) = to(&receiver);
    let mut sent = sender.send(&delivery, &endpoint);
    while receiver.count() == 0 {
        assert!(futures_util::poll!(sent.as_mut()).is_pending());
        tokio::task::yield_now().await;
    }

    thread::sleep(TIMEOUT * 2);

    assert_eq!(sent.await.and_then(|outcome| outcome.status()), Some(200));
    assert_eq!(receiver.count(), 1);
}

#[tokio::test]
async fn a_redirect_is_an_answer_and_not_followed() {
    let elsewhere =
        |url: &str| format!("HTTP/1.1 307 Elsewhere\r\nlocation: {url}\r\ncontent-length: 0\r\n\r\n");
    let (receiver, sender) = (Receiver::start(elsewhere), sender());
    let (delivery, endpoint) = to(&receiver);
    let outcome = sender.send(&delivery, &endpoint).await.unwrap();
    assert_eq!((outcome.status(), receiver.count()), (Some(307), 1));
}
