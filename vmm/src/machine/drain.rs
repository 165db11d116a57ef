//! Waiting for the requests that were in flight when a guest was stopped. Begun by
//! [`super::Machine::begin_pause`] on the main thread, waited for on any other.

use devices::block::BlockNode;
use devices::virtio::mmio::Drain;
use migration::guest::PartTime;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One device that was told to start no new request.
pub struct DeviceDrain {
    part: String,
    /// What stores the disk, if it is one.
    pub disk: Option<Arc<BlockNode>>,
    began: Instant,
    drain: Drain,
}

impl DeviceDrain {
    /// A disk that was told so just now.
    pub fn of_disk(node: &Arc<BlockNode>, drain: Drain) -> Self {
        let part = format!("draining disk `{}`", node.id());
        Self::new(part, Some(node.clone()), drain)
    }

    /// Another device.
    pub fn of_device(name: &str, drain: Drain) -> Self {
        Self::new(format!("draining device `{name}`"), None, drain)
    }

    fn new(part: String, disk: Option<Arc<BlockNode>>, drain: Drain) -> Self {
        Self { part, disk, began: Instant::now(), drain }
    }

    /// Whether no request is in flight any more, by `deadline` at the latest.
    pub fn wait_until(&mut self, deadline: Instant) -> bool {
        self.drain.wait_until(deadline)
    }

    /// How long it took, or has been waited for.
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
    /// Whether no request of any device is in flight any more, by `deadline` at the latest.
    pub fn wait_until(&mut self, deadline: Instant) -> bool {
        // All are asked, so that each learns how long it took.
        let late = self.devices.iter_mut().filter_map(|device| {
            let ended = device.wait_until(deadline);
            (!ended).then_some(())
        });
        late.count() == 0
    }

    /// How long each part took, the longest first; one that has not ended is the longest.
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

    /// What has not come to rest, in words for the user.
    pub fn late(&self) -> Vec<PartTime> {
        self.times().into_iter().filter(|time| !time.ended).collect()
    }
}

/// Sorts parts by how long they took; one that has not ended comes first.
pub fn longest_first(times: &mut [PartTime]) {
    times.sort_by_key(|time| std::cmp::Reverse((!time.ended, time.took)));
}
