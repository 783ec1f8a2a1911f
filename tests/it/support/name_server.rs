//! A DNS server that answers as it is told (RFC 1035), with answers that nobody may keep.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

const HEADER_BYTES: usize = 12;
/// What UDP carries (RFC 1035, section 4.2.1).
const UDP_BYTES_MAX: usize = 512;
const TYPE_A: [u8; 2] = [0, 1];
/// A response, recursion available, no error.
const FOUND: [u8; 2] = [0x81, 0x80];
/// The same, but there is no such name.
const NO_SUCH_NAME: [u8; 2] = [0x81, 0x83];

/// What a look-up of a name is answered.
#[derive(Debug, Clone)]
pub enum Reply {
    /// These IPv4 addresses, and no others. The name exists even if there are none.
    Addresses(Vec<Ipv4Addr>),
    /// The same, after a while.
    After(Duration, Vec<Ipv4Addr>),
    /// There is no such name.
    NoSuchName,
    /// Nothing at all.
    Silence,
}

/// A DNS server on a port of its own; it ends with the test.
pub struct NameServer {
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl NameServer {
    /// `reply` is given a name and how many times its IPv4 addresses were looked up before.
    pub async fn start(reply: impl Fn(&str, usize) -> Reply + Send + 'static) -> Self {
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = socket.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let (mut query, mut asked) = ([0; 4096], HashMap::<String, usize>::new());
            while let Ok((length, client)) = socket.recv_from(&mut query).await {
                let Some(question) = Question::read(&query[..length]) else { continue };
                let times = asked.entry(question.name.clone()).or_default();
                let reply = reply(&question.name, *times);
                *times += usize::from(question.is_for_ipv4);
                let socket = socket.clone();
                tokio::spawn(async move {
                    if let Reply::After(delay, _) = reply {
                        tokio::time::sleep(delay).await;
                    }
                    if let Some(message) = question.answered(&reply) {
                        socket.send_to(&message, client).await.unwrap();
                    }
                });
            }
        });
        Self { address, task }
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The one question of a query.
struct Question {
    id: [u8; 2],
    name: String,
    is_for_ipv4: bool,
    /// As it came: name, type and class.
    bytes: Vec<u8>,
}

impl Question {
    fn read(query: &[u8]) -> Option<Self> {
        let (mut labels, mut at) = (Vec::new(), HEADER_BYTES);
        loop {
            let length = usize::from(*query.get(at)?);
            at += 1;
            if length == 0 {
                break;
            }
            labels.push(String::from_utf8_lossy(query.get(at..at + length)?).to_lowercase());
            at += length;
        }
        Some(Self {
            id: query.get(..2)?.try_into().ok()?,
            name: labels.join("."),
            is_for_ipv4: query.get(at..at + 2)? == TYPE_A,
            bytes: query.get(HEADER_BYTES..at + 4)?.to_vec(),
        })
    }

    fn answered(&self, reply: &Reply) -> Option<Vec<u8>> {
        let (flags, addresses) = match reply {
            Reply::Addresses(addresses) | Reply::After(_, addresses) => (FOUND, addresses.as_slice()),
            Reply::NoSuchName => (NO_SUCH_NAME, &[][..]),
            Reply::Silence => return None,
        };
        let addresses = if self.is_for_ipv4 { addresses } else { &[] };
        let count = u16::try_from(addresses.len()).unwrap().to_be_bytes();
        let mut message = [self.id, flags, [0, 1], count, [0, 0], [0, 0]].concat();
        message.extend(&self.bytes);
        for address in addresses {
            // the name of the question, IPv4, Internet, a time to live of 0, 4 bytes
            message.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
            message.extend(address.octets());
        }
        assert!(message.len() <= UDP_BYTES_MAX, "longer answers need TCP");
        Some(message)
    }
}
