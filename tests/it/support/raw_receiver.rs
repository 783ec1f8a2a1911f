//! A receiver that speaks bytes instead of HTTP, to break its rules.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// What one connection of a receiver gets for its request.
#[derive(Debug, Clone, Copy)]
pub enum Behaviour {
    /// This, and then whatever the client decides: it hangs up when it has enough.
    Answer(&'static [u8]),
    /// This, and the end of the connection.
    AnswerAndHangUp(&'static [u8]),
    /// The same again and again after a beginning, for ever.
    Endless {
        beginning: &'static [u8],
        again: &'static [u8],
    },
    /// The same, slowly.
    Dripping {
        beginning: &'static [u8],
        again: &'static [u8],
    },
    Reset,
    Close,
    Silence,
    /// Compressed zeros, which would be a thousand times as much.
    Bomb,
}

async fn behave(mut stream: TcpStream, behaviour: Behaviour) -> std::io::Result<()> {
    let mut request = [0; 4096];
    let _ = stream.read(&mut request).await?;
    match behaviour {
        Behaviour::Answer(answer) => {
            stream.write_all(answer).await?;
            let _ = stream.read(&mut request).await?;
        }
        Behaviour::AnswerAndHangUp(answer) => stream.write_all(answer).await?,
        Behaviour::Endless { beginning, again } => {
            stream.write_all(beginning).await?;
            let again = again.repeat(64);
            loop {
                stream.write_all(&again).await?;
            }
        }
        Behaviour::Dripping { beginning, again } => {
            stream.write_all(beginning).await?;
            loop {
                stream.write_all(again).await?;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        Behaviour::Reset => stream.set_zero_linger()?,
        Behaviour::Close => {}
        Behaviour::Silence => std::future::pending().await,
        Behaviour::Bomb => {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\n").await?;
            // a gzip header, then stored blocks that say that they are long
            stream.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3]).await?;
            for _ in 0..4_000 {
                stream.write_all(&[0; 4096]).await?;
            }
        }
    }
    Ok(())
}

/// Starts a receiver and returns its URL.
pub async fn start(behaviour: Behaviour) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(behave(stream, behaviour));
        }
    });
    url
}
