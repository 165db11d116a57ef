//! What an incoming guest may take of this host: `--max-memory` and `--max-cpus`. Checked against the
//! description that the source sends, before anything is built.

use crate::machine::description::Description;

/// The most that a guest may take. `None` for what this host has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Guest RAM, in bytes. By default what is available when the guest comes.
    pub memory_bytes: Option<u64>,
    /// vCPUs. By default as many as this process may use processors.
    pub cpus: Option<u8>,
}

/// A guest that is too large.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    #[error("the guest has {} MiB of memory, {of} {} MiB: `ferry receive --max-memory` allows more", wanted >> 20, most >> 20)]
    Memory { wanted: u64, most: u64, of: &'static str },
    #[error("the guest has {wanted} vCPUs, {of} {most}: `ferry receive --max-cpus` allows more")]
    Cpus { wanted: u8, most: usize, of: &'static str },
}

const GIVEN: &str = "the limit is";

impl Limits {
    /// Checks a guest.
    pub fn check(&self, guest: &Description) -> Result<(), LimitError> {
        let (most, of) = match self.cpus {
            Some(most) => (most.into(), GIVEN),
            // Unknown only where /sys and sched_getaffinity both fail: one processor there is.
            None => (std::thread::available_parallelism().map_or(1, usize::from), "this host has"),
        };
        if usize::from(guest.cpus) > most {
            return Err(LimitError::Cpus { wanted: guest.cpus, most, of });
        }
        let (most, of) = match self.memory_bytes {
            Some(most) => (Some(most), GIVEN),
            None => (available_bytes(), "available here are"),
        };
        match most {
            Some(most) if guest.memory_bytes > most => {
                Err(LimitError::Memory { wanted: guest.memory_bytes, most, of })
            }
            _ => Ok(()),
        }
    }
}

/// Memory that can be had without swapping, in bytes: `MemAvailable` of proc(5). `None` if the kernel does
/// not say; then there is no limit.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let found = available_in(&text);
    if found.is_none() {
        log::warn!("/proc/meminfo has no MemAvailable: --max-memory has no default here");
    }
    found
}

fn available_in(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::description::sample;

    #[test]
    fn a_guest_that_is_too_large_is_refused_with_the_option_that_lets_it_in() {
        // 2 vCPUs and 128 MiB.
        let guest = sample();
        let check = |memory_bytes, cpus| {
            let limits = Limits { memory_bytes, cpus };
            limits.check(&guest).map_err(|error| error.to_string())
        };
        assert_eq!(check(Some(128 << 20), Some(2)), Ok(()));
        assert_eq!(
            check(Some(127 << 20), Some(2)).unwrap_err(),
            "the guest has 128 MiB of memory, the limit is 127 MiB: `ferry receive --max-memory` allows more"
        );
        assert_eq!(
            check(Some(128 << 20), Some(1)).unwrap_err(),
            "the guest has 2 vCPUs, the limit is 1: `ferry receive --max-cpus` allows more"
        );
        let vast = Description { memory_bytes: 1 << 50, ..sample() };
        let error = Limits { memory_bytes: None, cpus: Some(2) }.check(&vast).unwrap_err();
        assert!(error.to_string().contains("available here are"), "{error}");
    }

    #[test]
    fn available_memory_is_read_in_bytes() {
        assert_eq!(available_in("MemFree: 1 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(available_in("MemFree: 1 kB\n"), None);
        assert_eq!(available_in("MemAvailable: lots\n"), None);
        assert!(available_bytes().is_some_and(|bytes| bytes > 0));
    }
}
