//! Waiting for the requests that were in flight when a guest was stopped. Begun by
//! [`super::Machine::begin_pause`] on the main thread, waited for on any other.

use devices::block::BlockNode;
use devices::virtio::mmio::Drain;
use migration::guest::PartTime;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// One device that was told to start no new request.
pub struct DeviceDrain {
    part: String,
    /// What stores the disk, if it is one.
    pub disk: Option<Arc<BlockNode>>,
    began: Instant,
    drain: TimedDrain,
}

impl DeviceDrain {
    /// A disk that was told so just now.
    pub fn of_disk(node: &Arc<BlockNode>, drain: Drain) -> Self {
        let part = format!("disk `{}`: requests in flight", node.id());
        Self::new(part, Some(node.clone()), drain)
    }

    /// Another device.
    pub fn of_device(name: &str, drain: Drain) -> Self {
        Self::new(format!("device `{name}`: requests in flight"), None, drain)
    }

    fn new(part: String, disk: Option<Arc<BlockNode>>, drain: Drain) -> Self {
        Self { part, disk, began: Instant::now(), drain: TimedDrain::new(drain) }
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
        let vcpus = PartTime::new("vCPUs: stop", self.vcpus_took);
        let mut times: Vec<_> = self.devices.iter().map(DeviceDrain::time).collect();
        times.push(vcpus);
        longest_first(&mut times);
        times
    }

    /// The part that took longest.
    pub fn longest(&self) -> PartTime {
        let vcpus = PartTime::new("vCPUs: stop", self.vcpus_took);
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

/// A [`Drain`] that can be waited for with a deadline, and says how long it took.
// TODO: goes when `Drain` itself has `wait_until` and `took`; until then a thread waits for it.
struct TimedDrain {
    began: Instant,
    answer: Receiver<Instant>,
    ended: Option<Instant>,
}

impl TimedDrain {
    fn new(drain: Drain) -> Self {
        let (ended, answer) = channel();
        let waits = move || {
            drain.wait();
            // Who has stopped waiting need not hear of it.
            let _ = ended.send(Instant::now());
        };
        // Without the thread it is taken for one that does not end.
        let builder = std::thread::Builder::new().name("drain".into()).stack_size(64 << 10);
        if let Err(error) = builder.spawn(waits) {
            log::error!("cannot start the thread that waits for a device: {error}");
        }
        Self { began: Instant::now(), answer, ended: None }
    }

    fn wait_until(&mut self, deadline: Instant) -> bool {
        if self.ended.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            self.ended = self.answer.recv_timeout(left).ok();
        }
        self.ended.is_some()
    }

    fn took(&self) -> Option<Duration> {
        self.ended.map(|ended| ended.saturating_duration_since(self.began))
    }
}
