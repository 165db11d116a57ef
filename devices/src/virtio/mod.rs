//! Virtio devices (virtio 1.2): [`mmio`] is the transport's registers, [`worker`] the thread that
//! serves a queue, [`blk`] the block device, whose requests `blk_worker` serves, [`rng`] the source of
//! random bytes. `chains` is what their workers have in common, `latch` how their ends are waited for.

pub mod blk;
mod blk_worker;
mod chains;
#[cfg(test)]
pub(crate) mod driver;
mod latch;
pub mod mmio;
pub mod rng;
pub mod worker;

use crate::ram::GuestRam;
use crate::state::{DeviceRecord, RestoreError};
use std::os::fd::RawFd;
use virtio_queue::Queue;

/// `VIRTIO_F_VERSION_1`: not a legacy device.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_RING_EVENT_IDX`.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_RING_INDIRECT_DESC`.
pub const F_INDIRECT: u64 = 1 << 28;

/// The guest has set up a queue that cannot be served; the device needs a reset.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BrokenQueue(pub String);

/// A kind of device, behind any transport.
pub trait VirtioDevice: Send {
    /// Device id (virtio 1.2, 5).
    fn device_id(&self) -> u32;
    /// Offered features, without those of ring and transport.
    fn features(&self) -> u64;
    /// Number of queues; does not change.
    fn queue_count(&self) -> u16;
    /// Most descriptors of a queue.
    fn queue_max_size(&self) -> u16;
    /// Reads the configuration space; past its end it reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// What serves a queue, on a thread of its own, for a driver that accepted `driver_features`.
    fn processor(
        &self,
        queue: u16,
        driver_features: u64,
        ram: &GuestRam,
    ) -> Box<dyn QueueProcessor>;
    /// Names the thread of a queue.
    fn thread_name(&self, queue: u16) -> String;
    /// The state that is the device's own; it travels inside the transport's record.
    fn save(&self) -> DeviceRecord;
    /// Checks and takes over what [`VirtioDevice::save`] made.
    fn restore(&mut self, record: DeviceRecord) -> Result<(), RestoreError>;
}

/// What a processor asks of the thread that it runs on.
pub trait QueueHost {
    /// Tells the driver that buffers were used.
    fn interrupt(&mut self);
    /// Whether to leave the rest for later: somebody waits for the worker to park or to end.
    fn must_yield(&self) -> bool;
    /// Whether the device was reset or is gone: RAM is the guest's again. Nothing is answered any more.
    fn is_ending(&self) -> bool;
}

/// Serves one queue. Dropping it waits until it touches no RAM any more.
pub trait QueueProcessor: Send {
    /// Serves all that is available, request by request, until the host must yield. Requests may
    /// still be in flight after that, for no more than a bounded number of bytes.
    fn process(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
    ) -> Result<(), BrokenQueue>;
    /// Waits until no request is in flight. Those that have ended are answered; one that is served in
    /// pieces may be put back into the ring instead, to be served again from its start. Takes no new ones.
    fn drain(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
    ) -> Result<(), BrokenQueue>;
    /// Readable when a request that was in flight has ended, and `process` should run again. `None`
    /// if none is ever in flight after `process`.
    fn completions(&self) -> Option<RawFd>;
    /// Whether requests are in flight: whether RAM may change, or is read, between two calls.
    fn in_flight(&self) -> bool;
}
