//! Measures what one sender gets through, bandwidth cap and peer included: what an encoder's savings are
//! weighed against. Pure: the caller brings the figures.

use std::time::Duration;

/// After this much writing time the weight of earlier writes is halved.
const MEMORY: Duration = Duration::from_millis(500);

/// Recently written bytes, and the time spent on them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Throughput {
    written: u64,
    writing: Duration,
}

impl Throughput {
    /// Records that writing `bytes` took this long.
    pub fn add(&mut self, bytes: u64, took: Duration) {
        if self.writing > MEMORY {
            (self.written, self.writing) = (self.written / 2, self.writing / 2);
        }
        self.written += bytes;
        self.writing += took;
    }

    /// Bytes per second; 0 if unknown.
    pub fn bytes_per_sec(&self) -> u64 {
        if self.written == 0 { 0 } else { crate::policy::per_second(self.written, self.writing) }
    }
}
