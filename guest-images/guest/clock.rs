//! Guest time from the TSC, time by kvmclock, and the LAPIC's timer for sleeping.

use crate::apic::{lapic_read, lapic_write};
use crate::cpu::{cpuid, service_wrmsr};
use core::arch::x86_64::_rdtsc;
use core::cell::UnsafeCell;
use core::ptr::read_volatile;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::*, fence};

static TSC_KHZ: AtomicU64 = AtomicU64::new(1_000_000);
static LAPIC_KHZ: AtomicU64 = AtomicU64::new(1_000_000);
static BOOT: AtomicU64 = AtomicU64::new(0);
static DEADLINE_TIMER: AtomicBool = AtomicBool::new(false);
static KVMCLOCK_RUNS: AtomicBool = AtomicBool::new(false);

const SPURIOUS: usize = 0xf0;
const TIMER_VECTOR: usize = 0x320;
const TIMER_MASKED: u32 = 1 << 16;
const TIMER_TSC_DEADLINE: u32 = 2 << 17;
const TIMER_COUNT: usize = 0x380;
const TIMER_NOW: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;
const SPURIOUS_VECTOR: u32 = 63;
const MSR_KVMCLOCK: u32 = 0x4b56_4d01;
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Our interrupts start at 32.
pub const VECTOR_TIMER: u32 = 32;

/// What KVM writes for the guest (`pvclock_vcpu_time_info`).
#[repr(C, align(64))]
struct KvmClock {
    version: u32,
    pad: u32,
    tsc_timestamp: u64,
    system_time: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    pad2: [u8; 2],
}

struct Shared(UnsafeCell<KvmClock>);
// SAFETY: only KVM writes, and `kvmclock` reads with the version protocol.
unsafe impl Sync for Shared {}
static KVMCLOCK: Shared = Shared(UnsafeCell::new(KvmClock {
    version: 0,
    pad: 0,
    tsc_timestamp: 0,
    system_time: 0,
    tsc_to_system_mul: 0,
    tsc_shift: 0,
    flags: 0,
    pad2: [0; 2],
}));

pub fn tsc() -> u64 {
    unsafe { _rdtsc() }
}

/// Finds the TSC's frequency: from CPUID, from kvmclock, or against the LAPIC's timer.
pub fn start() {
    BOOT.store(tsc(), Relaxed);
    let (mut khz, mut most) = (0, 0);
    if cpuid(1, 0).ecx >> 31 == 1 {
        let hypervisor = cpuid(0x4000_0000, 0);
        most = hypervisor.eax;
        let is_kvm = (hypervisor.ebx, hypervisor.ecx, hypervisor.edx)
            == (0x4b4d_564b, 0x564b_4d56, 0x0000_004d);
        if is_kvm && cpuid(0x4000_0001, 0).eax & 1 << 3 != 0 {
            service_wrmsr(MSR_KVMCLOCK, KVMCLOCK.0.get() as u64 | 1);
            KVMCLOCK_RUNS.store(read_kvmclock().is_some(), Relaxed);
        }
    }
    if (0x4000_0010..0x4000_0100).contains(&most) {
        let timing = cpuid(0x4000_0010, 0);
        khz = timing.eax.into();
        if timing.ebx > 0 {
            LAPIC_KHZ.store(timing.ebx.into(), Relaxed);
        }
    }
    if khz == 0 && KVMCLOCK_RUNS.load(Relaxed) {
        let clock = unsafe { read_volatile(KVMCLOCK.0.get()) };
        let scaled = (1_000_000u64 << 32) / u64::from(clock.tsc_to_system_mul.max(1));
        khz = shift(scaled, -i32::from(clock.tsc_shift));
    }
    if khz == 0 && cpuid(0, 0).eax >= 0x15 {
        let ratio = cpuid(0x15, 0);
        if ratio.eax > 0 {
            khz = u64::from(ratio.ecx) * u64::from(ratio.ebx) / u64::from(ratio.eax) / 1000;
        }
    }
    TSC_KHZ.store(if khz > 0 { khz } else { against_lapic() }, Relaxed);
}

fn shift(value: u64, by: i32) -> u64 {
    if by >= 0 { value << by } else { value >> -by }
}

/// Nanoseconds by kvmclock, at TSC value now.
fn read_kvmclock() -> Option<u64> {
    let clock = KVMCLOCK.0.get();
    // KVM writes it before the guest runs on; an odd version means that it is being written.
    for _ in 0..1000 {
        let version = unsafe { read_volatile(&raw const (*clock).version) };
        fence(SeqCst);
        let seen = unsafe { read_volatile(clock) };
        let now = tsc();
        fence(SeqCst);
        let after = unsafe { read_volatile(&raw const (*clock).version) };
        if version & 1 == 0 && version == after && version > 0 {
            let delta = shift(now.wrapping_sub(seen.tsc_timestamp), seen.tsc_shift.into());
            let scaled = u128::from(delta) * u128::from(seen.tsc_to_system_mul) >> 32;
            return Some(seen.system_time.wrapping_add(scaled as u64));
        }
    }
    None
}

/// Microseconds by kvmclock, 0 if there is none.
pub fn kvmclock_us() -> u64 {
    if !KVMCLOCK_RUNS.load(Relaxed) {
        return 0;
    }
    read_kvmclock().map_or(0, |ns| ns / 1000)
}

/// Counts TSC ticks while the LAPIC's timer counts 10 ms down.
fn against_lapic() -> u64 {
    let lapic_khz = LAPIC_KHZ.load(Relaxed);
    lapic_write(SPURIOUS, 0x100 | SPURIOUS_VECTOR);
    lapic_write(TIMER_DIVIDE, 0xb);
    lapic_write(TIMER_VECTOR, TIMER_MASKED | VECTOR_TIMER);
    lapic_write(TIMER_COUNT, u32::MAX);
    let (start, first) = (tsc(), lapic_read(TIMER_NOW));
    loop {
        let (now, counted) = (tsc(), u64::from(first.wrapping_sub(lapic_read(TIMER_NOW))));
        if counted >= lapic_khz * 10 {
            lapic_write(TIMER_COUNT, 0);
            return (now - start) * lapic_khz / counted;
        }
    }
}

/// TSC ticks in `us` microseconds.
pub fn ticks(us: u64) -> u64 {
    us * TSC_KHZ.load(Relaxed) / 1000
}

/// Microseconds in `ticks`.
pub fn us(ticks: u64) -> u64 {
    (u128::from(ticks) * 1000 / u128::from(TSC_KHZ.load(Relaxed))) as u64
}

/// Microseconds since boot.
pub fn now_us() -> u64 {
    us(tsc().wrapping_sub(BOOT.load(Relaxed)))
}

/// Chooses how to sleep: `deadline`, `oneshot`, or the best that there is.
pub fn choose_timer(wish: Option<&str>) {
    let offered = cpuid(1, 0).ecx >> 24 & 1 == 1;
    DEADLINE_TIMER.store(offered && wish != Some("oneshot"), Relaxed);
}

pub fn timer_is_by_deadline() -> bool {
    DEADLINE_TIMER.load(Relaxed)
}

/// Opens this CPU's LAPIC and its timer.
pub fn enable_lapic() {
    let mode = if timer_is_by_deadline() { TIMER_TSC_DEADLINE } else { 0 };
    lapic_write(SPURIOUS, 0x100 | SPURIOUS_VECTOR);
    lapic_write(TIMER_DIVIDE, 0xb);
    lapic_write(TIMER_VECTOR, mode | VECTOR_TIMER);
}

/// Makes the one-shot timer interrupt at TSC value `until`, or before if that is far away.
pub fn arm_one_shot(until: u64) {
    let wait_us = us(until.saturating_sub(tsc())).clamp(1, 2_000_000);
    let count = wait_us * LAPIC_KHZ.load(Relaxed) / 1000;
    lapic_write(TIMER_COUNT, count.clamp(1, u32::MAX.into()) as u32);
}
