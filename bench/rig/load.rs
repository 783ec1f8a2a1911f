//! A lean generator of load: requests that are written out beforehand, on connections that are kept.
//!
//! It shares the machine with what it measures.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

use crate::report::figures::per_second;

/// A kept connection.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    pub async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(4096) })
    }

    /// Sends a request and reads the whole answer, whose status it returns.
    pub async fn exchange(&mut self, request: &[u8]) -> anyhow::Result<u16> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        let mut end = None;
        while !end.is_some_and(|end: End| end.is_reached(&self.buffer)) {
            ensure!(self.stream.read_buf(&mut self.buffer).await? > 0, "the connection was closed");
            end = end.or_else(|| End::of(&self.buffer));
        }
        status(&self.buffer)
    }

    /// Requests a URL and returns the body.
    pub async fn get(&mut self, path: &str) -> anyhow::Result<&[u8]> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
        accepted(self.exchange(request.as_bytes()).await?)?;
        Ok(&self.buffer[header_length(&self.buffer).unwrap_or_default()..])
    }
}

/// Where an answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// After so many bytes, its header among them.
    At(usize),
    /// With an empty chunk.
    EmptyChunk,
}

impl End {
    /// What the header says; `None` while it is not complete.
    fn of(answer: &[u8]) -> Option<Self> {
        let header_length = header_length(answer)?;
        let header = std::str::from_utf8(&answer[..header_length]).ok()?;
        let body =
            header.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        Some(body.map_or(Self::EmptyChunk, |body| Self::At(header_length + body)))
    }

    fn is_reached(self, answer: &[u8]) -> bool {
        match self {
            Self::At(length) => answer.len() >= length,
            Self::EmptyChunk => answer.ends_with(b"\r\n0\r\n\r\n"),
        }
    }
}

fn header_length(answer: &[u8]) -> Option<usize> {
    Some(answer.windows(4).position(|window| window == b"\r\n\r\n")? + 4)
}

fn status(answer: &[u8]) -> anyhow::Result<u16> {
    let digits = answer.get(9..12).and_then(|digits| std::str::from_utf8(digits).ok());
    digits.and_then(|digits| digits.parse().ok()).context("the answer is not HTTP")
}

/// Sends one request `count` times over many connections, each time as soon as the answer before is there. Answers how
/// many a second.
pub async fn at_full_speed(
    address: SocketAddr,
    connections: usize,
    count: usize,
    request: Vec<u8>,
) -> anyhow::Result<f64> {
    let (request, left) = (Arc::new(request), Arc::new(AtomicUsize::new(count)));
    let mut lanes = JoinSet::new();
    let begun = Instant::now();
    for _ in 0..connections {
        let (request, left) = (request.clone(), left.clone());
        lanes.spawn(async move {
            let mut connection = Connection::open(address).await?;
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
            {
                accepted(connection.exchange(&request).await?)?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(lane) = lanes.join_next().await {
        lane??;
    }
    Ok(per_second(count, begun))
}

fn accepted(status: u16) -> anyhow::Result<()> {
    ensure!((200..300).contains(&status), "the answer was {status}");
    Ok(())
}

/// Times at which requests are due, whatever became of those before.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    begin: Instant,
    interval: Duration,
}

impl Schedule {
    pub fn from_now(per_second: f64) -> Self {
        Self { begin: Instant::now(), interval: Duration::from_secs_f64(1.0 / per_second) }
    }

    pub fn due(&self, number: usize) -> Instant {
        self.begin + self.interval.saturating_mul(u32::try_from(number).unwrap_or(u32::MAX))
    }
}

/// Sends `count` requests at the times of a schedule. Answers how long each took from the time at which it was due, in
/// milliseconds, in no order.
pub async fn on_schedule(
    address: SocketAddr,
    connections: usize,
    count: usize,
    schedule: Schedule,
    request: impl Fn(usize) -> Vec<u8> + Send + Sync + 'static,
) -> anyhow::Result<Vec<f64>> {
    let (due, arriving) = mpsc::unbounded_channel();
    // a thread of its own: the runtime's timers are of whole milliseconds
    let pacer = tokio::task::spawn_blocking(move || {
        for number in 0..count {
            std::thread::sleep(schedule.due(number).saturating_duration_since(Instant::now()));
            if due.send(number).is_err() {
                return;
            }
        }
    });
    let (request, arriving) = (Arc::new(request), Arc::new(Mutex::new(arriving)));
    let mut lanes = JoinSet::new();
    for _ in 0..connections {
        let (request, arriving) = (request.clone(), arriving.clone());
        lanes.spawn(async move {
            let mut connection = Connection::open(address).await?;
            let mut latencies = Vec::new();
            loop {
                let next = arriving.lock().await.recv().await;
                let Some(number) = next else { return anyhow::Ok(latencies) };
                accepted(connection.exchange(&request(number)).await?)?;
                latencies.push(schedule.due(number).elapsed().as_secs_f64() * 1e3);
            }
        });
    }
    let mut latencies = Vec::with_capacity(count);
    while let Some(lane) = lanes.join_next().await {
        latencies.extend(lane??);
    }
    pacer.await?;
    Ok(latencies)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_where_its_header_says() {
        let answer = b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\nok";
        assert_eq!(End::of(answer), Some(End::At(answer.len())));
        assert_eq!(End::of(&answer[..30]), None);
        assert_eq!(status(answer).unwrap(), 201);
        let chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
        let end = End::of(chunked).unwrap();
        assert!(end.is_reached(chunked) && !end.is_reached(&chunked[..chunked.len() - 5]));
        assert!(status(b"SSH-2").is_err());
    }

    #[test]
    fn a_schedule_does_not_drift() {
        let schedule = Schedule::from_now(1_000.0);
        assert_eq!(schedule.due(2_500) - schedule.due(0), Duration::from_millis(2_500));
    }
}
