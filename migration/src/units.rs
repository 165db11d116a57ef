//! Wide integers and durations as the 64-bit numbers of reports and the wire. Every conversion
//! saturates: the largest `u64` stands for "at least this much". Imports nothing of this crate.

use std::time::Duration;

/// `value`, or the largest `u64` if it is larger.
pub fn saturating_u64(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// Milliseconds, rounded down.
pub fn millis(duration: Duration) -> u64 {
    saturating_u64(duration.as_millis())
}

/// Microseconds, rounded down. 580 thousand years fit.
pub fn micros(duration: Duration) -> u64 {
    saturating_u64(duration.as_micros())
}

/// Nanoseconds. 580 years fit.
pub fn nanos(duration: Duration) -> u64 {
    saturating_u64(duration.as_nanos())
}
