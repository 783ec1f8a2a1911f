//! PostgreSQL goes away and comes back: nobody hangs, nothing accepted is lost, all goes on by itself.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use sqlx::ConnectOptions as _;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use webhook_processor::infrastructure::embedded_postgres::{EmbeddedOptions, EmbeddedPostgres};

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command};
use crate::support::receiver::{Reply, TestReceiver};

/// A server of this test's own, which it may stop.
fn own_server() -> EmbeddedOptions {
    let directory = std::env::temp_dir().join(format!("webhook-processor-outage-{}", std::process::id()));
    EmbeddedOptions { directory, durable: false, binaries: None }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_postgres_is_away_requests_get_503_and_afterwards_everything_goes_on() {
    let options = own_server();
    let server = EmbeddedPostgres::start(&options).await.unwrap();
    let url = server.connect_options().to_url_lossy().to_string();
    let receiver = TestReceiver::start().await;
    let mut serve = command(&TestDatabase::new().await, &["serve"]);
    serve.env("DATABASE_URL", &url).env("WORKER_POLL_INTERVAL", "500ms");
    let process = Process::start(serve);
    let api = process.api();
    let config = api.register(&receiver.url, json!({})).await;
    // one attempt is under way when the server stops, and ends while it is away
    receiver.reply_with([Reply::status(200).after(Duration::from_secs(1))]);
    let under_way = api.credit(config).await;
    eventually("the request arrives", async || (receiver.count() == 1).then_some(())).await;
    let waiting = json!({"event_type": "+credit", "config_id": config, "scheduled_at": chrono::Utc::now() + chrono::TimeDelta::seconds(3)});
    let waiting = api.post("/webhooks", waiting).await.json()["queue_id"].as_str().unwrap().to_owned();

    server.stop().await.unwrap();

    let event = json!({"event_type": "+credit", "config_id": config, "event_id": "during"});
    for (method, path) in
        [("POST", "/webhooks"), ("GET", "/webhooks/stats"), ("GET", "/api/webhooks"), ("GET", "/webhooks")]
    {
        let begun = Instant::now();
        let answer = if method == "POST" { api.post(path, event.clone()).await } else { api.get(path).await };
        assert_eq!(answer.status, 503, "{path}: {}", answer.text);
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        assert!(answer.headers.contains_key("retry-after"));
        // the promise is 2 s; the margin is for a busy machine
        assert!(begun.elapsed() < Duration::from_secs(10), "{path} took {:?}", begun.elapsed());
    }
    assert_eq!(api.get("/health/live").await.status, 200);
    assert_eq!(api.get("/health/ready").await.status, 503);

    let server = EmbeddedPostgres::start(&options).await.unwrap();
    eventually("the service is ready again", async || {
        (api.get("/health/ready").await.status == 200).then_some(())
    })
    .await;
    assert_eq!(api.post("/webhooks", event).await.status, 201);
    let settled = api.delivery_in(&under_way, "completed").await;
    assert_eq!(settled["attempts"].as_array().unwrap().len(), 1);
    api.delivery_in(&waiting, "completed").await;
    eventually("the new event arrives", async || (receiver.count() == 3).then_some(())).await;

    process.signal("TERM");
    assert_eq!(process.wait(), Some(0));
    server.stop().await.unwrap();
    let _ = std::fs::remove_dir_all(&options.directory);
}

/// How a driver asks whether a connection is alive: a lone Sync message.
const SIGN_OF_LIFE: &[u8] = &[b'S', 0, 0, 0, 4];

/// The port of a way to the server at `socket`. While `silent`, a connection that is asked for a sign of life never answers again,
/// and does not end.
async fn way_that_goes_silent(socket: PathBuf, silent: Arc<AtomicBool>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = UnixStream::connect(&socket).await.unwrap();
            tokio::spawn(carry(client, server, silent.clone()));
        }
    });
    port
}

async fn carry(client: TcpStream, server: UnixStream, silent: Arc<AtomicBool>) {
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let answers = async { tokio::io::copy(&mut from_server, &mut to_client).await };
    let questions = async {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let length = from_client.read(&mut buffer).await?;
            let asks = &buffer[..length] == SIGN_OF_LIFE;
            if asks && silent.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            if length == 0 {
                return Ok::<(), std::io::Error>(());
            }
            to_server.write_all(&buffer[..length]).await?;
        }
    };
    tokio::select! { _ = answers => {} _ = questions => {} }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_go_silent_while_they_are_given_back_do_not_stay_in_use() {
    let database = TestDatabase::empty().await;
    let server = database.options.get_socket().unwrap().join(".s.PGSQL.5432");
    let silent = Arc::new(AtomicBool::new(false));
    let options = PgConnectOptions::new_without_pgpass()
        .host("127.0.0.1")
        .port(way_that_goes_silent(server, silent.clone()).await)
        .username("postgres")
        .database(database.options.get_database().unwrap())
        .ssl_mode(PgSslMode::Disable);
    let mut serve = command(&database, &["serve"]);
    serve.env("DATABASE_URL", options.to_url_lossy().to_string());
    let process = Process::start(serve);
    let api = process.api();
    let answered = async || (api.get("/api/webhooks").await.status == 200).then_some(());
    eventually("an answer", answered).await;

    silent.store(true, Ordering::SeqCst);
    // far more than there are connections
    let answers = futures_util::future::join_all((0..30).map(|_| api.get("/api/webhooks"))).await;
    assert!(answers.iter().any(|answer| answer.status == 503), "no connection went silent");
    silent.store(false, Ordering::SeqCst);

    eventually("an answer afterwards", answered).await;
    process.signal("TERM");
    assert_eq!(process.wait(), Some(0));
}
