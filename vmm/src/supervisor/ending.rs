//! The end of the process: drains and flushes the disks, and stores their bitmaps, until a deadline. A hanging
//! disk is reported and left to its thread.

use super::Supervisor;
use super::tasks::{self, DiskWork, Done, TaskId, wait_in_steps};
use crate::control::Event;
use crate::control::message::QmpError;
use crate::exit_code::{self, Exit};
use crate::log_queue::say;
use crate::machine::close_bitmaps;
use crate::machine::drain::{DeviceDrain, Drains};
use devices::block::BlockNode;
use migration::guest::PartTime;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long draining and flushing the disks may take when the process ends.
const END_LIMIT: Duration = Duration::from_millis(1500);
/// How much of it the requests of NBD clients may take.
const EXPORTS_LIMIT: Duration = Duration::from_millis(500);
/// How long a stopped vCPU may take to say where it is.
const LOCATE_LIMIT: Duration = Duration::from_millis(100);
/// How much later the process ends if its tasks do not report.
const REPORT_SLACK: Duration = Duration::from_millis(200);

/// The state of a process that is ending.
pub(super) struct Ending {
    exit: Exit,
    /// When it ends unconditionally.
    pub deadline: Instant,
    /// Waits for the disks.
    task: Option<TaskId>,
    /// A migration's thread removes the images that it has created.
    pub arrival_at_work: bool,
    /// Part of the machine hangs.
    pub leaves_machine: bool,
}

impl Supervisor {
    /// Ends the process, unless it is ending already: stops the guest, drains and flushes its disks. A
    /// failure says where the guest was.
    pub(super) fn end(&mut self, exit: Exit, event: &Event) {
        if self.ending.is_some() {
            return;
        }
        self.tell(event);
        let arrival_at_work = self.jobs.is_arriving();
        self.jobs.abandon(Some(&format!("its process ends with code {}: {}", exit.code, exit.why)));
        self.dirty_rate.abort();
        self.console.detach();
        self.pausing = None;
        let deadline = Instant::now() + END_LIMIT;
        let mut ending = Ending {
            exit,
            deadline: deadline + REPORT_SLACK,
            task: None,
            arrival_at_work,
            leaves_machine: false,
        };
        let exports = self.exports.take();
        if let Some(machine) = &mut self.machine {
            let (drains, stopped) = machine.begin_end();
            ending.leaves_machine = !stopped;
            if stopped && ending.exit.code == exit_code::TIMEOUT {
                let places = machine.locate(Instant::now() + LOCATE_LIMIT).join(", ");
                ending.exit = ending.exit.at(Some(places).filter(|places| !places.is_empty()));
            }
            let come_to_rest = move |_: &_| {
                // Its clients' last writes are to be flushed, too.
                let exports = exports.is_none_or(|nbd| {
                    let ended = nbd.end(Instant::now() + EXPORTS_LIMIT);
                    if !ended {
                        // A thread that hangs in the kernel would hold this one up.
                        tasks::discard(nbd);
                    }
                    ended
                });
                let mut late = come_to_rest(drains, deadline);
                if !exports {
                    late.push(PartTime::not_ended("a request of an NBD client", END_LIMIT));
                }
                Done::Flushed(late)
            };
            // The parent of a shuttled guest knows the output from before the last move, too.
            let says_output = matches!(
                ending.exit.code,
                exit_code::CRASHED | exit_code::TIMEOUT | exit_code::UNMATCHED
            );
            if says_output && !self.mode.host().with_parent {
                ending.exit = ending.exit.at(Some(self.console.last_output()));
            }
            match self.tasks.start("end", None, come_to_rest) {
                Ok(id) => ending.task = Some(id),
                Err(error) => {
                    log::error!("cannot wait for the disks: {error}");
                    ending.leaves_machine = true;
                }
            }
        }
        self.ending = Some(ending);
        self.refuse_all_that_waits();
        self.finish_ending();
    }

    /// Fails all waiting requests.
    fn refuse_all_that_waits(&mut self) {
        let blocked = self.waiting.take_blocked();
        let mut requests: Vec<_> = blocked.into_iter().map(|blocked| blocked.request).collect();
        if let Some((id, transition)) = self.transition.take() {
            self.tasks.give_up(id);
            requests.extend(self.give_up_transition(transition));
        }
        if let Some(stopping) = self.stopping.take() {
            self.tasks.give_up(stopping.task);
            requests.extend(stopping.requests);
        }
        for request in requests {
            self.answer(&request, Err(shutting_down()));
        }
    }

    /// The disks are drained and flushed, except for `late`.
    pub(super) fn on_flushed(&mut self, id: TaskId, late: &[PartTime]) {
        let Some(ending) = self.ending.as_mut().filter(|ending| ending.task == Some(id)) else {
            return;
        };
        ending.task = None;
        if !late.is_empty() {
            ending.leaves_machine = true;
            let late: Vec<_> = late.iter().map(PartTime::to_string).collect();
            say(format_args!("{}: not waited for any longer", late.join(", ")));
        }
        self.finish_ending();
    }

    /// Ends the process if nothing is left to wait for.
    pub(super) fn finish_ending(&mut self) {
        if let Some(ending) = &self.ending
            && ending.task.is_none()
            && !ending.arrival_at_work
        {
            self.event_loop.end(ending.exit.clone());
        }
    }

    /// Ends the process unconditionally.
    pub(super) fn end_at_once(&mut self) {
        if let Some(ending) = &mut self.ending {
            ending.leaves_machine |= ending.task.is_some();
            self.event_loop.end(ending.exit.clone());
        }
    }
}

/// The error for requests during the end.
pub(super) fn shutting_down() -> QmpError {
    QmpError::generic("The virtual machine is shutting down")
}

/// Drains each device, then flushes its disk and stores its bitmaps, until `deadline`; returns what has not finished.
fn come_to_rest(drains: Drains, deadline: Instant) -> Vec<PartTime> {
    let (done, ended) = channel();
    let mut late = Vec::new();
    let mut started = 0;
    for device in drains.devices {
        let done = done.clone();
        let rest = move || drop(done.send(rest(device, deadline)));
        match tasks::spawn("end-disk", rest) {
            Ok(()) => started += 1,
            Err(error) => late.push(PartTime::not_ended(error.to_string(), Duration::ZERO)),
        }
    }
    drop(done);
    for _ in 0..started {
        // Each thread keeps the deadline and reports a moment later.
        let left = (deadline + REPORT_SLACK).saturating_duration_since(Instant::now());
        match ended.recv_timeout(left) {
            Ok(None) => {}
            Ok(Some(time)) => late.push(time),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                late.push(PartTime::not_ended("draining a device", left));
            }
        }
    }
    late
}

/// The part of a device that has not finished by `deadline`.
fn rest(mut device: DeviceDrain, deadline: Instant) -> Option<PartTime> {
    if !wait_in_steps(deadline, &|| true, &mut |until| device.wait_until(until)) {
        return Some(device.time());
    }
    let node = device.disk.filter(|node| !node.read_only())?;
    let mut flush = DiskWork::new("flushing", vec![node]);
    let close = |node: &BlockNode| {
        let synced = node.sync();
        close_bitmaps(node);
        synced
    };
    let done = flush.run(|_| true, close, deadline, &|| true);
    let done = match done {
        Ok(done) => done.into_iter().next()?,
        Err(error) => return Some(PartTime::not_ended(error.to_string(), Duration::ZERO)),
    };
    if let Some(Err(error)) = &done.result {
        log::error!("while shutting down: {}: {error}", done.time.part);
    }
    (!done.time.ended).then_some(done.time)
}
