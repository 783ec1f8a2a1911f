//! `POST /webhooks/batch`: many events in one request, as an array or as an unlimited stream of lines.

use std::io::SeekFrom;
use std::pin::pin;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::response::{IntoResponse as _, Response};
use bytes::BytesMut;
use futures_util::stream::{self, Stream, StreamExt as _};
use http_body_util::BodyExt as _;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::fs::File;
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _, BufWriter};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;
use tokio_util::io::ReaderStream;
use tracing::error;
use utoipa::ToSchema;
use uuid::Uuid;

use super::Api;
use super::access::Admitted;
use super::error::{ApiError, PROBLEM_JSON, Problem};
use super::extract::{BODY_BYTES_MAX, has_media_type, read_body};
use super::webhooks::traceparent;
use crate::contract::events::EventBody;
use crate::contract::json::parse_json;

/// The most events of an array; a stream has no limit.
const ARRAY_ITEMS_MAX: usize = 1_000;
const ARRAY_BYTES_MAX: usize = 8 * 1024 * 1024;
/// The most text, in KiB, of all arrays that are read and processed at the same time; further arrays wait.
const ARRAYS_KIB_MAX: u32 = 64 * 1024;
/// How long an array waits for room.
const ARRAY_ROOM_WAIT: Duration = Duration::from_secs(2);
/// Shared by the whole process, like its memory.
static ARRAY_ROOM: Semaphore = Semaphore::const_new(ARRAYS_KIB_MAX as usize);
/// How many events of one stream are being stored at the same time.
const STREAM_AHEAD: usize = 300;
/// How long the next part of a stream may take to arrive.
const STREAM_IDLE_MAX: Duration = Duration::from_secs(30);
/// Results up to this size, in bytes, are kept in memory, longer ones in a file.
const RESULTS_MEMORY_MAX: usize = 256 * 1024;

/// The results of a batch.
#[derive(Serialize, ToSchema)]
pub struct BatchResults {
    /// One result per event, in order.
    results: Vec<BatchResult>,
}

/// The problem of a stream that broke off or fell silent, with the results of the events that had arrived.
#[derive(Serialize, ToSchema)]
pub struct BrokenBatch {
    #[serde(flatten)]
    problem: Problem,
    /// For a stream: one result per event that had arrived, in order. Later events were not accepted: send them again.
    #[serde(skip_serializing_if = "Option::is_none")]
    results: Option<Vec<BatchResult>>,
}

/// The result of one event: a `queue_id`, or an `error`.
#[derive(Serialize, ToSchema)]
pub struct BatchResult {
    /// The event's position in the batch, from 0.
    index: u64,
    /// The delivery of the event.
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_id: Option<Uuid>,
    /// Whether the same event was accepted before, as this delivery.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    duplicate: bool,
    /// Why the event was not accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Problem>,
}

/// Accept many events.
///
/// An array of at most 1,000, or `application/x-ndjson`: a stream of any length, one event per line, at most 64 KiB per
/// line. Each event is accepted or refused on its own; the answer comes after all accepted events are committed. A stream
/// that breaks off, or is silent for 30 s, is answered with a problem whose `results` show what was accepted before.
#[utoipa::path(post, path = "/webhooks/batch", operation_id = "enqueue_batch", tag = "webhooks",
    request_body(content((Vec<EventBody> = "application/json"), (String = "application/x-ndjson"))),
    responses(
        (status = 200, description = "One result per event", body = BatchResults),
        (status = 400, description = "Not JSON; or a stream that broke off, with the results of the events before", body = BrokenBatch, content_type = "application/problem+json"),
        (status = 408, description = "A stream that fell silent, with the results of the events before", body = BrokenBatch, content_type = "application/problem+json"),
        (status = 413, description = "More than 1,000 events or 8 MiB"),
        (status = 422, description = "Not an array"),
        (status = 415, description = "Neither of the two content types"),
        (status = 503, description = "Too many arrays are being read; see Retry-After"),
    ))]
pub async fn enqueue_batch(
    State(api): State<Api>,
    caller: Admitted,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let trace = traceparent(&parts.headers);
    let mut results = Results::default();
    if has_media_type(&parts, "application/x-ndjson") {
        let lines = Lines { body, buffer: BytesMut::new(), searched: 0, skipping: false, ended: false };
        let accepted =
            lines.into_stream().map(|line| accept(&api, &caller, line, trace.clone())).buffered(STREAM_AHEAD);
        let mut accepted = pin!(accepted);
        while let Some(result) = accepted.next().await {
            match result {
                Ok(result) => results.push(result).await?,
                // the events before it are committed, and the caller must learn that
                Err(broken) => return results.into_response(Some(&broken)).await,
            }
        }
    } else if has_media_type(&parts, "application/json") {
        let _room = array_room(&parts).await?;
        let bytes = read_body(body, ARRAY_BYTES_MAX).await?;
        let items: Vec<Box<RawValue>> = parse_json(&bytes)?;
        if items.len() > ARRAY_ITEMS_MAX {
            return Err(ApiError::too_many(ARRAY_ITEMS_MAX));
        }
        let lines = items
            .into_iter()
            .map(|item| Ok(Line::Text(Bytes::from(Box::<str>::from(item).into_boxed_bytes()))));
        let accepted = lines.map(|line| accept(&api, &caller, line, trace.clone()));
        for result in futures_util::future::join_all(accepted).await {
            results.push(result?).await?;
        }
    } else {
        return Err(ApiError::unsupported_media_type("application/json or application/x-ndjson"));
    }
    results.into_response(None).await
}

/// Waits for room for an array: for its content length, or, if that is missing, for the largest size.
async fn array_room(parts: &Parts) -> Result<SemaphorePermit<'static>, ApiError> {
    let length = parts.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    let length = length.unwrap_or(ARRAY_BYTES_MAX);
    if length > ARRAY_BYTES_MAX {
        return Err(ApiError::too_large(ARRAY_BYTES_MAX));
    }
    let kib = u32::try_from(length / 1024 + 1).expect("it is at most 8 MiB");
    match timeout(ARRAY_ROOM_WAIT, ARRAY_ROOM.acquire_many(kib)).await {
        Ok(permit) => Ok(permit.expect("the semaphore is never closed")),
        Err(_) => Err(ApiError::unavailable("too many arrays are being read; try again")),
    }
}

/// Accepts one event, or reports why not. Fails only if the stream itself fails.
async fn accept(
    api: &Api,
    caller: &Admitted,
    line: Result<Line, ApiError>,
    trace: Option<String>,
) -> Result<BatchResult, ApiError> {
    let accepted = match line? {
        Line::TooLong => Err(ApiError::too_large(BODY_BYTES_MAX)),
        Line::Text(text) if text.len() > BODY_BYTES_MAX => Err(ApiError::too_large(BODY_BYTES_MAX)),
        Line::Text(text) => {
            // before there is room, the event stays text, which takes least memory
            let _room = api.enqueue.bulk_room(text.len()).await;
            Box::pin(async {
                let event = EventBody::from_json(&text)?.into_event(trace)?;
                caller.check_config(event.config_id())?;
                Ok(api.enqueue.accept_of_many(&event).await?)
            })
            .await
        }
    };
    Ok(match accepted {
        Ok(receipt) => BatchResult {
            index: 0,
            queue_id: Some(receipt.queue_id.get()),
            duplicate: receipt.is_duplicate(),
            error: None,
        },
        Err(error) => {
            BatchResult { index: 0, queue_id: None, duplicate: false, error: Some(error.problem()) }
        }
    })
}

/// A line of a stream.
enum Line {
    Text(Bytes),
    TooLong,
}

/// Cuts a body into lines, holding no more than one line and one frame in memory.
struct Lines {
    body: Body,
    buffer: BytesMut,
    /// The first so many bytes of the buffer contain no line end.
    searched: usize,
    /// Whether the rest of a line that is too long is being skipped.
    skipping: bool,
    ended: bool,
}

impl Lines {
    fn into_stream(self) -> impl Stream<Item = Result<Line, ApiError>> {
        stream::unfold(Some(self), |lines| async {
            let mut lines = lines?;
            match lines.next().await {
                Ok(Some(line)) => Some((Ok(line), Some(lines))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    /// The next line that is not blank.
    async fn next(&mut self) -> Result<Option<Line>, ApiError> {
        loop {
            let end = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n');
            if let Some(end) = end.map(|end| end + self.searched) {
                self.searched = 0;
                let line = self.buffer.split_to(end + 1);
                if std::mem::take(&mut self.skipping) {
                    return Ok(Some(Line::TooLong));
                }
                if !line.trim_ascii().is_empty() {
                    return Ok(Some(Line::Text(line.freeze())));
                }
                continue;
            }
            if self.buffer.len() > BODY_BYTES_MAX {
                self.skipping = true;
                self.buffer.clear();
            }
            self.searched = self.buffer.len();
            if self.ended {
                if self.buffer.is_empty() && !self.skipping {
                    return Ok(None);
                }
                // the last line may lack its newline
                self.buffer.extend_from_slice(b"\n");
                continue;
            }
            match timeout(STREAM_IDLE_MAX, self.body.frame()).await {
                Err(_) => return Err(ApiError::too_slow()),
                Ok(None) => self.ended = true,
                Ok(Some(Ok(frame))) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Ok(Some(Err(_))) => return Err(ApiError::bad_request("the body broke off")),
            }
        }
    }
}

/// The growing answer: in memory while it is short, then in an unnamed temporary file.
#[derive(Default)]
struct Results {
    count: u64,
    memory: Vec<u8>,
    file: Option<BufWriter<File>>,
}

impl Results {
    async fn push(&mut self, mut result: BatchResult) -> Result<(), ApiError> {
        result.index = self.count;
        self.memory.extend_from_slice(if self.count == 0 { b"{\"results\":[" } else { b",\n" });
        serde_json::to_writer(&mut self.memory, &result).expect("a result is plain data");
        self.count += 1;
        if self.memory.len() > RESULTS_MEMORY_MAX {
            self.spill().await.map_err(|cause| unwritable(&cause))
        } else {
            Ok(())
        }
    }

    async fn spill(&mut self) -> std::io::Result<()> {
        if self.file.is_none() {
            let file =
                tokio::task::spawn_blocking(tempfile::tempfile).await.map_err(std::io::Error::other)??;
            self.file = Some(BufWriter::new(File::from_std(file)));
        }
        let file = self.file.as_mut().expect("it was opened above");
        file.write_all(&self.memory).await?;
        self.memory.clear();
        Ok(())
    }

    /// The answer: 200, or the problem that ended the stream, with the results of the events before it.
    async fn into_response(mut self, problem: Option<&ApiError>) -> Result<Response, ApiError> {
        self.memory.extend_from_slice(if self.count == 0 { b"{\"results\":[]" } else { b"]" });
        let (status, content_type) = match problem {
            None => {
                self.memory.push(b'}');
                (StatusCode::OK, "application/json")
            }
            Some(error) => {
                let problem = serde_json::to_vec(&error.problem()).expect("a problem is plain data");
                // its members follow those already written
                self.memory.push(b',');
                self.memory.extend_from_slice(&problem[1..]);
                (error.status(), PROBLEM_JSON)
            }
        };
        let body = match self.file {
            None => Body::from(self.memory),
            Some(file) => {
                Body::from_stream(read_back(file, self.memory).await.map_err(|cause| unwritable(&cause))?)
            }
        };
        Ok((status, [(CONTENT_TYPE, content_type)], body).into_response())
    }
}

/// Reads the file from its beginning, then `rest`.
async fn read_back(
    mut file: BufWriter<File>,
    rest: Vec<u8>,
) -> std::io::Result<impl Stream<Item = std::io::Result<Bytes>>> {
    file.flush().await?;
    let mut file = file.into_inner();
    file.seek(SeekFrom::Start(0)).await?;
    Ok(ReaderStream::new(file).chain(stream::once(async { Ok(Bytes::from(rest)) })))
}

/// The events are stored, but there is no disk space for the answer.
fn unwritable(cause: &std::io::Error) -> ApiError {
    error!(error = %cause, "cannot write the results of a batch to a temporary file");
    ApiError::unavailable(
        "there is no disk space for the results; send the events again, with their event_id, in smaller batches",
    )
}
