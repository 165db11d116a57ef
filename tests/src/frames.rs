//! Between a source and a destination, frame by frame: what they say to each other is seen, changed, held back
//! or kept from them.

use crate::process::SOON;
use anyhow::{Context, Result};
use socket2::{SockAddr, Socket, Type};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

const HEADER_BYTES: usize = 8;

/// Kinds of frames, as `migration`'s `wire` numbers them.
pub mod kind {
    pub const MACHINE: u8 = 2;
    pub const GO: u8 = 5;
    pub const READY: u8 = 10;
    pub const RUNNING: u8 = 11;
}

/// What becomes of a frame's payload. With nothing, its connection is cut instead.
pub trait Change: Fn(u8, Vec<u8>) -> Option<Vec<u8>> + Send + Sync + 'static {}

impl<F: Fn(u8, Vec<u8>) -> Option<Vec<u8>> + Send + Sync + 'static> Change for F {}

/// Everything as it is.
pub fn unchanged(_: u8, payload: Vec<u8>) -> Option<Vec<u8>> {
    Some(payload)
}

/// A frame that is held back, and all that comes after it. Dropping this lets them pass.
pub struct Held {
    came: Receiver<()>,
    cut: Sender<()>,
}

impl Held {
    /// Waits until the frame has come.
    pub fn wait(&self) -> Result<()> {
        self.came.recv_timeout(SOON).context("no such frame has come")
    }

    /// Cuts the connection: it never arrives.
    pub fn cut(self) {
        // The connection may have ended.
        let _ = self.cut.send(());
    }
}

/// Holds back the first frame for which `which` says so, by its kind.
pub fn holding(which: impl Fn(u8) -> bool + Send + Sync + 'static) -> (impl Change, Held) {
    let ((tell, came), (cut, released)) = (channel(), channel());
    let released = Mutex::new(released);
    let change = move |kind, payload| {
        if which(kind) {
            // Nobody may be waiting for it any more.
            let _ = tell.send(());
            if released.lock().unwrap_or_else(PoisonError::into_inner).recv() == Ok(()) {
                return None;
            }
        }
        Some(payload)
    };
    (change, Held { came, cut })
}

/// One frame: its header without the length at its end, and what it carries.
fn frame(mut from: &Socket) -> std::io::Result<([u8; 4], Vec<u8>)> {
    let mut header = [0; HEADER_BYTES];
    from.read_exact(&mut header)?;
    let len = header[4..].iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    let mut payload = vec![0; len];
    from.read_exact(&mut payload)?;
    Ok(([header[0], header[1], header[2], header[3]], payload))
}

#[expect(clippy::little_endian_bytes, reason = "a codec of frame headers")]
fn send(mut to: &Socket, head: [u8; 4], payload: &[u8]) -> Result<()> {
    let mut bytes = head.to_vec();
    bytes.extend(u32::try_from(payload.len())?.to_le_bytes());
    bytes.extend(payload);
    Ok(to.write_all(&bytes)?)
}

fn pass(from: &Socket, to: &Socket, change: Option<&dyn Change>) {
    // Without it a small frame waits for the acknowledgement of the one before. Unix sockets do not know it.
    let _ = to.set_tcp_nodelay(true);
    if let Some(change) = change {
        pass_frames(from, to, change);
    } else {
        // An end like any other.
        let _ = std::io::copy(&mut &*from, &mut &*to);
    }
    // The other side has to notice; it may have gone already.
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

fn pass_frames(from: &Socket, to: &Socket, change: &dyn Change) {
    while let Ok((head, payload)) = frame(from) {
        let Some(changed) = change(head[0], payload) else { break };
        if send(to, head, &changed).is_err() {
            break;
        }
    }
}

fn address(text: &str) -> Result<SockAddr> {
    if let Some(path) = text.strip_prefix("unix:") {
        return Ok(SockAddr::unix(path)?);
    }
    let at: SocketAddr = text.strip_prefix("tcp:").context("not an address")?.parse()?;
    Ok(at.into())
}

fn connect(to: &SockAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(to.domain(), Type::STREAM, None)?;
    socket.connect(to)?;
    Ok(socket)
}

/// Stands in front of `destination`, an address whose host is a number; returns its own.
pub fn between(destination: &str, forth: impl Change, back: impl Change) -> Result<String> {
    let there = address(destination)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let here = format!("tcp:{}", listener.local_addr()?);
    let (forth, back): (Arc<dyn Change>, Arc<dyn Change>) = (Arc::new(forth), Arc::new(back));
    std::thread::spawn(move || {
        // The first connection is the control connection; pages go by others, as they are.
        for (index, from) in listener.incoming().enumerate() {
            let (Ok(from), Ok(to)) = (from.map(Socket::from), connect(&there)) else { return };
            let (Ok(back_from), Ok(back_to)) = (to.try_clone(), from.try_clone()) else { return };
            let changes = (index == 0).then(|| (forth.clone(), back.clone()));
            let (forth, back) = changes.unzip();
            std::thread::spawn(move || pass(&from, &to, forth.as_deref()));
            std::thread::spawn(move || pass(&back_from, &back_to, back.as_deref()));
        }
    });
    Ok(here)
}
