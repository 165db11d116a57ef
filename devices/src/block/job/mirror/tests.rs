//! Mirrors of scripted disks, and of files that change their place.
#![allow(clippy::big_endian_bytes, reason = "counters in sectors")]

use super::super::tests::{busy, content, new_job, options, until};
use super::super::{JobEvent, JobOptions, JobStatus};
use super::*;
use crate::block::failure::OnError;
use crate::block::memory::{MemoryDisk, Script};
use crate::block::raw::{Cache, RawFile};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const LEN: u64 = 8 << 20;
const SOON: Duration = Duration::from_secs(30);

struct Case {
    pair: Pair,
    source: Arc<Script>,
    target: Arc<Script>,
}

impl Case {
    fn new() -> Self {
        let (one, other) = (MemoryDisk::new(LEN), MemoryDisk::new(LEN));
        let (source, target) = (one.script(), other.script());
        let pair = Pair {
            source: Arc::new(BlockNode::new("disk", Box::new(one))),
            target: Arc::new(BlockNode::new("copy", Box::new(other))),
            unmap: true,
        };
        Self { pair, source, target }
    }

    fn options(&self, sync: Sync) -> MirrorOptions {
        MirrorOptions {
            pair: self.pair.clone(),
            sync,
            granularity: DEFAULT_GRANULARITY,
            buf_size: DEFAULT_BUF_SIZE,
            target_is_blank: true,
            reopen: None,
            remote: None,
        }
    }

    fn start(&self, sync: Sync, mode: CopyMode, job: JobOptions) -> (Arc<Job>, Receiver<JobEvent>) {
        start(self.options(sync), mode, job)
    }

    fn is_equal(&self) -> bool {
        content(&self.pair.source) == content(&self.pair.target)
    }
}

fn start(
    options: MirrorOptions,
    mode: CopyMode,
    job: JobOptions,
) -> (Arc<Job>, Receiver<JobEvent>) {
    let (tell, events) = channel();
    let first = tell.clone();
    let tell = move |event| drop(tell.send(event));
    let mirror = Mirror::new(options).unwrap();
    let first = &mut move |event| drop(first.send(event));
    (Job::start(new_job(job, mode), first, tell, mirror).unwrap(), events)
}

#[test]
fn a_disk_that_is_written_meanwhile_is_switched_over_without_losing_a_write() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let case = Case::new();
        case.pair.source.fill_at(&[1; 1 << 20], 3 << 20).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let guests: Vec<_> =
            (1..3).map(|seed| busy(case.pair.source.clone(), seed * 77, stop.clone())).collect();
        let (job, events) = case.start(Sync::Full, mode, options("m"));
        assert!(until(&events, "READY").ends_with(&["ready".into(), "READY".into()]));
        let old = case.pair.source.storage();
        job.complete().unwrap();
        let end = until(&events, "null");
        assert_eq!(end, ["waiting", "pending", "COMPLETED", "concluded", "null"], "{mode:?}");
        let frozen = {
            let mut bytes = vec![0; usize::try_from(LEN).unwrap()];
            old.read_at(&mut bytes, 0).unwrap();
            bytes
        };
        stop.store(true, Ordering::SeqCst);
        let writes: u64 = guests.into_iter().map(|guest| guest.join().unwrap()).sum();
        assert!(writes > 100, "{writes} writes");
        // The device is the target now, and the old storage is not written any more.
        assert!(case.is_equal(), "{mode:?}");
        let mut bytes = vec![0; usize::try_from(LEN).unwrap()];
        old.read_at(&mut bytes, 0).unwrap();
        assert!(bytes == frozen, "{mode:?}");
        let info = job.info();
        assert_eq!((info.offset_bytes, info.error), (info.len_bytes, None));
    }
}

#[test]
fn one_that_is_cancelled_when_it_is_ready_leaves_a_copy_of_one_moment() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let case = Case::new();
        // Two counters that the guest raises one after the other: at every moment they differ by at most one.
        let (node, stop) = (case.pair.source.clone(), Arc::new(AtomicBool::new(false)));
        let guest = std::thread::spawn({
            let (node, stop) = (node.clone(), stop.clone());
            move || {
                let mut turn = 0u64;
                while !stop.load(Ordering::SeqCst) {
                    turn += 1;
                    let mut sector = [0; 512];
                    sector[..8].copy_from_slice(&turn.to_be_bytes());
                    node.write_at(&sector, 0).unwrap();
                    node.write_at(&sector, LEN - 512).unwrap();
                }
            }
        });
        let (job, events) = case.start(Sync::Full, mode, options("m"));
        until(&events, "READY");
        job.cancel(Cancel::Soft).unwrap();
        let end = until(&events, "null");
        assert_eq!(end, ["waiting", "pending", "COMPLETED", "concluded", "null"]);
        let copy = content(&case.pair.target);
        stop.store(true, Ordering::SeqCst);
        guest.join().unwrap();
        let last = copy.len() - 512;
        let counter = |at: usize| u64::from_be_bytes(copy[at..at + 8].try_into().unwrap());
        let (first, second) = (counter(0), counter(last));
        assert!(first == second || first == second + 1, "{first} and {second}");
        assert!(case.target.flush_count() > 1, "it is durable");
        // The device stays where it was.
        assert!(!Arc::ptr_eq(&node.storage(), &case.pair.target.storage()));
        let was = content(&case.pair.target);
        node.write_at(&[9; 512], 4096).unwrap();
        assert!(was == content(&case.pair.target), "nothing is copied any more");
    }
}

#[test]
fn cancel_before_it_is_ready_ends_it_although_the_target_hangs() {
    let case = Case::new();
    case.pair.source.fill_at(&[1; 512], 0).unwrap();
    case.target.hold(true);
    let (job, events) = case.start(Sync::Full, CopyMode::Background, options("m"));
    case.target.wait_until_held();
    assert!(job.info().busy && !job.info().ready);
    job.cancel(Cancel::Soft).unwrap();
    let end = ["created", "running", "aborting", "CANCELLED", "concluded", "null"];
    assert_eq!(until(&events, "null"), end);
    case.pair.source.write_at(&[2; 512], 0).unwrap();
    case.target.hold(false);
}

#[test]
fn nothing_is_copied_at_first_if_only_new_writes_are_wanted() {
    let case = Case::new();
    case.pair.source.fill_at(&[1; 512], 0).unwrap();
    let (job, events) = case.start(Sync::None, CopyMode::Background, options("m"));
    until(&events, "READY");
    assert_eq!(case.target.accesses(), []);
    case.pair.source.write_at(&[2; 512], 1 << 20).unwrap();
    assert!(job.wait_until(SOON, |info| info.offset_bytes == DEFAULT_GRANULARITY));
    job.cancel(Cancel::Soft).unwrap();
    until(&events, "COMPLETED");
    let copy = content(&case.pair.target);
    assert_eq!((copy[0], copy[1 << 20]), (0, 2));
}

#[test]
fn a_target_that_is_not_blank_is_zeroed_where_the_disk_has_holes() {
    let case = Case::new();
    case.pair.target.fill_at(&[5; 4096], 1 << 20).unwrap();
    let options_of = MirrorOptions { target_is_blank: false, ..case.options(Sync::Full) };
    let (job, events) = start(options_of, CopyMode::Background, options("m"));
    until(&events, "READY");
    assert!(case.is_equal());
    job.cancel(Cancel::Force).unwrap();
    until(&events, "CANCELLED");
}

#[test]
fn the_speed_is_limited_until_it_is_ready_and_can_be_raised() {
    let case = Case::new();
    case.pair.source.fill_at(&vec![1; usize::try_from(LEN).unwrap()], 0).unwrap();
    let slow = JobOptions { speed: 1 << 20, ..options("m") };
    let began = Instant::now();
    let (job, events) = case.start(Sync::Full, CopyMode::Background, slow);
    assert!(job.wait_until(SOON, |info| info.len_bytes > 0));
    let (time, copied) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    // A quarter of a second at 1 MiB/s, plus the operations that may begin at once.
    while time.elapsed() < Duration::from_millis(250) {
        copied.store(job.info().offset_bytes, Ordering::SeqCst);
        job.rest(Duration::from_millis(10));
    }
    assert!(copied.load(Ordering::SeqCst) <= 3 << 20, "{copied:?}");
    assert!(!job.info().ready);
    job.set_speed(0).unwrap();
    until(&events, "READY");
    assert!(began.elapsed() < Duration::from_secs(7), "it was not raised");
    assert!(case.is_equal());
    job.cancel(Cancel::Force).unwrap();
    until(&events, "null");
}

#[test]
fn what_could_not_be_copied_is_dirty_again() {
    let case = Case::new();
    case.pair.source.fill_at(&[1; 1 << 20], 0).unwrap();
    let policy = JobOptions { on_target_error: OnError::Stop, ..options("m") };
    case.target.fail(true);
    let (job, events) = case.start(Sync::Full, CopyMode::Background, policy);
    let all = until(&events, "paused");
    assert_eq!(all[..3], ["created", "running", "Target stop"]);
    assert!(job.info().paused && !job.info().ready);
    case.target.fail(false);
    job.resume().unwrap();
    assert!(until(&events, "READY").contains(&"running".to_owned()));
    assert!(case.is_equal());
    // And once more when it was ready: it is not in sync until the write has been repeated.
    case.target.fail(true);
    case.pair.source.write_at(&[2; 512], 0).unwrap();
    let all = until(&events, "standby");
    assert_eq!(all, ["Target stop", "standby"]);
    assert!(!job.info().ready);
    assert!(job.complete().is_err(), "not in sync");
    case.target.fail(false);
    job.resume().unwrap();
    assert!(job.wait_until(SOON, |info| info.ready && info.status == JobStatus::Ready));
    assert!(case.is_equal());
    job.cancel(Cancel::Force).unwrap();
}

#[test]
fn an_error_that_is_reported_ends_it_and_one_that_is_ignored_does_not() {
    for (source_fails, side) in [(true, "Source"), (false, "Target")] {
        let case = Case::new();
        case.pair.source.fill_at(&[1; 1 << 20], 0).unwrap();
        let script = if source_fails { &case.source } else { &case.target };
        script.fail(true);
        let (job, events) = case.start(Sync::Full, CopyMode::Background, options("m"));
        let end = until(&events, "null");
        assert!(end.contains(&format!("{side} report")), "{end:?}");
        assert!(end.ends_with(&["aborting", "FAILED", "concluded", "null"].map(String::from)));
        assert!(job.info().error.is_some_and(|error| error.contains("scripted fault")));

        let ignores = JobOptions {
            on_source_error: OnError::Ignore,
            on_target_error: OnError::Ignore,
            ..options("i")
        };
        let (job, events) = case.start(Sync::Full, CopyMode::Background, ignores);
        until(&events, &format!("{side} ignore"));
        script.fail(false);
        until(&events, "READY");
        assert!(case.is_equal());
        job.cancel(Cancel::Force).unwrap();
    }
}

#[test]
fn a_write_that_waits_for_the_copy_succeeds_when_the_copy_fails() {
    let case = Case::new();
    let policy = JobOptions { on_target_error: OnError::Ignore, ..options("m") };
    let (job, events) = case.start(Sync::Full, CopyMode::WriteBlocking, policy);
    until(&events, "READY");
    assert!(job.wait_until(SOON, |info| info.actively_synced == Some(true)));
    let node = &case.pair.source;
    node.write_at(&[3; 512], 512).unwrap();
    assert!(case.is_equal(), "both have it when the write returns");
    case.target.fail(true);
    node.write_at(&[4; 512], 512).unwrap();
    until(&events, "Target ignore");
    assert_ne!(job.info().actively_synced, Some(true));
    case.target.fail(false);
    assert!(job.wait_until(SOON, |info| info.ready && info.actively_synced == Some(true)));
    assert!(case.is_equal());
    job.cancel(Cancel::Force).unwrap();
    until(&events, "null");
}

#[test]
fn the_copy_mode_can_be_changed_while_it_runs() {
    let case = Case::new();
    let (job, events) = case.start(Sync::Full, CopyMode::Background, options("m"));
    until(&events, "READY");
    job.set_copy_mode(CopyMode::WriteBlocking).unwrap();
    assert!(job.wait_until(SOON, |info| info.actively_synced == Some(true)));
    case.pair.source.write_at(&[3; 512], 512).unwrap();
    assert!(case.is_equal());
    job.complete().unwrap();
    until(&events, "null");
}

#[test]
fn one_that_is_cancelled_before_it_is_finalized_touches_no_write_any_more() {
    let case = Case::new();
    let manual = JobOptions { auto_finalize: false, ..options("m") };
    let (job, events) = case.start(Sync::Full, CopyMode::WriteBlocking, manual);
    until(&events, "READY");
    assert!(job.wait_until(SOON, |info| info.actively_synced == Some(true)));
    job.complete().unwrap();
    until(&events, "PENDING");
    job.cancel(Cancel::Force).unwrap();
    assert!(until(&events, "null").contains(&"CANCELLED".into()));
    case.target.hold(true);
    case.pair.source.write_at(&[9; 512], 0).unwrap();
    case.target.hold(false);
    assert_eq!(content(&case.pair.target)[0], 0);
}

#[test]
fn a_target_that_fails_at_the_very_end_leaves_the_device_where_it_was() {
    let case = Case::new();
    let manual = JobOptions { auto_finalize: false, ..options("m") };
    let (job, events) = case.start(Sync::Full, CopyMode::Background, manual);
    until(&events, "READY");
    job.complete().unwrap();
    until(&events, "PENDING");
    // The guest goes on meanwhile.
    case.pair.source.write_at(&[7; 512], 0).unwrap();
    case.target.fail(true);
    job.finalize().unwrap();
    let end = until(&events, "null");
    assert!(
        end.ends_with(&["aborting", "FAILED", "concluded", "null"].map(String::from)),
        "{end:?}"
    );
    case.pair.source.write_at(&[8; 512], 0).unwrap();
    case.target.fail(false);
    assert!(content(&case.pair.source)[0] == 8 && content(&case.pair.target)[0] == 0);
}

#[test]
fn persistent_bitmaps_come_along_to_the_new_image() {
    use crate::block::bitmaps::{BitmapName, NewBitmap};
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str| {
        let path = folder.path().join(name);
        RawFile::create(&path, &path, LEN, Cache::Writeback).unwrap()
    };
    let source = Arc::new(BlockNode::new("disk", Box::new(open("old"))));
    let target = Arc::new(BlockNode::new("copy", Box::new(open("new"))));
    source.load_bitmaps().unwrap();
    source.mark_bitmaps().unwrap();
    let name = BitmapName::new("b").unwrap();
    let new = NewBitmap { name, granularity: 65_536, persistent: true, recording: true };
    source.bitmaps().add(new).unwrap();
    source.mark_added_bitmaps().unwrap();
    source.write_at(&[1; 512], 0).unwrap();
    let options_of = MirrorOptions {
        pair: Pair { source: source.clone(), target, unmap: true },
        sync: Sync::Full,
        granularity: DEFAULT_GRANULARITY,
        buf_size: DEFAULT_BUF_SIZE,
        target_is_blank: true,
        reopen: None,
        remote: None,
    };
    let (job, events) = start(options_of, CopyMode::Background, options("m"));
    until(&events, "READY");
    job.complete().unwrap();
    until(&events, "null");
    assert!(source.location().ends_with("new"));
    source.write_at(&[1; 512], 1 << 20).unwrap();
    source.close_bitmaps().unwrap();
    source.unlock();
    // Both files are right: the old one up to the switch, the new one to the end.
    for (image, count) in [("old", 65_536), ("new", 2 * 65_536)] {
        let raw = RawFile::open(&folder.path().join(image), false, Cache::Writeback).unwrap();
        let node = BlockNode::new("disk", Box::new(raw));
        node.lock().unwrap();
        node.load_bitmaps().unwrap();
        let info = node.bitmaps().info();
        assert_eq!((info[0].count_bytes, info[0].inconsistent), (count, false), "{image}");
    }
}

#[test]
fn what_cannot_be_mirrored_is_refused() {
    let case = Case::new();
    let refused = |change: &dyn Fn(&mut MirrorOptions)| {
        let mut options = case.options(Sync::Full);
        change(&mut options);
        Mirror::new(options).map(drop).unwrap_err().to_string()
    };
    for granularity in [0, 256, 128 << 20] {
        let error = refused(&|options| options.granularity = granularity);
        assert!(error.contains("range [512B, 64MB]"), "{error}");
    }
    let error = refused(&|options| options.granularity = 1536);
    assert!(error.contains("power of 2"), "{error}");
    let error = refused(&|options| options.pair.target = options.pair.source.clone());
    assert!(error.contains("into itself"), "{error}");
    let node = |disk: MemoryDisk| Arc::new(BlockNode::new("copy", Box::new(disk)));
    let error = refused(&|options| options.pair.target = node(MemoryDisk::new(LEN - 512)));
    assert!(error.contains("different sizes"), "{error}");
    let read_only = || node(MemoryDisk::new(LEN).into_read_only());
    let error = refused(&|options| options.pair.target = read_only());
    assert!(error.contains("read-only"), "{error}");
}

#[test]
fn a_copy_that_is_asked_for_is_durable_and_has_all_that_was_written_before() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let case = Case::new();
        let (job, events) = case.start(Sync::Full, mode, options("m"));
        assert!(!job.sync_by(Instant::now()), "it is not in sync");
        until(&events, "READY");
        for turn in 1..20u8 {
            case.pair.source.write_at(&[turn; 512], u64::from(turn) << 16).unwrap();
            let before = case.target.flush_count();
            assert!(job.sync_by(Instant::now() + SOON), "{mode:?}");
            assert!(case.is_equal() && case.target.flush_count() > before, "{mode:?}");
        }
        case.target.hold(true);
        case.target.fail(true);
        job.cancel(Cancel::Force).unwrap();
        case.target.hold(false);
        until(&events, "CANCELLED");
        assert!(!job.sync_by(Instant::now() + Duration::from_millis(10)));
    }
}
