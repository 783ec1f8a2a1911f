//! A TCP proxy that can stall, swallow answers, and cut.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;

/// Where connections lead.
#[derive(Debug, Clone)]
pub enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// What the proxy does with the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Carries all.
    Pass,
    /// Carries nothing, and keeps what comes.
    Stall,
    /// Carries what is asked, and throws the answers away.
    SwallowAnswers,
}

#[derive(Debug, Clone, Copy)]
struct State {
    mode: Mode,
    /// Connections that were made before are cut.
    generation: u64,
}

/// A running proxy.
#[derive(Debug)]
pub struct Proxy {
    pub address: SocketAddr,
    state: watch::Sender<State>,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1.
    pub async fn start(target: Target) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (state, watched) = watch::channel(State { mode: Mode::Pass, generation: 0 });
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(carry(stream, target.clone(), watched.clone()));
            }
        });
        Ok(Self { address, state })
    }

    /// From now on.
    pub fn set(&self, mode: Mode) {
        self.state.send_modify(|state| state.mode = mode);
    }

    /// For so long; then all connections are cut, and new ones pass.
    pub async fn disturb(&self, mode: Mode, length: Duration) {
        self.set(mode);
        tokio::time::sleep(length).await;
        self.cut();
        self.set(Mode::Pass);
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        self.state.send_modify(|state| state.generation += 1);
    }
}

async fn carry(client: TcpStream, target: Target, state: watch::Receiver<State>) {
    let generation = state.borrow().generation;
    let mut cut = state.clone();
    let (client_read, client_write) = client.into_split();
    let pumps = async {
        match target {
            Target::Tcp(address) => {
                let (read, write) = TcpStream::connect(address).await?.into_split();
                both(client_read, client_write, read, write, state).await
            }
            Target::Unix(path) => {
                let (read, write) = UnixStream::connect(path).await?.into_split();
                both(client_read, client_write, read, write, state).await
            }
        }
    };
    tokio::select! {
        // either way both ends are closed
        _ = pumps => {}
        _ = cut.wait_for(|state| state.generation != generation) => {}
    }
}

async fn both(
    client_read: impl AsyncRead + Unpin,
    client_write: impl AsyncWrite + Unpin,
    server_read: impl AsyncRead + Unpin,
    server_write: impl AsyncWrite + Unpin,
    state: watch::Receiver<State>,
) -> io::Result<()> {
    tokio::select! {
        ended = pump(client_read, server_write, state.clone(), false) => ended,
        ended = pump(server_read, client_write, state, true) => ended,
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut state: watch::Receiver<State>,
    are_answers: bool,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        let mode = state.wait_for(|state| state.mode != Mode::Stall).await.map_err(io::Error::other)?.mode;
        if mode == Mode::SwallowAnswers && are_answers {
            continue;
        }
        to.write_all(&buffer[..read]).await?;
    }
}
