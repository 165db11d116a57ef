//! A server on a unix socket, and a client that says what a test tells it to.

mod exports;
mod handshake;
mod hostile;
mod strangers;
mod transmission;

use super::*;
use crate::block::BlockNode;
use crate::block::bitmaps::{BitmapName, NewBitmap};
use crate::block::memory::{MemoryDisk, Script};
use crate::block::nbd::protocol::*;
use crate::block::raw::{Cache, RawFile};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};

/// A generous limit for anything that should take moments.
const SOON: Duration = Duration::from_secs(30);
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

struct Fixture {
    server: Option<NbdServer>,
    deleted: Receiver<String>,
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn with(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("nbd.sock")).unwrap();
        let (tell, deleted) = channel();
        let on_deleted = move |id: &str| tell.send(id.to_owned()).unwrap();
        let server = NbdServer::start(Listener::Unix(listener), limits, Arc::new(on_deleted));
        Self { server: Some(server.unwrap()), deleted, folder }
    }

    /// A server with one writable export `d` of a disk in memory.
    fn of_memory(len_bytes: u64) -> (Self, Arc<BlockNode>, Arc<Script>) {
        let disk = MemoryDisk::new(len_bytes);
        let script = disk.script();
        let node = Arc::new(BlockNode::new("d", Box::new(disk)));
        let fixture = Self::new();
        fixture.server().add(export("d", &node, true)).unwrap();
        (fixture, node, script)
    }

    fn server(&self) -> &NbdServer {
        self.server.as_ref().unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// As libnbd's tools name an export.
    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// A raw image in a file.
    fn image(&self, name: &str, len_bytes: u64) -> Arc<BlockNode> {
        let path = self.path(name);
        std::fs::File::create(&path).unwrap().set_len(len_bytes).unwrap();
        let raw = RawFile::open(&path, false, Cache::Writeback).unwrap();
        Arc::new(BlockNode::new(name, Box::new(raw)))
    }

    /// Waits until the server has `count` connections.
    fn wait_for_connections(&self, count: usize) {
        let shared = &self.server().shared;
        let is_other = |open: &mut HashMap<u64, Arc<Socket>>| open.len() != count;
        let waited = shared.ended.wait_timeout_while(lock(&shared.connections), SOON, is_other);
        let (open, timeout) = waited.unwrap();
        assert!(!timeout.timed_out(), "{} connections, not {count}", open.len());
    }
}

fn export(name: &str, node: &Arc<BlockNode>, writable: bool) -> Export {
    let (node, name) = (node.clone(), name.to_owned());
    let (id, description) = (name.clone(), String::new());
    Export { id, name, description, node, writable, bitmaps: Vec::new() }
}

fn add_bitmap(node: &BlockNode, name: &str, recording: bool) -> BitmapName {
    let name = BitmapName::new(name).unwrap();
    let new = NewBitmap { name: name.clone(), granularity: 64 * KIB, persistent: false, recording };
    node.bitmaps().add(new).unwrap();
    name
}

/// A client. Whatever takes too long fails its test.
struct Client {
    socket: UnixStream,
    structured: bool,
}

/// What a request was answered with, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Data(u64, Vec<u8>),
    Hole(u64, u32),
    Status(u32, Vec<Extent>),
    Error(u32, Option<u64>),
}

impl Client {
    /// Connected, and not a byte of it read.
    fn connect(socket: &Path) -> Self {
        let socket = UnixStream::connect(socket).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.set_write_timeout(Some(SOON)).unwrap();
        Self { socket, structured: false }
    }

    /// Past the greeting.
    fn greeted(socket: &Path) -> Self {
        let mut client = Self::connect(socket);
        let greeting = Greeting::decode(&client.array()).unwrap();
        assert_eq!(greeting.flags, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        client.put(&[0, 0, 0, 3]);
        client
    }

    /// Uses an export with structured replies, and these contexts.
    fn using(socket: &Path, export: &str, contexts: &[&str]) -> Self {
        let mut client = Self::greeted(socket);
        assert_eq!(client.option(option::STRUCTURED_REPLY, &[]), [(reply::ACK, Vec::new())]);
        client.structured = true;
        if !contexts.is_empty() {
            let replies = client.select(export, contexts);
            assert_eq!(replies.len(), contexts.len() + 1, "{replies:?}");
        }
        client.go(export);
        client
    }

    /// Uses an export without structured replies.
    fn simple(socket: &Path, export: &str) -> Self {
        let mut client = Self::greeted(socket);
        client.go(export);
        client
    }

    fn select(&mut self, export: &str, contexts: &[&str]) -> Vec<(u32, Vec<u8>)> {
        let queries = contexts.iter().map(|&name| name.to_owned()).collect();
        let request = MetaRequest { export: export.to_owned(), queries };
        self.option(option::SET_META_CONTEXT, &request.encode())
    }

    fn go(&mut self, export: &str) {
        let request = InfoRequest { export: export.to_owned(), wanted: vec![info::BLOCK_SIZE] };
        let replies = self.option(option::GO, &request.encode());
        assert_eq!(replies.last(), Some(&(reply::ACK, Vec::new())), "{replies:?}");
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn bytes(&mut self, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn put(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// Whether the server has closed the connection, after anything that it has sent before.
    fn is_closed(&mut self) -> bool {
        match self.socket.read_to_end(&mut Vec::new()) {
            Ok(_) => true,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }

    /// Replies to an option, up to the last.
    fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let len = u32::try_from(data.len()).unwrap();
        self.put(&OptionHeader { option, len }.encode());
        self.put(data);
        let mut replies = Vec::new();
        loop {
            let header = OptionReply::decode(&self.array()).unwrap();
            assert_eq!(header.option, option);
            let data = self.bytes(header.len);
            replies.push((header.kind, data));
            if header.is_error() || header.kind == reply::ACK {
                return replies;
            }
        }
    }

    fn ask(&mut self, flags: u16, command: u16, offset: u64, len: u32) {
        let request = Request { flags, command, cookie: offset ^ 77, offset, len };
        self.put(&request.encode());
    }

    /// The error number of a simple reply, or that of a structured one without data.
    fn verdict(&mut self) -> u32 {
        let first = self.array();
        match ReplyHeader::decode(&first).unwrap() {
            ReplyHeader::Simple(reply) => reply.error,
            ReplyHeader::Chunk => {
                let chunk = self.rest_of_chunk(&first);
                assert!(chunk.is_last());
                let payload = self.bytes(chunk.len);
                match chunk.kind {
                    chunk::NONE => 0,
                    kind => ErrorPayload::decode(kind, &payload).unwrap().errno,
                }
            }
        }
    }

    fn rest_of_chunk(&mut self, first: &[u8; SimpleReply::BYTES]) -> ChunkHeader {
        let rest: [u8; 4] = self.array();
        ChunkHeader::decode(&[&first[..], &rest].concat().try_into().unwrap()).unwrap()
    }

    /// All parts of a structured reply.
    fn parts(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        loop {
            let first = self.array();
            assert_eq!(ReplyHeader::decode(&first), Ok(ReplyHeader::Chunk));
            let header = self.rest_of_chunk(&first);
            let payload = self.bytes(header.len);
            match header.kind {
                chunk::NONE => assert!(header.is_last()),
                chunk::OFFSET_DATA => {
                    let offset = Fields::new("data", &payload).u64().unwrap();
                    parts.push(Part::Data(offset, payload[8..].to_vec()));
                }
                chunk::OFFSET_HOLE => {
                    let (offset, len) = decode_hole(&payload).unwrap();
                    parts.push(Part::Hole(offset, len));
                }
                chunk::BLOCK_STATUS => {
                    let (context, extents) = decode_status(&payload).unwrap();
                    parts.push(Part::Status(context, extents));
                }
                kind => {
                    let error = ErrorPayload::decode(kind, &payload).unwrap();
                    assert!(!error.message.is_empty());
                    parts.push(Part::Error(error.errno, error.offset));
                }
            }
            if header.is_last() {
                return parts;
            }
        }
    }

    /// What a read with this connection's kind of reply yields, or its error number.
    fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        self.ask(0, command::READ, offset, len);
        if !self.structured {
            return match self.verdict() {
                0 => Ok(self.bytes(len)),
                error => Err(error),
            };
        }
        let (mut bytes, mut at) = (Vec::new(), offset);
        for part in self.parts() {
            let (start, data) = match part {
                Part::Data(start, data) => (start, data),
                Part::Hole(start, len) => (start, vec![0; usize::try_from(len).unwrap()]),
                Part::Error(errno, _) => return Err(errno),
                other => panic!("{other:?}"),
            };
            assert_eq!(start, at, "parts are in order");
            at += data.len() as u64;
            bytes.extend(data);
        }
        assert_eq!(at, offset + u64::from(len));
        Ok(bytes)
    }

    fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        self.ask(flags, command::WRITE, offset, u32::try_from(data.len()).unwrap());
        self.put(data);
        self.verdict()
    }

    fn command(&mut self, flags: u16, command: u16, offset: u64, len: u32) -> u32 {
        self.ask(flags, command, offset, len);
        self.verdict()
    }

    fn status(&mut self, flags: u16, offset: u64, len: u32) -> Vec<Part> {
        self.ask(flags, command::BLOCK_STATUS, offset, len);
        self.parts()
    }
}

/// Bytes that differ from place to place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at / 512 * 7 + at) % 251).unwrap() | 1).collect()
}
