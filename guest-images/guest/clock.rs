//! Guest time from the TSC; the LAPIC's one-shot timer for sleeping.

use crate::machine::sleep_until_interrupt;
use core::arch::x86_64::{__cpuid, _rdtsc};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

static TSC_KHZ: AtomicU64 = AtomicU64::new(1_000_000);
static BOOT: AtomicU64 = AtomicU64::new(0);

const LAPIC: usize = 0xfee0_0000;
const SPURIOUS: usize = 0xf0;
const TIMER_VECTOR: usize = 0x320;
const TIMER_MASKED: u32 = 1 << 16;
const TIMER_COUNT: usize = 0x380;
const TIMER_NOW: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;
/// KVM's and QEMU's LAPIC timers count nanoseconds.
const LAPIC_TICKS_PER_US: u64 = 1000;
/// Our interrupts start at 32.
pub const VECTOR_TIMER: u32 = 32;

pub fn tsc() -> u64 {
    unsafe { _rdtsc() }
}

/// Finds the TSC's frequency: from the hypervisor, or against the LAPIC's timer.
pub fn calibrate() {
    BOOT.store(tsc(), Relaxed);
    let hypervisor = __cpuid(0x4000_0000).eax;
    let khz = if (0x4000_0010..0x4000_0100).contains(&hypervisor) {
        __cpuid(0x4000_0010).eax.into()
    } else {
        0
    };
    TSC_KHZ.store(if khz > 0 { khz } else { against_lapic() }, Relaxed);
}

/// Counts TSC ticks while the LAPIC's timer counts 10 ms down.
fn against_lapic() -> u64 {
    const WINDOW_US: u64 = 10_000;
    lapic_write(SPURIOUS, 0x100 | 63);
    lapic_write(TIMER_DIVIDE, 0xb);
    lapic_write(TIMER_VECTOR, TIMER_MASKED | VECTOR_TIMER);
    lapic_write(TIMER_COUNT, u32::MAX);
    let (start, first) = (tsc(), lapic_read(TIMER_NOW));
    loop {
        let (now, counted) = (tsc(), u64::from(first - lapic_read(TIMER_NOW)));
        if counted >= WINDOW_US * LAPIC_TICKS_PER_US {
            lapic_write(TIMER_COUNT, 0);
            return (now - start) * LAPIC_TICKS_PER_US * 1000 / counted;
        }
    }
}

/// TSC ticks in `us` microseconds.
pub fn ticks(us: u64) -> u64 {
    us * TSC_KHZ.load(Relaxed) / 1000
}

/// Microseconds in `ticks`.
pub fn us(ticks: u64) -> u64 {
    ticks * 1000 / TSC_KHZ.load(Relaxed)
}

/// Microseconds since boot.
pub fn now_us() -> u64 {
    us(tsc() - BOOT.load(Relaxed))
}

pub fn lapic_write(register: usize, value: u32) {
    unsafe { ((LAPIC + register) as *mut u32).write_volatile(value) };
}

pub fn lapic_read(register: usize) -> u32 {
    unsafe { ((LAPIC + register) as *const u32).read_volatile() }
}

pub fn enable_lapic() {
    lapic_write(SPURIOUS, 0x100 | 63);
    lapic_write(TIMER_DIVIDE, 0xb);
    lapic_write(TIMER_VECTOR, VECTOR_TIMER);
}

/// Makes the timer interrupt once, at TSC value `until`.
pub fn arm(until: u64) {
    let wait = us(until.saturating_sub(tsc())).max(1) * LAPIC_TICKS_PER_US;
    lapic_write(TIMER_COUNT, wait.min(u32::MAX.into()) as u32);
}

/// Sleeps until TSC value `until`.
pub fn sleep_until(until: u64) {
    while tsc() < until {
        arm(until);
        sleep_until_interrupt();
    }
}
