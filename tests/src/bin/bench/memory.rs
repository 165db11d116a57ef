//! Warm memory: what a row measures is a program, not how the host gets memory for it.
//!
//! A host that is a guest itself, or whose memory is overcommitted, backs memory when it is first touched. That
//! can take seconds per GiB, and falls to whichever program comes first.

use std::hint::black_box;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What memory a row is measured in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Touched a moment ago.
    Warm,
    /// Whatever the host has at hand.
    AsItComes,
}

const MIB: u64 = 1 << 20;

/// What touching memory has cost so far.
struct Touched {
    megabytes: u64,
    time: Duration,
    /// Fastest and slowest so far, in seconds per GiB.
    spread: (f64, f64),
}

static TOUCHED: Mutex<Touched> = Mutex::new(Touched {
    megabytes: 0,
    time: Duration::ZERO,
    spread: (f64::INFINITY, f64::NEG_INFINITY),
});

/// Touches that much free memory, and gives it back.
pub fn warm(megabytes: u64) {
    let began = Instant::now();
    let bytes = usize::try_from(megabytes * MIB).unwrap_or(usize::MAX);
    drop(black_box(vec![1u8; bytes]));
    let took = began.elapsed();
    let per_gib = took.as_secs_f64() * 1024.0 / megabytes.max(1) as f64;
    let mut touched = TOUCHED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    touched.megabytes += megabytes;
    touched.time += took;
    touched.spread = (touched.spread.0.min(per_gib), touched.spread.1.max(per_gib));
}

/// For the end of the report; `None` if nothing was touched.
pub fn report() -> Option<String> {
    let touched = TOUCHED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (least, most) = touched.spread;
    let mean = touched.time.as_secs_f64() * 1024.0 / touched.megabytes as f64;
    (touched.megabytes > 0).then(|| {
        format!(
            "Touching memory before each move took {mean:.2} s per GiB ({least:.2}-{most:.2}): \
             where these differ much, the host backs memory lazily."
        )
    })
}
