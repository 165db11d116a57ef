//! One request after the other, as a worker of a connection serves them.

use super::exports::{Context, Exported};
use super::handshake::MIN_BLOCK_BYTES;
use super::status;
use super::stream::{Input, Output};
use crate::block::BlockNode;
use crate::block::aligned::AlignedBuffer;
use crate::block::backend::Content;
use crate::block::nbd::protocol::{
    CHUNK_DONE, ChunkHeader, ErrorPayload, MAX_PAYLOAD_BYTES, Request, SimpleReply, chunk, command,
    command_flag as flag, encode_data_chunk, encode_hole_chunk, encode_status, errno, errno_of,
};
use crate::lock;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// Most data in memory for one request.
pub const PIECE_BYTES: usize = 256 << 10;
/// A shorter hole is sent as zeroes.
const MIN_HOLE_BYTES: u64 = 64 << 10;

/// Why a request fails.
pub struct Refusal {
    errno: u32,
    why: String,
    /// Where, if that is known.
    offset: Option<u64>,
}

impl Refusal {
    fn new(errno: u32, why: impl Into<String>) -> Self {
        Self { errno, why: why.into(), offset: None }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::new(errno_of(&error), error.to_string())
    }
}

/// A client that uses an export, and how it is answered.
pub struct Client {
    export: Arc<Exported>,
    /// Whether it has asked for structured replies.
    structured: bool,
    /// The metadata contexts that it has chosen, with their ids.
    contexts: Vec<(u32, Context)>,
    output: Mutex<Output>,
}

impl Client {
    /// As it has chosen in its handshake.
    pub fn new(
        export: Arc<Exported>,
        structured: bool,
        contexts: Vec<(u32, Context)>,
        output: Output,
    ) -> Self {
        Self { export, structured, contexts, output: Mutex::new(output) }
    }

    /// What it is sent. Kept for the length of a reply, or of a chunk of it.
    fn output(&self) -> MutexGuard<'_, Output> {
        lock(&self.output)
    }
}

/// A request that has been received.
pub enum Received {
    /// To be served.
    Request(Request),
    /// A write of more than a piece, and what has become of it.
    Written(Request, io::Result<()>),
    /// To be refused.
    Refused(Request, Refusal),
}

/// Serves requests of a connection, one at a time.
pub struct Worker<'s> {
    client: &'s Client,
    /// The data of a small write while it waits to be served.
    buffer: AlignedBuffer,
    /// Known to be allocated: need not be asked about again, since data may always be sent as data.
    data: Range<u64>,
}

impl<'s> Worker<'s> {
    /// One more worker of this connection.
    pub fn new(client: &'s Client) -> Self {
        // Its pages take no memory until they are used.
        Self { client, buffer: AlignedBuffer::new(PIECE_BYTES), data: 0..0 }
    }

    fn node(&self) -> &'s BlockNode {
        &self.client.export.node
    }

    fn output(&self) -> MutexGuard<'s, Output> {
        self.client.output()
    }

    /// Receives the next request, with its data. `None` if the client leaves or the export ends.
    ///
    /// # Errors
    /// If the client breaks the protocol or cannot be reached.
    pub fn receive(&mut self, input: &mut Input) -> io::Result<Option<Received>> {
        if input.at_end()? {
            return Ok(None);
        }
        let broken = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        let request = Request::decode(&input.array()?);
        let request = request.map_err(|why| broken(why.to_string()))?;
        if self.client.export.is_ending() || request.command == command::DISCONNECT {
            return Ok(None);
        }
        let is_write = request.command == command::WRITE;
        if is_write && request.len > MAX_PAYLOAD_BYTES {
            return Err(broken(format!("a write of {} bytes", request.len)));
        }
        let len = usize::try_from(request.len).map_err(io::Error::other)?;
        Ok(Some(match self.check(request) {
            Err(refusal) => {
                if is_write {
                    self.skip(input, request.len)?;
                }
                Received::Refused(request, refusal)
            }
            Ok(()) if is_write && len > PIECE_BYTES => {
                Received::Written(request, self.write_in_pieces(input, request)?)
            }
            Ok(()) => {
                if is_write {
                    input.receive(&mut self.buffer[..len])?;
                }
                Received::Request(request)
            }
        }))
    }

    /// Serves what has been received last.
    ///
    /// # Errors
    /// If the client cannot be reached, or must not be: the connection ends.
    pub fn serve(&mut self, received: Received) -> io::Result<()> {
        let (request, done) = match received {
            Received::Refused(request, refusal) => return self.refuse(request, refusal),
            Received::Written(request, written) => (request, written),
            Received::Request(request) => match request.command {
                command::READ if self.client.structured && request.flags & flag::DF == 0 => {
                    return self.read_in_chunks(request);
                }
                command::READ => return self.read_whole(request),
                command::BLOCK_STATUS => return self.block_status(request),
                _ => (request, self.change(request)),
            },
        };
        let durable = request.flags & flag::FUA != 0 && self.client.export.writable;
        let done = done.and_then(|()| if durable { self.node().sync() } else { Ok(()) });
        match done {
            Ok(()) => self.acknowledge(request),
            Err(error) => self.refuse(request, error.into()),
        }
    }

    fn change(&self, request: Request) -> io::Result<()> {
        let Request { offset, len, .. } = request;
        match request.command {
            command::WRITE if len == 0 => Ok(()),
            command::WRITE => {
                let len = usize::try_from(len).map_err(io::Error::other)?;
                self.node().write_at(&self.buffer[..len], offset)
            }
            command::TRIM => self.node().discard(offset, len.into()),
            command::WRITE_ZEROES => {
                let may_unmap = request.flags & flag::NO_HOLE == 0;
                self.node().write_zeroes(offset, len.into(), may_unmap)
            }
            // There is only the flush left.
            _ => self.node().sync(),
        }
    }

    /// That a request is one that the export accepts.
    fn check(&self, request: Request) -> Result<(), Refusal> {
        let Request { flags, command, offset, len, .. } = request;
        let (allowed, changes) = match command {
            command::READ if self.client.structured => (flag::DF, false),
            command::READ | command::FLUSH => (0, false),
            command::WRITE | command::TRIM => (0, true),
            command::WRITE_ZEROES => (flag::NO_HOLE, true),
            command::BLOCK_STATUS => (flag::REQ_ONE, false),
            other => {
                return Err(Refusal::new(errno::EINVAL, format!("command {other} is not known")));
            }
        };
        let unknown = flags & !(allowed | flag::FUA);
        if unknown != 0 {
            let why = format!("command {command} does not have the flags {unknown:#x}");
            return Err(Refusal::new(errno::EINVAL, why));
        }
        if command == command::FLUSH {
            let why = "a flush has neither offset nor length";
            let right = offset == 0 && len == 0;
            return if right { Ok(()) } else { Err(Refusal::new(errno::EINVAL, why)) };
        }
        if changes && !self.client.export.writable {
            return Err(Refusal::new(errno::EPERM, "the export is read-only"));
        }
        let size = self.node().len_bytes();
        if offset.checked_add(len.into()).is_none_or(|end| end > size) {
            let full = matches!(command, command::WRITE | command::WRITE_ZEROES);
            let errno = if full { errno::ENOSPC } else { errno::EINVAL };
            let why = format!("{len} bytes at {offset} exceed the export's {size}");
            return Err(Refusal::new(errno, why));
        }
        if offset % u64::from(MIN_BLOCK_BYTES) != 0 || len % MIN_BLOCK_BYTES != 0 {
            let why = format!("{len} bytes at {offset} are not in blocks of {MIN_BLOCK_BYTES}");
            return Err(Refusal::new(errno::EINVAL, why));
        }
        if command == command::READ && len > MAX_PAYLOAD_BYTES {
            let why = format!("a read of {len} bytes: at most {MAX_PAYLOAD_BYTES}");
            return Err(Refusal::new(errno::EINVAL, why));
        }
        if command == command::BLOCK_STATUS && (self.client.contexts.is_empty() || len == 0) {
            let why = "block status needs a metadata context and a length";
            return Err(Refusal::new(errno::EINVAL, why));
        }
        Ok(())
    }

    /// Says that the request has succeeded, without data.
    fn acknowledge(&self, request: Request) -> io::Result<()> {
        let cookie = request.cookie;
        if !self.client.structured || request.command != command::READ {
            return self.output().send(&SimpleReply { error: 0, cookie }.encode(), &[]);
        }
        let done = ChunkHeader { flags: CHUNK_DONE, kind: chunk::NONE, cookie, len: 0 };
        self.output().send(&done.encode(), &[])
    }

    /// Says that the request has failed.
    fn refuse(&self, request: Request, refusal: Refusal) -> io::Result<()> {
        let (cookie, Refusal { errno, why, offset }) = (request.cookie, refusal);
        if !self.client.structured {
            return self.output().send(&SimpleReply { error: errno, cookie }.encode(), &[]);
        }
        let error = ErrorPayload { errno, message: why, offset };
        let payload = error.encode();
        let len = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let header = ChunkHeader { flags: CHUNK_DONE, kind: error.kind(), cookie, len };
        self.output().send(&header.encode(), &payload)
    }

    /// Receives the data of a write that is not made.
    fn skip(&mut self, input: &mut Input, len: u32) -> io::Result<()> {
        for range in pieces(0, len) {
            let len = piece_len(&range)?;
            input.receive(&mut self.buffer[..len])?;
        }
        Ok(())
    }

    /// Writes what is received. The outer error is the connection's.
    fn write_in_pieces(
        &mut self,
        input: &mut Input,
        request: Request,
    ) -> io::Result<io::Result<()>> {
        let mut written = Ok(());
        for range in pieces(request.offset, request.len) {
            let len = piece_len(&range)?;
            input.receive(&mut self.buffer[..len])?;
            if written.is_ok() {
                written = self.node().write_at(&self.buffer[..len], range.start);
            }
        }
        Ok(written)
    }

    /// Reads a piece into the buffer and returns its length.
    fn load(&mut self, range: &Range<u64>) -> io::Result<usize> {
        let len = piece_len(range)?;
        self.node().copy_at(&mut self.buffer[..len], range.start)?;
        Ok(len)
    }

    /// Replies with all data in one reply or chunk. What comes after its first piece can fail when its header has
    /// been sent.
    fn read_whole(&mut self, request: Request) -> io::Result<()> {
        let Request { cookie, offset, len, .. } = request;
        let mut pieces = pieces(offset, len);
        let Some(first) = pieces.next() else { return self.acknowledge(request) };
        let loaded = match self.load(&first) {
            Ok(loaded) => loaded,
            Err(error) => return self.refuse(request, error.into()),
        };
        let is_all = first.end == offset + u64::from(len);
        let data = &self.buffer[..loaded];
        // Nothing may come between its pieces.
        let output = self.output();
        if self.client.structured {
            let flags = if is_all { CHUNK_DONE } else { 0 };
            output.send(&encode_data_chunk(flags, cookie, offset, len), data)?;
        } else {
            output.send(&SimpleReply { error: 0, cookie }.encode(), data)?;
        }
        let mut failed = None;
        for piece in pieces {
            let len = match self.load(&piece) {
                Ok(len) => len,
                // There is no other way to tell.
                Err(error) if !self.client.structured => return Err(error),
                Err(error) => {
                    failed.get_or_insert(Refusal { offset: Some(piece.start), ..error.into() });
                    let len = piece_len(&piece)?;
                    self.buffer[..len].fill(0);
                    len
                }
            };
            output.send(&self.buffer[..len], &[])?;
        }
        drop(output);
        match failed {
            Some(refusal) => self.refuse(request, refusal),
            None if self.client.structured && !is_all => self.acknowledge(request),
            None => Ok(()),
        }
    }

    /// Replies with a chunk for each piece and each large hole.
    fn read_in_chunks(&mut self, request: Request) -> io::Result<()> {
        let Request { cookie, offset, len, .. } = request;
        let end = offset + u64::from(len);
        if len == 0 {
            return self.acknowledge(request);
        }
        let mut at = offset;
        while at < end {
            let (part, is_hole) = self.part(at..end);
            let flags = if part.end == end { CHUNK_DONE } else { 0 };
            let start = part.start;
            at = part.end;
            if is_hole {
                let len = u32::try_from(part.end - start).map_err(io::Error::other)?;
                self.output().send(&encode_hole_chunk(flags, cookie, start, len), &[])?;
                continue;
            }
            match self.load(&part) {
                Ok(loaded) => {
                    let len = u32::try_from(loaded).map_err(io::Error::other)?;
                    let header = encode_data_chunk(flags, cookie, start, len);
                    self.output().send(&header, &self.buffer[..loaded])?;
                }
                Err(error) => {
                    let refusal = Refusal { offset: Some(start), ..error.into() };
                    return self.refuse(request, refusal);
                }
            }
        }
        Ok(())
    }

    /// What is at the start of `range`: a hole, or data, which is cut to a piece.
    fn part(&mut self, range: Range<u64>) -> (Range<u64>, bool) {
        let most = range.end.min(range.start + PIECE_BYTES as u64);
        let mut at = range.start;
        while at < most {
            if self.data.contains(&at) {
                at = self.data.end;
                continue;
            }
            // What does not tell is read.
            let Ok(extent) = self.node().extent_at(at) else { break };
            let end = at.saturating_add(extent.len_bytes);
            if extent.content != Content::Zero {
                self.data = at..end;
            } else if end.min(range.end) - at >= MIN_HOLE_BYTES {
                return match at == range.start {
                    true => (at..end.min(range.end), true),
                    false => (range.start..at, false),
                };
            }
            at = end;
        }
        (range.start..most, false)
    }

    fn block_status(&mut self, request: Request) -> io::Result<()> {
        let Request { flags, cookie, offset, len, .. } = request;
        let most = if flags & flag::REQ_ONE == 0 { status::MAX_EXTENTS } else { 1 };
        let last = self.client.contexts.len() - 1;
        for (at, (id, context)) in self.client.contexts.iter().enumerate() {
            let extents = match status::extents(&self.client.export, *context, offset, len, most) {
                Ok(extents) => extents,
                Err(error) => return self.refuse(request, error.into()),
            };
            let payload = encode_status(*id, &extents);
            let len = u32::try_from(payload.len()).map_err(io::Error::other)?;
            let flags = if at == last { CHUNK_DONE } else { 0 };
            let header = ChunkHeader { flags, kind: chunk::BLOCK_STATUS, cookie, len };
            self.output().send(&header.encode(), &payload)?;
        }
        Ok(())
    }
}

/// Pieces of `len` bytes from `offset` on.
fn pieces(offset: u64, len: u32) -> impl Iterator<Item = Range<u64>> {
    let end = offset + u64::from(len);
    let starts = (offset..end).step_by(PIECE_BYTES);
    starts.map(move |start| start..end.min(start + PIECE_BYTES as u64))
}

fn piece_len(piece: &Range<u64>) -> io::Result<usize> {
    usize::try_from(piece.end - piece.start).map_err(io::Error::other)
}
