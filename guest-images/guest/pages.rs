//! What stands in a page: its number and generation, and a body that follows from both, so that any
//! wrong, stale or misplaced byte shows.

use crate::console::println;
use crate::machine::{self, Machine};

pub const WORDS: usize = 512;
const MAGIC: u64 = 0x4645_5252_5950_4147;
const TEXT: &[u8; 64] = b"The quick brown ferry carries a guest to the other shore, whole ";

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    Random,
    Text,
    Zero,
}

impl Fill {
    pub fn named(name: Option<&str>) -> Self {
        match name {
            Some("text") => Self::Text,
            Some("zero") => Self::Zero,
            _ => Self::Random,
        }
    }

    #[inline(always)]
    fn word(self, seed: u64, at: usize) -> u64 {
        match self {
            Self::Random => {
                let mixed = seed.wrapping_add(at as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                mixed ^ mixed >> 31
            }
            Self::Text => {
                let start = at % 8 * 8;
                let mut bytes = [0; 8];
                bytes.copy_from_slice(&TEXT[start..start + 8]);
                u64::from_le_bytes(bytes) ^ if at % 64 == 0 { seed & 0xff } else { 0 }
            }
            Self::Zero => 0,
        }
    }
}

fn seed(index: u64, generation: u64) -> u64 {
    (index << 32 ^ generation).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Writes page `index` in its `generation`. Generation 0 of a zero fill is a page of zeroes.
pub fn write(page: *mut u64, fill: Fill, index: u64, generation: u64) {
    let words = unsafe { core::slice::from_raw_parts_mut(page, WORDS) };
    if fill == Fill::Zero && generation == 0 {
        return words.fill(0);
    }
    let seed = seed(index, generation);
    words[0] = MAGIC;
    words[1] = index;
    words[2] = generation;
    for (at, word) in words.iter_mut().enumerate().skip(3) {
        *word = fill.word(seed, at);
    }
}

/// Number and generation as the page says them.
pub fn head_is(page: *const u64, fill: Fill, index: u64, generation: u64) -> bool {
    let words = unsafe { core::slice::from_raw_parts(page, 3) };
    if fill == Fill::Zero && generation == 0 {
        return *words == [0; 3];
    }
    *words == [MAGIC, index, generation]
}

/// Whether every byte is as [`write`] left it.
pub fn is_whole(page: *const u64, fill: Fill, index: u64, generation: u64) -> bool {
    let words = unsafe { core::slice::from_raw_parts(page, WORDS) };
    if fill == Fill::Zero && generation == 0 {
        return words.iter().all(|word| *word == 0);
    }
    let seed = seed(index, generation);
    let wrong = words.iter().enumerate().skip(3).fold(0, |wrong, (at, word)| wrong | word ^ fill.word(seed, at));
    wrong == 0 && head_is(page, fill, index, generation)
}

/// Flips one bit in each kind of page and in a sector, and expects to see it.
pub fn self_test(machine: &Machine) -> ! {
    for (index, fill) in [Fill::Random, Fill::Text, Fill::Zero].into_iter().enumerate() {
        let page = machine.page(index);
        for bit in [0, 64 * 100 + 7, 64 * 511 + 63] {
            write(page, fill, index as u64, 5);
            let good = is_whole(page, fill, index as u64, 5);
            unsafe { *page.add(bit / 64) ^= 1 << (bit % 64) };
            let seen = !is_whole(page, fill, index as u64, 5);
            if !good || !seen {
                println!("SELFTEST failed: page {index} bit {bit} good={good} seen={seen}");
                machine::debug_exit(1);
            }
            println!("SELFTEST flipped bit detected at page {index} bit {bit}");
        }
    }
    if !crate::disk::sector_self_test() {
        println!("SELFTEST failed: sector");
        machine::debug_exit(1);
    }
    println!("SELFTEST flipped bit detected in a sector");
    machine::debug_exit(0)
}
