//! Where requests may go: names that change or lead nowhere, ports of other protocols, and https alone.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use webhook_processor::infrastructure::service::Role;

use crate::support::eventually;
use crate::support::name_server::{NameServer, Reply};
use crate::support::postgres::TestDatabase;
use crate::support::receiver::TestReceiver;
use crate::support::service::TestService;

const ALLOWED: Ipv4Addr = Ipv4Addr::LOCALHOST;
const FORBIDDEN: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// Two receivers on the same port, at an address that is allowed and at one that is not. Each connection is for one request.
struct Pair {
    port: u16,
    at_allowed: Arc<AtomicUsize>,
    at_forbidden: Arc<AtomicUsize>,
}

impl Pair {
    async fn start() -> Self {
        let (allowed, forbidden) = loop {
            let allowed = TcpListener::bind((ALLOWED, 0)).await.unwrap();
            let port = allowed.local_addr().unwrap().port();
            if let Ok(forbidden) = TcpListener::bind((FORBIDDEN, port)).await {
                break (allowed, forbidden);
            }
        };
        let port = allowed.local_addr().unwrap().port();
        Self { port, at_allowed: count_connections(allowed), at_forbidden: count_connections(forbidden) }
    }

    fn counts(&self) -> (usize, usize) {
        (self.at_allowed.load(Ordering::SeqCst), self.at_forbidden.load(Ordering::SeqCst))
    }
}

fn count_connections(listener: TcpListener) -> Arc<AtomicUsize> {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                let mut request = [0; 4096];
                // the client may hang up in any way
                let _ = stream.read(&mut request).await;
                let _ = stream
                    .write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                    .await;
            });
        }
    });
    count
}

/// A service that may call [`ALLOWED`] and asks this name server.
async fn service_that_asks(name_server: &NameServer) -> TestService {
    let (database, dns) = (TestDatabase::new().await, name_server.address.to_string());
    let settings = [("EGRESS_ALLOW", "127.0.0.1/32"), ("EGRESS_DNS", dns.as_str())];
    TestService::start_with(Role::Serve, database, &settings).await
}

/// Why nothing is sent to a config, once nothing is.
async fn held_because(service: &TestService, config: i64) -> String {
    eventually("its circuit opens", async || {
        let circuit = service.api.get(&format!("/api/webhooks/{config}")).await.json()["circuit"].clone();
        circuit["reason"].as_str().map(str::to_owned)
    })
    .await
}

#[tokio::test]
async fn a_name_that_leads_elsewhere_after_it_was_checked_gains_nothing() {
    let receivers = Pair::start().await;
    let name_server =
        NameServer::start(|_, times| Reply::Addresses(vec![if times == 0 { ALLOWED } else { FORBIDDEN }]))
            .await;
    let service = service_that_asks(&name_server).await;
    let url = format!("http://rebinding.example:{}", receivers.port);
    let config = service.api.register(&url, json!({"max_retries": 0})).await;

    let first = service.api.credit(config).await;
    service.api.delivery_in(&first, "completed").await;
    assert_eq!(receivers.counts(), (1, 0), "the address that was checked is the one that is called");

    let second = service.api.credit(config).await;
    let held = held_because(&service, config).await;
    assert!(held.contains("127.0.0.2 is not public"), "{held}");
    let waiting = service.api.delivery_in(&second, "pending").await;
    assert_eq!((&waiting["retry_count"], receivers.counts()), (&json!(0), (1, 0)));
    service.stop().await;
}

#[tokio::test]
async fn a_name_that_resolves_slowly_or_to_many_addresses_or_to_none_ends_in_time() {
    let receivers = Pair::start().await;
    let name_server = NameServer::start(|name, _| match name {
        "slow.example" => Reply::After(Duration::from_millis(300), vec![ALLOWED]),
        "many.example" => Reply::Addresses([vec![FORBIDDEN; 24], vec![ALLOWED]].concat()),
        "empty.example" => Reply::Addresses(vec![]),
        "silent.example" => Reply::Silence,
        _ => Reply::NoSuchName,
    })
    .await;
    let service = service_that_asks(&name_server).await;
    for (name, status, error) in [
        ("slow.example", "completed", None),
        ("many.example", "completed", None),
        ("empty.example", "failed", Some("the name empty.example cannot be resolved: it has no address")),
        ("unknown.example", "failed", Some("the name unknown.example cannot be resolved: it has no address")),
        ("silent.example", "failed", Some("timed out after 1000 ms")),
    ] {
        let url = format!("http://{name}:{}", receivers.port);
        // one that is silent must not take long, and one that is slow has to be waited for
        let timeout_ms = if name == "silent.example" { 1_000 } else { 30_000 };
        let config = service.api.register(&url, json!({"max_retries": 0, "timeout_ms": timeout_ms})).await;
        let queue_id = service.api.credit(config).await;
        let ended = service.api.delivery_in(&queue_id, status).await;
        let attempt = &ended["attempts"][0];
        assert_eq!(attempt["error"], json!(error), "{name}");
        let kind = match name {
            "slow.example" | "many.example" => None,
            "silent.example" => Some("timeout"),
            _ => Some("dns"),
        };
        assert_eq!(attempt["error_kind"], json!(kind), "{name}");
        let address = kind.is_none().then(|| format!("{ALLOWED}:{}", receivers.port));
        assert_eq!(attempt["remote_address"], json!(address), "{name}");
    }
    assert_eq!(receivers.counts(), (2, 0));
    service.stop().await;
}

/// Registers a config while its URL is allowed, then runs workers without these settings, and answers why nothing is sent.
async fn held_after(url: &str, permissive: &[(&str, &str)], strict: &[(&str, &str)]) -> String {
    let database = TestDatabase::new().await;
    let api = TestService::start_with(Role::Api, database.clone(), permissive).await;
    let config = api.api.register(url, json!({"max_retries": 0})).await;
    let queue_id = api.api.credit(config).await;
    let worker = TestService::start_with(Role::Worker, database, strict).await;
    let held = held_because(&api, config).await;
    let waiting = api.api.delivery_in(&queue_id, "pending").await;
    assert_eq!(waiting["retry_count"], 0, "no attempt is used up: {waiting}");
    worker.stop().await;
    api.stop().await;
    held
}

/// What registering this URL, and changing a config to it, is answered: the status, the fields at fault.
async fn registered_and_changed(service: &TestService, url: &str) -> [(u16, Vec<String>); 2] {
    let body = |url: &str| json!({"name": "x", "postback_url": url, "chargeback_url": "https://127.0.0.1/"});
    let registered = service.api.post("/api/webhooks", body(url)).await;
    let other = service.api.post("/api/webhooks", body("https://127.0.0.1/")).await.json();
    let path = format!("/api/webhooks/{}", other["id"]);
    let changed = service.api.patch(&path, json!({"postback_url": url})).await;
    [registered, changed]
        .map(|answer| (answer.status, if answer.status == 422 { answer.fields() } else { vec![] }))
}

#[tokio::test]
async fn with_https_only_no_config_has_a_url_of_http_and_none_that_is_older_is_called() {
    let receiver = TestReceiver::start().await;
    let settings = [("HTTPS_ONLY", "true")];
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &settings).await;
    let refused = (422, vec!["postback_url".to_owned()]);
    assert_eq!(registered_and_changed(&service, "http://127.0.0.1/").await, [refused.clone(), refused]);
    assert_eq!(registered_and_changed(&service, "https://127.0.0.1/").await, [(201, vec![]), (200, vec![])]);
    service.stop().await;

    let held = held_after(&receiver.url, &[], &settings).await;
    assert!(held.contains("must begin with https://, because HTTPS_ONLY is set"), "{held}");
    assert_eq!(receiver.count(), 0);
}

#[tokio::test]
async fn ports_of_other_protocols_are_called_only_if_allowed() {
    let default = [("EGRESS_PORTS_ALLOW", "")];
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &default).await;
    for port in [22, 25, 6667] {
        let refused = (422, vec!["postback_url".to_owned()]);
        let url = format!("https://127.0.0.1:{port}/");
        assert_eq!(registered_and_changed(&service, &url).await, [refused.clone(), refused], "{port}");
    }
    service.stop().await;

    // a port that only root may listen on, so that nobody is disturbed if it is called
    let allowed = [("EGRESS_PORTS_ALLOW", "6000,1")];
    let held = held_after("http://127.0.0.1:1", &allowed, &default).await;
    assert!(held.contains("port 1 is one of another protocol"), "{held}");
    let service = TestService::start_with(Role::Serve, TestDatabase::new().await, &allowed).await;
    let config = service.api.register("http://127.0.0.1:1", json!({"max_retries": 0})).await;
    let queue_id = service.api.credit(config).await;
    let called: Value = service.api.delivery_in(&queue_id, "failed").await;
    assert!(called["attempts"][0]["error"].as_str().unwrap().contains("cannot connect"), "{called}");
    service.stop().await;
}
