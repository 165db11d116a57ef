//! `disk`: a virtio-blk driver over virtio-mmio, and sectors that prove themselves.
//!
//! Every cycle takes a few random sectors, reads them, checks that each is exactly what the device
//! acknowledged last, writes the next generation and now and then flushes. Completions come by
//! interrupt; the driver sleeps meanwhile.

use crate::clock::{self, VECTOR_TIMER, lapic_read, tsc, us};
use crate::console::println;
use crate::machine::{self, Machine, sleep_until_interrupt};
use crate::paced::{Heartbeat, answer, report};
use core::ptr::{read_volatile, write_volatile};
use core::sync::atomic::{Ordering, fence};

const IOAPIC: usize = 0xfec0_0000;
const VECTOR_DISK: u32 = VECTOR_TIMER + 1;
const QUEUE_SIZE: usize = 64;
/// Requests in flight: three descriptors each.
const BATCH: usize = 8;
const SECTOR_WORDS: usize = 64;
const MAGIC: u64 = 0x4645_5252_5953_4543;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const F_FLUSH: u32 = 1 << 9;
const F_EVENT_IDX: u32 = 1 << 29;

fn seed(sector: u64, generation: u64) -> u64 {
    (sector << 24 ^ generation).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn sum(words: &[u64]) -> u64 {
    words.iter().fold(0xcbf2_9ce4_8422_2325, |sum, word| (sum ^ word).wrapping_mul(0x100_0000_01b3))
}

/// A numbered, checksummed sector: magic, number, generation, body, checksum of all before it.
fn fill_sector(words: &mut [u64], sector: u64, generation: u64) {
    let seed = seed(sector, generation);
    words[..3].copy_from_slice(&[MAGIC, sector, generation]);
    for (at, word) in words.iter_mut().enumerate().take(SECTOR_WORDS - 1).skip(3) {
        *word = seed.wrapping_add(at as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    words[SECTOR_WORDS - 1] = sum(&words[..SECTOR_WORDS - 1]);
}

fn is_whole(words: &[u64], sector: u64, generation: u64) -> bool {
    words[..3] == [MAGIC, sector, generation] && words[SECTOR_WORDS - 1] == sum(&words[..SECTOR_WORDS - 1])
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

struct Device {
    base: usize,
    /// Descriptor table, available ring and used ring, a page each; then headers and statuses; data.
    rings: *mut u8,
    data: *mut u64,
    avail: u16,
    event_idx: bool,
    acknowledged: u64,
    kicks: u64,
}

impl Device {
    fn get(&self, register: usize) -> u32 {
        unsafe { read_volatile((self.base + register) as *const u32) }
    }

    fn set(&self, register: usize, value: u32) {
        unsafe { write_volatile((self.base + register) as *mut u32, value) }
    }

    fn find(machine: &Machine) -> Option<(usize, u32)> {
        // virtio_mmio.device=<size>@<base>:<irq>
        let parse = |word: &'static str| {
            let (_, place) = word.strip_prefix("virtio_mmio.device=")?.split_once('@')?;
            let (base, irq) = place.split_once(':')?;
            let base = usize::from_str_radix(base.strip_prefix("0x")?, 16).ok()?;
            let id = unsafe { read_volatile((base + 8) as *const u32) };
            (id == 2).then_some((base, irq.parse().ok()?))
        };
        machine.words().find_map(parse)
    }

    fn start(base: usize, irq: u32, rings: *mut u8, data: *mut u64) -> Option<Self> {
        let mut device =
            Self { base, rings, data, avail: 0, event_idx: false, acknowledged: 0, kicks: 0 };
        if device.get(4) != 2 {
            println!("ERROR virtio-mmio version {} is not 2", device.get(4));
            return None;
        }
        device.set(0x70, 0);
        device.set(0x70, 3);
        device.set(0x14, 0);
        let offered = device.get(0x10);
        let features = offered & (F_FLUSH | F_EVENT_IDX);
        device.event_idx = features & F_EVENT_IDX != 0;
        device.set(0x24, 0);
        device.set(0x20, features);
        device.set(0x24, 1);
        device.set(0x20, 1);
        device.set(0x70, 11);
        if device.get(0x70) & 8 == 0 {
            println!("ERROR device refuses features {features:#x}");
            return None;
        }
        device.set(0x30, 0);
        device.set(0x38, QUEUE_SIZE as u32);
        for (register, offset) in [(0x80, 0), (0x90, 4096), (0xa0, 8192)] {
            let address = rings as usize + offset;
            device.set(register, address as u32);
            device.set(register + 4, (address >> 32) as u32);
        }
        device.set(0x44, 1);
        device.set(0x70, 15);
        // IOAPIC: edge, fixed, to CPU 0.
        let ioapic = |register: u32, value: u32| unsafe {
            write_volatile(IOAPIC as *mut u32, register);
            write_volatile((IOAPIC + 0x10) as *mut u32, value);
        };
        ioapic(0x10 + irq * 2 + 1, (lapic_read(0x20) >> 24) << 24);
        ioapic(0x10 + irq * 2, VECTOR_DISK);
        Some(device)
    }

    fn slot(&self, slot: usize) -> *mut u64 {
        unsafe { self.data.add(slot * SECTOR_WORDS) }
    }

    fn sector(&self, slot: usize) -> &'static mut [u64] {
        unsafe { core::slice::from_raw_parts_mut(self.slot(slot), SECTOR_WORDS) }
    }

    /// Does up to [`BATCH`] requests of one kind and waits for all; `Err` is the first bad status.
    fn execute(&mut self, kind: u32, sectors: &[u64], len: u32) -> Result<(), u8> {
        unsafe {
            for (slot, sector) in sectors.iter().enumerate() {
                let header = self.rings.add(12288 + slot * 32);
                write_volatile(header as *mut u64, u64::from(kind));
                write_volatile(header.add(8) as *mut u64, *sector);
                write_volatile(header.add(16), 0xff);
                let describe = |index: usize, address: usize, len: u32, flags: u16, next: usize| {
                    let at = self.rings.add((slot * 3 + index) * 16);
                    write_volatile(at as *mut u64, address as u64);
                    write_volatile(at.add(8) as *mut u32, len);
                    write_volatile(at.add(12) as *mut u16, flags);
                    write_volatile(at.add(14) as *mut u16, (slot * 3 + next) as u16);
                };
                let device_writes = if kind == T_OUT { 0 } else { 2 };
                describe(0, header as usize, 16, 1, if len > 0 { 1 } else { 2 });
                describe(1, self.slot(slot) as usize, len, 1 | device_writes, 2);
                describe(2, header as usize + 16, 1, 2, 0);
                let entry = self.rings.add(4096 + 4 + self.avail as usize % QUEUE_SIZE * 2);
                write_volatile(entry as *mut u16, (slot * 3) as u16);
                self.avail = self.avail.wrapping_add(1);
            }
            if self.event_idx {
                // Interrupt once the last of them is used.
                let used_event = self.rings.add(4096 + 4 + QUEUE_SIZE * 2);
                write_volatile(used_event as *mut u16, self.avail.wrapping_sub(1));
            }
            fence(Ordering::SeqCst);
            write_volatile(self.rings.add(4096 + 2) as *mut u16, self.avail);
            fence(Ordering::SeqCst);
            self.kicks += 1;
            self.set(0x50, 0);
            let used = self.rings.add(8192 + 2) as *const u16;
            let started = tsc();
            while read_volatile(used) != self.avail {
                clock::arm(tsc() + clock::ticks(200_000));
                sleep_until_interrupt();
                if self.get(0x70) & 0x40 != 0 {
                    println!("DISK-ERROR device needs reset");
                    machine::debug_exit(0x7a);
                }
                if us(tsc().wrapping_sub(started)) > 20_000_000 {
                    println!("DISK-ERROR no answer for 20 s");
                    machine::debug_exit(0x79);
                }
            }
            let pending = self.get(0x60);
            self.set(0x64, pending);
            fence(Ordering::SeqCst);
            for slot in 0..sectors.len() {
                let status = read_volatile(self.rings.add(12288 + slot * 32 + 16));
                if status != 0 {
                    return Err(status);
                }
            }
        }
        self.acknowledged += sectors.len() as u64;
        Ok(())
    }
}

fn must(what: &str, result: Result<(), u8>) {
    if let Err(status) = result {
        println!("DISK-ERROR {what} status={status}");
        machine::debug_exit(0x78);
    }
}

pub fn run(machine: &Machine) -> ! {
    clock::enable_lapic();
    let Some((base, irq)) = Device::find(machine) else {
        println!("ERROR no virtio-blk device on the command line");
        machine::debug_exit(0x77);
    };
    let (rings, data) = (machine.page(0) as *mut u8, machine.page(4));
    for page in 0..8 {
        unsafe { machine.page(page).write_bytes(0, 512) };
    }
    let Some(mut device) = Device::start(base, irq, rings, data) else { machine::debug_exit(0x76) };
    must("get-id", device.execute(T_GET_ID, &[0], 20));
    let id: [u64; 3] = [device.sector(0)[0], device.sector(0)[1], device.sector(0)[2]];
    let id = unsafe { core::slice::from_raw_parts(id.as_ptr() as *const u8, 20) };
    let id = id.split(|byte| *byte == 0).next().and_then(|id| core::str::from_utf8(id).ok());
    let capacity = u64::from(device.get(0x100)) | u64::from(device.get(0x104)) << 32;
    let count = (machine.number("disk_mb", 1 << 40) * 2048).min(capacity);
    // One generation per sector, in the pages behind.
    let table = machine.page(8) as *mut u32;
    let generation = |sector: u64| unsafe { &mut *table.add(sector as usize) };
    let start = tsc();
    let mut sectors = [0u64; BATCH];
    for first in (0..count).step_by(BATCH) {
        let len = (count - first).min(BATCH as u64) as usize;
        for slot in 0..len {
            sectors[slot] = first + slot as u64;
            *generation(sectors[slot]) = 1;
            fill_sector(device.sector(slot), sectors[slot], 1);
        }
        must("write", device.execute(T_OUT, &sectors[..len], 512));
    }
    must("flush", device.execute(T_FLUSH, &[0], 0));
    let fill_us = us(tsc() - start);
    println!("READY work=disk cpus=1 id={} sectors={count} fill_us={fill_us}", id.unwrap_or("?"));
    let mut heartbeat = Heartbeat::new(machine.number("hb_ms", 100) * 1000);
    let (mut random, mut cycles, mut writes) = (1u64, 0u64, 0u64);
    let (mut last, mut largest) = (tsc(), 0);
    loop {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let first = (random >> 20) % count / BATCH as u64 * BATCH as u64;
        let len = (count - first).min(BATCH as u64) as usize;
        for (slot, sector) in sectors[..len].iter_mut().enumerate() {
            *sector = first + slot as u64;
        }
        must("read", device.execute(T_IN, &sectors[..len], 512));
        for (slot, sector) in sectors[..len].iter().enumerate() {
            let old = generation(*sector);
            let words = device.sector(slot);
            if !is_whole(words, *sector, u64::from(*old)) {
                report("sector", *sector as usize, u64::from(*old), words[2]);
            }
            *old += 1;
            fill_sector(words, *sector, u64::from(*old));
        }
        must("write", device.execute(T_OUT, &sectors[..len], 512));
        writes += len as u64;
        cycles += 1;
        if cycles % 64 == 0 {
            must("flush", device.execute(T_FLUSH, &[0], 0));
        }
        let now = tsc();
        largest = (now - last).max(largest);
        last = now;
        let gap = || us(core::mem::take(&mut largest));
        let input = heartbeat.beat(writes, writes * 512, gap);
        answer(input, &mut || {
            let mut corrupt = 0;
            for first in (0..count).step_by(BATCH) {
                let len = (count - first).min(BATCH as u64) as usize;
                for (slot, sector) in sectors[..len].iter_mut().enumerate() {
                    *sector = first + slot as u64;
                }
                must("read", device.execute(T_IN, &sectors[..len], 512));
                for (slot, sector) in sectors[..len].iter().enumerate() {
                    let expected = u64::from(*generation(*sector));
                    if !is_whole(device.sector(slot), *sector, expected) {
                        corrupt += 1;
                        report("sector", *sector as usize, expected, device.sector(slot)[2]);
                    }
                }
            }
            must("flush", device.execute(T_FLUSH, &[0], 0));
            println!("CHECK sectors={count} corrupt={corrupt} gen={writes} acknowledged={}", device.acknowledged);
            last = tsc();
        });
    }
}
