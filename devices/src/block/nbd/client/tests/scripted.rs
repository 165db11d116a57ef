//! A server that does what the test says.

use super::*;
use crate::block::nbd::protocol::{
    BlockSizes, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Greeting, Info, MetaContext, OptionHeader,
    OptionReply, Request, SimpleReply, option, reply,
};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use tempfile::TempDir;

pub const DISK: u64 = 1 << 20;
/// Every command, but one connection.
pub const FLAGS: u16 = transmission_flag::HAS_FLAGS
    | transmission_flag::SEND_FLUSH
    | transmission_flag::SEND_TRIM
    | transmission_flag::SEND_WRITE_ZEROES;
/// What it calls `base:allocation`.
pub const CONTEXT: u32 = 7;

/// What a server says about its export.
#[derive(Debug, Clone, Copy)]
pub struct Said {
    pub len_bytes: u64,
    pub flags: u16,
    pub sizes: Option<BlockSizes>,
    pub structured: bool,
}

impl Default for Said {
    fn default() -> Self {
        Self { len_bytes: DISK, flags: FLAGS, sizes: None, structured: true }
    }
}

/// A listening socket, and a thread that serves its connections one after the other.
pub struct Scripted {
    pub address: NbdAddress,
    /// How each connection has ended.
    pub ends: Receiver<io::Result<()>>,
    path: PathBuf,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _folder: TempDir,
}

impl Scripted {
    /// Runs `script` with each connection and its number.
    pub fn start(
        mut script: impl FnMut(&mut Peer, usize) -> io::Result<()> + Send + 'static,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, ends) = channel();
        let over = Arc::new(AtomicBool::new(false));
        let is_over = over.clone();
        let thread = std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                if is_over.load(Ordering::SeqCst) {
                    return;
                }
                let mut peer = Peer { stream: stream.unwrap(), structured: false };
                let end = script(&mut peer, number);
                drop(peer);
                // Some tests do not look.
                let _ = sender.send(end);
            }
        });
        let thread = Some(thread);
        Self { address: unix(&path, "disk"), ends, path, over, thread, _folder: folder }
    }

    /// The same, after the handshake.
    pub fn serve(
        said: Said,
        mut script: impl FnMut(&mut Peer) -> io::Result<()> + Send + 'static,
    ) -> Self {
        Self::start(move |peer, _| {
            peer.handshake(said)?;
            script(peer)
        })
    }

    /// Waits for the end of a connection.
    pub fn end(&self) -> io::Result<()> {
        self.ends.recv_timeout(SOON).expect("a connection ends")
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // Wakes it; it may have ended already.
        drop(UnixStream::connect(&self.path));
        let ended = self.thread.take().expect("it was started").join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

/// The server's end of a connection.
pub struct Peer {
    pub stream: UnixStream,
    pub structured: bool,
}

impl Peer {
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(bytes.as_ref())
    }

    pub fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Waits until the client has closed the connection.
    pub fn drain(&mut self) -> io::Result<Vec<u8>> {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Err(error) if error.kind() != io::ErrorKind::ConnectionReset => Err(error),
            _ => Ok(rest),
        }
    }

    pub fn greet(&mut self) -> io::Result<()> {
        self.send(Greeting { flags: FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES }.encode())?;
        assert_eq!(self.take()?, [0, 0, 0, 3], "both flags");
        Ok(())
    }

    /// The next option and its data.
    pub fn option(&mut self) -> io::Result<(u32, Vec<u8>)> {
        let header = OptionHeader::decode(&self.take()?).unwrap();
        let mut data = vec![0; header.len as usize];
        self.stream.read_exact(&mut data)?;
        Ok((header.option, data))
    }

    pub fn answer(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).unwrap();
        self.send([&OptionReply { option, kind, len }.encode()[..], data].concat())
    }

    /// Answers options until `GO` comes.
    pub fn until_go(&mut self, structured: bool) -> io::Result<()> {
        self.greet()?;
        loop {
            match self.option()?.0 {
                option::STRUCTURED_REPLY if structured => {
                    self.structured = true;
                    self.answer(option::STRUCTURED_REPLY, reply::ACK, &[])?;
                }
                option::SET_META_CONTEXT => {
                    let context = MetaContext { id: CONTEXT, name: "base:allocation".into() };
                    self.answer(option::SET_META_CONTEXT, reply::META_CONTEXT, &context.encode())?;
                    self.answer(option::SET_META_CONTEXT, reply::ACK, &[])?;
                }
                option::GO => return Ok(()),
                other => self.answer(other, reply::ERR_UNSUP, b"no")?,
            }
        }
    }

    pub fn info(&mut self, info: &Info) -> io::Result<()> {
        self.answer(option::GO, reply::INFO, &info.encode())
    }

    pub fn go(&mut self, said: Said) -> io::Result<()> {
        let Said { len_bytes, flags, sizes, .. } = said;
        self.info(&Info::Export { len_bytes, flags })?;
        if let Some(sizes) = sizes {
            self.info(&Info::BlockSize(sizes))?;
        }
        self.answer(option::GO, reply::ACK, &[])
    }

    pub fn handshake(&mut self, said: Said) -> io::Result<()> {
        self.until_go(said.structured)?;
        self.go(said)
    }

    /// The next request, and what a write writes.
    pub fn request(&mut self) -> io::Result<(Request, Vec<u8>)> {
        let request = Request::decode(&self.take()?).unwrap();
        let len = if request.command == command::WRITE { request.len } else { 0 };
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        Ok((request, data))
    }

    pub fn simple(&mut self, cookie: u64, error: u32) -> io::Result<()> {
        self.send(SimpleReply { error, cookie }.encode())
    }

    /// Acknowledges requests without data until the client takes leave.
    pub fn acknowledge_all(&mut self) -> io::Result<()> {
        loop {
            let (request, _) = self.request()?;
            if request.command == command::DISCONNECT {
                return Ok(());
            }
            self.simple(request.cookie, 0)?;
        }
    }
}
