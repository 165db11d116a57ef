//! Virtio devices (virtio 1.2): [`mmio`] is the transport, [`worker`] the thread that serves a queue,
//! [`blk`] the block device, whose requests `blk_request` parses and `blk_worker` serves, [`rng`] the entropy
//! device. `chains` is common to all queue processors; a `latch` signals that a worker has parked or ended.

pub mod blk;
mod blk_request;
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
use std::io;
use std::os::fd::RawFd;
use virtio_queue::Queue;

/// `VIRTIO_F_VERSION_1`: not a legacy device.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_RING_EVENT_IDX`.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_RING_INDIRECT_DESC`.
pub const F_INDIRECT: u64 = 1 << 28;

/// A queue that cannot be served; the device needs a reset.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BrokenQueue(pub String);

/// A device type, independent of the transport.
pub trait VirtioDevice: Send {
    /// Device id (virtio 1.2, 5).
    fn device_id(&self) -> u32;
    /// Offered features, without those of rings and transport.
    fn features(&self) -> u64;
    /// Number of queues; does not change.
    fn queue_count(&self) -> u16;
    /// Maximum queue size.
    fn queue_max_size(&self) -> u16;
    /// Reads the configuration space, which is zero past its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Creates the processor of a queue for a driver that accepted `driver_features`. It runs on its own
    /// thread. Fails if the host has no descriptor for it.
    fn processor(
        &self,
        queue: u16,
        driver_features: u64,
        ram: &GuestRam,
    ) -> io::Result<Box<dyn QueueProcessor>>;
    /// Name of a queue's thread.
    fn thread_name(&self, queue: u16) -> String;
    /// The device's own state, part of the transport's record.
    fn save(&self) -> DeviceRecord;
    /// Checks and loads what [`VirtioDevice::save`] returned.
    fn restore(&mut self, record: DeviceRecord) -> Result<(), RestoreError>;
}

/// The thread that runs a queue processor.
pub trait QueueHost {
    /// Raises the used buffer interrupt.
    fn interrupt(&mut self);
    /// Whether to stop serving for now: the worker must park or end.
    fn must_yield(&self) -> bool;
    /// Whether the device was reset or dropped: its buffers belong to the guest again, and no request may
    /// be completed any more.
    fn is_ending(&self) -> bool;
}

/// Serves one queue. Dropping it waits until it accesses no RAM any more.
pub trait QueueProcessor: Send {
    /// Serves available requests until the host must yield. Afterwards requests may still be in flight, up
    /// to a bounded number of bytes.
    fn process(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
    ) -> Result<(), BrokenQueue>;
    /// Waits until no request is in flight and starts no new one. Requests that end are completed; one that
    /// is served in pieces may be put back into the ring instead, to be served again from its start. After
    /// an error requests may still be in flight: call it again.
    fn drain(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
    ) -> Result<(), BrokenQueue>;
    /// Each readable when `process` should run: a request in flight has ended, for example. They do not change.
    fn wakers(&self) -> Vec<RawFd>;
    /// Whether requests are in flight, so that RAM may be read or written between two calls.
    fn in_flight(&self) -> bool;
}
