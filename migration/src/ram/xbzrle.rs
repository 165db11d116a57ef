//! XBZRLE: what of a page has changed since the peer last saw it, in QEMU's format. Called by the
//! shard that sends a page, with the copy from its cache, and by the destination, with the page in
//! place. Pure; which page is where is `cache`'s business. The vector kernels are in `simd`.
//!
//! ```text
//! delta = (unchanged changed)+
//! unchanged = count                 bytes to leave alone; 0 only in the first pair
//! changed   = count, new bytes      at least one
//! count     = 7 bits, or 0x80 | low 7 bits, then high 7 bits
//! ```
//! Runs are maximal, and unchanged bytes at the end of the page are not mentioned. Despite the
//! format's name the new bytes are literal, so applying a delta twice does no harm.
//!
//! Three steps, so that none of them has to guess what comes next: compare the pages and keep one bit
//! per byte; list the offsets at which a run ends; write the runs out. Random memory latency, bits and
//! branches each get a loop of their own.

use super::page::{PAGE_BYTES, Page};
use super::simd::{self, Changes, Kernel};
use std::ops::Range;

/// Longest count that takes one byte.
const SHORT_COUNT: u16 = 0x7f;
/// Bytes that are copied for a short run, whatever its length: one move instead of a loop.
const SHORT_RUN: usize = 16;

/// Runs that are encoded one by one before the vector kernel is asked again.
const RUNS_BY_HAND: usize = 8;

/// What came of an attempt to encode a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoded {
    /// Nothing to send: the peer has this page.
    Unchanged,
    /// The delta does not fit: send the page itself.
    Overflow,
    /// The delta is this many bytes long.
    Bytes(usize),
}

/// Why a delta is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum XbzrleError {
    /// The delta says nothing.
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
    /// A run of no bytes.
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

/// Encodes pages; keeps what it needs between them, so that no page costs an allocation.
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

    /// Writes what turns `old` into `new` to the start of `into`, which is at most a page long if a
    /// delta is to be shorter than the page. Bytes of `into` after the delta may change as well.
    pub fn encode(&mut self, old: &Page, new: &Page, into: &mut [u8]) -> Encoded {
        simd::find_changes(self.kernel, old, new, &mut self.changes);
        let runs = self.changes.runs();
        if runs == 0 {
            return Encoded::Unchanged;
        }
        let (mut run, mut len) = (0, 0);
        while run < runs {
            (run, len) = simd::short_runs(self.kernel, &self.changes, run, new, into, len);
            // What the kernel could not do, or all if there is none.
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

/// Writes a delta run by run, for those who know what has changed without comparing bytes.
pub struct RunWriter<'a> {
    new: &'a Page,
    into: &'a mut [u8],
    len: usize,
    /// Where the last run ended.
    offset: usize,
}

impl<'a> RunWriter<'a> {
    /// Of `new`, to the start of `into`.
    pub fn new(new: &'a Page, into: &'a mut [u8]) -> Self {
        Self { new, into, len: 0, offset: 0 }
    }

    /// The bytes `run` of the page have changed. Runs come in order and do not touch; false if this one
    /// does not fit.
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

    /// What came of it.
    pub fn finish(self) -> Encoded {
        if self.len == 0 { Encoded::Unchanged } else { Encoded::Bytes(self.len) }
    }
}

/// A count; the second byte means nothing if the first one says all.
fn two_bytes(count: u16) -> [u8; 2] {
    let more = u8::from(count > SHORT_COUNT) << 7;
    [(count & SHORT_COUNT) as u8 | more, ((count >> 7) & SHORT_COUNT) as u8]
}

/// Writes one pair at byte `len` of `into`; returns where the next one goes, or nothing if this one
/// does not fit.
#[inline(always)]
fn push([before, start, end]: [u16; 3], new: &Page, into: &mut [u8], len: usize) -> Option<usize> {
    let (unchanged, changed) = (start - before, end - start);
    let from = usize::from(start);
    let room = into.get_mut(len..len + 3 + SHORT_RUN);
    if let (Some(room), Some(bytes)) = (room, new.get(from..from + SHORT_RUN))
        && usize::from(changed) <= SHORT_RUN
    {
        // The second byte is overwritten if there is none: cheaper than a guess that fails.
        let long = usize::from(unchanged > SHORT_COUNT);
        room[..2].copy_from_slice(&two_bytes(unchanged));
        let room = &mut room[1 + long..];
        room[0] = (changed & SHORT_COUNT) as u8;
        room[1..1 + SHORT_RUN].copy_from_slice(bytes);
        return Some(len + 2 + long + usize::from(changed));
    }
    push_long([before, start, end], new, into, len)
}

/// The same for long runs, and near the ends of the page and the output.
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

/// Applies `delta` to `page`, which is what the peer had when it made the delta. After an error the
/// page holds some of both.
pub fn decode(delta: &[u8], page: &mut Page) -> Result<(), XbzrleError> {
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
            && let Some(to) = page.get_mut(offset + usize::from(unchanged)..)
            && let Some(to) = to.get_mut(..usize::from(changed))
        {
            to.copy_from_slice(&bytes[..usize::from(changed)]);
            at += 2 + usize::from(changed);
            offset += usize::from(unchanged) + usize::from(changed);
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
        let to = page.get_mut(offset + unchanged..end);
        let to = to.ok_or(XbzrleError::PastPage { at: start, end })?;
        let bytes = delta.get(at..at + changed).ok_or(XbzrleError::Truncated { at: start })?;
        to.copy_from_slice(bytes);
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
