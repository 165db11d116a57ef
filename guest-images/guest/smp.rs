//! Starts the other CPUs and hands them their part of the work.

use crate::clock::{lapic_write, ticks, tsc};
use crate::console::println;
use crate::paced;
use core::ptr::{addr_of, copy_nonoverlapping};
use core::sync::atomic::{AtomicU64, Ordering::Acquire};

const TRAMPOLINE: usize = 0x8000;
const ICR_LOW: usize = 0x300;
const ICR_HIGH: usize = 0x310;
const INIT_ALL_BUT_SELF: u32 = 0xc_4500;
const SIPI_ALL_BUT_SELF: u32 = 0xc_4600 | (TRAMPOLINE >> 12) as u32;
pub const MAX_CPUS: usize = 8;

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static cpu_count: AtomicU64;
}

/// Starts CPUs until `wanted` run; says which did not come.
pub fn start(wanted: usize) {
    if wanted < 2 {
        return;
    }
    unsafe {
        let start = addr_of!(ap_trampoline);
        let len = addr_of!(ap_trampoline_end) as usize - start as usize;
        copy_nonoverlapping(start, TRAMPOLINE as *mut u8, len);
    }
    for command in [INIT_ALL_BUT_SELF, SIPI_ALL_BUT_SELF] {
        lapic_write(ICR_HIGH, 0);
        lapic_write(ICR_LOW, command);
        let until = tsc() + ticks(2_000);
        while tsc() < until {}
    }
    let deadline = tsc() + ticks(5_000_000);
    loop {
        let running = unsafe { cpu_count.load(Acquire) } as usize;
        if running >= wanted {
            return;
        }
        if tsc() > deadline {
            println!("ERROR cpu {running} did not start");
            return;
        }
    }
}

/// Every CPU but the first comes here.
pub fn application_processor(cpu: usize) -> ! {
    paced::worker(cpu)
}
