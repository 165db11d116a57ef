//! `spin` and `dirty`: every CPU rewrites its part of the working set at a rate, checking each page
//! before, and watches the TSC with live vector registers the rest of the time.

use crate::clock::{ticks, tsc, us};
use crate::console::{self, println};
use crate::fpu;
use crate::heartbeat::{self, Heartbeat, PER_CPU, answer, corrupt, note_gap, rewritten};
use crate::machine::Machine;
use crate::pages::{self, Content, Fill};
use crate::sleeper;
use crate::smp;
use core::cell::UnsafeCell;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::*};

/// Generations in one page of their table.
const ENTRIES: usize = 1024;
/// Longest time between two checks of the vector registers.
const HOLD_US: u64 = 500;
/// The same while a line waits to be sent, a byte at a time.
const HOLD_SENDING_US: u64 = 10;
/// Work missed for longer than this is not caught up: the rate is a rate, not a debt.
const MOST_DEBT_US: u64 = 10_000;

/// What all CPUs do. Written by CPU 0 before `GO`.
struct Plan {
    machine: Machine,
    content: Content,
    /// Pages of the table of generations; filled pages come behind, untouched ones last.
    table_pages: usize,
    page_count: usize,
    untouched: usize,
    working_set: usize,
    bytes_per_sec: u64,
    random: bool,
    cpus: usize,
    interval_ms: u64,
}

struct Shared(UnsafeCell<Option<Plan>>);
// SAFETY: written before `GO` is set, only read after.
unsafe impl Sync for Shared {}

static PLAN: Shared = Shared(UnsafeCell::new(None));
static GO: AtomicBool = AtomicBool::new(false);
/// Rounds of checking asked for by CPU 0, and how many CPUs have stopped for one and finished it.
static CHECK: AtomicUsize = AtomicUsize::new(0);
static STOPPED: AtomicUsize = AtomicUsize::new(0);
static FINISHED: AtomicUsize = AtomicUsize::new(0);

fn part(count: usize, cpu: usize, cpus: usize) -> Range<usize> {
    count * cpu / cpus..count * (cpu + 1) / cpus
}

impl Plan {
    fn from_cmdline(machine: &Machine) -> Self {
        let spins = machine.text("work") == Some("spin");
        let total = machine.page_count();
        let table_pages = total.div_ceil(ENTRIES);
        let most = total - table_pages;
        let fills = !spins || machine.text("fill").is_some();
        let fill_pct = if fills { machine.number("fill_pct", 75).min(100) as usize } else { 0 };
        let page_count = most * fill_pct / 100;
        Self {
            machine: machine.clone(),
            content: Content {
                fill: Fill::named(machine.text("fill")),
                changing_words: pages::changing_words(machine.number("change_pct", 100)),
            },
            table_pages,
            page_count,
            untouched: most - page_count,
            working_set: (machine.number("ws_mb", 256) as usize)
                .saturating_mul(256)
                .min(page_count),
            bytes_per_sec: if spins { 0 } else { machine.number("rate_mbps", 500) * 1_000_000 },
            random: machine.text("pattern") == Some("rand"),
            cpus: smp::wanted(machine),
            interval_ms: machine.number("hb_ms", 100),
        }
    }

    fn page(&self, index: usize) -> *mut u64 {
        self.machine.page(self.table_pages + index)
    }

    fn generation(&self, index: usize) -> &AtomicU32 {
        let entries = self.machine.page(index / ENTRIES).cast::<AtomicU32>();
        // SAFETY: `run` has cleared the table's pages, and they hold nothing else.
        unsafe { &*entries.add(index % ENTRIES) }
    }

    /// Checks the page's head and a sample, then writes its next generation.
    fn rewrite(&self, cpu: usize, index: usize) {
        let generation = self.generation(index);
        let old = generation.load(Relaxed);
        let page = self.page(index);
        if !self.content.looks_right(page, index as u64, old.into()) {
            heartbeat::report_content("page", index, old.into(), unsafe { *page.add(2) });
        }
        self.content.rewrite(page, index as u64, u64::from(old) + 1);
        generation.store(old + 1, Relaxed);
        PER_CPU[cpu].rewritten.fetch_add(1, Relaxed);
    }

    fn check(&self, cpu: usize, cpus: usize) {
        for index in part(self.page_count, cpu, cpus) {
            let generation = self.generation(index).load(Relaxed).into();
            let page = self.page(index);
            if !self.content.is_whole(page, index as u64, generation) {
                heartbeat::report_content("page", index, generation, unsafe { *page.add(2) });
            }
        }
        for index in part(self.untouched, cpu, cpus) {
            if let Some((word, found)) = pages::first_non_zero(self.page(self.page_count + index)) {
                heartbeat::report_untouched(index, word, found);
            }
        }
    }

    fn print_check(&self) {
        let (pages, untouched) = (self.page_count, self.untouched);
        println!(
            "CHECK pages={pages} corrupt={} gen={} untouched={untouched}",
            corrupt(),
            rewritten()
        );
    }
}

/// Fills RAM, then rewrites a working set at a rate, or only watches the clock.
pub fn run(machine: &Machine) -> ! {
    let plan = Plan::from_cmdline(machine);
    let start = tsc();
    for page in 0..plan.table_pages {
        // SAFETY: nothing else uses the table's pages.
        unsafe { machine.page(page).write_bytes(0, pages::WORDS) };
    }
    for index in 0..plan.page_count {
        plan.content.fill(plan.page(index), index as u64);
    }
    let fill_us = us(tsc() - start);
    let (page_count, cpus, interval_ms) = (plan.page_count, plan.cpus, plan.interval_ms);
    // SAFETY: no other CPU runs yet.
    unsafe { *PLAN.0.get() = Some(plan) };
    let sleeps = machine.number("sleep", 0) == 1;
    sleeper::set_interval(interval_ms);
    smp::start(cpus, if sleeps { sleeper::other_cpu } else { worker });
    let work = machine.text("work").unwrap_or("");
    let ram_mb = machine.ram_mb();
    println!("READY work={work} cpus={cpus} ram_mb={ram_mb} pages={page_count} fill_us={fill_us}");
    console::flush();
    GO.store(true, Release);
    if sleeps {
        sleeper::first_cpu(interval_ms, &mut || {
            let plan = plan_of_all();
            plan.check(0, 1);
            plan.print_check();
        });
    }
    worker(0)
}

fn plan_of_all() -> &'static Plan {
    while !GO.load(Acquire) {
        core::hint::spin_loop();
    }
    // SAFETY: `run` wrote it before `GO`, and nobody after.
    match unsafe { (*PLAN.0.get()).as_ref() } {
        Some(plan) => plan,
        None => unreachable!("GO comes after the plan"),
    }
}

/// The next page of a part, in order or at random.
struct Walk {
    at: usize,
    random: u64,
    by_chance: bool,
}

impl Walk {
    fn next(&mut self, len: usize) -> usize {
        self.random = pages::next_random(self.random);
        self.at =
            if self.by_chance { (self.random >> 33) as usize % len } else { (self.at + 1) % len };
        self.at
    }
}

/// What each CPU does once there is a plan.
fn worker(cpu: usize) -> ! {
    let plan = plan_of_all();
    let mut heartbeat = Heartbeat::new(plan.interval_ms, 0);
    let mut walk = Walk { at: 0, random: cpu as u64 + 1, by_chance: plan.random };
    let part = part(plan.working_set, cpu, plan.cpus);
    let writes = plan.bytes_per_sec > 0 && !part.is_empty();
    let per_page = match plan.bytes_per_sec {
        0 => 0,
        rate => ticks(1_000_000) * 4096 * plan.cpus as u64 / rate,
    };
    let (hold, hold_sending, most_debt) =
        (ticks(HOLD_US), ticks(HOLD_SENDING_US), ticks(MOST_DEBT_US));
    let mut checks = 0;
    let mut sending = false;
    let mut last = tsc();
    let mut next = last;
    loop {
        let now = tsc();
        note_gap(cpu, now.wrapping_sub(last), now);
        last = now;
        if writes && next <= now {
            plan.rewrite(cpu, part.start + walk.next(part.len()));
            next = (next + per_page).max(now.saturating_sub(most_debt));
        } else {
            let longest = now + if sending { hold_sending } else { hold };
            let until = if writes { next.min(longest) } else { longest };
            let gap;
            (gap, last) = fpu::spin(cpu, until, last);
            note_gap(cpu, gap, last);
            if sending {
                sending = console::pump();
            }
        }
        PER_CPU[cpu].progress.fetch_add(1, Relaxed);
        if CHECK.load(Acquire) != checks {
            checks += 1;
            check_together(plan, cpu, checks);
            last = tsc();
            next = last;
        }
        if cpu == 0 && last >= heartbeat.due() {
            let pages = rewritten();
            heartbeat.beat(pages, pages * 4096, format_args!(""));
            sending = true;
            answer(&mut || {
                CHECK.fetch_add(1, AcqRel);
            });
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
    plan.check(cpu, plan.cpus);
    wait_for_all(&FINISHED);
    if cpu == 0 {
        plan.print_check();
    }
}
