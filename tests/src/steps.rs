//! A guest that writes, discards and zeroes known sectors of its disk, and says how far it is: what it has touched
//! follows from that.

use crate::disk::SECTOR_BYTES;
use crate::process::{SOON, Vmm};
use crate::verdict::field;
use anyhow::{Context, Result};
use guest_images::steps::{Kind, Step};
use std::collections::BTreeSet;
use std::ops::Range;

/// Its command line: some hundred steps a second.
pub const STEPPING: &str = "work=disk steps=1 rate_mbps=1 hb_ms=20";

/// The steps that a heartbeat tells of, if it is one and whole.
fn count(line: &str) -> Option<u64> {
    field(line, "held")?;
    line.starts_with("HB ").then(|| field(line, "steps"))?
}

/// The last number of steps that the guest has told of in this process.
pub fn last_told(vmm: &Vmm) -> Option<u64> {
    vmm.serial().from(0).iter().rev().find_map(|line| count(line))
}

/// Lets it take steps.
pub fn go(vmm: &mut Vmm) -> Result<()> {
    tell(vmm, "g", "^HB .* held=0").map(drop)
}

/// Stops its steps. Returns how many it has taken.
pub fn hold(vmm: &mut Vmm) -> Result<u64> {
    let line = tell(vmm, "h", "^HB .* held=1")?;
    count(&line).with_context(|| format!("no steps in {line:?}"))
}

fn tell(vmm: &mut Vmm, word: &str, answer: &str) -> Result<String> {
    let from = vmm.serial().count();
    vmm.process.type_in(word)?;
    Ok(vmm.serial().wait_from(from, answer, SOON)?.text)
}

/// Waits until it has taken so many steps, in this process.
pub fn wait_for(vmm: &Vmm, steps: u64) -> Result<()> {
    let mut from = 0;
    loop {
        let line = vmm.serial().wait_from(from, "^HB .* held=", SOON)?;
        if count(&line.text) >= Some(steps) {
            return Ok(());
        }
        from = line.index + 1;
    }
}

/// The sectors that these steps touch on a disk of that size.
///
/// # Panics
/// If one kind of step could be forgotten and nobody would see it: they must be told apart.
pub fn touched(steps: Range<u64>, disk_bytes: u64) -> BTreeSet<u64> {
    let of = |wanted: &dyn Fn(Kind) -> bool| -> BTreeSet<u64> {
        let all = steps.clone().filter_map(|number| Step::new(number, disk_bytes / SECTOR_BYTES));
        all.filter(|step| wanted(step.kind)).flat_map(|step| step.sectors).collect()
    };
    let all = of(&|_| true);
    let without = [
        of(&|kind| kind != Kind::Write),
        of(&|kind| kind != Kind::Discard),
        of(&|kind| !matches!(kind, Kind::Zeroes { .. })),
        of(&|kind| kind != Kind::Zeroes { unmap: true }),
    ];
    assert!(without.iter().all(|some| some.len() < all.len()), "{steps:?} are all of one kind");
    assert!((all.len() as u64) < disk_bytes / SECTOR_BYTES, "{steps:?} touch all of the disk");
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_all_used_once_before_any_is_again_in_another_way() {
        let sectors = 32 * 1024 + 1;
        let slots = sectors / 16;
        let step = |number| Step::new(number, sectors).unwrap();
        let firsts: BTreeSet<u64> =
            (0..slots).map(|number| step(number).sectors.start / 16).collect();
        assert_eq!(firsts.len() as u64, slots);
        for number in 0..slots {
            let (now, later) = (step(number), step(number + slots));
            assert_eq!(now.sectors, later.sectors);
            assert_ne!(now.kind, later.kind);
            assert_eq!(now.sectors.start / 16, (now.sectors.end - 1) / 16);
        }
        assert_eq!(Step::new(0, 15), None);
    }
}
