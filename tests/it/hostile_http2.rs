//! Hostile receivers that speak HTTP/2: whatever frames one sends, its attempt ends in time and in bounded memory.

use std::sync::Arc;

use rcgen::{CertificateParams, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::hostile::{MEMORY_MB_MAX, attempt_at, memory_at_its_highest_mb};
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command};

/// The stream of the first request (RFC 9113, section 5.1.1).
const STREAM: u32 = 1;
/// `:status: 200`, from the static table (RFC 7541, appendix A).
const STATUS_200: &[u8] = &[0x88];
/// A literal header that is not to be remembered, with a name and a value that are 100 bytes long each.
const LONG_HEADER: &[u8] = &{
    let mut header = [b'x'; 203];
    header[0] = 0x10;
    header[1] = 100;
    header[102] = 100;
    header
};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// RFC 9113, section 4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// What a connection gets after the handshake of TLS, and then again and again.
#[derive(Clone)]
struct Behaviour {
    beginning: Vec<u8>,
    again: Vec<u8>,
}

/// A certificate for `localhost` with its key, and the authority that signed it, as PEM.
fn certificate() -> (CertificateDer<'static>, KeyPair, String) {
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::new(vec![]).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let pem = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let certificate = params.signed_by(&key, &issuer).unwrap();
    (certificate.der().clone(), key, pem)
}

/// Speaks TLS, insists on HTTP/2, and behaves.
async fn start(certificate: CertificateDer<'static>, key: &KeyPair, behaviour: Behaviour) -> String {
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (acceptor, listener) =
        (TlsAcceptor::from(Arc::new(config)), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, behaviour) = (acceptor.clone(), behaviour.clone());
            tokio::spawn(async move {
                let stream = acceptor.accept(stream).await.unwrap();
                let (mut incoming, mut outgoing) = tokio::io::split(stream);
                // what the client writes is read, so that it can go on writing, up to its end
                let read = async {
                    let mut chunk = [0; 4096];
                    while incoming.read(&mut chunk).await.is_ok_and(|length| length > 0) {}
                };
                let write = async {
                    let mut text = behaviour.beginning;
                    while outgoing.write_all(&text).await.is_ok() && outgoing.flush().await.is_ok() {
                        text.clone_from(&behaviour.again);
                        if text.is_empty() {
                            return std::future::pending().await;
                        }
                    }
                };
                tokio::select! { () = read => {}, () = write => {} }
            });
        }
    });
    url
}

/// What a receiver sends; how the delivery ends, the status that the audit shows, and the kinds of error that may be it.
type Kind = (&'static str, Behaviour, &'static str, Option<u16>, &'static [Option<&'static str>]);

fn kinds() -> Vec<Kind> {
    let settings = frame(SETTINGS, 0, 0, &[]);
    let behaves = |frames: &[Vec<u8>], again: Vec<u8>| Behaviour {
        beginning: [settings.clone(), frames.concat()].concat(),
        again,
    };
    let head = frame(HEADERS, END_HEADERS, STREAM, STATUS_200);
    let no_error = 0_u32.to_be_bytes();
    let cancelled = 8_u32.to_be_bytes();
    let no_answer: &[_] = &[Some("protocol"), Some("timeout")];
    vec![
        (
            "HTTP/1.1 over a connection that was to be HTTP/2",
            Behaviour { beginning: b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_vec(), again: vec![] },
            "failed",
            None,
            // if the connection has failed before it takes the request, the client reports only that it is closed
            &[Some("protocol"), Some("reset")],
        ),
        ("silence", behaves(&[], vec![]), "failed", None, &[Some("timeout")]),
        (
            "pings without end",
            behaves(&[], frame(PING, 0, 0, &[0; 8]).repeat(100)),
            "failed",
            None,
            no_answer,
        ),
        ("settings without end", behaves(&[], settings.repeat(100)), "failed", None, no_answer),
        (
            "a connection that goes away",
            behaves(&[frame(GOAWAY, 0, 0, &[no_error, no_error].concat())], vec![]),
            "failed",
            None,
            &[Some("protocol"), Some("reset")],
        ),
        (
            "a stream that is reset",
            behaves(&[frame(RST_STREAM, 0, STREAM, &cancelled)], vec![]),
            "failed",
            None,
            &[Some("protocol")],
        ),
        (
            "streams that are reset without end",
            behaves(&[], frame(RST_STREAM, 0, STREAM, &cancelled).repeat(100)),
            "failed",
            None,
            &[Some("protocol")],
        ),
        (
            "headers without end",
            behaves(
                &[frame(HEADERS, 0, STREAM, STATUS_200)],
                frame(CONTINUATION, 0, STREAM, &LONG_HEADER.repeat(60)),
            ),
            "failed",
            None,
            &[Some("protocol")],
        ),
        (
            "a body without end",
            behaves(std::slice::from_ref(&head), frame(DATA, 0, STREAM, &[b'x'; 8192])),
            "completed",
            Some(200),
            &[None],
        ),
        (
            "empty pieces of a body without end",
            behaves(std::slice::from_ref(&head), frame(DATA, 0, STREAM, &[]).repeat(100)),
            "completed",
            Some(200),
            &[Some("protocol"), Some("timeout")],
        ),
        ("no body after the head", behaves(&[head], vec![]), "completed", Some(200), &[Some("timeout")]),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_receiver_sends_over_http_2_the_attempt_ends_in_time_and_in_bounded_memory() {
    let (certificate, key, authority) = certificate();
    let directory = tempfile::tempdir().unwrap();
    let authority_file = directory.path().join("authority.pem");
    std::fs::write(&authority_file, authority).unwrap();
    let mut serve = command(&TestDatabase::new().await, &["serve"]);
    serve.env("SSL_CERT_FILE", &authority_file);
    let process = Process::start(serve);
    let api = process.api();
    for (name, behaviour, status, http_status, kinds) in kinds() {
        let url = start(certificate.clone(), &key, behaviour).await;
        let (ended, attempt) = attempt_at(&api, &url).await;
        assert_eq!(
            (ended.as_str(), &attempt["http_status"]),
            (status, &json!(http_status)),
            "{name}: {attempt}"
        );
        let kind: Option<&str> = attempt["error_kind"].as_str();
        assert!(kinds.contains(&kind), "{name}: {attempt}");
        assert_eq!(kind.is_some(), attempt["error"] != Value::Null, "{name}: {attempt}");
    }
    assert!(memory_at_its_highest_mb(&process) < MEMORY_MB_MAX, "{} MB", memory_at_its_highest_mb(&process));
}
