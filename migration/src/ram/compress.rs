//! Compresses runs of pages with zlib or zstd, each run independent of the others. Called by `encode` at
//! the source, on private copies of pages, and by `decode` at the destination. Reuses its contexts from run to
//! run; whether compression pays is `adaptive`'s business.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use std::fmt;
use zstd_safe::zstd_sys::ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall;
use zstd_safe::{CCtx, CParameter, DCtx};

use super::page::PAGE_BYTES;

/// zstd returns its errors as negative sizes.
const DST_TOO_SMALL: usize = (ZSTD_error_dstSize_tooSmall as usize).wrapping_neg();

/// A run is sent compressed only if that saves one byte in this many; less does not pay for unpacking.
const MIN_SAVING: usize = 16;
/// Samples for the randomness test: most lines per page, and per run.
const LINE_BYTES: usize = 64;
const SAMPLE_PAGE_LINES: usize = 16;
const SAMPLE_LINES: usize = 64;

/// A compression method. Levels are those of QEMU's `multifd-zlib-level` and `multifd-zstd-level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// zlib with its header and checksum, level 0 (none) to 9.
    Zlib {
        /// From 0 to [`Method::MAX_ZLIB_LEVEL`].
        level: u8,
    },
    /// zstd frames, level 0 (its default) to 20.
    Zstd {
        /// From 0 to [`Method::MAX_ZSTD_LEVEL`].
        level: u8,
    },
}

impl Method {
    /// The strongest level of zlib.
    pub const MAX_ZLIB_LEVEL: u8 = 9;
    /// The strongest level of zstd that QEMU allows.
    pub const MAX_ZSTD_LEVEL: u8 = 20;

    fn level(self) -> (u8, u8) {
        match self {
            Self::Zlib { level } => (level, Self::MAX_ZLIB_LEVEL),
            Self::Zstd { level } => (level, Self::MAX_ZSTD_LEVEL),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Zlib { .. } => "zlib",
            Self::Zstd { .. } => "zstd",
        })
    }
}

/// Creating a compressor or decompressor failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MethodError {
    /// A level that the method does not support.
    #[error("{method} does not support level {level}, only 0 to {max}")]
    Level {
        /// The method with that level.
        method: Method,
        level: u8,
        max: u8,
    },
    /// Allocating a context failed.
    #[error("no memory for {method}")]
    NoMemory { method: Method },
}

/// Unpacking a run failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecompressError {
    /// Not valid output of the method.
    #[error("run of {len_bytes} bytes is not valid {method}")]
    Corrupt {
        method: Method,
        /// Bytes received.
        len_bytes: usize,
    },
    /// The run is longer than announced.
    #[error("{method} run unpacks to more than its {expected_bytes} bytes")]
    TooLong {
        method: Method,
        /// Bytes announced.
        expected_bytes: usize,
    },
    /// The run is shorter than announced, or cut off.
    #[error("{method} run unpacks to {got_bytes} of its {expected_bytes} bytes")]
    TooShort {
        method: Method,
        /// Bytes unpacked.
        got_bytes: usize,
        /// Bytes announced.
        expected_bytes: usize,
    },
    /// Bytes follow the end of the compressed data.
    #[error("{method} run is followed by {left_bytes} stray bytes")]
    Trailing {
        method: Method,
        /// Bytes after the end.
        left_bytes: usize,
    },
}

/// Compresses runs with one method.
#[derive(Debug)]
pub struct Compressor {
    context: Context,
    /// Output buffer, as large as the largest run so far.
    scratch: Vec<u8>,
}

enum Context {
    Zlib(Compress),
    Zstd(CCtx<'static>),
}

impl fmt::Debug for Context {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Zlib(_) => "Zlib",
            Self::Zstd(_) => "Zstd",
        })
    }
}

impl Compressor {
    /// A compressor for `method`.
    pub fn new(method: Method) -> Result<Self, MethodError> {
        let (level, max) = method.level();
        if level > max {
            return Err(MethodError::Level { method, level, max });
        }
        let context = match method {
            Method::Zlib { level } => {
                Context::Zlib(Compress::new(Compression::new(level.into()), true))
            }
            Method::Zstd { level } => {
                let context = CCtx::try_create();
                let mut context = context.ok_or(MethodError::NoMemory { method })?;
                context
                    .set_parameter(CParameter::CompressionLevel(level.into()))
                    .map_err(|_| MethodError::Level { method, level, max })?;
                Context::Zstd(context)
            }
        };
        Ok(Self { context, scratch: Vec::new() })
    }

    /// Appends `pages`, compressed, to `into`. Returns false, with `into` unchanged, if that saves too
    /// little: send the pages uncompressed.
    pub fn compress(&mut self, pages: &[u8], into: &mut Vec<u8>) -> bool {
        let limit = pages.len() - pages.len().div_ceil(MIN_SAVING);
        if looks_random(pages) {
            return false;
        }
        if self.scratch.len() < limit {
            self.scratch.resize(limit, 0);
        }
        // The library gives up as soon as it has filled this.
        let scratch = &mut self.scratch[..limit];
        let len = match &mut self.context {
            Context::Zlib(context) => {
                context.reset();
                match context.compress(pages, scratch, FlushCompress::Finish) {
                    Ok(Status::StreamEnd) => usize::try_from(context.total_out()).ok(),
                    Ok(Status::Ok | Status::BufError) | Err(_) => None,
                }
            }
            Context::Zstd(context) => context.compress2(scratch, pages).ok(),
        };
        let Some(compressed) = len.and_then(|len| scratch.get(..len)) else { return false };
        into.extend_from_slice(compressed);
        true
    }
}

/// Whether the bytes of `pages` are distributed like random ones, as in compressed or encrypted data. Looks
/// at samples only. Mixed runs, and runs that repeat from page to page, do not look random.
fn looks_random(pages: &[u8]) -> bool {
    let page_count = pages.len().div_ceil(PAGE_BYTES).max(1);
    let page_lines = (SAMPLE_LINES / page_count).clamp(1, SAMPLE_PAGE_LINES);
    let page_step = (page_count * page_lines).div_ceil(SAMPLE_LINES);
    let mut counts = [0u32; 256];
    let mut total = 0u32;
    let mut before = None;
    for (index, page) in pages.chunks(PAGE_BYTES).enumerate().step_by(page_step) {
        if before.is_some() && before == page.first_chunk::<16>() {
            return false;
        }
        before = page.first_chunk::<16>();
        let lines = page.as_chunks::<LINE_BYTES>().0;
        for sample in 0..page_lines {
            // Different lines in each page, so that a common page layout does not decide alone.
            let Some(line) = lines.get((index * 5 + sample * 37) % lines.len().max(1)) else {
                continue;
            };
            for byte in line {
                counts[usize::from(*byte)] += 1;
            }
            total += 64;
        }
    }
    if total < 512 {
        return false;
    }
    // Chi-squared with 255 degrees of freedom: about 255, and 23 off is one standard deviation. Text
    // has tens of thousands, and a table of ascending bytes has none.
    let squares: u64 = counts.iter().map(|count| u64::from(*count) * u64::from(*count)).sum();
    let chi_squared = squares * 256 / u64::from(total);
    let chi_squared = chi_squared.saturating_sub(total.into());
    (255 - 5 * 23..=255 + 5 * 23).contains(&chi_squared)
}

/// Unpacks runs of one method.
#[derive(Debug)]
pub struct Decompressor {
    method: Method,
    context: Unpacker,
}

enum Unpacker {
    Zlib(Decompress),
    Zstd(DCtx<'static>),
}

impl fmt::Debug for Unpacker {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Zlib(_) => "Zlib",
            Self::Zstd(_) => "Zstd",
        })
    }
}

impl Decompressor {
    /// A decompressor for `method`, whose level does not matter.
    pub fn new(method: Method) -> Result<Self, MethodError> {
        let context = match method {
            Method::Zlib { .. } => Unpacker::Zlib(Decompress::new(true)),
            Method::Zstd { .. } => {
                Unpacker::Zstd(DCtx::try_create().ok_or(MethodError::NoMemory { method })?)
            }
        };
        Ok(Self { method, context })
    }

    /// Unpacks `data` into exactly `into.len()` bytes. Allocates nothing: `into` is the only window it
    /// needs. After an error the content of `into` is unspecified.
    pub fn decompress(&mut self, data: &[u8], into: &mut [u8]) -> Result<(), DecompressError> {
        let (method, expected_bytes) = (self.method, into.len());
        let corrupt = DecompressError::Corrupt { method, len_bytes: data.len() };
        let too_long = DecompressError::TooLong { method, expected_bytes };
        let got_bytes = match &mut self.context {
            Unpacker::Zlib(context) => {
                context.reset(true);
                let status = context.decompress(data, into, FlushDecompress::Finish);
                let status = status.map_err(|_| corrupt)?;
                let read = usize::try_from(context.total_in()).map_err(|_| corrupt)?;
                let got_bytes = usize::try_from(context.total_out()).map_err(|_| corrupt)?;
                let left_bytes = data.len().saturating_sub(read);
                match status {
                    Status::StreamEnd if left_bytes > 0 => {
                        return Err(DecompressError::Trailing { method, left_bytes });
                    }
                    Status::StreamEnd => got_bytes,
                    Status::Ok | Status::BufError if got_bytes == expected_bytes => {
                        return Err(if left_bytes > 0 { too_long } else { corrupt });
                    }
                    Status::Ok | Status::BufError => {
                        return Err(DecompressError::TooShort {
                            method,
                            got_bytes,
                            expected_bytes,
                        });
                    }
                }
            }
            // In one call: no window is allocated, whatever the frame asks for.
            Unpacker::Zstd(context) => {
                let result = context.decompress(into, data);
                result.map_err(|code| if code == DST_TOO_SMALL { too_long } else { corrupt })?
            }
        };
        if got_bytes != expected_bytes {
            return Err(DecompressError::TooShort { method, got_bytes, expected_bytes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const METHODS: [Method; 4] = [
        Method::Zlib { level: 1 },
        Method::Zlib { level: 9 },
        Method::Zstd { level: 1 },
        Method::Zstd { level: 20 },
    ];

    fn random(len: usize, mut state: u64) -> Vec<u8> {
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
        .take(len)
        .collect()
    }

    fn text(len: usize) -> Vec<u8> {
        let lines =
            (0..).map(|line| format!("{line}: some guest wrote this line, then the next\n"));
        lines.flat_map(String::into_bytes).take(len).collect()
    }

    #[test]
    fn runs_of_all_lengths_come_back() {
        for method in METHODS {
            let mut compressor = Compressor::new(method).unwrap();
            let mut decompressor = Decompressor::new(method).unwrap();
            for pages in [1, 2, 3, 17, 256] {
                let run = text(pages * PAGE_BYTES);
                let mut sent = b"before".to_vec();
                assert!(compressor.compress(&run, &mut sent), "{method}");
                assert!(sent.starts_with(b"before"));
                assert!(sent.len() < run.len() / 2, "{method}: {}", sent.len());
                let mut back = vec![0xa5; run.len()];
                decompressor.decompress(&sent[6..], &mut back).unwrap();
                assert!(back == run, "{method}");
            }
        }
    }

    #[test]
    fn what_cannot_get_smaller_is_left_alone() {
        for method in METHODS {
            let mut compressor = Compressor::new(method).unwrap();
            let mut sent = b"before".to_vec();
            for pages in [1, 3, 64] {
                assert!(!compressor.compress(&random(pages * PAGE_BYTES, 7), &mut sent));
            }
            // Not random at sight, but it saves less than it should: seven bytes of zeroes a line.
            let mut run = random(16 * PAGE_BYTES, 9);
            run.chunks_mut(32).for_each(|line| line[0] = 0);
            assert!(!looks_random(&run));
            assert!(!compressor.compress(&run, &mut sent), "{method}");
            assert_eq!(sent, b"before");
            // And it did no harm to the next run.
            assert!(compressor.compress(&text(PAGE_BYTES), &mut sent));
        }
        let mut none = Compressor::new(Method::Zlib { level: 0 }).unwrap();
        assert!(!none.compress(&text(PAGE_BYTES), &mut Vec::new()));
        assert!(!none.compress(&[], &mut Vec::new()));
    }

    #[test]
    fn only_what_chance_could_have_made_looks_random() {
        for seed in 0..200 {
            for pages in [1, 2, 16, 64, 256] {
                assert!(looks_random(&random(pages * PAGE_BYTES, seed)), "{seed} {pages}");
            }
        }
        assert!(!looks_random(&[0; 4 * PAGE_BYTES]));
        assert!(!looks_random(&text(PAGE_BYTES)));
        assert!(!looks_random(&text(256 * PAGE_BYTES)));
        let ascending: Vec<u8> = (0..=255).cycle().take(4 * PAGE_BYTES).collect();
        assert!(!looks_random(&ascending));
        let counters: Vec<u8> = (0..8192u16).flat_map(|at| [(at & 0xff) as u8, 0, 0, 0]).collect();
        assert!(!looks_random(&counters));
        // The same page of noise again and again.
        assert!(!looks_random(&random(PAGE_BYTES, 3).repeat(8)));
        // Half text, half noise.
        let mut run = text(8 * PAGE_BYTES);
        run.extend(random(8 * PAGE_BYTES, 3));
        assert!(!looks_random(&run));
    }

    #[test]
    fn every_lie_has_its_name() {
        for method in METHODS {
            let run = text(4 * PAGE_BYTES);
            let (mut sent, mut into) = (Vec::new(), vec![0; run.len()]);
            assert!(Compressor::new(method).unwrap().compress(&run, &mut sent));
            let mut decompressor = Decompressor::new(method).unwrap();
            let mut unpack = |data: &[u8], into: &mut [u8]| decompressor.decompress(data, into);
            let expected_bytes = run.len() - 1;
            let too_long = DecompressError::TooLong { method, expected_bytes };
            assert_eq!(unpack(&sent, &mut into[..expected_bytes]), Err(too_long));
            let expected_bytes = run.len() + 1;
            let got_bytes = run.len();
            let too_short = DecompressError::TooShort { method, got_bytes, expected_bytes };
            assert_eq!(unpack(&sent, &mut vec![0; expected_bytes]), Err(too_short));
            for len in 0..sent.len() {
                let cut = unpack(&sent[..len], &mut into);
                assert!(
                    matches!(
                        cut,
                        Err(DecompressError::TooShort { .. } | DecompressError::Corrupt { .. })
                    ),
                    "{method} cut at {len}: {cut:?}"
                );
            }
            let mut more = sent.clone();
            more.extend(b"more");
            assert!(unpack(&more, &mut into).is_err(), "{method}");
            assert!(unpack(b"neither of the two, I fear", &mut into).is_err(), "{method}");
            // None of that did any harm to the next run.
            unpack(&sent, &mut into).unwrap();
            assert!(into == run);
        }
    }

    #[test]
    fn levels_out_of_range_are_refused() {
        for method in [Method::Zlib { level: 10 }, Method::Zstd { level: 21 }] {
            let error = Compressor::new(method).unwrap_err();
            assert!(error.to_string().contains("does not support level"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            data in prop::collection::vec(any::<u8>(), 0..300),
            len in 0..3 * PAGE_BYTES,
        ) {
            for method in METHODS {
                let _ = Decompressor::new(method).unwrap().decompress(&data, &mut vec![0; len]);
            }
        }

        #[test]
        fn a_damaged_run_never_panics(
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            spoiled in 0usize..3000,
        ) {
            for method in METHODS {
                let mut run = text(PAGE_BYTES);
                run[..spoiled].copy_from_slice(&random(spoiled, 5));
                let mut sent = Vec::new();
                if !Compressor::new(method).unwrap().compress(&run, &mut sent) {
                    continue;
                }
                let at = at.index(sent.len());
                let same = sent[at] == byte;
                sent[at] = byte;
                let mut back = vec![0; run.len()];
                let result = Decompressor::new(method).unwrap().decompress(&sent, &mut back);
                if same {
                    prop_assert_eq!(result, Ok(()));
                    prop_assert!(back == run);
                }
            }
        }
    }
}
