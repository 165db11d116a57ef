//! A dirty bitmap in pieces, for a wire or a file.
//!
//! The bitmap's bytes are its words in order, each little-endian: bit `n` of byte `b` is granule `8 * b + n`.
//! A [`Chunk`] is a run of these bytes which starts at a word: up to [`CHUNK_BYTES`] of data, or any number of
//! zeroes as a length only. [`DirtyBitmap::chunks`] cuts a bitmap into such chunks, without gaps;
//! [`DirtyBitmap::load_chunk`] marks what a chunk has marked, so that the order of chunks and what has been
//! marked before does not matter.

use super::merge::merge_word;
use super::{BITS, DirtyBitmap, index};
use std::sync::atomic::Ordering;

const WORD_BYTES: u64 = 8;
/// Most data in one chunk; also what chunks of data are aligned to.
pub const CHUNK_BYTES: u64 = 64 << 10;
const CHUNK_WORDS: u64 = CHUNK_BYTES / WORD_BYTES;

/// A piece of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Offset in the bitmap's bytes; a multiple of 8.
    pub offset_bytes: u64,
    /// What is there.
    pub content: Content,
}

/// Content of a [`Chunk`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// So many bytes are zero; a multiple of 8.
    Zero(u64),
    /// Words, each little-endian.
    Data(Vec<u8>),
}

impl Chunk {
    /// How much of the bitmap it is.
    pub fn len_bytes(&self) -> u64 {
        match &self.content {
            Content::Zero(len_bytes) => *len_bytes,
            Content::Data(bytes) => bytes.len() as u64,
        }
    }
}

/// A chunk that does not fit the bitmap.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    #[error("a chunk of {len_bytes} bytes at {offset_bytes} does not consist of words of 8 bytes")]
    Misaligned { offset_bytes: u64, len_bytes: u64 },
    #[error("a chunk of {len_bytes} bytes is longer than {CHUNK_BYTES}")]
    TooLong { len_bytes: u64 },
    #[error(
        "a chunk of {len_bytes} bytes at {offset_bytes} is not in a bitmap of {bitmap_bytes} bytes"
    )]
    Outside { offset_bytes: u64, len_bytes: u64, bitmap_bytes: u64 },
    #[error("a chunk at {offset_bytes} marks something past the end of the disk")]
    PastEnd { offset_bytes: u64 },
}

impl DirtyBitmap {
    /// Length of its bytes.
    pub fn serialized_bytes(&self) -> u64 {
        self.word_count() * WORD_BYTES
    }

    /// All of it, in order and without gaps. What is clean is found through the summary. Marks set meanwhile
    /// may be missed.
    pub fn chunks(&self) -> impl Iterator<Item = Chunk> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let end = self.word_count();
            if at == end {
                return None;
            }
            let first = at;
            let dirty = self.next_dirty_word(at).map_or(end, |(word, _)| word);
            let content = match dirty / CHUNK_WORDS * CHUNK_WORDS {
                start if dirty < end && start <= at => {
                    at = (start + CHUNK_WORDS).min(end);
                    Content::Data(self.bytes_of(first, at))
                }
                start => {
                    at = if dirty < end { start } else { end };
                    Content::Zero((at - first) * WORD_BYTES)
                }
            };
            Some(Chunk { offset_bytes: first * WORD_BYTES, content })
        })
    }

    #[expect(clippy::little_endian_bytes, reason = "the codec")]
    fn bytes_of(&self, first: u64, end: u64) -> Vec<u8> {
        let words = &self.words[index(first)..index(end)];
        let mut bytes = vec![0; words.len() * 8];
        for (word, place) in words.iter().zip(bytes.as_chunks_mut::<8>().0) {
            *place = word.load(Ordering::SeqCst).to_le_bytes();
        }
        bytes
    }

    /// Marks what `chunk` has marked, and returns how much that is, marked before or not. A bad chunk changes
    /// nothing.
    #[expect(clippy::little_endian_bytes, reason = "the codec")]
    pub fn load_chunk(&self, chunk: &Chunk) -> Result<u64, ChunkError> {
        let (offset_bytes, len_bytes) = (chunk.offset_bytes, chunk.len_bytes());
        if !offset_bytes.is_multiple_of(WORD_BYTES) || !len_bytes.is_multiple_of(WORD_BYTES) {
            return Err(ChunkError::Misaligned { offset_bytes, len_bytes });
        }
        let bitmap_bytes = self.serialized_bytes();
        if offset_bytes.checked_add(len_bytes).is_none_or(|end| end > bitmap_bytes) {
            return Err(ChunkError::Outside { offset_bytes, len_bytes, bitmap_bytes });
        }
        let Content::Data(bytes) = &chunk.content else { return Ok(0) };
        if len_bytes > CHUNK_BYTES {
            return Err(ChunkError::TooLong { len_bytes });
        }
        let words = || bytes.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        // Only the bitmap's last word may have bits that belong to nothing.
        if offset_bytes + len_bytes == bitmap_bytes
            && words().next_back().is_some_and(|last| last & !self.last_mask() != 0)
        {
            return Err(ChunkError::PastEnd { offset_bytes });
        }
        let (mut carried, mut newly) = (0, 0);
        let first = offset_bytes / WORD_BYTES;
        for (word, bits) in (first..).zip(words()).filter(|(_, bits)| *bits != 0) {
            carried += u64::from(bits.count_ones());
            newly += merge_word(&self.words[index(word)], bits);
            let (summary, bit) = (&self.summary[index(word / BITS)], 1 << (word % BITS));
            if summary.load(Ordering::SeqCst) & bit == 0 {
                summary.fetch_or(bit, Ordering::SeqCst);
            }
        }
        self.count.fetch_add(newly, Ordering::SeqCst);
        Ok(carried)
    }

    /// The bits of the last word that stand for granules.
    fn last_mask(&self) -> u64 {
        match self.granules() % BITS {
            0 => u64::MAX,
            used => (1 << used) - 1,
        }
    }
}
