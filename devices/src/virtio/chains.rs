//! Takes descriptor chains from a queue and answers them: the part that all devices have in common.

use super::{BrokenQueue, QueueHost};
use crate::ram::GuestRam;
use std::ops::ControlFlow;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

impl From<virtio_queue::Error> for BrokenQueue {
    fn from(error: virtio_queue::Error) -> Self {
        Self(error.to_string())
    }
}

/// Gives every available chain to `serve`, until there is none left, the host must yield or `serve`
/// has had enough. In the latter two cases notifications stay off: whoever makes the worker go on
/// makes it look again.
pub(super) fn take_all(
    ram: &GuestRam,
    queue: &mut Queue,
    host: &mut dyn QueueHost,
    mut serve: impl FnMut(
        &mut Queue,
        &mut dyn QueueHost,
        DescriptorChain<&GuestRam>,
    ) -> Result<ControlFlow<()>, BrokenQueue>,
) -> Result<(), BrokenQueue> {
    // Whether the driver was seen to have made something available that we have not looked at.
    let mut announced = false;
    loop {
        queue.disable_notification(ram)?;
        let mut served = false;
        loop {
            if host.must_yield() {
                return Ok(());
            }
            let Some(chain) = queue.iter(ram)?.next() else { break };
            served = true;
            if serve(queue, host, chain)?.is_break() {
                return Ok(());
            }
        }
        if announced && !served {
            // More was announced than can be read: without this a guest could make us spin.
            return Err(BrokenQueue("an available entry cannot be read".into()));
        }
        announced = queue.enable_notification(ram)?;
        if !announced {
            return Ok(());
        }
    }
}

/// Gives a chain back, with `len` bytes written to it.
pub(super) fn give_back(
    ram: &GuestRam,
    queue: &mut Queue,
    host: &mut dyn QueueHost,
    head: u16,
    len: usize,
) -> Result<(), BrokenQueue> {
    // The used ring's length has 32 bits. Overlapping buffers can add up to more: it saturates.
    queue.add_used(ram, head, u32::try_from(len).unwrap_or(u32::MAX))?;
    if queue.needs_notification(ram)? {
        host.interrupt();
    }
    Ok(())
}
