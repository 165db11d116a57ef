//! Between a source and a destination, frame by frame: what they say to each other is seen, changed or kept
//! from them.

use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

const HEADER_BYTES: usize = 8;

/// Kinds of frames, as `migration`'s `wire` numbers them.
pub mod kind {
    pub const MACHINE: u8 = 2;
    pub const GO: u8 = 5;
    pub const RUNNING: u8 = 11;
}

/// What becomes of a frame's payload. With nothing, its connection is cut instead.
pub type Change = fn(u8, Vec<u8>) -> Option<Vec<u8>>;

/// Everything as it is.
pub fn unchanged(_: u8, payload: Vec<u8>) -> Option<Vec<u8>> {
    Some(payload)
}

/// One frame: its header without the length at its end, and what it carries.
fn frame(from: &mut TcpStream) -> std::io::Result<([u8; 4], Vec<u8>)> {
    let mut header = [0; HEADER_BYTES];
    from.read_exact(&mut header)?;
    let len = header[4..].iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    let mut payload = vec![0; len];
    from.read_exact(&mut payload)?;
    Ok(([header[0], header[1], header[2], header[3]], payload))
}

#[expect(clippy::little_endian_bytes, reason = "a codec of frame headers")]
fn send(to: &mut TcpStream, head: [u8; 4], payload: &[u8]) -> Result<()> {
    let mut bytes = head.to_vec();
    bytes.extend(u32::try_from(payload.len())?.to_le_bytes());
    bytes.extend(payload);
    Ok(to.write_all(&bytes)?)
}

fn pass(mut from: TcpStream, mut to: TcpStream, change: Option<Change>) {
    // Without it a small frame waits for the acknowledgement of the one before.
    let _ = to.set_nodelay(true);
    if let Some(change) = change {
        pass_frames(&mut from, &mut to, change);
    } else {
        // An end like any other.
        let _ = std::io::copy(&mut from, &mut to);
    }
    // The other side has to notice; it may have gone already.
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

fn pass_frames(from: &mut TcpStream, to: &mut TcpStream, change: Change) {
    while let Ok((head, payload)) = frame(from) {
        let Some(changed) = change(head[0], payload) else { break };
        if send(to, head, &changed).is_err() {
            break;
        }
    }
}

/// Stands in front of `destination`, a `tcp:` address; returns its own.
pub fn between(destination: &str, forth: Change, back: Change) -> Result<String> {
    let there = destination.strip_prefix("tcp:").context("not a tcp: address")?.to_owned();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let here = format!("tcp:{}", listener.local_addr()?);
    std::thread::spawn(move || {
        // The first connection is the control connection; pages go by others, as they are.
        for (index, from) in listener.incoming().enumerate() {
            let (Ok(from), Ok(to)) = (from, TcpStream::connect(&there)) else { return };
            let (Ok(back_from), Ok(back_to)) = (to.try_clone(), from.try_clone()) else { return };
            let changes = (index == 0).then_some((forth, back));
            std::thread::spawn(move || pass(from, to, changes.map(|(forth, _)| forth)));
            std::thread::spawn(move || pass(back_from, back_to, changes.map(|(_, back)| back)));
        }
    });
    Ok(here)
}
