//! Starts the other CPUs and hands them their part of the work.

use crate::apic::lapic_write;
use crate::clock::{ticks, tsc};
use crate::console::println;
use crate::cpu;
use crate::machine::{self, Machine};
use core::ptr::{addr_of, copy_nonoverlapping};
use core::sync::atomic::{AtomicUsize, Ordering::*};

const TRAMPOLINE: usize = 0x8000;
const ICR_LOW: usize = 0x300;
const ICR_HIGH: usize = 0x310;
const INIT_ALL_BUT_SELF: u32 = 0xc_4500;
const SIPI_ALL_BUT_SELF: u32 = 0xc_4600 | (TRAMPOLINE >> 12) as u32;
pub const MAX_CPUS: usize = 8;
const START_TIMEOUT_US: u64 = 5_000_000;
/// A start-up message to a CPU that runs already does nothing, so it may be sent again.
const SIPI_AGAIN_US: u64 = 200_000;

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
}

/// The CPUs that work; others that come are parked.
static WANTED: AtomicUsize = AtomicUsize::new(1);
/// Address of what they do.
static WORK: AtomicUsize = AtomicUsize::new(0);
static ARRIVED: AtomicUsize = AtomicUsize::new(1);

/// How many CPUs the command line, or else CPUID, asks for.
pub fn wanted(machine: &Machine) -> usize {
    let cpus = match machine.text("cpus") {
        Some(_) => machine.number("cpus", 1) as usize,
        None => cpu::cpu_count(),
    };
    cpus.clamp(1, MAX_CPUS)
}

/// Starts CPUs until `wanted` run; says which did not come. Each does `work` with its number.
pub fn start(wanted: usize, work: fn(usize) -> !) {
    if wanted < 2 {
        return;
    }
    WANTED.store(wanted, Relaxed);
    WORK.store(work as usize, Release);
    unsafe {
        let start = addr_of!(ap_trampoline);
        let len = addr_of!(ap_trampoline_end) as usize - start as usize;
        copy_nonoverlapping(start, TRAMPOLINE as *mut u8, len);
    }
    send_to_others(INIT_ALL_BUT_SELF);
    let init_done = tsc() + ticks(2_000);
    while tsc() < init_done {
        core::hint::spin_loop();
    }
    let deadline = tsc() + ticks(START_TIMEOUT_US);
    let mut send_next = tsc();
    // Numbers are dealt as CPUs come, so those that arrive are 1, 2, 3, …
    while ARRIVED.load(Acquire) < wanted {
        let now = tsc();
        if now >= send_next {
            send_to_others(SIPI_ALL_BUT_SELF);
            send_next = now + ticks(SIPI_AGAIN_US);
        }
        if now > deadline {
            println!("ERROR cpu {} did not start", ARRIVED.load(Acquire));
            machine::debug_exit(0x7b);
        }
        core::hint::spin_loop();
    }
}

fn send_to_others(command: u32) {
    lapic_write(ICR_HIGH, 0);
    lapic_write(ICR_LOW, command);
}

/// Every CPU but the first comes here.
pub fn application_processor(cpu: usize) -> ! {
    if cpu >= WANTED.load(Acquire) {
        machine::stop();
    }
    ARRIVED.fetch_add(1, AcqRel);
    let work = WORK.load(Acquire);
    // SAFETY: `start` stored this function's address before it sent the start-up message.
    let work = unsafe { core::mem::transmute::<usize, fn(usize) -> !>(work) };
    work(cpu)
}
