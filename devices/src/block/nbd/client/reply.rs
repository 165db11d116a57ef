//! One request's reply, put together from what arrives for it. Owned by the thread that waits for it; a
//! [`super::connection`] brings the headers. What does not fit the request ends the connection: nobody knows what
//! such a server means next.

use super::failure::{Cause, ServerError};
use super::wire::{Limit, Reader, Wire};
use crate::block::nbd::protocol::{
    self as nbd, ChunkHeader, ErrorPayload, Fields, MAX_STRING_BYTES, ProtocolError, ReplyHeader,
    SimpleReply, chunk,
};
use std::io;

/// Separate parts of a read that may have arrived at any time: a server sends them in order, or nearly so.
const MOST_PARTS: usize = 1024;
/// Errors within one reply. The first counts.
const MOST_ERRORS: usize = 16;
/// Longest block status: QEMU sends up to 128 Ki extents.
const MAX_STATUS_BYTES: u32 = 4 + (1 << 20);
/// An error number, a message with its length, and an offset.
const MAX_ERROR_BYTES: usize = 4 + 2 + MAX_STRING_BYTES + 8;

/// Header of a simple reply or of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Header {
    Simple(SimpleReply),
    Chunk(ChunkHeader),
}

impl Header {
    /// Receives the next one.
    pub fn receive(wire: &Wire, reader: &mut Reader) -> Result<Self, ReplyError> {
        let mut bytes = [0; ChunkHeader::BYTES];
        let (first, rest) = bytes.split_at_mut(SimpleReply::BYTES);
        reader.exact(wire, first, Limit::Progress)?;
        let first = first.first_chunk().expect("it was split there");
        match ReplyHeader::decode(first)? {
            ReplyHeader::Simple(simple) => Ok(Self::Simple(simple)),
            ReplyHeader::Chunk => {
                reader.exact(wire, rest, Limit::Progress)?;
                Ok(Self::Chunk(ChunkHeader::decode(&bytes)?))
            }
        }
    }

    pub fn cookie(self) -> u64 {
        match self {
            Self::Simple(simple) => simple.cookie,
            Self::Chunk(chunk) => chunk.cookie,
        }
    }

    /// The outcome, if this is all of a reply that carries no data.
    pub fn outcome_without_data(self) -> Option<Result<(), ServerError>> {
        match self {
            Self::Simple(SimpleReply { error: 0, .. }) => Some(Ok(())),
            Self::Simple(simple) => Some(Err(refusal(simple))),
            Self::Chunk(chunk) => {
                let ends = chunk.is_last() && chunk.kind == chunk::NONE && chunk.len == 0;
                ends.then_some(Ok(()))
            }
        }
    }
}

fn refusal(simple: SimpleReply) -> ServerError {
    ServerError { errno: simple.error, message: String::new(), offset: None }
}

/// What ends a connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReplyError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("a reply to request {0}, which is not in flight")]
    UnknownCookie(u64),
    #[error("a reply in chunks, which were not negotiated")]
    Unnegotiated,
    #[error("a simple reply where chunks were negotiated")]
    NotInChunks,
    #[error("a chunk of kind {kind} in the reply to a request that asks for none")]
    UnexpectedChunk { kind: u16 },
    #[error("a chunk of kind {kind} with {len} bytes")]
    ChunkLength { kind: u16, len: u32 },
    #[error(
        "data for {offset}, {len} bytes, which the request did not ask for, or which it has already"
    )]
    WrongData { offset: u64, len: u64 },
    #[error("data in more than {MOST_PARTS} parts")]
    TooManyParts,
    #[error("more than {MOST_ERRORS} errors in one reply")]
    TooManyErrors,
    #[error("a read that ends before all its data has arrived")]
    Incomplete,
    #[error("a block status of context {0}, which was not selected, or was sent already")]
    WrongContext(u32),
    #[error("a block status that is missing")]
    NoStatus,
}

impl ReplyError {
    pub fn cause(&self) -> Cause {
        match self {
            Self::Io(error) => Cause::of(error),
            other => Cause::of_protocol(other),
        }
    }
}

/// What a request asks for.
#[derive(Debug)]
pub(super) enum Answer<'a> {
    /// That it is done.
    Done,
    /// The bytes from `offset` on.
    Data { offset: u64, buffer: &'a mut [u8] },
    /// The extents of the metadata context.
    Status { context: u32, extents: &'a mut Vec<nbd::Extent> },
}

/// A reply that is arriving.
#[derive(Debug)]
pub(super) struct Reply<'a> {
    answer: Answer<'a>,
    structured: bool,
    /// Parts of the buffer that are filled: ascending, disjoint, not adjacent.
    parts: Vec<(usize, usize)>,
    has_status: bool,
    error: Option<ServerError>,
    error_count: usize,
}

impl<'a> Reply<'a> {
    pub fn new(answer: Answer<'a>, structured: bool) -> Self {
        let (parts, error) = (Vec::new(), None);
        Self { answer, structured, parts, has_status: false, error, error_count: 0 }
    }

    /// Receives what follows `header`. Returns the outcome once the reply is complete.
    pub fn receive(
        &mut self,
        header: Header,
        wire: &Wire,
        reader: &mut Reader,
    ) -> Result<Option<Result<(), ServerError>>, ReplyError> {
        match header {
            Header::Simple(simple) if simple.error != 0 => Ok(Some(Err(refusal(simple)))),
            Header::Simple(_) => match &mut self.answer {
                Answer::Done => Ok(Some(Ok(()))),
                Answer::Data { buffer, .. } if !self.structured => {
                    reader.exact(wire, buffer, Limit::Progress)?;
                    Ok(Some(Ok(())))
                }
                Answer::Data { .. } | Answer::Status { .. } => Err(ReplyError::NotInChunks),
            },
            Header::Chunk(_) if !self.structured => Err(ReplyError::Unnegotiated),
            Header::Chunk(header) => {
                self.chunk(header, wire, reader)?;
                if header.is_last() { self.finish().map(Some) } else { Ok(None) }
            }
        }
    }

    fn chunk(
        &mut self,
        header: ChunkHeader,
        wire: &Wire,
        reader: &mut Reader,
    ) -> Result<(), ReplyError> {
        let ChunkHeader { kind, len, .. } = header;
        let wrong_length = || ReplyError::ChunkLength { kind, len };
        if header.is_error() {
            if len as usize > MAX_ERROR_BYTES {
                return Err(wrong_length());
            }
            let mut payload = vec![0; len as usize];
            reader.exact(wire, &mut payload, Limit::Progress)?;
            return self.note_error(ErrorPayload::decode(kind, &payload)?);
        }
        match (kind, &mut self.answer) {
            // It can only end a reply.
            (chunk::NONE, _) if len == 0 && header.is_last() => Ok(()),
            (chunk::NONE, _) => Err(wrong_length()),
            (chunk::OFFSET_DATA, Answer::Data { offset, buffer }) => {
                let mut at = [0; 8];
                let data_len =
                    len.checked_sub(8).filter(|len| *len > 0).ok_or_else(wrong_length)?;
                reader.exact(wire, &mut at, Limit::Progress)?;
                let at = Fields::new("a chunk of data", &at).u64()?;
                let place = claim(&mut self.parts, *offset, buffer.len(), at, data_len)?;
                Ok(reader.exact(wire, &mut buffer[place], Limit::Progress)?)
            }
            (chunk::OFFSET_HOLE, Answer::Data { offset, buffer }) => {
                let mut payload = [0; 12];
                if len != 12 {
                    return Err(wrong_length());
                }
                reader.exact(wire, &mut payload, Limit::Progress)?;
                let (at, hole_len) = nbd::decode_hole(&payload)?;
                let place = claim(&mut self.parts, *offset, buffer.len(), at, hole_len)?;
                buffer[place].fill(0);
                Ok(())
            }
            (chunk::BLOCK_STATUS, Answer::Status { context, extents }) => {
                if len > MAX_STATUS_BYTES {
                    return Err(wrong_length());
                }
                let mut payload = vec![0; len as usize];
                reader.exact(wire, &mut payload, Limit::Progress)?;
                let (found, list) = nbd::decode_status(&payload)?;
                if found != *context || self.has_status {
                    return Err(ReplyError::WrongContext(found));
                }
                **extents = list;
                self.has_status = true;
                Ok(())
            }
            _ => Err(ReplyError::UnexpectedChunk { kind }),
        }
    }

    fn note_error(&mut self, payload: ErrorPayload) -> Result<(), ReplyError> {
        self.error_count += 1;
        if self.error_count > MOST_ERRORS {
            return Err(ReplyError::TooManyErrors);
        }
        let ErrorPayload { errno, message, offset } = payload;
        self.error.get_or_insert(ServerError { errno, message, offset });
        Ok(())
    }

    fn finish(&mut self) -> Result<Result<(), ServerError>, ReplyError> {
        if let Some(error) = self.error.take() {
            return Ok(Err(error));
        }
        match &self.answer {
            Answer::Data { buffer, .. } if self.parts != [(0, buffer.len())] => {
                Err(ReplyError::Incomplete)
            }
            Answer::Status { .. } if !self.has_status => Err(ReplyError::NoStatus),
            _ => Ok(Ok(())),
        }
    }
}

/// Adds `len` bytes at `at` to the `parts` of a read that asked for `asked` bytes at `offset`. Returns their place in
/// its buffer.
fn claim(
    parts: &mut Vec<(usize, usize)>,
    offset: u64,
    asked: usize,
    at: u64,
    len: u32,
) -> Result<std::ops::Range<usize>, ReplyError> {
    let wrong = || ReplyError::WrongData { offset: at, len: len.into() };
    let start = at.checked_sub(offset).and_then(|start| usize::try_from(start).ok());
    let start = start.filter(|start| *start < asked && len > 0).ok_or_else(wrong)?;
    let end = start.checked_add(len as usize).filter(|end| *end <= asked).ok_or_else(wrong)?;
    // The part before which it lies.
    let next = parts.partition_point(|(other, _)| *other < start);
    let overlaps_next = parts.get(next).is_some_and(|(other, _)| *other < end);
    let before = next.checked_sub(1).map(|before| parts[before]);
    if overlaps_next || before.is_some_and(|(_, other)| other > start) {
        return Err(wrong());
    }
    let joins_before = before.is_some_and(|(_, other)| other == start);
    let joins_next = parts.get(next).is_some_and(|(other, _)| *other == end);
    match (joins_before, joins_next) {
        (true, true) => {
            parts[next - 1].1 = parts[next].1;
            parts.remove(next);
        }
        (true, false) => parts[next - 1].1 = end,
        (false, true) => parts[next].0 = start,
        (false, false) if parts.len() == MOST_PARTS => return Err(ReplyError::TooManyParts),
        (false, false) => parts.insert(next, (start, end)),
    }
    Ok(start..end)
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "offsets in a small disk")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_byte_of_a_read_is_taken_once(chunks in prop::collection::vec((0u64..40, 0u32..12), 0..40)) {
            let (mut parts, mut taken) = (Vec::new(), [false; 32]);
            for (at, len) in chunks {
                let end = at + u64::from(len);
                let is_inside = at >= 4 && end <= 36 && len > 0;
                let is_new = is_inside && (at..end).all(|byte| !taken[byte as usize - 4]);
                let claimed = claim(&mut parts, 4, 32, at, len);
                prop_assert_eq!(claimed.is_ok(), is_new);
                if let Ok(place) = claimed {
                    prop_assert_eq!((place.start as u64 + 4, place.len()), (at, len as usize));
                    taken[place].fill(true);
                }
                prop_assert_eq!(parts == [(0, 32)], taken == [true; 32]);
            }
        }
    }

    #[test]
    fn a_read_in_too_many_scattered_parts_is_refused() {
        let mut parts = Vec::new();
        let mut claim_at = |at| claim(&mut parts, 0, 1 << 20, at, 1);
        for at in 0..MOST_PARTS as u64 {
            claim_at(2 * at).unwrap();
        }
        assert!(matches!(claim_at(4096), Err(ReplyError::TooManyParts)));
        assert!(claim_at(1).is_ok(), "what joins two parts is none of its own");
        assert!(claim_at(u64::MAX).is_err());
    }
}
