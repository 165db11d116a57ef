//! Threads for slow work, so that the main thread never waits for storage or for KVM.
//!
//! A [`Task`] has a deadline and a cancel flag, and reports its end to a [`Sink`]. It may hang in the
//! kernel, where nothing can interrupt it: an overdue task is abandoned and its result discarded.
//! [`DiskWork`] runs the same work on several disks, each on its own thread, so that a hanging disk does
//! not delay the others.

use super::nbd::ExportsDone;
use crate::control::QmpResult;
use crate::control::message::QmpError;
use crate::machine::Machine;
use crate::machine::drain::longest_first;
use crate::setup::SetupError;
use crate::targets::Target;
use devices::block::BlockNode;
use devices::block::job::backup::Backup;
use migration::guest::PartTime;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How often a wait checks for cancellation.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Identifies a task; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TaskId(u64);

/// The result of a task.
pub enum Done {
    /// A machine, or an error.
    Built(Result<Box<Machine>, SetupError>),
    /// The drain has finished, except for these parts.
    Drained(Result<(), Vec<PartTime>>),
    /// The disks are locked, or an error.
    Locked(Result<(), String>),
    /// The sizes have been queried.
    Sized,
    /// The disks are flushed, except for these parts.
    Flushed(Vec<PartTime>),
    /// The reply to a request about bitmaps.
    Bitmaps(QmpResult),
    /// A target of a block job has been opened, or an error.
    Opened(Result<Target, String>),
    /// What was asked about exports.
    Exports(ExportsDone),
    /// Backups have begun, to be run as jobs, or an error.
    Begun(Result<Vec<Backup>, QmpError>),
    /// It panicked or is overdue.
    Nothing,
}

/// Cancels a task. Clones share the flag.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Sets the flag.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether the flag is set.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Called on a task's thread when it has ended.
type Sink = Arc<dyn Fn(TaskId, Done) + Send + Sync>;

struct Task {
    what: &'static str,
    deadline: Option<Instant>,
    cancel: Cancel,
}

/// The running tasks.
pub struct Tasks {
    sink: Sink,
    last_id: u64,
    running: BTreeMap<TaskId, Task>,
}

/// Reports a task's end, even if it panics.
struct Report {
    sink: Sink,
    id: TaskId,
    done: Done,
}

impl Drop for Report {
    fn drop(&mut self) {
        let done = std::mem::replace(&mut self.done, Done::Nothing);
        (self.sink)(self.id, done);
    }
}

impl Tasks {
    /// No tasks yet; they report to `sink`.
    pub fn new(sink: impl Fn(TaskId, Done) + Send + Sync + 'static) -> Self {
        Self { sink: Arc::new(sink), last_id: 0, running: BTreeMap::new() }
    }

    /// Runs `work` on a thread. After `limit` it is overdue.
    pub fn start(
        &mut self,
        what: &'static str,
        limit: Option<Duration>,
        work: impl FnOnce(&Cancel) -> Done + Send + 'static,
    ) -> io::Result<TaskId> {
        let id = TaskId(self.last_id + 1);
        self.last_id = id.0;
        let (sink, cancel) = (self.sink.clone(), Cancel::default());
        let token = cancel.clone();
        spawn(what, move || {
            let mut report = Report { sink, id, done: Done::Nothing };
            report.done = work(&token);
        })?;
        let deadline = limit.map(|limit| Instant::now() + limit);
        self.running.insert(id, Task { what, deadline, cancel });
        Ok(id)
    }

    /// A task has reported; returns whether it was still wanted.
    pub fn ended(&mut self, id: TaskId) -> bool {
        self.running.remove(&id).is_some()
    }

    /// Forgets a task.
    pub fn give_up(&mut self, id: TaskId) {
        if let Some(task) = self.running.remove(&id) {
            task.cancel.cancel();
        }
    }

    /// The next deadline.
    pub fn deadline(&self) -> Option<Instant> {
        self.running.values().filter_map(|task| task.deadline).min()
    }

    /// Abandons overdue tasks and returns their ids.
    pub fn take_overdue(&mut self, now: Instant) -> Vec<TaskId> {
        let is_late = |task: &Task| task.deadline.is_some_and(|deadline| deadline <= now);
        let late = self.running.iter().filter(|(_, task)| is_late(task));
        let late: Vec<_> = late.map(|(id, task)| (*id, task.what)).collect();
        for (id, what) in &late {
            log::warn!("the task `{what}` is overdue and abandoned");
            self.give_up(*id);
        }
        late.into_iter().map(|(id, _)| id).collect()
    }
}

/// Spawns a detached thread.
pub fn spawn(what: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = std::thread::Builder::new().name(format!("task-{what}"));
    // Opening a qcow2 image and loading a kernel need some stack.
    builder.stack_size(512 << 10).spawn(work).map(drop)
}

/// Drops a value, such as a machine, on a thread because that takes time.
pub fn discard<T: Send + 'static>(what: T) {
    if let Err(error) = spawn("discard", move || drop(what)) {
        // The value was dropped with the closure.
        log::error!("cannot start a thread: {error}");
    }
}

/// Work in progress on a disk.
struct UnderWay<T> {
    began: Instant,
    answer: Receiver<(T, Duration)>,
}

/// The same work on several disks, each on its own thread. A disk has at most one thread: while that hangs
/// in the kernel, no other is started.
pub struct DiskWork<T> {
    what: &'static str,
    disks: Vec<(Arc<BlockNode>, Option<UnderWay<T>>)>,
}

/// The result for one disk.
pub struct DiskDone<T> {
    /// How long it took, or has taken so far.
    pub time: PartTime,
    /// The result, if it has ended.
    pub result: Option<T>,
}

impl<T: Send + 'static> DiskWork<T> {
    /// Work named `what`, as in "flushing", on these disks.
    pub fn new(what: &'static str, disks: Vec<Arc<BlockNode>>) -> Self {
        Self { what, disks: disks.into_iter().map(|node| (node, None)).collect() }
    }

    /// Whether it is for exactly these disks.
    pub fn is_about(&self, nodes: &[Arc<BlockNode>]) -> bool {
        let same =
            |((own, _), node): (&(Arc<BlockNode>, _), &Arc<BlockNode>)| Arc::ptr_eq(own, node);
        self.disks.len() == nodes.len() && self.disks.iter().zip(nodes).all(same)
    }

    /// Runs `work` on the disks that `wanted` selects and waits until `deadline`, or until `go_on` returns
    /// false. Work left from an earlier call is waited for first, because `work` must see what the guest
    /// has done since.
    pub fn run(
        &mut self,
        wanted: impl Fn(&BlockNode) -> bool,
        work: impl Fn(&BlockNode) -> T + Clone + Send + 'static,
        deadline: Instant,
        go_on: &dyn Fn() -> bool,
    ) -> io::Result<Vec<DiskDone<T>>> {
        let what = self.what;
        let mut chosen: Vec<_> = self.disks.iter_mut().filter(|(node, _)| wanted(node)).collect();
        let begin = |node: &Arc<BlockNode>| {
            let (node, work, began) = (node.clone(), work.clone(), Instant::now());
            let (done, answer) = channel();
            spawn(what, move || {
                let result = work(&node);
                // Fails if the caller has stopped waiting.
                let _ = done.send((result, began.elapsed()));
            })?;
            Ok::<_, io::Error>(UnderWay { began, answer })
        };
        // Start all before waiting for the first.
        let mut stale = Vec::with_capacity(chosen.len());
        for (node, under_way) in &mut chosen {
            stale.push(under_way.is_some());
            if under_way.is_none() {
                *under_way = Some(begin(node)?);
            }
        }
        let mut all = Vec::with_capacity(chosen.len());
        for ((node, under_way), stale) in chosen.into_iter().zip(stale) {
            if stale && wait(under_way, deadline, go_on).is_some() {
                *under_way = Some(begin(node)?);
            }
            let part = format!("{what} disk `{}`", node.id());
            // Every chosen disk was begun above.
            let Some(began) = under_way.as_ref().map(|under_way| under_way.began) else {
                return Err(io::Error::other(format!("{part} was not begun")));
            };
            all.push(match wait(under_way, deadline, go_on) {
                Some((result, took)) => {
                    DiskDone { time: PartTime::new(part, took), result: Some(result) }
                }
                None => DiskDone { time: PartTime::not_ended(part, began.elapsed()), result: None },
            });
        }
        Ok(all)
    }
}

/// Waits for the result; leaves `under_way` in place on timeout.
fn wait<T>(
    under_way: &mut Option<UnderWay<T>>,
    deadline: Instant,
    go_on: &dyn Fn() -> bool,
) -> Option<(T, Duration)> {
    let pending = under_way.as_ref()?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match pending.answer.recv_timeout(left.min(LOOK_EVERY)) {
            Ok(answer) => {
                *under_way = None;
                return Some(answer);
            }
            // Its thread has panicked: treated like one that hangs.
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) if left.is_zero() || !go_on() => return None,
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// The part that took longest, or `none` if there is none.
pub fn longest<T>(all: &[DiskDone<T>], none: &str) -> PartTime {
    let mut times: Vec<_> = all.iter().map(|done| done.time.clone()).collect();
    longest_first(&mut times);
    times.into_iter().next().unwrap_or_else(|| PartTime::new(none, Duration::ZERO))
}

/// Calls `wait` in steps until it returns true, at most until `deadline` or until `go_on` returns false.
pub fn wait_in_steps(
    deadline: Instant,
    go_on: &dyn Fn() -> bool,
    wait: &mut dyn FnMut(Instant) -> bool,
) -> bool {
    loop {
        let now = Instant::now();
        if wait(deadline.min(now + LOOK_EVERY)) {
            return true;
        }
        if now >= deadline || !go_on() {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::block::memory::MemoryDisk;

    fn flush(node: &BlockNode) -> Result<(), String> {
        node.sync().map_err(|error| error.to_string())
    }

    #[test]
    fn a_disk_that_hangs_is_named_and_the_others_are_done() {
        let (fast, slow) = (MemoryDisk::new(512), MemoryDisk::new(512));
        let (fast_script, script) = (fast.script(), slow.script());
        let nodes = [("fast", fast), ("slow", slow)]
            .map(|(id, disk)| Arc::new(BlockNode::new(id, Box::new(disk))));
        let mut work = DiskWork::new("flushing", nodes.to_vec());
        let soon = || Instant::now() + Duration::from_millis(100);
        script.hold(true);
        let done = work.run(|_| true, flush, soon(), &|| true).unwrap();
        assert_eq!(done[0].result, Some(Ok(())));
        assert!(done[0].time.ended && !done[1].time.ended && done[1].result.is_none());
        assert_eq!(longest(&done, "none").part, "flushing disk `slow`");
        assert_eq!(fast_script.flush_count(), 1);
        // The retry uses the same thread, whose flush is too old.
        drop(work.run(|_| true, flush, soon(), &|| true).unwrap());
        assert_eq!(script.held(), 1);
        script.hold(false);
        let late = Instant::now() + Duration::from_secs(60);
        let done = work.run(|node| node.id() == "slow", flush, late, &|| true).unwrap();
        assert_eq!(done.len(), 1);
        assert_eq!(done[0].result, Some(Ok(())));
        assert_eq!((fast_script.flush_count(), script.flush_count()), (2, 2));
    }

    #[test]
    fn who_is_told_to_give_up_does_not_wait_for_the_deadline() {
        let disk = MemoryDisk::new(512);
        let script = disk.script();
        script.hold(true);
        let mut work =
            DiskWork::new("flushing", vec![Arc::new(BlockNode::new("d", Box::new(disk)))]);
        let never = Instant::now() + Duration::from_secs(3600);
        let done = work.run(|_| true, flush, never, &|| false).unwrap();
        assert!(!done[0].time.ended);
        script.hold(false);
    }
}
