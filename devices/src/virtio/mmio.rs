//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2). Its state is saved and restored in [`record`].
//!
//! Register accesses run on the vCPU's thread; each queue has a [`Worker`], started when the driver sets
//! DRIVER_OK and ended by a reset. Invalid programming is ignored or sets NEEDS_RESET, as the specification
//! says; it never harms the VMM.
//!
//! A vCPU never waits for the disk. The transport holds the registers; an active queue belongs to its
//! worker. **A reset** completes at once if no request is in flight, as is almost always the case: Linux's
//! virtio-mmio driver does not read the status back but programs the device right away. If requests are in
//! flight, a short wait ([`RESET_PATIENCE`]) gives them the time that a working disk needs. After that the
//! reset continues in the background: the status keeps its old value until the last request has ended, then
//! reads as 0, as specified (virtio 1.2, 2.1.2 and 2.4.1). Until then the rings and buffers are in use, so
//! all writes are ignored and QueueReady reads as 1: a driver that did not wait fails to set up its queues
//! and reports that, instead of sharing memory with a read in flight.

use super::latch::Latch;
use super::worker::{Position, QueueSignals, Worker};
use super::{BrokenQueue, F_EVENT_IDX, F_INDIRECT, F_VERSION_1, VirtioDevice};
use crate::bus::BusDevice;
use crate::irq::IrqLine;
use crate::log_limit::LogLimit;
use crate::ram::{GuestAddress, GuestRam};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

mod record;

pub use record::MmioState;

/// Bytes of address space of one device.
pub const MMIO_LEN: u64 = 0x1000;
/// QueueNotify: where an ioeventfd listens.
pub const NOTIFY_OFFSET: u64 = 0x50;
const CONFIG_OFFSET: u64 = 0x100;

const MAGIC: u32 = 0x7472_6976; // "virt"
const VERSION: u32 = 2;
const VENDOR: u32 = 0x5952_4546; // "FERY"
const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_NEEDS_RESET: u32 = 0x40;
const STATUS_FAILED: u32 = 0x80;
/// The bits that a driver sets.
const STATUS_BY_DRIVER: u32 =
    STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK | STATUS_FEATURES_OK | STATUS_FAILED;

/// How long a vCPU that resets the device waits for requests in flight before the reset continues in the
/// background. About a time slice of the host's scheduler: enough for a working disk's last requests, too
/// short for a guest or a pause to notice.
const RESET_PATIENCE: Duration = Duration::from_millis(5);
/// How long dropping or restoring a device waits for the requests that are in flight.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// Log limits, one per error that a guest can cause.
#[derive(Debug, Default)]
struct LogLimits {
    broken_queue: LogLimit,
    interrupt: LogLimit,
    bad_write: LogLimit,
}

/// State shared by workers and vCPUs. Each reset creates a new one, so that old workers cannot change what
/// the driver sees now.
struct Shared {
    status: AtomicU32,
    interrupt_status: AtomicU32,
    irq: Arc<dyn IrqLine>,
    limits: Arc<LogLimits>,
}

impl Shared {
    fn new(irq: Arc<dyn IrqLine>, limits: Arc<LogLimits>) -> Arc<Self> {
        let (status, interrupt_status) = (AtomicU32::new(0), AtomicU32::new(0));
        Arc::new(Self { status, interrupt_status, irq, limits })
    }

    fn interrupt(&self, reason: u32) {
        self.interrupt_status.fetch_or(reason, Ordering::SeqCst);
        if let Err(error) = self.irq.raise()
            && let Some(suppressed) = self.limits.interrupt.allow()
        {
            log::error!("virtio interrupt: {error}{suppressed}");
        }
    }
}

impl QueueSignals for Shared {
    fn used(&self) {
        self.interrupt(INTERRUPT_USED);
    }

    fn is_live(&self) -> bool {
        is_live(self.status.load(Ordering::SeqCst))
    }

    fn broken(&self, reason: &BrokenQueue) {
        if let Some(suppressed) = self.limits.broken_queue.allow() {
            log::warn!(
                "a guest's virtqueue cannot be served, the device needs a reset: \
                 {reason}{suppressed}"
            );
        }
        self.status.fetch_or(STATUS_NEEDS_RESET, Ordering::SeqCst);
        self.interrupt(INTERRUPT_CONFIG);
    }
}

/// One virtqueue and its worker.
struct QueueSlot {
    /// As programmed by the driver; the worker has its own copy.
    config: Queue,
    notify: EventFd,
    worker: Option<Worker>,
}

impl QueueSlot {
    fn new(max_size: u16) -> io::Result<Self> {
        let config = Queue::new(max_size).map_err(io::Error::other)?;
        let notify = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { config, notify, worker: None })
    }

    /// Position in the rings: exact while the worker is parked.
    fn position(&self) -> Position {
        self.worker.as_ref().map_or_else(|| Position::of(&self.config), Worker::position)
    }

    /// Sets half of a ring's address. A misaligned address is ignored.
    fn set_address(&mut self, offset: u64, value: u32) -> Result<(), virtio_queue::Error> {
        let config = &mut self.config;
        let with_half = |old: u64| {
            let value = u64::from(value);
            GuestAddress(if offset & 4 == 0 {
                old & !0xffff_ffff | value
            } else {
                old & 0xffff_ffff | value << 32
            })
        };
        match offset {
            0x80 | 0x84 => config.try_set_desc_table_address(with_half(config.desc_table())),
            0x90 | 0x94 => config.try_set_avail_ring_address(with_half(config.avail_ring())),
            0xa0 | 0xa4 => config.try_set_used_ring_address(with_half(config.used_ring())),
            _ => Ok(()),
        }
    }
}

/// Whether a queue's rings lie in RAM. Does not log: a guest could trigger it at will.
fn rings_are_in_ram(queue: &Queue, ram: &GuestRam) -> bool {
    let entries = usize::from(queue.size());
    // Descriptors of 16 bytes; rings of entries with flags and index before, and an event index after.
    let rings = [
        (queue.desc_table(), 16 * entries),
        (queue.avail_ring(), 6 + 2 * entries),
        (queue.used_ring(), 6 + 8 * entries),
    ];
    rings.iter().all(|(address, len)| ram.check_range(GuestAddress(*address), *len))
}

/// A reset that continues in the background.
struct Resetting {
    /// The status that the driver reads until it is complete.
    status: u32,
    /// Set when the workers with requests in flight have ended.
    busy: Vec<Arc<Latch>>,
}

/// One virtio-mmio device.
///
/// Dropping it waits briefly for the requests in flight. Those of a hanging disk are left to their thread,
/// which holds references to the RAM and the disk.
pub struct MmioTransport {
    ram: GuestRam,
    device: Box<dyn VirtioDevice>,
    /// Since the last reset.
    shared: Arc<Shared>,
    /// The last reset, if it continues in the background.
    resetting: Option<Resetting>,
    queues: Vec<QueueSlot>,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    /// Set between `drain` and `resume`: a worker starts parked.
    drained: bool,
}

impl MmioTransport {
    /// A device in its reset state.
    pub fn new(
        ram: GuestRam,
        device: Box<dyn VirtioDevice>,
        irq: Arc<dyn IrqLine>,
    ) -> io::Result<Self> {
        let max_size = device.queue_max_size();
        let queues = (0..device.queue_count()).map(|_| QueueSlot::new(max_size));
        let queues = queues.collect::<io::Result<_>>()?;
        Ok(Self {
            ram,
            device,
            shared: Shared::new(irq, Arc::default()),
            resetting: None,
            queues,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            drained: false,
        })
    }

    /// The notification eventfds, by queue number.
    pub fn queue_events(&self) -> impl Iterator<Item = &EventFd> {
        self.queues.iter().map(|slot| &slot.notify)
    }

    /// Tells all workers to start no new request. The result waits for those in flight, including those
    /// from before a reset.
    pub fn begin_drain(&mut self) -> Drain {
        self.drained = true;
        let began = Instant::now();
        let mut awaited: Vec<_> = self.workers().map(Worker::park).collect();
        awaited.extend(self.resetting.iter().flat_map(|reset| reset.busy.iter().cloned()));
        Drain { began, awaited }
    }

    /// Resumes serving, also during a drain: the workers finish that first. A notification or interrupt in
    /// flight may have been lost, so both are repeated.
    pub fn resume(&mut self) {
        self.drained = false;
        self.workers().for_each(Worker::resume);
        let pending = self.shared.interrupt_status.load(Ordering::SeqCst);
        if pending != 0 {
            self.shared.interrupt(pending);
        }
    }

    fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.queues.iter().filter_map(|slot| slot.worker.as_ref())
    }

    /// The queue that the driver selected, if it exists.
    fn queue(&self, number: u32) -> Option<&QueueSlot> {
        self.queues.get(usize::try_from(number).ok()?)
    }

    fn queue_mut(&mut self, number: u32) -> Option<&mut QueueSlot> {
        self.queues.get_mut(usize::try_from(number).ok()?)
    }

    fn is_resetting(&self) -> bool {
        let is_busy = |reset: &Resetting| reset.busy.iter().any(|worker| worker.get().is_none());
        self.resetting.as_ref().is_some_and(is_busy)
    }

    fn features(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT
    }

    pub(super) fn status(&self) -> u32 {
        match &self.resetting {
            Some(reset) if self.is_resetting() => reset.status,
            _ => self.shared.status.load(Ordering::SeqCst),
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let selected = self.queue(self.queue_select);
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.device_id(),
            0x0c => VENDOR,
            0x10 => half(self.features(), self.device_features_select),
            0x34 => selected.map_or(0, |_| self.device.queue_max_size().into()),
            0x44 => selected.map_or(0, |slot| (slot.config.ready() || self.is_resetting()).into()),
            0x60 => self.shared.interrupt_status.load(Ordering::SeqCst),
            0x70 => self.status(),
            // No shared memory regions: their length reads as -1.
            0xb0..=0xbc => u32::MAX,
            // 0xfc, the configuration generation: the configuration never changes.
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        if self.is_resetting() {
            return;
        }
        match offset {
            0x14 => self.device_features_select = value,
            0x20 => self.set_driver_features(value),
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            0x50 => {
                if let Some(slot) = self.queue(value) {
                    // Like the ioeventfd; a full counter means that the worker is awake.
                    let _ = slot.notify.write(1);
                }
            }
            0x64 => {
                self.shared.interrupt_status.fetch_and(!value, Ordering::SeqCst);
            }
            0x70 => self.set_status(value),
            0x38 | 0x44 | 0x80..=0xa4 => self.set_queue_register(offset, value),
            _ => self.ignored("write", value, offset),
        }
    }

    /// Logs a register write that is ignored.
    fn ignored(&self, what: &str, value: u32, offset: u64) {
        if log::log_enabled!(log::Level::Debug)
            && let Some(suppressed) = self.shared.limits.bad_write.allow()
        {
            log::debug!("virtio-mmio {what} {value:#x} to {offset:#x} ignored{suppressed}");
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status() & STATUS_FEATURES_OK != 0 {
            return;
        }
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let mask = 0xffff_ffff_u64 << shift;
        self.driver_features = self.driver_features & !mask | u64::from(value) << shift;
    }

    fn set_queue_register(&mut self, offset: u64, value: u32) {
        // Queues are set up before DRIVER_OK (virtio 1.2, 3.1.1) and not touched while live (4.2.2.2).
        if self.status() & STATUS_DRIVER_OK != 0 {
            return;
        }
        let Some(slot) = self.queue_mut(self.queue_select) else { return };
        let taken = match offset {
            // Checked here because the queue's setters log every rejected value.
            0x38 => match u16::try_from(value) {
                Ok(size) => slot.config.try_set_size(size).is_ok(),
                Err(_) => false,
            },
            0x44 => {
                slot.config.set_ready(value & 1 == 1);
                true
            }
            _ => slot.set_address(offset, value).is_ok(),
        };
        if !taken {
            self.ignored("queue setting", value, offset);
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let old = self.status();
        // Bits are set in order and never cleared but by a reset (virtio 1.2, 2.1 and 3.1.1).
        let mut new = old | value & STATUS_BY_DRIVER;
        if !in_order(new) {
            return self.ignored("status out of order", value, 0x70);
        }
        let newly = |new: u32, bit| new & bit != 0 && old & bit == 0;
        if newly(new, STATUS_FEATURES_OK) && !self.accepts_features() {
            self.ignored("status with features that were not offered", value, 0x70);
            new &= !(STATUS_FEATURES_OK | STATUS_DRIVER_OK);
        }
        // Only sets bits: the worker may set NEEDS_RESET concurrently.
        self.shared.status.fetch_or(new, Ordering::SeqCst);
        if newly(new, STATUS_DRIVER_OK) && is_live(new) {
            let event_idx = self.driver_features & F_EVENT_IDX != 0;
            for slot in &mut self.queues {
                slot.config.set_event_idx(event_idx);
            }
            if let Err(reason) = self.activate() {
                self.shared.broken(&reason);
            }
        }
    }

    fn accepts_features(&self) -> bool {
        self.driver_features & !self.features() == 0 && self.driver_features & F_VERSION_1 != 0
    }

    /// Starts a worker for each queue that the driver has set up. After an error some workers may exist,
    /// but they serve nothing unless the device is live.
    fn activate(&mut self) -> Result<(), BrokenQueue> {
        for number in 0..self.device.queue_count() {
            let worker = match self.queue(number.into()) {
                Some(slot) => self.start(number, slot)?,
                None => None,
            };
            if let Some(slot) = self.queue_mut(number.into()) {
                slot.worker = worker;
            }
        }
        Ok(())
    }

    fn start(&self, number: u16, slot: &QueueSlot) -> Result<Option<Worker>, BrokenQueue> {
        if !slot.config.ready() {
            return Ok(None);
        }
        if !rings_are_in_ram(&slot.config, &self.ram) {
            return Err(BrokenQueue(format!("the rings of queue {number} lie outside RAM")));
        }
        let queue = Queue::try_from(slot.config.state())?;
        let worker = slot.notify.try_clone().and_then(|notify| {
            Worker::start(
                self.device.thread_name(number),
                self.ram.clone(),
                queue,
                notify,
                self.device.processor(number, self.driver_features, &self.ram)?,
                self.shared.clone(),
                self.drained,
            )
        });
        worker.map(Some).map_err(|error| BrokenQueue(format!("no worker thread: {error}")))
    }

    /// Ends all workers. Returns latches for those with requests in flight, including workers from before
    /// earlier resets; the others use neither RAM nor notifications any more.
    fn retire_workers(&mut self) -> Vec<Arc<Latch>> {
        let mut busy: Vec<_> = self.workers().filter_map(Worker::retire).collect();
        for slot in &mut self.queues {
            slot.worker = None;
        }
        busy.extend(self.resetting.take().into_iter().flat_map(|reset| reset.busy));
        busy
    }

    fn reset(&mut self) {
        let status = self.status();
        let busy = self.retire_workers();
        for slot in &mut self.queues {
            slot.config.reset();
        }
        self.shared = Shared::new(self.shared.irq.clone(), self.shared.limits.clone());
        self.driver_features = 0;
        self.driver_features_select = 0;
        self.device_features_select = 0;
        self.queue_select = 0;
        if !all_set(&busy, Instant::now() + RESET_PATIENCE) {
            self.resetting = Some(Resetting { status, busy });
        }
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        let mut workers: Vec<_> = self.workers().map(Worker::ended).collect();
        workers.extend(self.retire_workers());
        if !all_set(&workers, Instant::now() + END_PATIENCE) {
            let name = self.device.thread_name(0);
            log::warn!("{name}: requests in flight do not end; left to their thread");
        }
    }
}

/// Waits for all latches; returns false on timeout.
fn all_set(latches: &[Arc<Latch>], deadline: Instant) -> bool {
    latches.iter().all(|moment| moment.wait_until(deadline).is_some())
}

/// Workers that were told to park. Dropping this does not affect them.
#[must_use = "requests are in flight until it has been waited for"]
pub struct Drain {
    began: Instant,
    awaited: Vec<Arc<Latch>>,
}

impl Drain {
    /// Waits until no request is in flight, at most until `deadline`. Returns false on timeout; may be
    /// called again.
    pub fn wait_until(&mut self, deadline: Instant) -> bool {
        all_set(&self.awaited, deadline)
    }

    /// Duration from the start until the last request ended, whether or not anyone waited. `None` while
    /// requests are in flight.
    pub fn took(&self) -> Option<Duration> {
        let ends = self.awaited.iter().map(|moment| moment.get());
        let last = ends.collect::<Option<Vec<_>>>()?.into_iter().max().unwrap_or(self.began);
        Some(last.saturating_duration_since(self.began))
    }
}

/// Whether each status bit's prerequisites are set.
fn in_order(status: u32) -> bool {
    let needs = |bit, before| status & bit == 0 || status & before == before;
    needs(STATUS_DRIVER, STATUS_ACKNOWLEDGE)
        && needs(STATUS_FEATURES_OK, STATUS_DRIVER)
        && needs(STATUS_DRIVER_OK, STATUS_FEATURES_OK)
}

/// Whether a device with this status serves its queues.
fn is_live(status: u32) -> bool {
    status & STATUS_DRIVER_OK != 0 && status & (STATUS_NEEDS_RESET | STATUS_FAILED) == 0
}

#[expect(clippy::cast_possible_truncation, reason = "one half at a time")]
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

impl BusDevice for MmioTransport {
    #[expect(clippy::little_endian_bytes, reason = "registers are little-endian on the bus")]
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG_OFFSET {
            self.device.read_config(offset - CONFIG_OFFSET, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        }
    }

    #[expect(clippy::little_endian_bytes, reason = "registers are little-endian on the bus")]
    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        if offset < CONFIG_OFFSET && offset.is_multiple_of(4) {
            self.set_register(offset, u32::from_le_bytes(bytes));
        }
    }
}

#[cfg(test)]
mod hanging_disk;
#[cfg(test)]
mod tests;
