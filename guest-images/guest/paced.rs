//! `idle`, `spin` and `dirty`: work at a pace, and a report of what the guest saw of the world.

use crate::clock::{self, ticks, tsc, us};
use crate::console::{self, println};
use crate::fpu;
use crate::machine::{self, Machine, sleep_until_interrupt};
use crate::pages::{self, Fill};
use crate::smp::{self, MAX_CPUS};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};

/// What all CPUs do. Written by CPU 0 before `GO`.
struct Plan {
    machine: Machine,
    fill: Fill,
    /// Filled pages; page 0 comes after the table of generations.
    page_count: usize,
    table_pages: usize,
    working_set: usize,
    bytes_per_sec: u64,
    random: bool,
    cpus: usize,
    heartbeat_us: u64,
    sleeps: bool,
}

struct Shared(UnsafeCell<Option<Plan>>);
unsafe impl Sync for Shared {}

static PLAN: Shared = Shared(UnsafeCell::new(None));
static GO: AtomicBool = AtomicBool::new(false);
static REWRITTEN: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
static LARGEST_GAP: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
static CORRUPT: AtomicU64 = AtomicU64::new(0);
/// Rounds of checking asked for by CPU 0, and how many CPUs have stopped for one and finished it.
static CHECK: AtomicUsize = AtomicUsize::new(0);
static STOPPED: AtomicUsize = AtomicUsize::new(0);
static FINISHED: AtomicUsize = AtomicUsize::new(0);
static CHECK_CORRUPT: AtomicU64 = AtomicU64::new(0);

impl Plan {
    fn page(&self, index: usize) -> *mut u64 {
        self.machine.page(self.table_pages + index)
    }

    fn generation(&self, index: usize) -> &AtomicUsize {
        let entry = self.machine.page(index / 512) as *const AtomicUsize;
        unsafe { &*entry.add(index % 512) }
    }

    fn part(&self, count: usize, cpu: usize) -> core::ops::Range<usize> {
        count * cpu / self.cpus..count * (cpu + 1) / self.cpus
    }

    /// Checks the page's head, then writes its next generation.
    fn rewrite(&self, cpu: usize, index: usize) {
        let generation = self.generation(index);
        let old = generation.load(Relaxed) as u64;
        let page = self.page(index);
        if !pages::head_is(page, self.fill, index as u64, old) {
            report("page", index, old, unsafe { *page.add(2) });
        }
        pages::write(page, self.fill, index as u64, old + 1);
        generation.store(old as usize + 1, Relaxed);
        REWRITTEN[cpu].fetch_add(1, Relaxed);
    }

    fn check(&self, range: core::ops::Range<usize>) {
        for index in range {
            let generation = self.generation(index).load(Relaxed) as u64;
            if !pages::is_whole(self.page(index), self.fill, index as u64, generation) {
                CHECK_CORRUPT.fetch_add(1, Relaxed);
                report("page", index, generation, unsafe { *self.page(index).add(2) });
            }
        }
    }
}

/// Says what was corrupt, the first time.
pub fn report(what: &str, index: usize, expected: u64, found: u64) {
    if CORRUPT.fetch_add(1, Relaxed) == 0 {
        println!("CORRUPT {what}={index} expected_gen={expected} found_gen={found}");
    }
}

/// Heartbeats of CPU 0, and what it is asked on the serial line.
pub struct Heartbeat {
    number: u64,
    next: u64,
    interval: u64,
    last_bytes: u64,
    last_time: u64,
}

impl Heartbeat {
    pub fn new(interval_us: u64) -> Self {
        let interval = ticks(interval_us);
        Self { number: 0, next: tsc() + interval, interval, last_bytes: 0, last_time: tsc() }
    }

    pub fn due(&self) -> u64 {
        self.next
    }

    /// Prints a line if it is time; returns a byte of input, if there is one then.
    pub fn beat(&mut self, generations: u64, bytes: u64, gap_us: impl FnOnce() -> u64) -> Option<u8> {
        let now = tsc();
        if now < self.next {
            return None;
        }
        if now < self.last_time {
            report("clock", 0, self.last_time, now);
        }
        let elapsed_us = us(now.wrapping_sub(self.last_time)).max(1);
        let mbps = (bytes - self.last_bytes) / elapsed_us;
        println!(
            "HB n={} t_us={} gen={generations} max_gap_us={} mbps={mbps} corrupt={} fpu={}",
            self.number,
            clock::now_us(),
            gap_us(),
            CORRUPT.load(Relaxed),
            fpu::CORRUPT.load(Relaxed),
        );
        self.number += 1;
        (self.last_bytes, self.last_time) = (bytes, now);
        self.next = (self.next + self.interval).max(now + self.interval / 2);
        console::read()
    }
}

fn gap_us() -> u64 {
    us(LARGEST_GAP.iter().map(|gap| gap.swap(0, Relaxed)).max().unwrap_or(0))
}

fn rewritten() -> u64 {
    REWRITTEN.iter().map(|count| count.load(Relaxed)).sum()
}

/// Sleeps on the LAPIC timer between heartbeats; the gap is how late it woke.
pub fn idle(machine: &Machine) -> ! {
    clock::enable_lapic();
    println!("READY work=idle cpus=1 ram_mb={} pages=0 fill_us=0", machine.ram_bytes() >> 20);
    sleeping(&mut Heartbeat::new(machine.number("hb_ms", 100) * 1000), || {
        println!("CHECK pages=0 corrupt=0 gen=0");
    })
}

fn sleeping(heartbeat: &mut Heartbeat, mut check: impl FnMut()) -> ! {
    loop {
        clock::sleep_until(heartbeat.due());
        let late = tsc() - heartbeat.due();
        let input = heartbeat.beat(0, 0, || us(late));
        answer(input, &mut check);
    }
}

/// `c` asks for a full check, `q` for an exit through the debug port, `p` for power-off.
pub fn answer(input: Option<u8>, check: &mut dyn FnMut()) {
    match input {
        Some(b'c') => check(),
        Some(b'q') => machine::debug_exit(0),
        Some(b'p') => machine::power_off(),
        _ => {}
    }
}

/// Fills RAM, then rewrites a working set at a rate, or only watches the clock.
pub fn dirty(machine: &Machine) -> ! {
    clock::enable_lapic();
    let total = machine.page_count();
    let cpus = (machine.number("cpus", 1) as usize).clamp(1, MAX_CPUS);
    let table_pages = total / 512 + 1;
    let most = total - table_pages;
    let page_count = most * machine.number("fill_pct", 75).min(100) as usize / 100;
    let working_set = (machine.number("ws_mb", 0) as usize * 256).min(page_count);
    let spins = machine.text("work") == Some("spin");
    let own = machine.clone();
    let plan = Plan {
        machine: own,
        fill: Fill::named(machine.text("fill")),
        page_count: if spins && machine.text("fill").is_none() { 0 } else { page_count },
        table_pages,
        working_set: if working_set == 0 { page_count } else { working_set },
        bytes_per_sec: machine.number("rate_mbps", 0) * 1_000_000,
        random: machine.text("pattern") == Some("rand"),
        cpus,
        heartbeat_us: machine.number("hb_ms", 100) * 1000,
        sleeps: machine.number("sleep", 0) == 1,
    };
    let start = tsc();
    for index in 0..plan.page_count {
        pages::write(plan.page(index), plan.fill, index as u64, 0);
    }
    let fill_us = us(tsc() - start);
    let (page_count, megabytes) = (plan.page_count, machine.ram_bytes() >> 20);
    unsafe { *PLAN.0.get() = Some(plan) };
    smp::start(cpus);
    println!("READY work=dirty cpus={cpus} ram_mb={megabytes} pages={page_count} fill_us={fill_us}");
    GO.store(true, Release);
    worker(0)
}

/// What each CPU does once there is a plan.
pub fn worker(cpu: usize) -> ! {
    while !GO.load(Acquire) {
        core::hint::spin_loop();
    }
    let Some(plan) = (unsafe { (*PLAN.0.get()).as_ref() }) else { machine::debug_exit(0x7b) };
    let mut heartbeat = Heartbeat::new(plan.heartbeat_us);
    if plan.sleeps {
        if cpu > 0 {
            loop {
                sleep_until_interrupt();
            }
        }
        sleeping(&mut heartbeat, || {
            plan.check(0..plan.page_count);
            print_check(plan);
        });
    }
    let part = plan.part(plan.working_set, cpu);
    let writes = plan.bytes_per_sec > 0 && !part.is_empty();
    let per_page = if writes { ticks(1_000_000) * 4096 * plan.cpus as u64 / plan.bytes_per_sec } else { 0 };
    let (mut at, mut random) = (0usize, cpu as u64 + 1);
    let mut last = tsc();
    let mut next = last;
    let mut checks = 0;
    loop {
        let gap;
        let mut now = tsc();
        if writes && next <= now {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            at = if plan.random { (random >> 33) as usize % part.len() } else { (at + 1) % part.len() };
            plan.rewrite(cpu, part.start + at);
            // Work missed in a pause is not caught up: the rate is a rate, not a debt.
            next = (next + per_page).max(now.saturating_sub(ticks(1_000)));
            now = tsc();
            gap = now - last;
            last = now;
        } else {
            let until = if writes { next } else { now + ticks(500) };
            (gap, last) = fpu::hold(until.min(now + ticks(500)).max(now), last);
        }
        LARGEST_GAP[cpu].fetch_max(gap, Relaxed);
        if CHECK.load(Acquire) != checks {
            checks += 1;
            check_together(plan, cpu, checks);
            last = tsc();
            next = last;
        }
        if cpu == 0 && last >= heartbeat.due() {
            let pages = rewritten();
            let input = heartbeat.beat(pages, pages * 4096, gap_us);
            answer(input, &mut || {
                CHECK.fetch_add(1, AcqRel);
            });
            if input.is_some() {
                last = tsc();
                next = last;
            }
        }
    }
}

/// Checks this CPU's part, with every other CPU. None writes before all have finished: the parts of
/// the check and of the working set differ.
fn check_together(plan: &Plan, cpu: usize, round: usize) {
    let wait_for_all = |count: &AtomicUsize| {
        count.fetch_add(1, AcqRel);
        while count.load(Acquire) < round * plan.cpus {
            core::hint::spin_loop();
        }
    };
    wait_for_all(&STOPPED);
    plan.check(plan.part(plan.page_count, cpu));
    wait_for_all(&FINISHED);
    if cpu == 0 {
        print_check(plan);
    }
}

fn print_check(plan: &Plan) {
    let corrupt = CHECK_CORRUPT.swap(0, Relaxed) + fpu::CORRUPT.load(Relaxed);
    println!("CHECK pages={} corrupt={corrupt} gen={}", plan.page_count, rewritten());
}
