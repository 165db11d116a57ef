//! Waits for the requests in flight of a stopped guest. Started by [`super::Machine::begin_pause`] on the
//! main thread, waited for on another.

use devices::block::BlockNode;
use devices::virtio::mmio::Drain;
use migration::guest::PartTime;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One device that was told to start no new request.
pub struct DeviceDrain {
    part: String,
    /// The disk's node, if it is a disk.
    pub disk: Option<Arc<BlockNode>>,
    began: Instant,
    drain: Drain,
}

impl DeviceDrain {
    /// A draining disk.
    pub fn of_disk(node: &Arc<BlockNode>, drain: Drain) -> Self {
        let part = format!("draining disk `{}`", node.id());
        Self::new(part, Some(node.clone()), drain)
    }

    /// A draining device other than a disk.
    pub fn of_device(name: &str, drain: Drain) -> Self {
        Self::new(format!("draining device `{name}`"), None, drain)
    }

    fn new(part: String, disk: Option<Arc<BlockNode>>, drain: Drain) -> Self {
        Self { part, disk, began: Instant::now(), drain }
    }

    /// Waits until no request is in flight; returns false at `deadline`.
    pub fn wait_until(&mut self, deadline: Instant) -> bool {
        self.drain.wait_until(deadline)
    }

    /// How long the drain took, or has taken so far.
    pub fn time(&self) -> PartTime {
        match self.drain.took() {
            Some(took) => PartTime::new(self.part.clone(), took),
            None => PartTime::not_ended(self.part.clone(), self.began.elapsed()),
        }
    }
}

/// All devices of a machine whose vCPUs have stopped.
#[must_use = "requests are in flight until it has been waited for"]
pub struct Drains {
    /// How long the vCPUs took to stop.
    pub vcpus_took: Duration,
    /// The devices.
    pub devices: Vec<DeviceDrain>,
}

impl Drains {
    /// Waits until no device has requests in flight; returns false at `deadline`.
    pub fn wait_until(&mut self, deadline: Instant) -> bool {
        // Asks all, so that each records how long it took.
        let late = self.devices.iter_mut().filter_map(|device| {
            let ended = device.wait_until(deadline);
            (!ended).then_some(())
        });
        late.count() == 0
    }

    /// The duration of each part, longest first; unfinished ones come before all others.
    pub fn times(&self) -> Vec<PartTime> {
        let vcpus = PartTime::new("stopping vCPUs", self.vcpus_took);
        let mut times: Vec<_> = self.devices.iter().map(DeviceDrain::time).collect();
        times.push(vcpus);
        longest_first(&mut times);
        times
    }

    /// The part that took longest.
    pub fn longest(&self) -> PartTime {
        let vcpus = PartTime::new("stopping vCPUs", self.vcpus_took);
        self.times().into_iter().next().unwrap_or(vcpus)
    }

    /// The parts that have not ended, for the user.
    pub fn late(&self) -> Vec<PartTime> {
        self.times().into_iter().filter(|time| !time.ended).collect()
    }
}

/// Sorts parts by duration, longest first; unfinished ones come before all others.
pub fn longest_first(times: &mut [PartTime]) {
    times.sort_by_key(|time| std::cmp::Reverse((!time.ended, time.took)));
}
