//! Whether the guest notices what its checks are for.

use crate::console::println;
use crate::disk::sector_self_test;
use crate::fpu;
use crate::machine::{self, Machine};
use crate::pages::{Content, Fill, HEAD_WORDS, WORDS, first_non_zero};

/// Flips bits in each kind of page, in each kind of place, and in sectors, and expects to see it.
pub fn run(machine: &Machine) -> ! {
    let mut passed = sector_self_test();
    for (index, fill) in [Fill::Random, Fill::Text, Fill::Zero].into_iter().enumerate() {
        let page = machine.page(index);
        for (changing_words, generation) in [(WORDS, 5), (WORDS / 2, 6), (HEAD_WORDS, 0)] {
            let content = Content { fill, changing_words };
            for bit in [0, 64 + 3, 128 + 1, 64 * 100 + 7, 64 * 300, 64 * 511 + 63] {
                content.fill(page, index as u64);
                if generation > 0 {
                    content.rewrite(page, index as u64, generation);
                }
                let good = content.is_whole(page, index as u64, generation)
                    && content.looks_right(page, index as u64, generation);
                unsafe { *page.add(bit / 64) ^= 1 << (bit % 64) };
                let seen = !content.is_whole(page, index as u64, generation);
                if good && seen {
                    println!("SELFTEST flipped bit detected at page {index} bit {bit}");
                } else {
                    println!("SELFTEST failed page={index} bit={bit} good={good} seen={seen}");
                    passed = false;
                }
            }
        }
        unsafe { page.write_bytes(0, WORDS) };
        let clean = first_non_zero(page).is_none();
        unsafe { *page.add(77) = 1 << 40 };
        passed &= clean && first_non_zero(page) == Some((77, 1 << 40));
    }
    passed &= fpu::self_test();
    if passed {
        println!("SELFTEST lost registers detected");
        println!("SELFTEST flipped bit detected in a sector");
        machine::debug_exit(0);
    }
    println!("SELFTEST failed");
    machine::debug_exit(1)
}
