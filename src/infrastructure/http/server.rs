//! The accept loop. Unlike `axum::serve`, it bounds the number of connections, and the time that a header and an answer may
//! take.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tower_http::add_extension::AddExtension;
use tracing::{debug, warn};

/// The most connections at a time; more wait to be accepted.
const CONNECTIONS_MAX: usize = 4_096;
/// How many may wait to be accepted; the system may set a lower limit (`net.core.somaxconn`). A caller that exceeds it tries
/// again after a second.
const WAITING_MAX: u32 = 4_096;
/// How long a request's header may take to arrive, and how long a connection may be idle.
const HEADER_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a caller may take to read the next part of an answer.
const WRITE_TIME_MAX: Duration = Duration::from_secs(30);
/// The largest header of a request.
const HEADER_BYTES_MAX: usize = 32 * 1024;
/// How long requests that are under way may take to finish after `stop`.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(10);
/// The wait after a failed accept, for example because the process has run out of file descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Listens with a long queue of waiting connections.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // or the connections of a process that has just ended would keep the address occupied
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(WAITING_MAX)
}

/// Serves until `stop`, then waits until requests that are under way have finished.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &room) => accepted,
        };
        match accepted {
            Ok((stream, peer, permit)) => serve_connection(stream, peer, permit, router.clone(), &graceful),
            Err(error) => {
                warn!(%error, "cannot accept a connection; trying again");
                sleep(ACCEPT_AGAIN).await;
            }
        }
    }
    drop(listener);
    if timeout(DRAIN_TIME_MAX, graceful.shutdown()).await.is_err() {
        warn!("requests were still under way after the time limit and are cut off");
    }
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let permit = room.clone().acquire_owned().await.expect("the semaphore is never closed");
    let (stream, peer) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, peer, permit))
}

fn serve_connection(
    stream: TcpStream,
    peer: SocketAddr,
    permit: OwnedSemaphorePermit,
    router: Router,
    graceful: &GracefulShutdown,
) {
    // against callers that never read the answer
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIME_MAX));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME_MAX)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(
            TokioIo::new(Box::pin(stream)),
            TowerToHyperService::new(AddExtension::new(router, ConnectInfo(peer))),
        );
    let connection = graceful.watch(connection);
    tokio::spawn(async move {
        let _permit = permit;
        // callers may hang up at any time
        if let Err(error) = connection.await {
            debug!(%error, "a connection ended early");
        }
    });
}
