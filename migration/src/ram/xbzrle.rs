//! XBZRLE: encodes the difference between two versions of a page, in QEMU's format. Called by `encode`
//! with the cached version, and by `decode` with the page in guest RAM. Pure: versions are `cache`'s
//! business, vector kernels `simd`'s.
//!
//! ```text
//! delta = (unchanged changed)+
//! unchanged = count                 bytes to leave alone; 0 only in the first pair
//! changed   = count, new bytes      at least one
//! count     = 7 bits, or 0x80 | low 7 bits, then high 7 bits
//! ```
//! Runs are maximal, and unchanged bytes at the end of the page are omitted. Despite the format's name
//! the new bytes are literal, so applying a delta twice is harmless.
//!
//! Three loops, each free of unpredictable branches: compare the pages into one bit per byte; list the
//! offsets at which runs end; write the runs.

use super::page::{PAGE_BYTES, Page};
use super::simd::{self, Changes, Kernel};
use std::ops::Range;

/// Longest count that takes one byte.
const SHORT_COUNT: u16 = 0x7f;
/// A short run copies this many bytes, whatever its length: one move instead of a loop.
const SHORT_RUN: usize = 16;

/// Runs encoded one by one before the vector kernel is tried again.
const RUNS_BY_HAND: usize = 8;

/// Result of encoding a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoded {
    /// The peer has this version: send nothing.
    Unchanged,
    /// The delta does not fit: send the page itself.
    Overflow,
    /// The delta is this many bytes long.
    Bytes(usize),
}

/// An invalid delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum XbzrleError {
    #[error("XBZRLE delta is empty")]
    Empty,
    /// A count or its bytes are cut off.
    #[error("XBZRLE delta ends within the run at byte {at}")]
    Truncated {
        /// Where in the delta the run begins.
        at: usize,
    },
    /// A count of more than two bytes, or of two where one would do.
    #[error("XBZRLE count at byte {at} is not in its shortest form, or too long")]
    BadCount {
        /// Where in the delta the count begins.
        at: usize,
    },
    #[error("XBZRLE run at byte {at} is empty")]
    EmptyRun {
        /// Where in the delta the run begins.
        at: usize,
    },
    /// Unchanged bytes with nothing changed after them.
    #[error("XBZRLE delta ends with unchanged bytes, at byte {at}")]
    TrailingUnchanged {
        /// Where in the delta the run begins.
        at: usize,
    },
    /// A run goes past the end of the page.
    #[error("XBZRLE run at byte {at} ends at offset {end} of a page of {PAGE_BYTES} bytes")]
    PastPage {
        /// Where in the delta the run begins.
        at: usize,
        /// Where in the page it would end.
        end: usize,
    },
}

/// Encodes pages. Keeps its buffers, so that no page allocates.
#[derive(Debug)]
pub struct Encoder {
    kernel: Kernel,
    changes: Changes,
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new(Kernel::best())
    }
}

impl Encoder {
    /// An encoder that uses `kernel`.
    pub fn new(kernel: Kernel) -> Self {
        Self { kernel, changes: Changes::default() }
    }

    /// Writes the delta from `old` to `new` to the start of `into`, whose length is the longest acceptable
    /// delta. Bytes of `into` after the delta may change as well.
    pub fn encode(&mut self, old: &Page, new: &Page, into: &mut [u8]) -> Encoded {
        simd::find_changes(self.kernel, old, new, &mut self.changes);
        let runs = self.changes.runs();
        if runs == 0 {
            return Encoded::Unchanged;
        }
        let (mut run, mut len) = (0, 0);
        while run < runs {
            (run, len) = simd::short_runs(self.kernel, &self.changes, run, new, into, len);
            // Runs that the kernel could not encode, or all without one.
            let end = runs.min(run + RUNS_BY_HAND);
            for run in run..end {
                match push(self.changes.run(run), new, into, len) {
                    Some(next) => len = next,
                    None => return Encoded::Overflow,
                }
            }
            run = end;
        }
        Encoded::Bytes(len)
    }
}

/// Writes a delta run by run, for callers that know the changed ranges.
pub struct RunWriter<'a> {
    new: &'a Page,
    into: &'a mut [u8],
    len: usize,
    /// Where the last run ended.
    offset: usize,
}

impl<'a> RunWriter<'a> {
    /// Writes a delta to `new` to the start of `into`.
    pub fn new(new: &'a Page, into: &'a mut [u8]) -> Self {
        Self { new, into, len: 0, offset: 0 }
    }

    /// Appends the changed bytes `run` of the page. Runs come in order and are not adjacent. Returns false
    /// if this one does not fit.
    pub fn changed(&mut self, run: Range<usize>) -> bool {
        let [Ok(before), Ok(start), Ok(end)] = [self.offset, run.start, run.end].map(u16::try_from)
        else {
            return false;
        };
        let run = [before, start, end];
        let Some(len) = push_long(run, self.new, self.into, self.len) else { return false };
        (self.len, self.offset) = (len, usize::from(run[2]));
        true
    }

    pub fn finish(self) -> Encoded {
        if self.len == 0 { Encoded::Unchanged } else { Encoded::Bytes(self.len) }
    }
}

/// Encodes a count. The second byte is unused if the first suffices.
fn two_bytes(count: u16) -> [u8; 2] {
    let more = u8::from(count > SHORT_COUNT) << 7;
    [(count & SHORT_COUNT) as u8 | more, ((count >> 7) & SHORT_COUNT) as u8]
}

/// Writes one pair at byte `len` of `into`; returns the offset after it, or `None` if it does not fit.
#[inline(always)]
fn push([before, start, end]: [u16; 3], new: &Page, into: &mut [u8], len: usize) -> Option<usize> {
    let (unchanged, changed) = (start - before, end - start);
    let from = usize::from(start);
    let room = into.get_mut(len..len + 3 + SHORT_RUN);
    if let (Some(room), Some(bytes)) = (room, new.get(from..from + SHORT_RUN))
        && usize::from(changed) <= SHORT_RUN
    {
        // An unused second byte is overwritten: cheaper than a mispredicted branch.
        let long = usize::from(unchanged > SHORT_COUNT);
        room[..2].copy_from_slice(&two_bytes(unchanged));
        let room = &mut room[1 + long..];
        room[0] = (changed & SHORT_COUNT) as u8;
        room[1..1 + SHORT_RUN].copy_from_slice(bytes);
        return Some(len + 2 + long + usize::from(changed));
    }
    push_long([before, start, end], new, into, len)
}

/// As [`push`], for long runs and near the ends of the page and the output.
fn push_long(
    [before, start, end]: [u16; 3],
    new: &Page,
    into: &mut [u8],
    len: usize,
) -> Option<usize> {
    let len = append(short_form(&two_bytes(start - before)), into, len)?;
    let len = append(short_form(&two_bytes(end - start)), into, len)?;
    append(&new[usize::from(start)..usize::from(end)], into, len)
}

fn short_form(count: &[u8; 2]) -> &[u8] {
    &count[..1 + usize::from(count[0] >= 0x80)]
}

fn append(bytes: &[u8], into: &mut [u8], len: usize) -> Option<usize> {
    into.get_mut(len..len + bytes.len())?.copy_from_slice(bytes);
    Some(len + bytes.len())
}

/// Applies `delta` to `page`, the version that it was made against. After an error the page is a mixture
/// of both versions.
pub fn decode(delta: &[u8], page: &mut Page) -> Result<(), XbzrleError> {
    changed_runs(delta, |offset, bytes| {
        page[offset..offset + bytes.len()].copy_from_slice(bytes);
    })
}

/// Calls `change` with each run of new bytes in `delta` and its offset, in ascending order. All lie within
/// a page. After an error some have been passed on already.
#[inline]
pub fn changed_runs(delta: &[u8], mut change: impl FnMut(usize, &[u8])) -> Result<(), XbzrleError> {
    if delta.is_empty() {
        return Err(XbzrleError::Empty);
    }
    let (mut at, mut offset) = (0, 0);
    while at < delta.len() {
        let start = at;
        // Nearly all pairs are short and far from both ends.
        if let (Some(&[unchanged, changed]), Some(bytes)) =
            (delta[at..].first_chunk(), delta.get(at + 2..at + 2 + SHORT_RUN))
            && unchanged < 0x80
            && (1..=SHORT_RUN).contains(&usize::from(changed))
            && (unchanged != 0 || start == 0)
            && offset + usize::from(unchanged) + usize::from(changed) <= PAGE_BYTES
        {
            offset += usize::from(unchanged);
            change(offset, &bytes[..usize::from(changed)]);
            at += 2 + usize::from(changed);
            offset += usize::from(changed);
            continue;
        }
        let unchanged = count(delta, &mut at, start)?;
        if unchanged == 0 && start != 0 {
            return Err(XbzrleError::EmptyRun { at: start });
        }
        if at == delta.len() {
            return Err(XbzrleError::TrailingUnchanged { at: start });
        }
        let changed = count(delta, &mut at, start)?;
        if changed == 0 {
            return Err(XbzrleError::EmptyRun { at: start });
        }
        let end = offset + unchanged + changed;
        if end > PAGE_BYTES {
            return Err(XbzrleError::PastPage { at: start, end });
        }
        let bytes = delta.get(at..at + changed).ok_or(XbzrleError::Truncated { at: start })?;
        change(offset + unchanged, bytes);
        at += changed;
        offset = end;
    }
    Ok(())
}

/// The count at `at` of `delta`, in the pair that begins at `start`.
fn count(delta: &[u8], at: &mut usize, start: usize) -> Result<usize, XbzrleError> {
    let mut byte = || {
        let byte = delta.get(*at).copied().ok_or(XbzrleError::Truncated { at: start })?;
        *at += 1;
        Ok(usize::from(byte))
    };
    let low = byte()?;
    if low < 0x80 {
        return Ok(low);
    }
    let high = byte()?;
    if high >= 0x80 || high == 0 {
        return Err(XbzrleError::BadCount { at: start });
    }
    Ok(low & 0x7f | high << 7)
}

#[cfg(test)]
mod tests;
