//! Accesses where no device is: logged once per port or page, so that a kernel that waits for a missing device tells
//! which.

use std::collections::BTreeSet;
use std::sync::Mutex;

/// Most places that are logged: a guest can touch any.
const MAX_PLACES: usize = 64;
/// MMIO accesses are told apart by page.
const PAGE_MASK: u64 = !0xfff;

/// The places that have been logged.
#[derive(Debug, Default)]
pub struct Unclaimed(Mutex<BTreeSet<Place>>);

/// Where no device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// An I/O port.
    Port(u16),
    /// A guest address outside of RAM.
    Memory(u64),
}

impl Unclaimed {
    /// The guest has accessed a place; logs that if it is new and the user wants to know.
    pub fn accessed(&self, place: Place, write: bool) {
        if log::log_enabled!(log::Level::Info)
            && let Some(line) = self.line(place, write)
        {
            log::info!("{line}");
        }
    }

    /// What to log.
    fn line(&self, place: Place, write: bool) -> Option<String> {
        let (place, text) = match place {
            Place::Port(port) => (place, format!("port {port:#x}")),
            Place::Memory(address) => (Place::Memory(address & PAGE_MASK), format!("{address:#x}")),
        };
        let mut seen = devices::lock(&self.0);
        if seen.len() >= MAX_PLACES || !seen.insert(place) {
            return None;
        }
        let verb = if write { "writes" } else { "reads" };
        let more = if seen.len() == MAX_PLACES { "; others are not reported" } else { "" };
        Some(format!("the guest {verb} {text}, where no device is{more}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_is_told_once_and_not_too_many() {
        let unclaimed = Unclaimed::default();
        let told = |place, write| unclaimed.line(place, write);
        let line = told(Place::Port(0x70), true).unwrap();
        assert_eq!(line, "the guest writes port 0x70, where no device is");
        assert_eq!(told(Place::Port(0x70), false), None);
        let line = told(Place::Memory(0xfed0_0010), false).unwrap();
        assert_eq!(line, "the guest reads 0xfed00010, where no device is");
        assert_eq!(told(Place::Memory(0xfed0_00f0), false), None, "the same page");
        let lines: Vec<_> =
            (0x100..0x200).filter_map(|port| told(Place::Port(port), false)).collect();
        assert_eq!(lines.len(), MAX_PLACES - 2);
        assert!(lines.last().unwrap().ends_with("; others are not reported"));
    }
}
