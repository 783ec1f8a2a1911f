//! `POST /webhooks/batch`: many events in one request, as an array or as a stream of lines without end.

use std::io::SeekFrom;
use std::pin::pin;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use bytes::BytesMut;
use futures_util::stream::{self, Stream, StreamExt as _};
use http_body_util::BodyExt as _;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::fs::File;
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _, BufWriter};
use tokio::time::timeout;
use tokio_util::io::ReaderStream;
use tracing::error;
use utoipa::ToSchema;
use uuid::Uuid;

use super::Api;
use super::error::{ApiError, Problem};
use super::extract::{BODY_BYTES_MAX, has_media_type, parse_json, parse_object, read_body};
use super::view::EventBody;
use super::webhooks::traceparent;

/// The most events of an array; a stream has no limit.
const ARRAY_ITEMS_MAX: usize = 1_000;
/// The largest array.
const ARRAY_BYTES_MAX: usize = 8 * 1024 * 1024;
/// How many events of one stream are on their way to the database at a time.
const STREAM_AHEAD: usize = 300;
/// How long the next part of a stream may take to arrive.
const STREAM_IDLE_MAX: Duration = Duration::from_secs(30);
/// Results up to this size are kept in memory, longer ones in a file.
const RESULTS_MEMORY_MAX: usize = 256 * 1024;

/// What became of the events of a batch.
#[derive(Serialize, ToSchema)]
pub struct BatchResults {
    /// One for each event, in order.
    results: Vec<BatchResult>,
}

/// What became of one event: a `queue_id`, or an `error`.
#[derive(Serialize, ToSchema)]
pub struct BatchResult {
    /// Its place in the batch, from 0.
    index: u64,
    /// The delivery.
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_id: Option<Uuid>,
    /// Whether the same event was accepted before, as this delivery.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    duplicate: bool,
    /// Why it was not accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Problem>,
}

/// Accept many events.
///
/// An array of at most 1,000, or `application/x-ndjson`: a stream of any length, one event a line of at most 64 KiB.
/// Each event is accepted or refused by itself; the answer comes after all that were accepted are committed.
#[utoipa::path(post, path = "/webhooks/batch", operation_id = "enqueue_batch", tag = "webhooks",
    request_body(content((Vec<EventBody> = "application/json"), (String = "application/x-ndjson"))),
    responses(
        (status = 200, description = "What became of each", body = BatchResults),
        (status = 400, description = "Not a JSON array", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "More than 1,000 events or 8 MiB", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "Not an array", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Neither of the two content types", body = Problem, content_type = "application/problem+json"),
    ))]
pub async fn enqueue_batch(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let trace = traceparent(&parts.headers);
    let mut results = Results::default();
    if has_media_type(&parts, "application/x-ndjson") {
        let lines = Lines { body, buffer: BytesMut::new(), searched: 0, skipping: false, ended: false };
        let accepted =
            lines.into_stream().map(|line| accept(&api, line, trace.clone())).buffered(STREAM_AHEAD);
        let mut accepted = pin!(accepted);
        while let Some(result) = accepted.next().await {
            results.push(result?).await?;
        }
    } else if has_media_type(&parts, "application/json") {
        let bytes = read_body(body, ARRAY_BYTES_MAX).await?;
        let items: Vec<Box<RawValue>> = parse_json(&bytes)?;
        if items.len() > ARRAY_ITEMS_MAX {
            return Err(ApiError::too_many(ARRAY_ITEMS_MAX));
        }
        let lines = items
            .into_iter()
            .map(|item| Ok(Line::Text(Bytes::from(Box::<str>::from(item).into_boxed_bytes()))));
        let accepted = lines.map(|line| accept(&api, line, trace.clone()));
        for result in futures_util::future::join_all(accepted).await {
            results.push(result?).await?;
        }
    } else {
        return Err(ApiError::unsupported_media_type("application/json or application/x-ndjson"));
    }
    results.into_response().await
}

/// Accepts one event, or says why not. Fails only if the stream itself does.
async fn accept(
    api: &Api,
    line: Result<Line, ApiError>,
    trace: Option<String>,
) -> Result<BatchResult, ApiError> {
    let accepted = match line? {
        Line::TooLong => Err(ApiError::too_large(BODY_BYTES_MAX)),
        Line::Text(text) if text.len() > BODY_BYTES_MAX => Err(ApiError::too_large(BODY_BYTES_MAX)),
        Line::Text(text) => {
            // until then it is text and no more
            let _room = api.enqueue.bulk_room(text.len()).await;
            Box::pin(async {
                let event = parse_object::<EventBody>(&text)?.into_event(trace)?;
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
    /// How much of the buffer holds no end of a line.
    searched: usize,
    /// Within a line that is too long already.
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
                // the last line need not end in a newline
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

/// The answer as it grows: in memory while it is short, then in a file without a name.
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

    async fn into_response(mut self) -> Result<Response, ApiError> {
        self.memory.extend_from_slice(if self.count == 0 { b"{\"results\":[]}" } else { b"]}" });
        let body = match self.file {
            None => Body::from(self.memory),
            Some(file) => {
                Body::from_stream(read_back(file, self.memory).await.map_err(|cause| unwritable(&cause))?)
            }
        };
        Ok(([(CONTENT_TYPE, "application/json")], body).into_response())
    }
}

/// The file from its beginning, then `rest`.
async fn read_back(
    mut file: BufWriter<File>,
    rest: Vec<u8>,
) -> std::io::Result<impl Stream<Item = std::io::Result<Bytes>>> {
    file.flush().await?;
    let mut file = file.into_inner();
    file.seek(SeekFrom::Start(0)).await?;
    Ok(ReaderStream::new(file).chain(stream::once(async { Ok(Bytes::from(rest)) })))
}

/// The events are stored, but where the answer should grow there is no room.
fn unwritable(cause: &std::io::Error) -> ApiError {
    error!(error = %cause, "the results of a batch cannot be kept in a temporary file");
    ApiError::unavailable(
        "the results do not fit on this machine; send the events again, with their event_id, in smaller parts",
    )
}
