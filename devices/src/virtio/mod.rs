//! Virtio devices (virtio 1.2): [`mmio`] is the transport's registers, [`worker`] the thread that
//! serves a queue, [`blk`] the block device.

pub mod blk;
pub mod mmio;
pub mod worker;

use crate::ram::GuestRam;
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

/// A kind of device, behind any transport. One queue each so far.
pub trait VirtioDevice: Send {
    /// Device id (virtio 1.2, 5).
    fn device_id(&self) -> u32;
    /// Offered features, without those of ring and transport.
    fn features(&self) -> u64;
    /// Most descriptors of the queue.
    fn queue_max_size(&self) -> u16;
    /// Reads the configuration space; past its end it reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// What serves the queue, on a thread of its own.
    fn processor(&self) -> Box<dyn QueueProcessor>;
    /// Names the thread.
    fn thread_name(&self) -> String;
}

/// Serves one queue.
pub trait QueueProcessor: Send {
    /// Serves all that is available; calls `interrupt` when the driver wants one.
    fn process(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        interrupt: &mut dyn FnMut(),
    ) -> Result<(), BrokenQueue>;
}
