//! How long requests took: a histogram since the last heartbeat.

/// Parts of each power of two.
const PARTS: usize = 16;
/// The last one holds all that is longer than 2^22 µs.
const BUCKETS: usize = 20 * PARTS;

/// Times by their µs, each to a 16th of it.
pub struct Latency {
    counts: [u32; BUCKETS],
    total: u64,
}

impl Latency {
    pub const fn new() -> Self {
        Self { counts: [0; BUCKETS], total: 0 }
    }

    pub fn note(&mut self, us: u64) {
        self.counts[bucket(us)] += 1;
        self.total += 1;
    }

    pub fn count(&self) -> u64 {
        self.total
    }

    /// At most so many µs took that many of 100; 0 if there were none.
    pub fn percentile(&self, percent: u64) -> u64 {
        let wanted = (self.total * percent).div_ceil(100);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += u64::from(*count);
            if *count > 0 && seen >= wanted {
                return longest_in(index);
            }
        }
        0
    }

    pub fn clear(&mut self) {
        *self = Self::new();
    }
}

fn bucket(us: u64) -> usize {
    let parts = PARTS as u64;
    if us < parts {
        return us as usize;
    }
    // How far to the right until only the part is left.
    let shift = us.ilog2() - parts.ilog2();
    let index = (shift as usize + 1) * PARTS + ((us >> shift) - parts) as usize;
    index.min(BUCKETS - 1)
}

fn longest_in(bucket: usize) -> u64 {
    if bucket < PARTS {
        return bucket as u64;
    }
    let shift = bucket / PARTS - 1;
    (((bucket % PARTS + PARTS + 1) as u64) << shift) - 1
}
