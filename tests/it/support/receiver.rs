//! A receiver that answers as it is told and remembers what arrived.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::Response;
use tokio::net::TcpListener;

/// One request as it arrived.
#[derive(Debug, Clone)]
pub struct Arrival {
    pub method: Method,
    /// Path and query.
    pub uri: String,
    pub headers: HeaderMap,
    pub at: Instant,
}

/// How a request is answered.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    pub delay: Duration,
}

impl Reply {
    pub fn status(status: u16) -> Self {
        Self { status, headers: vec![], body: b"ok".to_vec(), delay: Duration::ZERO }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }
}

#[derive(Default)]
struct Script {
    arrivals: Vec<Arrival>,
    replies: VecDeque<Reply>,
    default: Option<Reply>,
    /// Requests whose URI holds this are answered with that status.
    refused: Option<(String, u16)>,
    in_flight: usize,
    in_flight_max: usize,
}

/// A running receiver on a free port of 127.0.0.1.
#[derive(Clone)]
pub struct TestReceiver {
    pub url: String,
    script: Arc<Mutex<Script>>,
}

impl TestReceiver {
    /// Answers 200 until told otherwise.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let script = Arc::new(Mutex::new(Script::default()));
        let router = Router::new().fallback(answer).with_state(script.clone());
        tokio::spawn(async { axum::serve(listener, router).await });
        Self { url, script }
    }

    /// Answers the next requests with these, in order, and later ones with the default.
    pub fn reply_with(&self, replies: impl IntoIterator<Item = Reply>) {
        self.script.lock().unwrap().replies.extend(replies);
    }

    /// Answers all requests for which there is nothing else with this.
    pub fn reply_always(&self, reply: Reply) {
        self.script.lock().unwrap().default = Some(reply);
    }

    /// Answers requests whose URI holds `text` with this status, whatever else it was told.
    pub fn refuse_where(&self, text: &str, status: u16) {
        self.script.lock().unwrap().refused = Some((text.to_owned(), status));
    }

    /// What arrived so far.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.script.lock().unwrap().arrivals.clone()
    }

    /// The most requests that were unanswered at a time.
    pub fn in_flight_max(&self) -> usize {
        self.script.lock().unwrap().in_flight_max
    }

    /// Begins to look for that again.
    pub fn forget_in_flight_max(&self) {
        let mut script = self.script.lock().unwrap();
        script.in_flight_max = script.in_flight;
    }

    /// How many requests arrived so far.
    pub fn count(&self) -> usize {
        self.script.lock().unwrap().arrivals.len()
    }
}

async fn answer(State(script): State<Arc<Mutex<Script>>>, request: Request) -> Response {
    let reply = {
        let mut script = script.lock().unwrap();
        script.arrivals.push(Arrival {
            method: request.method().clone(),
            uri: request.uri().to_string(),
            headers: request.headers().clone(),
            at: Instant::now(),
        });
        script.in_flight += 1;
        script.in_flight_max = script.in_flight_max.max(script.in_flight);
        let uri = request.uri().to_string();
        let refused = script.refused.as_ref().filter(|(text, _)| uri.contains(text.as_str()));
        let refused = refused.map(|(_, status)| Reply::status(*status));
        let scripted = refused.or_else(|| script.replies.pop_front());
        scripted.or_else(|| script.default.clone()).unwrap_or_else(|| Reply::status(200))
    };
    if !reply.delay.is_zero() {
        tokio::time::sleep(reply.delay).await;
    }
    script.lock().unwrap().in_flight -= 1;
    let mut response = Response::new(Body::from(reply.body));
    *response.status_mut() = StatusCode::from_u16(reply.status).unwrap();
    for (name, value) in reply.headers {
        response.headers_mut().insert(name, value.try_into().unwrap());
    }
    response
}
