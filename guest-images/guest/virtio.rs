//! The driver side of virtio-mmio (version 2) and of one split virtqueue, as a disk uses them: a batch
//! of requests is put in flight together and waited for asleep. Event index and indirect descriptors are
//! used when the device offers them.

use crate::apic;
use crate::clock::{ticks, tsc, us};
use crate::console::println;
use crate::fpu;
use crate::machine::{self, Machine};
use core::ptr::{read_volatile, write_volatile};
use core::sync::atomic::{Ordering, fence};

const VECTOR: u32 = 33;
const DEVICE_BLOCK: u32 = 2;
/// Requests in flight, unless told otherwise.
pub const BATCH: usize = 8;
/// Most of them: what their headers and tables leave room for.
pub const MAX_SLOTS: usize = 32;
const QUEUE_SIZE: usize = 64;
const DESCRIPTORS_PER_REQUEST: usize = 3;
pub const SECTOR_WORDS: usize = 64;
/// Longest sleep without an interrupt before the driver looks by itself.
const LOOK_US: u64 = 200_000;
const GIVE_UP_US: u64 = 30_000_000;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;
/// What one of the last two has as its data: first sector, 8 bytes; sectors, 4; flags, 4.
pub const RANGE_BYTES: usize = 16;

const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const F_INDIRECT: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;

/// Registers.
const VERSION: usize = 0x04;
const DEVICE_ID: usize = 0x08;
const DEVICE_FEATURES: usize = 0x10;
const DEVICE_FEATURES_SELECT: usize = 0x14;
const DRIVER_FEATURES: usize = 0x20;
const DRIVER_FEATURES_SELECT: usize = 0x24;
const QUEUE_SELECT: usize = 0x30;
const QUEUE_MAX: usize = 0x34;
const QUEUE_NUM: usize = 0x38;
const QUEUE_READY: usize = 0x44;
const QUEUE_NOTIFY: usize = 0x50;
const INTERRUPT_STATUS: usize = 0x60;
const INTERRUPT_ACK: usize = 0x64;
const STATUS: usize = 0x70;
const QUEUE_DESC: usize = 0x80;
const QUEUE_DRIVER: usize = 0x90;
const QUEUE_DEVICE: usize = 0xa0;
const CONFIG: usize = 0x100;

const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_NEEDS_RESET: u32 = 0x40;

/// Where things lie in the pages of a queue.
const AVAIL: usize = 4096;
const USED: usize = 8192;
const HEADERS: usize = 12288;
const HEADER_STRIDE: usize = 32;
const HEADER_STATUS: usize = 16;
const INDIRECT_TABLES: usize = 14336;
/// Pages that a disk needs before those for data.
pub const RING_PAGES: usize = 4;
/// And for a batch of sectors.
pub const DATA_PAGES: usize = BATCH * SECTOR_WORDS * 8 / 4096;

pub struct Disk {
    base: usize,
    /// Descriptors, available ring, used ring, a page each; headers, statuses and indirect tables.
    rings: *mut u8,
    data: *mut u64,
    /// Of each request's data.
    slot_bytes: usize,
    avail: u16,
    pub features: u64,
    /// Requests that the device said were done well.
    pub acknowledged: u64,
    /// Completions that the driver found by itself: no interrupt had come.
    pub lost_interrupts: u64,
}

impl Disk {
    fn get(&self, register: usize) -> u32 {
        unsafe { read_volatile((self.base + register) as *const u32) }
    }

    fn set(&self, register: usize, value: u32) {
        unsafe { write_volatile((self.base + register) as *mut u32, value) }
    }

    fn set_wide(&self, register: usize, value: usize) {
        self.set(register, value as u32);
        self.set(register + 4, (value >> 32) as u32);
    }

    /// Base and interrupt line of the first `virtio_mmio.device=SIZE@BASE:IRQ` that is a disk.
    fn find(machine: &Machine) -> Option<(usize, u32)> {
        let parse = |word: &'static str| {
            let (_, place) = word.strip_prefix("virtio_mmio.device=")?.split_once('@')?;
            let mut parts = place.split(':');
            let base = parts.next()?;
            let base = match base.strip_prefix("0x") {
                Some(hex) => usize::from_str_radix(hex, 16).ok()?,
                None => base.parse().ok()?,
            };
            let irq = parts.next()?.parse().ok()?;
            let id = unsafe { read_volatile((base + DEVICE_ID) as *const u32) };
            (id == DEVICE_BLOCK).then_some((base, irq))
        };
        machine.words().find_map(parse)
    }

    /// Starts the disk for a batch of sectors; its rings and data take the first pages of `machine`.
    pub fn start(machine: &Machine) -> Result<Self, &'static str> {
        Self::start_with(machine, BATCH, SECTOR_WORDS * 8)
    }

    /// Starts the disk for `slots` requests of `slot_bytes` each.
    pub fn start_with(
        machine: &Machine,
        slots: usize,
        slot_bytes: usize,
    ) -> Result<Self, &'static str> {
        let (base, irq) = Self::find(machine).ok_or("no virtio-blk device on the command line")?;
        let pages = RING_PAGES + (slots * slot_bytes).div_ceil(4096);
        if slots > MAX_SLOTS || pages > machine.page_count() {
            return Err("not enough memory for so many requests");
        }
        for page in 0..pages {
            // SAFETY: nothing else uses these pages.
            unsafe { machine.page(page).write_bytes(0, 512) };
        }
        let rings = machine.page(0).cast::<u8>();
        let data = machine.page(RING_PAGES);
        let mut disk = Self {
            base,
            rings,
            data,
            slot_bytes,
            avail: 0,
            features: 0,
            acknowledged: 0,
            lost_interrupts: 0,
        };
        if disk.get(VERSION) != 2 {
            return Err("the device is not virtio-mmio version 2");
        }
        disk.set(STATUS, 0);
        disk.set(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        disk.negotiate()?;
        if slots * DESCRIPTORS_PER_REQUEST > QUEUE_SIZE && !disk.has(F_INDIRECT) {
            return Err("the device has no indirect descriptors for so many requests");
        }
        disk.set(QUEUE_SELECT, 0);
        if disk.get(QUEUE_MAX) < QUEUE_SIZE as u32 {
            return Err("the device's queue is too short");
        }
        disk.set(QUEUE_NUM, QUEUE_SIZE as u32);
        disk.set_wide(QUEUE_DESC, rings as usize);
        disk.set_wide(QUEUE_DRIVER, rings as usize + AVAIL);
        disk.set_wide(QUEUE_DEVICE, rings as usize + USED);
        disk.set(QUEUE_READY, 1);
        apic::ioapic_route(irq, VECTOR);
        let ok = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK;
        disk.set(STATUS, ok);
        Ok(disk)
    }

    fn negotiate(&mut self) -> Result<(), &'static str> {
        let mut offered = 0;
        for half in [1, 0] {
            self.set(DEVICE_FEATURES_SELECT, half);
            offered = offered << 32 | u64::from(self.get(DEVICE_FEATURES));
        }
        if offered & F_VERSION_1 == 0 {
            return Err("the device does not offer VERSION_1");
        }
        let clearing = F_DISCARD | F_WRITE_ZEROES;
        self.features = offered & (F_VERSION_1 | F_FLUSH | clearing | F_EVENT_IDX | F_INDIRECT);
        for half in [0, 1] {
            self.set(DRIVER_FEATURES_SELECT, half);
            self.set(DRIVER_FEATURES, (self.features >> (half * 32)) as u32);
        }
        self.set(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
        if self.get(STATUS) & STATUS_FEATURES_OK == 0 {
            return Err("the device refuses the features that it offers");
        }
        Ok(())
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    pub fn flushes(&self) -> bool {
        self.has(F_FLUSH)
    }

    /// Whether it takes discards and zeroes.
    pub fn clears(&self) -> bool {
        self.has(F_DISCARD) && self.has(F_WRITE_ZEROES)
    }

    /// In sectors.
    pub fn capacity(&self) -> u64 {
        u64::from(self.get(CONFIG)) | u64::from(self.get(CONFIG + 4)) << 32
    }

    /// The data of request `slot`.
    pub fn sector(&mut self, slot: usize) -> &mut [u64] {
        // SAFETY: DATA_PAGES hold BATCH sectors; the device uses them only inside `execute`.
        unsafe { core::slice::from_raw_parts_mut(self.data.add(slot * SECTOR_WORDS), SECTOR_WORDS) }
    }

    fn describe(table: *mut u8, index: usize, address: usize, len: usize, flags: u16, next: usize) {
        unsafe {
            let at = table.add(index * 16);
            write_volatile(at.cast::<u64>(), address as u64);
            write_volatile(at.add(8).cast::<u32>(), len as u32);
            write_volatile(at.add(12).cast::<u16>(), flags);
            write_volatile(at.add(14).cast::<u16>(), next as u16);
        }
    }

    /// Makes request `slot` of `kind`, and returns its first descriptor.
    fn prepare(&self, slot: usize, kind: u32, sector: u64, len: usize) -> u16 {
        let header = unsafe { self.rings.add(HEADERS + slot * HEADER_STRIDE) };
        unsafe {
            write_volatile(header.cast::<u64>(), kind.into());
            write_volatile(header.add(8).cast::<u64>(), sector);
            write_volatile(header.add(HEADER_STATUS), 0xff);
        }
        let indirect = self.has(F_INDIRECT);
        let first = if indirect { slot } else { slot * DESCRIPTORS_PER_REQUEST };
        let (table, base) = if indirect {
            (unsafe { self.rings.add(INDIRECT_TABLES + slot * 64) }, 0)
        } else {
            (self.rings, first)
        };
        let data = self.data as usize + slot * self.slot_bytes;
        let direction = if matches!(kind, T_IN | T_GET_ID) { DESC_WRITE } else { 0 };
        let mut count = 0;
        let mut add = |address, len, flags, is_last: bool| {
            let flags = if is_last { flags } else { flags | DESC_NEXT };
            Self::describe(table, base + count, address, len, flags, base + count + 1);
            count += 1;
        };
        add(header as usize, 16, 0, false);
        if len > 0 {
            add(data, len, direction, false);
        }
        add(header as usize + HEADER_STATUS, 1, DESC_WRITE, true);
        if self.has(F_INDIRECT) {
            Self::describe(self.rings, first, table as usize, count * 16, DESC_INDIRECT, 0);
        }
        first as u16
    }

    /// Does up to [`BATCH`] requests of one kind and waits for all; `Err` is the first bad status.
    pub fn execute(&mut self, kind: u32, sectors: &[u64], len: usize) -> Result<(), u8> {
        let old = self.avail;
        for (slot, sector) in sectors.iter().enumerate() {
            let first = self.prepare(slot, kind, *sector, len);
            let entry = 4 + self.avail as usize % QUEUE_SIZE * 2;
            unsafe { write_volatile(self.rings.add(AVAIL + entry).cast::<u16>(), first) };
            self.avail = self.avail.wrapping_add(1);
        }
        if self.has(F_EVENT_IDX) {
            // Interrupt once the last of them is used.
            let used_event = AVAIL + 4 + QUEUE_SIZE * 2;
            let last = self.avail.wrapping_sub(1);
            unsafe { write_volatile(self.rings.add(used_event).cast::<u16>(), last) };
        }
        fence(Ordering::SeqCst);
        unsafe { write_volatile(self.rings.add(AVAIL + 2).cast::<u16>(), self.avail) };
        fence(Ordering::SeqCst);
        if self.wants_notification(old) {
            self.set(QUEUE_NOTIFY, 0);
        }
        self.wait();
        fence(Ordering::SeqCst);
        for slot in 0..sectors.len() {
            let at = HEADERS + slot * HEADER_STRIDE + HEADER_STATUS;
            let status = unsafe { read_volatile(self.rings.add(at)) };
            if status != 0 {
                return Err(status);
            }
        }
        self.acknowledged += sectors.len() as u64;
        Ok(())
    }

    fn wants_notification(&self, old: u16) -> bool {
        if self.has(F_EVENT_IDX) {
            let avail_event = USED + 4 + QUEUE_SIZE * 8;
            let event = unsafe { read_volatile(self.rings.add(avail_event).cast::<u16>()) };
            self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(old)
        } else {
            unsafe { read_volatile(self.rings.add(USED).cast::<u16>()) & 1 == 0 }
        }
    }

    fn all_are_used(&self) -> bool {
        unsafe { read_volatile(self.rings.add(USED + 2).cast::<u16>()) == self.avail }
    }

    /// Sleeps until all requests are used. Interrupts are edges: each is acknowledged before the last
    /// look at the ring, so that none that matters is swallowed by one still standing.
    fn wait(&mut self) {
        let (started, interrupts) = (tsc(), machine::interrupts_on(VECTOR));
        let mut looked_by_itself = false;
        while !self.all_are_used() {
            let before = machine::interrupts_on(VECTOR);
            let until = tsc() + ticks(LOOK_US);
            fpu::sleep(0, until);
            looked_by_itself = tsc() >= until && machine::interrupts_on(VECTOR) == before;
            self.acknowledge_interrupt();
            if self.get(STATUS) & STATUS_NEEDS_RESET != 0 {
                println!("DISK-ERROR the device needs a reset");
                machine::debug_exit(0x78);
            }
            if us(tsc().wrapping_sub(started)) > GIVE_UP_US {
                println!("DISK-ERROR no answer for {} s", GIVE_UP_US / 1_000_000);
                machine::debug_exit(0x79);
            }
        }
        if looked_by_itself && machine::interrupts_on(VECTOR) == interrupts {
            self.lost_interrupts += 1;
        }
    }

    fn acknowledge_interrupt(&self) {
        let pending = self.get(INTERRUPT_STATUS);
        if pending != 0 {
            self.set(INTERRUPT_ACK, pending);
        }
    }
}
