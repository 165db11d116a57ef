//! Old data in memory, between its read from the disk and its write to the target.

use super::ledger::Holding;
use crate::block::aligned::AlignedBuffer;
use crate::block::backend::{ByteRange, Content};
use crate::block::copy::{CopyError, MAX_OPERATION_BYTES, Pair};

/// What a range of the disk held at the moment that is saved.
pub(super) struct Saved {
    range: ByteRange,
    /// Its parts that are to be written; `true` for zeroes, which are not in the buffer.
    parts: Vec<(ByteRange, bool)>,
    /// From the range's start on.
    buffer: Option<AlignedBuffer>,
    /// Counts it for as long as it lives.
    _holding: Holding,
}

/// Where `part` is in a buffer that begins where `range` does.
fn place(range: ByteRange, part: ByteRange) -> std::ops::Range<usize> {
    // A range is at most as long as a buffer.
    let start = usize::try_from(part.offset_bytes - range.offset_bytes).unwrap_or(usize::MAX);
    start..start.saturating_add(usize::try_from(part.len_bytes).unwrap_or(usize::MAX))
}

impl Saved {
    /// Reads `range`, which fits `buffer`. Zeroes need not be written if the target `is_blank`.
    pub fn read(
        pair: &Pair,
        range: ByteRange,
        mut buffer: AlignedBuffer,
        is_blank: bool,
        holding: Holding,
    ) -> Result<Self, CopyError> {
        let mut parts = Vec::new();
        for (content, part) in pair.parts(range) {
            let is_zero = content == Content::Zero;
            if !is_zero {
                pair.read(part, &mut buffer[place(range, part)])?;
            }
            if !(is_zero && is_blank) {
                parts.push((part, is_zero));
            }
        }
        Ok(Self { range, parts, buffer: Some(buffer), _holding: holding })
    }

    /// What is saved.
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// Writes it to the target; after an error it can be tried again.
    pub fn write(&self, pair: &Pair) -> Result<(), CopyError> {
        for (part, is_zero) in &self.parts {
            match &self.buffer {
                Some(buffer) if !is_zero => pair.write(*part, &buffer[place(self.range, *part)])?,
                _ => pair.zero(*part)?,
            }
        }
        Ok(())
    }

    /// The buffer, if it is large enough for most operations. The data is not needed any more.
    pub fn take_operation_buffer(&mut self) -> Option<AlignedBuffer> {
        let large = self.buffer.as_ref().is_some_and(|it| it.len() as u64 >= MAX_OPERATION_BYTES);
        if large { self.buffer.take() } else { None }
    }
}
