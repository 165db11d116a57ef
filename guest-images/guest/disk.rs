//! `disk`: sectors that prove themselves, over the driver in `virtio`.
//!
//! Every cycle takes a few sectors at random, reads them, checks that each is exactly what the device
//! acknowledged last, writes the next generation, and now and then flushes. With `steps=1` it takes those of
//! the next of `steps`, and writes, discards or zeroes them.

use crate::beside::{Beside, pages_wanted};
use crate::clock::{tsc, us};
use crate::console::{self, println};
use crate::heartbeat::{self, Heartbeat, PER_CPU, answer, corrupt, note_gap};
use crate::latency::Latency;
use crate::machine::{self, Machine};
use crate::pages::next_random;
use crate::steps::{Kind, Step};
use crate::virtio::{
    BATCH, DATA_PAGES, Disk, RANGE_BYTES, RING_PAGES, SECTOR_WORDS, T_DISCARD, T_FLUSH, T_GET_ID,
    T_IN, T_OUT, T_WRITE_ZEROES,
};
use core::ops::Range;
use core::sync::atomic::Ordering::Relaxed;

const SECTOR_BYTES: usize = 512;
const SECTORS_PER_MB: u64 = 2048;
/// Unless told otherwise: a full check should not take minutes.
const DEFAULT_MB: u64 = 1024;
const CYCLES_PER_FLUSH: u64 = 64;
/// A line to be sent goes out between cycles, this much at a time.
const BYTES_PER_CYCLE: usize = 4;
/// Generations of sectors in one page of their table.
const ENTRIES: u64 = 1024;
const MAGIC: u64 = 0x4645_5252_5953_4543;
/// Flags beside a generation: the sector is zeroes; it was discarded, and may be that or what it was.
const ZEROED: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;

fn seed(sector: u64, generation: u64) -> u64 {
    (sector << 24 ^ generation).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn checksum(words: &[u64]) -> u64 {
    words.iter().fold(0xcbf2_9ce4_8422_2325, |sum, word| (sum ^ word).wrapping_mul(0x100_0000_01b3))
}

/// A numbered, checksummed sector: magic, number, generation, body, checksum of all before it.
fn fill_sector(words: &mut [u64], sector: u64, generation: u64) {
    let seed = seed(sector, generation);
    words[..3].copy_from_slice(&[MAGIC, sector, generation]);
    for (at, word) in words.iter_mut().enumerate().take(SECTOR_WORDS - 1).skip(3) {
        *word = seed.wrapping_add(at as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    words[SECTOR_WORDS - 1] = checksum(&words[..SECTOR_WORDS - 1]);
}

fn is_whole(words: &[u64], sector: u64, generation: u64) -> bool {
    words[..3] == [MAGIC, sector, generation]
        && words[SECTOR_WORDS - 1] == checksum(&words[..SECTOR_WORDS - 1])
}

pub fn sector_self_test() -> bool {
    let mut words = [0; SECTOR_WORDS];
    (0..SECTOR_WORDS * 64).step_by(61).all(|bit| {
        fill_sector(&mut words, 7, 9);
        let good = is_whole(&words, 7, 9);
        words[bit / 64] ^= 1 << (bit % 64);
        good && !is_whole(&words, 7, 9)
    })
}

/// A disk whose every sector has a generation that we know.
struct Region<'m> {
    machine: &'m Machine,
    disk: Disk,
    sectors: u64,
    written: u64,
    /// Of writes, since the last heartbeat.
    latency: Latency,
}

impl Region<'_> {
    fn generation(&mut self, sector: u64) -> &mut u32 {
        let page = RING_PAGES + DATA_PAGES + (sector / ENTRIES) as usize;
        let table = self.machine.page(page).cast::<u32>();
        // SAFETY: `run` has cleared these pages, and they hold nothing else.
        unsafe { &mut *table.add((sector % ENTRIES) as usize) }
    }

    fn must(&mut self, what: &str, kind: u32, sectors: Range<u64>, len: usize) {
        let mut list = [0; BATCH];
        let mut count = 0;
        for sector in sectors {
            list[count] = sector;
            count += 1;
        }
        if let Err(status) = self.disk.execute(kind, &list[..count], len) {
            println!("DISK-ERROR {what} sector={} status={status}", list[0]);
            machine::debug_exit(0x78);
        }
    }

    fn batch(&self, first: u64) -> Range<u64> {
        first..(first + BATCH as u64).min(self.sectors)
    }

    fn write_next_generation(&mut self, batch: Range<u64>) {
        for (slot, sector) in batch.clone().enumerate() {
            let generation = self.generation(sector);
            *generation = (*generation & !(ZEROED | DISCARDED)) + 1;
            let generation = u64::from(*generation);
            fill_sector(self.disk.sector(slot), sector, generation);
        }
        let began = tsc();
        self.must("write", T_OUT, batch.clone(), SECTOR_BYTES);
        self.latency.note(us(tsc().wrapping_sub(began)));
        self.written += batch.end - batch.start;
    }

    fn read_and_check(&mut self, batch: Range<u64>) {
        for slot in 0..BATCH {
            self.disk.sector(slot).fill(0);
        }
        self.must("read", T_IN, batch.clone(), SECTOR_BYTES);
        for (slot, sector) in batch.enumerate() {
            let entry = *self.generation(sector);
            let expected = u64::from(entry & !(ZEROED | DISCARDED));
            let words = self.disk.sector(slot);
            let is_right = if words.iter().all(|word| *word == 0) {
                entry & (ZEROED | DISCARDED) != 0
            } else {
                entry & ZEROED == 0 && is_whole(words, sector, expected)
            };
            if !is_right {
                heartbeat::report_content("sector", sector as usize, expected, words[2]);
            }
        }
    }

    /// Discards or zeroes: one request of one range.
    fn clear(&mut self, what: &str, kind: u32, sectors: Range<u64>, flags: u64, mark: u32) {
        let count = sectors.end - sectors.start;
        self.disk.sector(0)[..2].copy_from_slice(&[sectors.start, count | flags << 32]);
        self.must(what, kind, sectors.start..sectors.start + 1, RANGE_BYTES);
        for sector in sectors {
            *self.generation(sector) |= mark;
        }
        self.written += count;
    }

    fn take(&mut self, step: Step) {
        let sectors = step.sectors;
        self.read_and_check(sectors.clone());
        match step.kind {
            Kind::Write => self.write_next_generation(sectors.clone()),
            Kind::Discard => self.clear("discard", T_DISCARD, sectors.clone(), 0, DISCARDED),
            Kind::Zeroes { unmap } => {
                self.clear("zeroes", T_WRITE_ZEROES, sectors.clone(), unmap.into(), ZEROED);
            }
        }
        self.read_and_check(sectors);
    }

    fn flush(&mut self) {
        if self.disk.flushes() {
            self.must("flush", T_FLUSH, 0..1, 0);
        }
    }

    fn check_all(&mut self, beside: &Beside<'_>) {
        for first in (0..self.sectors).step_by(BATCH) {
            self.read_and_check(self.batch(first));
        }
        self.flush();
        beside.check();
        let (sectors, written, acked) = (self.sectors, self.written, self.disk.acknowledged);
        println!(
            "CHECK sectors={sectors} corrupt={} gen={written} acked={acked} ram_pages={}",
            corrupt(),
            beside.pages()
        );
    }
}

pub fn run(machine: &Machine) -> ! {
    console::enable_interrupt();
    let disk = Disk::start(machine).unwrap_or_else(|error| {
        println!("ERROR {error}");
        machine::debug_exit(0x77)
    });
    let wished = machine.number("disk_mb", DEFAULT_MB).saturating_mul(SECTORS_PER_MB);
    let Some(table_pages) = machine
        .page_count()
        .checked_sub(pages_wanted(machine).saturating_add(RING_PAGES + DATA_PAGES))
    else {
        println!("ERROR there is less RAM than ws_mb");
        machine::debug_exit(0x77)
    };
    let table_pages = table_pages as u64;
    let sectors = disk.capacity().min(wished).min(table_pages * ENTRIES);
    if sectors == 0 {
        println!("ERROR the disk is empty");
        machine::debug_exit(0x77);
    }
    let steps = machine.number("steps", 0) == 1;
    if steps && (Step::new(0, sectors).is_none() || !disk.clears()) {
        println!("ERROR the disk is too small for steps, or has no discards and zeroes");
        machine::debug_exit(0x77);
    }
    heartbeat::HELD.store(steps, Relaxed);
    for page in 0..(sectors.div_ceil(ENTRIES)) as usize {
        // SAFETY: nothing else uses the table's pages.
        unsafe { machine.page(RING_PAGES + DATA_PAGES + page).write_bytes(0, 512) };
    }
    let tables_end = RING_PAGES + DATA_PAGES + sectors.div_ceil(ENTRIES) as usize;
    let beside = Beside::start(machine, tables_end);
    let mut region = Region { machine, disk, sectors, written: 0, latency: Latency::new() };
    let mut id = [0; 20];
    region.must("get-id", T_GET_ID, 0..1, id.len());
    let start = region.disk.sector(0).as_ptr().cast::<u8>();
    for (at, byte) in id.iter_mut().enumerate() {
        *byte = unsafe { *start.add(at) };
    }
    let id = id.split(|byte| *byte == 0).next().and_then(|id| core::str::from_utf8(id).ok());
    let started = tsc();
    for first in (0..sectors).step_by(BATCH) {
        region.write_next_generation(region.batch(first));
    }
    region.flush();
    println!(
        "READY work=disk cpus=1 ram_mb={} sectors={sectors} fill_us={} features={:#x} id={}",
        machine.ram_mb(),
        us(tsc() - started),
        region.disk.features,
        id.unwrap_or("?"),
    );
    console::flush();
    let written = region.written * SECTOR_BYTES as u64;
    let pace = Pace::new(machine.number("rate_mbps", 0), region.written);
    let heartbeat = Heartbeat::new(machine.number("hb_ms", 100), written);
    let next_step = steps.then_some(0);
    rewrite_for_ever(&mut region, beside, pace, heartbeat, next_step)
}

/// Keeps to a rate, if there is one.
struct Pace {
    /// Sectors per second; 0 is as fast as can be.
    sectors_per_sec: u64,
    written: u64,
    since: u64,
}

impl Pace {
    fn new(mbps: u64, written: u64) -> Self {
        Self { sectors_per_sec: mbps * 1_000_000 / SECTOR_BYTES as u64, written, since: tsc() }
    }

    /// Whether the next sectors are due. What was missed for long is not caught up.
    fn is_due(&mut self, written: u64, now: u64) -> bool {
        let due = us(now.wrapping_sub(self.since)) * self.sectors_per_sec / 1_000_000;
        let done = written - self.written;
        if due > done + self.sectors_per_sec / 100 {
            (self.since, self.written) = (now, written);
        }
        self.sectors_per_sec == 0 || done <= due
    }
}

fn rewrite_for_ever(
    region: &mut Region<'_>,
    mut beside: Beside<'_>,
    mut pace: Pace,
    mut heartbeat: Heartbeat,
    mut next_step: Option<u64>,
) -> ! {
    let (mut random, mut cycles) = (1u64, 0u64);
    let mut last = tsc();
    let mut sending = false;
    loop {
        let held = heartbeat::HELD.load(Relaxed);
        if let Some(number) = &mut next_step {
            if !held && let Some(step) = Step::new(*number, region.sectors) {
                region.take(step);
                *number += 1;
            }
        } else {
            random = next_random(random);
            let first = (random >> 20) % region.sectors / BATCH as u64 * BATCH as u64;
            let batch = region.batch(first);
            region.read_and_check(batch.clone());
            region.write_next_generation(batch);
        }
        cycles += 1;
        if cycles.is_multiple_of(CYCLES_PER_FLUSH) {
            region.flush();
        }
        for _ in 0..BYTES_PER_CYCLE {
            sending = sending && console::pump();
        }
        loop {
            let now = tsc();
            note_gap(0, now.wrapping_sub(last), now);
            last = now;
            beside.work(now);
            if pace.is_due(region.written, now) || heartbeat.is_due() {
                break;
            }
            sending = sending && console::pump();
        }
        PER_CPU[0].progress.fetch_add(1, Relaxed);
        if heartbeat.is_due() {
            let (acked, lost) = (region.disk.acknowledged, region.disk.lost_interrupts);
            let bytes = region.written * SECTOR_BYTES as u64;
            heartbeat.beat(
                region.written,
                bytes,
                format_args!(
                    " acked={acked} lost_irq={lost} ram_gen={} steps={} held={} writes={} write_p50_us={} write_p99_us={}",
                    beside.rewritten,
                    next_step.unwrap_or(0),
                    u8::from(held),
                    region.latency.count(),
                    region.latency.percentile(50),
                    region.latency.percentile(99),
                ),
            );
            region.latency.clear();
            sending = true;
            if answer(&mut || region.check_all(&beside)) {
                last = tsc();
            }
        }
    }
}
