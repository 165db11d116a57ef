//! Compresses chunks at the source and unpacks them at the destination, in the threads that read and write
//! them. The methods and the question whether they pay are RAM's ([`crate::ram::compress`],
//! [`crate::ram::adaptive`]); here is what differs: several threads compress for one link, and while it sends.
//! So only that part of their time counts for which the link has nothing to send.

use super::{BlockError, CHUNK, LoadError};
use crate::params::SharedParams;
use crate::policy;
use crate::ram::adaptive::{Adaptive, Trial};
use crate::ram::compress::{Compressor, DecompressError, Decompressor, Method, MethodError};
use crate::ram::frame::Packing;
use devices::block::aligned::AlignedBuffer;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Compression is judged by this many bytes of chunks: one chunk that was held up, by a busy host or a slow
/// neighbour, says nothing.
const JUDGED_BYTES: u64 = 8 << 20;

/// Whether chunks are compressed: shared by the reading threads.
pub(super) struct Pays {
    /// `None` if the destination cannot unpack chunks.
    params: Option<SharedParams>,
    /// What all channels get through.
    link_bytes_per_sec: AtomicU64,
    judged: Mutex<Judged>,
}

struct Judged {
    worth: Adaptive,
    /// Since compression was last judged.
    trial: Trial,
    /// Threads that compress now.
    busy: u32,
    /// Time spent compressing counts from here: several threads share it.
    since: Instant,
}

impl Pays {
    /// As `params` say, which may change at any time.
    pub(super) fn new(params: Option<SharedParams>) -> Self {
        let (worth, trial) = (Adaptive::default(), Trial::default());
        let judged = Mutex::new(Judged { worth, trial, busy: 0, since: Instant::now() });
        Self { params, link_bytes_per_sec: AtomicU64::new(0), judged }
    }

    /// Records what all channels get through.
    pub(super) fn link_is(&self, bytes_per_sec: u64) {
        self.link_bytes_per_sec.store(bytes_per_sec, Ordering::Relaxed);
    }

    /// Whether to compress `bytes`; if so, [`Pays::end`] has to follow.
    fn begin(&self, bytes: u64) -> bool {
        let mut judged = devices::lock(&self.judged);
        if !judged.worth.worth_trying() {
            judged.worth.passed(bytes);
            return false;
        }
        if judged.busy == 0 {
            judged.since = Instant::now();
        }
        judged.busy += 1;
        true
    }

    /// Judges what was compressed.
    fn end(&self, raw_bytes: u64, sent_bytes: u64, max_bandwidth: u64) {
        let link = match (self.link_bytes_per_sec.load(Ordering::Relaxed), max_bandwidth) {
            (link, 0) | (0, link) => link,
            (link, cap) => link.min(cap),
        };
        let judged = &mut *devices::lock(&self.judged);
        let now = Instant::now();
        judged.trial.cost += now.saturating_duration_since(judged.since);
        judged.trial.raw_bytes += raw_bytes;
        judged.trial.sent_bytes += sent_bytes;
        judged.since = now;
        judged.busy = judged.busy.saturating_sub(1);
        if judged.trial.raw_bytes >= JUDGED_BYTES {
            let trial = std::mem::take(&mut judged.trial);
            let cost = trial.cost.saturating_sub(policy::send_time(trial.sent_bytes, link));
            judged.worth.tried(Trial { cost, ..trial }, link);
        }
    }
}

/// A reading thread's compressor.
#[derive(Default)]
pub(super) struct Packer(Option<(Method, Compressor)>);

impl Packer {
    /// Appends `data`, compressed, to `into`. `Packing::None`, with `into` unchanged, if that is not wanted,
    /// or does not pay.
    pub(super) fn pack(
        &mut self,
        data: &[u8],
        into: &mut Vec<u8>,
        pays: &Pays,
    ) -> Result<Packing, BlockError> {
        let params = pays.params.as_ref().map(SharedParams::get);
        let Some((params, method)) = params.and_then(|all| all.method().map(|one| (all, one)))
        else {
            return Ok(Packing::None);
        };
        let raw_bytes = data.len() as u64;
        if raw_bytes == 0 {
            return Ok(Packing::None);
        }
        let compressor = match &mut self.0 {
            Some((has, compressor)) if *has == method => compressor,
            other => &mut other.insert((method, Compressor::new(method)?)).1,
        };
        if !pays.begin(raw_bytes) {
            return Ok(Packing::None);
        }
        let before = into.len();
        let packed = compressor.compress(data, into);
        let sent_bytes = if packed { (into.len() - before) as u64 } else { raw_bytes };
        pays.end(raw_bytes, sent_bytes, params.max_bandwidth);
        Ok(match method {
            _ if !packed => Packing::None,
            Method::Zlib { .. } => Packing::Zlib,
            Method::Zstd { .. } => Packing::Zstd,
        })
    }
}

/// A writing thread's decompressors.
#[derive(Default)]
pub(super) struct Unpacker {
    zlib: Option<Decompressor>,
    zstd: Option<Decompressor>,
    buffer: Option<AlignedBuffer>,
}

/// Why a chunk was not unpacked.
pub(super) enum UnpackError {
    Data(DecompressError),
    Method(MethodError),
}

impl UnpackError {
    pub(super) fn of_chunk(self, disk: &str, chunk: u64) -> LoadError {
        match self {
            Self::Data(source) => LoadError::Unpack { disk: disk.to_owned(), chunk, source },
            Self::Method(error) => error.into(),
        }
    }
}

impl Unpacker {
    /// Unpacks `packed` into exactly `data_bytes`, at most [`CHUNK`].
    pub(super) fn unpack(
        &mut self,
        packing: Packing,
        packed: &[u8],
        data_bytes: usize,
    ) -> Result<&[u8], UnpackError> {
        let (slot, method) = match packing {
            Packing::Zstd => (&mut self.zstd, Method::Zstd { level: 1 }),
            Packing::Zlib | Packing::None => (&mut self.zlib, Method::Zlib { level: 1 }),
        };
        let unpacker = match slot {
            Some(unpacker) => unpacker,
            None => slot.insert(Decompressor::new(method).map_err(UnpackError::Method)?),
        };
        let buffer = self.buffer.get_or_insert_with(|| AlignedBuffer::new(CHUNK));
        let len = buffer.len();
        let too_long = DecompressError::TooLong { method, expected_bytes: len };
        let into = buffer.get_mut(..data_bytes).ok_or(UnpackError::Data(too_long))?;
        unpacker.decompress(packed, into).map_err(UnpackError::Data)?;
        Ok(into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::CHUNK_BYTES;
    use crate::params::{Compression, Params};

    fn pays(compression: Compression) -> Pays {
        let params = Params { compression, max_bandwidth: 1_000_000, ..Default::default() };
        Pays::new(Some(SharedParams::new(params)))
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 7u64;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
        .take(len)
        .collect()
    }

    #[test]
    fn chunks_come_back_as_they_were() {
        let text = b"one line of a log file, then the next\n".repeat(1000);
        for (compression, packing) in
            [(Compression::Zlib, Packing::Zlib), (Compression::Zstd, Packing::Zstd)]
        {
            let (pays, mut packed) = (pays(compression), vec![1, 2, 3]);
            assert_eq!(Packer::default().pack(&text, &mut packed, &pays).unwrap(), packing);
            assert!(packed.starts_with(&[1, 2, 3]) && packed.len() < text.len() / 10);
            let mut unpacker = Unpacker::default();
            let back = unpacker.unpack(packing, &packed[3..], text.len()).ok();
            assert_eq!(back, Some(&text[..]));
            assert!(unpacker.unpack(packing, &packed[3..], text.len() - 1).is_err());
            assert!(unpacker.unpack(packing, &packed[3..], CHUNK + 1).is_err());
        }
    }

    #[test]
    fn what_does_not_shrink_is_sent_as_it_is_and_soon_not_even_tried() {
        let (pays, noise) = (pays(Compression::Zstd), noise(CHUNK));
        let (mut packer, mut packed) = (Packer::default(), Vec::new());
        for _ in 0..JUDGED_BYTES / CHUNK_BYTES {
            assert_eq!(packer.pack(&noise, &mut packed, &pays).unwrap(), Packing::None);
        }
        assert!(packed.is_empty());
        assert!(!devices::lock(&pays.judged).worth.worth_trying());
        let other = Pays::new(None);
        let zeroes = vec![0; CHUNK];
        assert_eq!(packer.pack(&zeroes, &mut packed, &other).unwrap(), Packing::None);
    }
}
