//! A guest that leaves, on the thread `mig-out`: waits for requests in flight, flushes disks, lets go of
//! their locks and takes them again.

use super::super::messages::Mailbox;
use super::super::tasks::{DiskWork, longest, wait_in_steps};
use super::{GuestRequest, ask};
use crate::error::chain;
use crate::machine::{MachineError, lock_disks, unlock_disks};
use devices::block::BlockNode;
use devices::state::DeviceRecord;
use migration::cancel::CancelToken;
use migration::guest::{GuestControl, GuestError, PartTime, Stopped};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a drain that was too late for a pause is watched while the guest runs again, to learn how
/// long it really takes.
const DRAIN_AFTERMATH: Duration = Duration::from_secs(1);
/// How long disks' locks are tried to be retaken. A destination that refused lets go of them when its
/// connection closes, which may take a moment.
const RELOCK_LIMIT: Duration = Duration::from_secs(1);
/// How often.
const RELOCK_EVERY: Duration = Duration::from_millis(50);

/// Nothing had to be flushed.
const NO_FLUSH: &str = "disks: flush";

/// Serves a migration's source.
pub struct LeavingGuest {
    mailbox: Mailbox,
    cancel: CancelToken,
    nodes: Vec<Arc<BlockNode>>,
    /// Disks that travel: what the destination has received is on its own storage.
    travelling: Vec<String>,
    flushes: DiskWork<io::Result<()>>,
}

impl LeavingGuest {
    /// The guest with these disks, in a migration that `cancel` ends.
    pub fn new(
        mailbox: Mailbox,
        cancel: CancelToken,
        nodes: Vec<Arc<BlockNode>>,
        travelling: Vec<String>,
    ) -> Self {
        let writable = nodes.iter().filter(|node| !node.read_only()).cloned().collect();
        let flushes = DiskWork::new("flush", writable);
        Self { mailbox, cancel, nodes, travelling, flushes }
    }

    /// Has `work` done to each writable disk that `wanted` names, until `deadline`.
    fn flush(
        &mut self,
        wanted: impl Fn(&BlockNode, bool) -> bool,
        work: impl Fn(&BlockNode, bool) -> io::Result<()> + Clone + Send + 'static,
        deadline: Instant,
    ) -> Result<PartTime, GuestError> {
        let (travelling, cancel) = (self.travelling.clone(), self.cancel.clone());
        let stays = move |node: &BlockNode| !travelling.iter().any(|id| id == node.id());
        let stays_too = stays.clone();
        let done = self.flushes.run(
            |node| wanted(node, stays(node)),
            move |node| work(node, stays_too(node)),
            deadline,
            &|| !cancel.is_cancelled(),
        );
        let done =
            done.map_err(|error| GuestError::new(format!("cannot start a thread: {error}")))?;
        for disk in &done {
            if let Some(Err(error)) = &disk.result {
                return Err(GuestError::new(format!("{}: {error}", disk.time.part)));
            }
        }
        Ok(longest(&done, NO_FLUSH))
    }
}

impl GuestControl for LeavingGuest {
    fn flush_ahead(&mut self, deadline: Instant) -> Result<PartTime, GuestError> {
        self.flush(|_, stays| stays, |node, _| node.sync(), deadline)
    }

    fn pause(&mut self, deadline: Instant) -> Result<Stopped, GuestError> {
        let mut drains = ask(&self.mailbox, GuestRequest::BeginPause)?;
        let cancel = self.cancel.clone();
        let go_on = || !cancel.is_cancelled();
        if wait_in_steps(deadline, &go_on, &mut |until| drains.wait_until(until)) {
            let stopped = ask(&self.mailbox, GuestRequest::FinishPause)?;
            return Ok(Stopped { drains: drains.times(), ..stopped });
        }
        ask(&self.mailbox, GuestRequest::CallOffPause)?;
        // The guest runs on. What is learnt now says what the next attempt needs.
        let aftermath = Instant::now() + DRAIN_AFTERMATH;
        wait_in_steps(aftermath, &go_on, &mut |until| drains.wait_until(until));
        Err(GuestError::Overdue(drains.longest()))
    }

    fn save_records(&mut self) -> Result<Vec<DeviceRecord>, GuestError> {
        ask(&self.mailbox, GuestRequest::SaveRecords)
    }

    fn release_disks(&mut self, deadline: Instant) -> Result<PartTime, GuestError> {
        // Nothing is written any more once the lock is gone, not even by a later flush: so all is written
        // back, and a thread that is late for that keeps the lock.
        let flush = |node: &BlockNode, stays: bool| {
            if stays {
                node.sync()?;
            }
            node.write_back()
        };
        let took = self.flush(|_, _| true, flush, deadline)?;
        if !took.ended {
            return Err(GuestError::Overdue(took));
        }
        unlock_disks(&self.nodes);
        Ok(took)
    }

    fn resume(&mut self, stopped: Stopped) -> Result<(), GuestError> {
        let locked = relock(&self.nodes).map_err(|error| chain(&error));
        ask(&self.mailbox, |reply| GuestRequest::Resume(stopped, locked, reply))
    }

    fn surrendered(&mut self) {
        if let Err(error) = ask(&self.mailbox, GuestRequest::Surrendered) {
            log::debug!("{error}");
        }
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        ask(&self.mailbox, |reply| GuestRequest::Throttle(percent, reply))
    }
}

/// Takes the disks' locks back.
fn relock(nodes: &[Arc<BlockNode>]) -> Result<(), MachineError> {
    let deadline = Instant::now() + RELOCK_LIMIT;
    loop {
        let result = lock_disks(nodes);
        if result.is_ok() || Instant::now() >= deadline {
            return result;
        }
        // The lock's holder gives no event when it lets go, so there is nothing else to wait for.
        std::thread::sleep(RELOCK_EVERY);
    }
}
