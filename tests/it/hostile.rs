//! Hostile receivers: whatever one answers, its attempt ends in time, in bounded memory, and harms nobody else.

use std::net::SocketAddr;
use std::sync::Arc;

use rcgen::{CertificateParams, CertifiedKey, KeyPair, date_time_ymd, generate_simple_self_signed};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command};
use crate::support::raw_receiver::{Behaviour, start};
use crate::support::receiver::TestReceiver;
use crate::support::service::ApiClient;

/// What an attempt may take, in milliseconds.
const TIMEOUT_MS: u64 = 700;
/// How much longer an attempt may last: what has arrived is read after a pause, and machines are busy.
const GRACE_MS: u64 = 5_000;
/// What a process that talks to all of them may have in memory at its highest.
pub const MEMORY_MB_MAX: u64 = 200;

async fn service() -> (Process, ApiClient) {
    let process = Process::start(command(&TestDatabase::new().await, &["serve"]));
    let api = process.api();
    (process, api)
}

/// The only attempt of a delivery to this URL, with the delivery's final status.
pub async fn attempt_at(api: &ApiClient, url: &str) -> (String, Value) {
    let config = api.register(url, json!({"timeout_ms": TIMEOUT_MS, "max_retries": 0})).await;
    let queue_id = api.credit(config).await;
    let ended = crate::support::eventually(&format!("an end at {url}"), async || {
        let delivery = api.get(&format!("/webhooks/{queue_id}")).await.json();
        let is_terminal = delivery["status"] == "completed" || delivery["status"] == "failed";
        is_terminal.then_some(delivery)
    })
    .await;
    assert_eq!(ended["attempts"].as_array().unwrap().len(), 1, "{ended}");
    let attempt = ended["attempts"][0].clone();
    let port = url.rsplit(':').next().unwrap();
    assert_eq!(attempt["remote_address"], format!("127.0.0.1:{port}"), "{url}: {attempt}");
    assert!(attempt["duration_ms"].as_u64().unwrap() < TIMEOUT_MS + GRACE_MS, "{url}: {attempt}");
    (ended["status"].as_str().unwrap().to_owned(), attempt)
}

pub fn memory_at_its_highest_mb(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() / 1024
}

/// A kind of receiver; how the delivery ends, the status that the audit shows, and a part of its error.
type Kind = (&'static str, Behaviour, &'static str, Option<u16>, Option<&'static str>);

#[expect(clippy::too_many_lines, reason = "a table")]
fn kinds(redirect: &'static [u8]) -> Vec<Kind> {
    use Behaviour::{Answer, Bomb, Close, Dripping, Endless, Reset, Silence};
    vec![
        (
            "an endless body",
            Endless { beginning: b"HTTP/1.1 200 OK\r\n\r\n", again: b"x" },
            "completed",
            Some(200),
            None,
        ),
        (
            "a body in drops",
            Dripping { beginning: b"HTTP/1.1 200 OK\r\n\r\n", again: b"x" },
            "completed",
            Some(200),
            Some("did not end within"),
        ),
        ("a bomb", Bomb, "completed", Some(200), None),
        (
            "endless headers",
            Endless { beginning: b"HTTP/1.1 200 OK\r\n", again: b"x-flood: 0123456789\r\n" },
            "failed",
            None,
            Some("the request failed"),
        ),
        (
            "an endless header",
            Endless { beginning: b"HTTP/1.1 200 OK\r\nx-flood: ", again: b"0123456789" },
            "failed",
            None,
            Some("the request failed"),
        ),
        (
            "headers in drops",
            Dripping { beginning: b"HTTP/1.1 200 OK\r\n", again: b"x: y\r\n" },
            "failed",
            None,
            Some("timed out"),
        ),
        ("a reset", Reset, "failed", None, Some("the request failed")),
        ("no answer and the end", Close, "failed", None, Some("the request failed")),
        ("silence", Silence, "failed", None, Some("timed out")),
        ("HTTP/0.9", Answer(b"hello"), "failed", None, Some("the request failed")),
        (
            "another protocol",
            Answer(b"220 mail.example ESMTP\r\n"),
            "failed",
            None,
            Some("the request failed"),
        ),
        (
            "status 999",
            Answer(b"HTTP/1.1 999 What\r\ncontent-length: 0\r\n\r\n"),
            "failed",
            Some(999),
            Some("answered 999"),
        ),
        (
            "status 42",
            Answer(b"HTTP/1.1 42 What\r\ncontent-length: 0\r\n\r\n"),
            "failed",
            None,
            Some("the request failed"),
        ),
        (
            "1xx without end",
            Endless { beginning: b"", again: b"HTTP/1.1 100 Continue\r\n\r\n" },
            "failed",
            None,
            Some(""),
        ),
        (
            "two lengths",
            Answer(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok"),
            "failed",
            None,
            Some("the request failed"),
        ),
        (
            "a length of -1",
            Answer(b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\nok"),
            "failed",
            None,
            Some("the request failed"),
        ),
        (
            "a chunk of 2^64 bytes",
            Answer(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nok"),
            "completed",
            Some(200),
            Some("the response broke off"),
        ),
        ("a redirect", Answer(redirect), "failed", Some(302), Some("redirects are not followed")),
        (
            "another protocol on request",
            Answer(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"),
            "failed",
            Some(101),
            Some("answered 101"),
        ),
        (
            "a nul in the body",
            Answer(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\na\0b"),
            "completed",
            Some(200),
            None,
        ),
    ]
}

/// The kind of error that the audit shows for one of [`kinds`].
fn error_kind(name: &str) -> Option<&'static str> {
    match name {
        "an endless body" | "a bomb" | "a nul in the body" => None,
        "a body in drops" | "headers in drops" | "1xx without end" | "silence" => Some("timeout"),
        "a reset" | "no answer and the end" => Some("reset"),
        "status 999" | "a redirect" | "another protocol on request" => Some("http_status"),
        _ => Some("protocol"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_receiver_answers_the_attempt_ends_in_time_and_in_bounded_memory() {
    let (process, api) = service().await;
    let good = TestReceiver::start().await;
    let elsewhere = TestReceiver::start().await;
    let redirect = format!("HTTP/1.1 302 Found\r\nlocation: {}\r\ncontent-length: 0\r\n\r\n", elsewhere.url);
    let redirect: &'static [u8] = redirect.leak().as_bytes();
    for (name, behaviour, status, http_status, error) in kinds(redirect) {
        let url = start(behaviour).await;
        let (ended, attempt) = attempt_at(&api, &url).await;
        assert_eq!(
            (ended.as_str(), &attempt["http_status"]),
            (status, &json!(http_status)),
            "{name}: {attempt}"
        );
        match error {
            Some(error) => assert!(attempt["error"].as_str().unwrap().contains(error), "{name}: {attempt}"),
            None => assert_eq!(attempt["error"], Value::Null, "{name}"),
        }
        assert_eq!(attempt["error_kind"], json!(error_kind(name)), "{name}: {attempt}");
        let (neighbour, _) = attempt_at(&api, &good.url).await;
        assert_eq!(neighbour, "completed", "beside {name}");
    }
    assert_eq!(elsewhere.count(), 0, "a redirect was followed");
    assert!(memory_at_its_highest_mb(&process) < MEMORY_MB_MAX, "{} MB", memory_at_its_highest_mb(&process));
}

/// Speaks TLS and answers 200.
async fn tls_receiver(certificate: CertificateDer<'static>, key: &KeyPair) -> SocketAddr {
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let (acceptor, listener) =
        (TlsAcceptor::from(Arc::new(config)), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // a handshake that the client breaks off is what most of these are for
                if let Ok(stream) = acceptor.accept(stream).await {
                    answer_ok(stream).await;
                }
            });
        }
    });
    address
}

async fn answer_ok(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut request = [0; 4096];
    let _ = stream.read(&mut request).await;
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    let _ = stream.read(&mut request).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_proves_nothing_is_refused_and_one_of_a_trusted_authority_is_accepted() {
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::new(vec![]).unwrap();
    authority.distinguished_name.push(rcgen::DnType::CommonName, "an authority of this test");
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_certificate = authority.self_signed(&authority_key).unwrap();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let sign = |name: &str, expired: bool| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        if expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let certificate = params.signed_by(&key, &issuer).unwrap();
        (certificate.der().clone(), key)
    };
    let directory = tempfile::tempdir().unwrap();
    let authority_file = directory.path().join("authority.pem");
    std::fs::write(&authority_file, authority_certificate.pem()).unwrap();
    let mut serve = command(&TestDatabase::new().await, &["serve"]);
    serve.env("SSL_CERT_FILE", &authority_file);
    let process = Process::start(serve);
    let api = process.api();

    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (good, wrong_name, expired) =
        (sign("localhost", false), sign("other.example", false), sign("localhost", true));
    for (name, certificate, key, expected) in [
        ("self-signed", cert.der().clone(), &signing_key, Some("not signed by an authority")),
        ("for another name", wrong_name.0, &wrong_name.1, Some("for a name other than")),
        ("expired", expired.0, &expired.1, Some("it has expired")),
        ("good", good.0, &good.1, None),
    ] {
        let address = tls_receiver(certificate, key).await;
        let (status, attempt) = attempt_at(&api, &format!("https://localhost:{}", address.port())).await;
        match expected {
            None => assert_eq!(
                (status.as_str(), &attempt["error"]),
                ("completed", &Value::Null),
                "{name}: {attempt}"
            ),
            Some(error) => {
                assert_eq!(status, "failed", "{name}");
                assert!(attempt["error"].as_str().unwrap().contains(error), "{name}: {attempt}");
                assert_eq!(attempt["error_kind"], "tls", "{name}: {attempt}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_stalls_or_makes_no_sense_ends_in_time() {
    let (_process, api) = service().await;
    for (name, behaviour, error) in [
        ("a stalled handshake", Behaviour::Silence, "timed out"),
        ("no TLS at all", Behaviour::Answer(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "TLS failed"),
        // an alert: protocol_version
        ("an old version", Behaviour::Answer(&[0x15, 3, 1, 0, 2, 2, 70]), "TLS failed"),
        (
            "endless rubbish",
            Behaviour::Endless { beginning: b"", again: b"\x16\x03\x01\xff\xff" },
            "TLS failed",
        ),
    ] {
        let url = start(behaviour).await.replace("http://127.0.0.1", "https://localhost");
        let (status, attempt) = attempt_at(&api, &url).await;
        assert_eq!(status, "failed", "{name}");
        assert!(attempt["error"].as_str().unwrap().contains(error), "{name}: {attempt}");
        let kind = if error == "timed out" { "timeout" } else { "tls" };
        assert_eq!(attempt["error_kind"], kind, "{name}: {attempt}");
    }
}
