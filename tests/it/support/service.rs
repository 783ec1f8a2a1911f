//! The service, running in the test's process, and its API as a client sees it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use metrics_exporter_prometheus::PrometheusHandle;
use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use webhook_processor::infrastructure::metrics::record_metrics;
use webhook_processor::infrastructure::ready_database::{Patience, ReadyDatabase};
use webhook_processor::infrastructure::service::{Role, run_on};
use webhook_processor::infrastructure::settings::Settings;

use super::look_for;
use super::postgres::TestDatabase;

/// An answer, read whole.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The fields that a problem names.
    pub fn fields(&self) -> Vec<String> {
        let problem = self.json();
        let errors = problem["errors"].as_array().cloned().unwrap_or_default();
        errors.iter().map(|error| error["field"].as_str().unwrap().to_owned()).collect()
    }
}

/// A client of the API.
#[derive(Clone)]
pub struct ApiClient {
    pub base: String,
    pub client: Client,
    /// The text of the API key that it presents.
    pub key: Option<String>,
}

impl ApiClient {
    pub fn new(base: impl Into<String>) -> Self {
        Self { base: base.into(), client: Client::builder().no_proxy().build().unwrap(), key: None }
    }

    /// The same service, asked with a key.
    pub fn with_key(&self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self.clone() }
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.base));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    pub async fn send(&self, request: RequestBuilder) -> Answer {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Answer { status, headers, text: response.text().await.unwrap() }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(self.request(Method::POST, path).json(&body)).await
    }

    pub async fn patch(&self, path: &str, body: Value) -> Answer {
        self.send(self.request(Method::PATCH, path).json(&body)).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// Registers a config whose two URLs lead to this receiver, with whatever else is given, and returns its id.
    pub async fn register(&self, receiver: &str, more: Value) -> i64 {
        let mut body = json!({
            "name": "test",
            "postback_url": format!("{receiver}/postback"),
            "chargeback_url": format!("{receiver}/chargeback"),
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = self.post("/api/webhooks/register", body).await;
        assert_eq!(answer.status, 201, "{}", answer.text);
        answer.json()["id"].as_i64().unwrap()
    }

    /// Enqueues a `+credit` and returns the delivery's id.
    pub async fn credit(&self, config_id: i64) -> String {
        let answer = self.post("/webhooks", json!({"event_type": "+credit", "config_id": config_id})).await;
        assert_eq!(answer.status, 201, "{}", answer.text);
        answer.json()["queue_id"].as_str().unwrap().to_owned()
    }

    /// The delivery, once it is in this status. One that ends in another, or does not get there in time, is shown.
    pub async fn delivery_in(&self, queue_id: &str, status: &str) -> Value {
        let mut last = Value::Null;
        let look = async || {
            last = self.get(&format!("/webhooks/{queue_id}")).await.json();
            let has_ended = ["completed", "failed", "cancelled"].iter().any(|end| last["status"] == *end);
            assert!(!has_ended || last["status"] == status, "it should be {status}: {last}");
            (last["status"] == status).then(|| last.clone())
        };
        match look_for(look).await {
            Some(delivery) => delivery,
            None => panic!("waited in vain for {status}: {last}"),
        }
    }
}

/// A running service of a test's own.
pub struct TestService {
    pub api: ApiClient,
    pub database: TestDatabase,
    stop: CancellationToken,
    running: JoinHandle<anyhow::Result<()>>,
}

impl TestService {
    /// API and workers on a database of its own, allowed to call 127.0.0.1.
    pub async fn start() -> Self {
        Self::start_with(Role::Serve, TestDatabase::new().await, &[]).await
    }

    /// A role on a database, with settings.
    pub async fn start_with(role: Role, database: TestDatabase, settings: &[(&str, &str)]) -> Self {
        let settings = settings_for(&database, settings);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = ApiClient::new(format!("http://{}", listener.local_addr().unwrap()));
        let stop = CancellationToken::new();
        let ready = ReadyDatabase::prepare(&settings, &stop, Patience::None).await.unwrap();
        let running = tokio::spawn({
            let (settings, stop) = (settings.clone(), stop.clone());
            async move {
                let ended = run_on(&settings, role, metrics(), &ready, listener, stop).await;
                ready.close().await;
                ended
            }
        });
        Self { api, database, stop, running }
    }

    /// Asks it to stop and waits until it has.
    pub async fn stop(self) {
        self.stop.cancel();
        self.running.await.unwrap().unwrap();
    }
}

/// Settings as a test needs them: its database, and receivers on 127.0.0.1, of which those at ports 1 and 9 never answer.
pub fn settings_for(database: &TestDatabase, more: &[(&str, &str)]) -> Settings {
    let url = database.url();
    let mut environment: HashMap<String, String> =
        [("DATABASE_URL", url.as_str()), ("EGRESS_ALLOW", "127.0.0.0/8"), ("EGRESS_PORTS_ALLOW", "1,9")]
            .map(|(n, v)| (n.into(), v.into()))
            .into();
    environment.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    let settings = Settings::from_sources(BTreeMap::new(), environment);
    settings.unwrap_or_else(|error| panic!("{error}"))
}

/// The recorder is one for the whole process.
pub fn metrics() -> PrometheusHandle {
    static HANDLE: OnceLock<Arc<PrometheusHandle>> = OnceLock::new();
    HANDLE.get_or_init(|| Arc::new(record_metrics().unwrap())).as_ref().clone()
}
