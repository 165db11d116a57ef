//! Takes descriptor chains from a queue and returns them; common to all devices.

use super::{BrokenQueue, QueueHost};
use crate::ram::GuestRam;
use std::ops::ControlFlow;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

impl From<virtio_queue::Error> for BrokenQueue {
    fn from(error: virtio_queue::Error) -> Self {
        Self(error.to_string())
    }
}

/// Passes every available chain to `serve`, until none is left, the host must yield, or `serve` stops. In
/// the latter two cases notifications stay disabled: the worker checks the ring again when it continues.
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
    // Whether an available entry has been seen but not read yet.
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
            // The index announces an entry that cannot be read: without this check a guest could make us
            // spin.
            return Err(BrokenQueue("an available entry cannot be read".into()));
        }
        announced = queue.enable_notification(ram)?;
        if !announced {
            return Ok(());
        }
    }
}

/// Returns a chain to the driver, with `len` bytes written.
pub(super) fn give_back(
    ram: &GuestRam,
    queue: &mut Queue,
    host: &mut dyn QueueHost,
    head: u16,
    len: usize,
) -> Result<(), BrokenQueue> {
    // Checked here because `add_used` logs every rejected head.
    if head >= queue.size() {
        return Err(BrokenQueue(format!("an available entry with head {head}, past the table")));
    }
    // The used ring's length has 32 bits. Overlapping buffers can add up to more: it saturates.
    queue.add_used(ram, head, u32::try_from(len).unwrap_or(u32::MAX))?;
    if queue.needs_notification(ram)? {
        host.interrupt();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::GuestAddress;
    use crate::virtio::driver::CalmHost;

    #[test]
    fn a_head_past_the_table_is_refused_by_us_and_not_logged_at_will() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mut queue = Queue::new(16).unwrap();
        for head in [16, u16::MAX] {
            let refused = give_back(&ram, &mut queue, &mut CalmHost, head, 0).unwrap_err();
            assert!(refused.to_string().contains("past the table"), "{refused}");
        }
    }
}
