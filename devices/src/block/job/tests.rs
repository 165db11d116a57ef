//! States, commands and events of jobs, with scripted work.

use super::*;
use crate::block::BlockNode;
use crate::block::backend::ByteRange;
use crate::block::copy::CopyError;
use std::sync::mpsc::{Receiver, Sender, channel};

const SOON: Duration = Duration::from_secs(30);

pub(super) fn options(id: &str) -> JobOptions {
    JobOptions {
        id: id.into(),
        speed: 0,
        auto_finalize: true,
        auto_dismiss: true,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
    }
}

pub(super) fn new_job(options: JobOptions, copy_mode: CopyMode) -> NewJob {
    NewJob { kind: JobKind::Mirror, options, device: "disk".into(), target: None, copy_mode }
}

/// Events in short.
pub(super) fn short(event: &JobEvent) -> String {
    match event {
        JobEvent::Status { status, .. } => status.name().to_owned(),
        JobEvent::Ready(_) => "READY".into(),
        JobEvent::Pending(_) => "PENDING".into(),
        JobEvent::Completed(info) if info.error.is_some() => "FAILED".into(),
        JobEvent::Completed(_) => "COMPLETED".into(),
        JobEvent::Cancelled(_) => "CANCELLED".into(),
        JobEvent::Error { side, action, .. } => format!("{side:?} {action}"),
    }
}

/// The events up to the one that is `last` in short.
pub(super) fn until(events: &Receiver<JobEvent>, last: &str) -> Vec<String> {
    let mut all = Vec::new();
    while all.last().is_none_or(|event| event != last) {
        let next = events.recv_timeout(SOON);
        all.push(short(&next.unwrap_or_else(|_| panic!("no {last} after {all:?}"))));
    }
    all
}

pub(super) fn content(node: &BlockNode) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(node.len_bytes()).unwrap()];
    node.copy_at(&mut bytes, 0).unwrap();
    bytes
}

/// A guest that writes, zeroes and discards all over its disk until it is told to stop.
pub(super) fn busy(
    node: Arc<BlockNode>,
    seed: u64,
    stop: Arc<AtomicBool>,
) -> std::thread::JoinHandle<u64> {
    std::thread::spawn(move || {
        let (mut random, mut writes) = (seed | 1, 0);
        while !stop.load(Ordering::SeqCst) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let sectors = node.len_bytes() / 512;
            let (sector, count) = (random % sectors, (random >> 32) % 64 + 1);
            let (at, len) = (sector * 512, count.min(sectors - sector) * 512);
            match random >> 60 {
                0 => node.write_zeroes(at, len, true).unwrap(),
                1 => node.discard(at, len).unwrap(),
                _ => {
                    let byte = u8::try_from(random & 0xff).unwrap();
                    node.write_at(&vec![byte; usize::try_from(len).unwrap()], at).unwrap();
                }
            }
            writes += 1;
        }
        writes
    })
}

/// Does what the test tells it.
struct Scripted {
    steps: Receiver<Step>,
    commits: Result<(), String>,
}

enum Step {
    Ready,
    Fail(Side),
    /// Looks whether it is to rest.
    Look,
    End(Finished),
    Panic,
}

impl Work for Scripted {
    fn run(&mut self, job: &Arc<Job>) -> Result<Finished, CopyError> {
        loop {
            match self.steps.recv().unwrap() {
                Step::Ready => job.become_ready(),
                Step::Look => drop(job.must_rest(0)),
                Step::End(finished) => return Ok(finished),
                Step::Panic => panic!("on purpose"),
                Step::Fail(side) => {
                    let (disk, range) = ("d".into(), ByteRange { offset_bytes: 0, len_bytes: 512 });
                    let source = io::ErrorKind::StorageFull.into();
                    let error = match side {
                        Side::Source => CopyError::Read { disk, range, source },
                        Side::Target => CopyError::Write { disk, range, source },
                    };
                    if !job.goes_on_after(&error) {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn commit(&mut self, _: &Arc<Job>) -> Result<(), String> {
        self.commits.clone()
    }

    fn abort(&mut self, _: &Arc<Job>) {}
}

fn start(
    options: JobOptions,
    commits: Result<(), String>,
) -> (Arc<Job>, Sender<Step>, Receiver<JobEvent>) {
    let (tell, events) = channel();
    let (step, steps) = channel();
    let first = tell.clone();
    let tell = move |event| drop(tell.send(event));
    let first = &mut move |event| drop(first.send(event));
    let work = Scripted { steps, commits };
    let job = Job::start(new_job(options, CopyMode::Background), first, tell, work);
    (job.unwrap(), step, events)
}

#[test]
fn events_come_in_the_order_of_qemus() {
    let (job, step, events) = start(options("m"), Ok(()));
    // Told before the start returns.
    assert_eq!(
        events.try_iter().map(|event| short(&event)).collect::<Vec<_>>(),
        ["created", "running"]
    );
    let refused = job.complete().unwrap_err();
    let verb = "Job 'm' in state 'running' cannot accept command verb 'complete'";
    assert_eq!(refused.to_string(), verb);
    step.send(Step::Ready).unwrap();
    assert_eq!(until(&events, "READY"), ["ready", "READY"]);
    job.pause().unwrap();
    assert_eq!(job.pause().unwrap_err(), JobError::AlreadyPaused);
    step.send(Step::Look).unwrap();
    assert_eq!(until(&events, "standby"), ["standby"]);
    assert!(job.info().paused);
    job.resume().unwrap();
    assert_eq!(job.resume().unwrap_err(), JobError::NotPaused);
    step.send(Step::Look).unwrap();
    assert_eq!(until(&events, "ready"), ["ready"]);
    job.complete().unwrap();
    assert!(job.is_told_to_complete());
    step.send(Step::End(Finished::Done)).unwrap();
    let end = ["waiting", "pending", "COMPLETED", "concluded", "null"];
    assert_eq!(until(&events, "null"), end);
    assert!(job.is_gone());
    assert!(job.cancel(Cancel::Force).is_err() && job.set_speed(1).is_err());
}

#[test]
fn a_cancelled_or_failed_job_aborts() {
    let (job, step, events) = start(options("c"), Ok(()));
    job.cancel(Cancel::Soft).unwrap();
    assert_eq!(job.cancelled(), Some(Cancel::Soft));
    job.cancel(Cancel::Force).unwrap();
    job.cancel(Cancel::Soft).unwrap();
    assert_eq!(job.cancelled(), Some(Cancel::Force), "it stays forced");
    step.send(Step::End(Finished::Cancelled)).unwrap();
    let end = ["created", "running", "aborting", "CANCELLED", "concluded", "null"];
    assert_eq!(until(&events, "null"), end);

    for (end, commits) in [
        (Step::Fail(Side::Source), Ok(())),
        (Step::Panic, Ok(())),
        (Step::End(Finished::Done), Err("no way".to_owned())),
    ] {
        let options = JobOptions { auto_dismiss: false, ..options("f") };
        let (job, step, events) = start(options, commits);
        step.send(end).unwrap();
        let all = until(&events, "concluded");
        assert_eq!(all[all.len() - 3..], ["aborting", "FAILED", "concluded"]);
        assert!(job.info().error.is_some_and(|error| !error.is_empty()));
        // It stays to be seen until it is dismissed.
        assert!(!job.is_gone());
        job.dismiss().unwrap();
        assert!(job.is_gone() && job.dismiss().is_err());
    }
}

#[test]
fn who_wants_to_finalize_is_waited_for() {
    let options = JobOptions { auto_finalize: false, auto_dismiss: false, ..options("p") };
    let (job, step, events) = start(options.clone(), Ok(()));
    assert!(job.finalize().is_err());
    step.send(Step::End(Finished::Done)).unwrap();
    let pending = ["created", "running", "waiting", "pending", "PENDING"];
    assert_eq!(until(&events, "PENDING"), pending);
    job.finalize().unwrap();
    assert_eq!(until(&events, "concluded"), ["COMPLETED", "concluded"]);

    let (job, step, events) = start(options, Ok(()));
    step.send(Step::End(Finished::Done)).unwrap();
    until(&events, "PENDING");
    job.cancel(Cancel::Force).unwrap();
    assert_eq!(until(&events, "concluded"), ["aborting", "CANCELLED", "concluded"]);
}

#[test]
fn each_side_has_its_error_policy() {
    let policy = |on_source_error, on_target_error| JobOptions {
        on_source_error,
        on_target_error,
        ..options("e")
    };
    let (job, step, events) = start(policy(OnError::Ignore, OnError::Stop), Ok(()));
    step.send(Step::Fail(Side::Source)).unwrap();
    assert_eq!(until(&events, "Source ignore"), ["created", "running", "Source ignore"]);
    assert_eq!(job.info().io_status, IoStatus::Ok);
    step.send(Step::Fail(Side::Target)).unwrap();
    step.send(Step::Look).unwrap();
    assert_eq!(until(&events, "paused"), ["Target stop", "paused"]);
    assert_eq!((job.info().io_status, job.info().paused), (IoStatus::NoSpace, true));
    job.resume().unwrap();
    step.send(Step::Look).unwrap();
    assert_eq!(until(&events, "running"), ["running"]);
    assert_eq!(job.info().io_status, IoStatus::Ok);
    step.send(Step::End(Finished::Cancelled)).unwrap();

    let (_job, step, events) = start(policy(OnError::Enospc, OnError::Report), Ok(()));
    step.send(Step::Fail(Side::Source)).unwrap();
    step.send(Step::Fail(Side::Target)).unwrap();
    let all = until(&events, "concluded");
    assert_eq!(all[2..], ["Source stop", "Target report", "aborting", "FAILED", "concluded"]);
}

#[test]
fn a_copy_mode_changes_in_one_direction() {
    let (job, step, _events) = start(options("w"), Ok(()));
    job.set_copy_mode(CopyMode::Background).unwrap();
    job.set_copy_mode(CopyMode::WriteBlocking).unwrap();
    assert_eq!(job.set_copy_mode(CopyMode::Background), Err(JobError::NotBackground));
    step.send(Step::End(Finished::Cancelled)).unwrap();
}
