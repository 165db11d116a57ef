//! Heartbeats of CPU 0, what every CPU adds to them, and what is asked on the serial line.

use crate::clock::{self, ticks, tsc, us};
use crate::console::{self, println};
use crate::machine;
use crate::smp::MAX_CPUS;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// What one CPU has to tell, in cache lines of its own.
#[repr(align(128))]
pub struct PerCpu {
    /// Pages rewritten.
    pub rewritten: AtomicU64,
    /// Largest gap since the last heartbeat, in TSC ticks.
    pub largest_gap: AtomicU64,
    /// Turns of its loop, or wake-ups.
    pub progress: AtomicU64,
}

pub static PER_CPU: [PerCpu; MAX_CPUS] = [const {
    PerCpu {
        rewritten: AtomicU64::new(0),
        largest_gap: AtomicU64::new(0),
        progress: AtomicU64::new(0),
    }
}; MAX_CPUS];

static CLOCK_CORRUPT: AtomicU64 = AtomicU64::new(0);
static KVMCLOCK_CORRUPT: AtomicU64 = AtomicU64::new(0);
static CONTENT_CORRUPT: AtomicU64 = AtomicU64::new(0);
static UNTOUCHED_CORRUPT: AtomicU64 = AtomicU64::new(0);
/// How often registers came back changed.
pub static FPU_CORRUPT: AtomicU64 = AtomicU64::new(0);

/// Whether `disk` takes no steps, until it is told to go.
pub static HELD: AtomicBool = AtomicBool::new(false);

/// Mismatches of every kind.
pub fn corrupt() -> u64 {
    [&CLOCK_CORRUPT, &KVMCLOCK_CORRUPT, &CONTENT_CORRUPT, &UNTOUCHED_CORRUPT, &FPU_CORRUPT]
        .iter()
        .map(|count| count.load(Relaxed))
        .sum()
}

/// Counts a mismatch and says what it was, the first time.
pub fn report_once(count: &AtomicU64, what: fmt::Arguments<'_>) {
    if count.fetch_add(1, Relaxed) == 0 {
        println!("CORRUPT {what}");
    }
}

/// A page or sector that is not what was written.
pub fn report_content(what: &str, index: usize, expected: u64, found: u64) {
    let text = format_args!("{what}={index} expected_gen={expected} found_gen={found}");
    report_once(&CONTENT_CORRUPT, text);
}

/// A page that nobody wrote, and is not zero.
pub fn report_untouched(index: usize, word: usize, found: u64) {
    report_once(&UNTOUCHED_CORRUPT, format_args!("untouched={index} word={word} found={found:#x}"));
}

/// Notes the gap between two looks at the TSC; a negative one is a clock that went backwards.
pub fn note_gap(cpu: usize, gap: u64, now: u64) {
    if gap > 1 << 62 {
        let last = now.wrapping_sub(gap);
        report_once(&CLOCK_CORRUPT, format_args!("clock cpu={cpu} last={last} now={now}"));
        return;
    }
    let largest = &PER_CPU[cpu].largest_gap;
    if gap > largest.load(Relaxed) {
        largest.fetch_max(gap, Relaxed);
    }
}

/// Pages rewritten by all.
pub fn rewritten() -> u64 {
    PER_CPU.iter().map(|cpu| cpu.rewritten.load(Relaxed)).sum()
}

pub struct Heartbeat {
    number: u64,
    next: u64,
    interval: u64,
    last_bytes: u64,
    last_time: u64,
    last_kvmclock_us: u64,
    last_progress: [u64; MAX_CPUS],
}

impl Heartbeat {
    /// The first comes after `interval_ms`; `bytes` have been written before.
    pub fn new(interval_ms: u64, bytes: u64) -> Self {
        let interval = ticks(interval_ms.clamp(1, 3_600_000) * 1000);
        let now = tsc();
        Self {
            number: 0,
            next: now + interval,
            interval,
            last_bytes: bytes,
            last_time: now,
            last_kvmclock_us: 0,
            last_progress: [0; MAX_CPUS],
        }
    }

    /// TSC value of the next one.
    pub fn due(&self) -> u64 {
        self.next
    }

    pub fn is_due(&self) -> bool {
        tsc() >= self.next
    }

    fn alive(&mut self) -> usize {
        let mut alive = 0;
        for (cpu, last) in PER_CPU.iter().zip(&mut self.last_progress) {
            let now = cpu.progress.load(Relaxed);
            alive += usize::from(now != *last);
            *last = now;
        }
        alive
    }

    /// Queues a line. `more` is added to its end.
    pub fn beat(&mut self, generations: u64, bytes: u64, more: fmt::Arguments<'_>) {
        let now = tsc();
        if now < self.last_time {
            note_gap(0, now.wrapping_sub(self.last_time), now);
        }
        let kvmclock_us = clock::kvmclock_us();
        if kvmclock_us < self.last_kvmclock_us {
            let last = self.last_kvmclock_us;
            let text = format_args!("kvmclock last={last} now={kvmclock_us}");
            report_once(&KVMCLOCK_CORRUPT, text);
        }
        self.last_kvmclock_us = kvmclock_us;
        let elapsed_us = us(now.wrapping_sub(self.last_time)).max(1);
        let alive = self.alive();
        let gaps = PER_CPU.iter().map(|cpu| cpu.largest_gap.swap(0, Relaxed));
        println!(
            "HB n={} t_us={} gen={generations} max_gap_us={} ws_mbps={} corrupt={} fpu={} alive={} kvmclock_us={}{more}",
            self.number,
            clock::now_us(),
            us(gaps.fold(0, u64::max)),
            bytes.wrapping_sub(self.last_bytes) / elapsed_us,
            corrupt(),
            FPU_CORRUPT.load(Relaxed),
            alive,
            kvmclock_us,
        );
        self.number += 1;
        (self.last_bytes, self.last_time) = (bytes, now);
        self.next = (self.next + self.interval).max(now + self.interval / 2);
    }
}

/// Reads what was asked on the serial line: `c` calls for a check, `q` leaves through the debug port,
/// `p` powers off, `r` resets, `g` and `h` have `disk` take steps or not. Says whether a check was made.
pub fn answer(check: &mut dyn FnMut()) -> bool {
    let mut checked = false;
    while let Some(byte) = console::read() {
        match byte {
            b'c' => {
                check();
                checked = true;
            }
            b'g' => HELD.store(false, Relaxed),
            b'h' => HELD.store(true, Relaxed),
            b'q' => machine::debug_exit(0),
            b'p' => machine::power_off(),
            b'r' => machine::reset(),
            _ => {}
        }
    }
    checked
}
