//! Backups that fail, are cancelled, or whose disks hang: the guest goes on, and the bitmap is right.

use super::super::ledger::MAX_GUEST_BYTES;
use super::*;
use crate::block::failure::OnError;

fn stops() -> JobOptions {
    JobOptions { on_source_error: OnError::Stop, on_target_error: OnError::Stop, ..options("b") }
}

#[test]
fn an_error_that_is_reported_ends_it_and_the_guest_notices_nothing() {
    for (source_fails, side) in [(true, "Source"), (false, "Target")] {
        let case = Case::filled();
        case.add_bitmap();
        case.pair.source.write_at(&[2; 512], 0).unwrap();
        let script = if source_fails { &case.source } else { &case.target };
        let full = case.with_bitmap(BackupSync::Full, BitmapMode::OnSuccess);
        let (backup, _) = begin_one(full);
        script.fail(true);
        if !source_fails {
            case.pair.source.write_at(&[3; 512], CLUSTER).unwrap();
        }
        let (job, events) = run(backup, options("b"));
        let end = until(&events, "null");
        assert!(end.contains(&format!("{side} report")), "{end:?}");
        assert!(end.ends_with(&["aborting", "FAILED", "concluded", "null"].map(String::from)));
        assert!(job.info().error.is_some_and(|error| error.contains("scripted fault")));
        script.fail(false);
        case.pair.source.write_at(&[4; 512], 2 * CLUSTER).unwrap();
        // The bitmap has its old marks and the new ones.
        let marks = if source_fails { 2 } else { 3 };
        assert_eq!(case.bitmap(), (marks * 4096, false));
    }
}

#[test]
fn one_that_an_error_has_stopped_keeps_the_moment_and_goes_on_when_it_is_resumed() {
    let case = Case::filled();
    let (backup, was) = begin_one(case.options(BackupSync::Full));
    case.target.fail(true);
    let (job, events) = run(backup, stops());
    let seen = until(&events, "paused");
    assert_eq!(seen[..3], ["created", "running", "Target stop"]);
    // The guest overwrites what is not saved, and does not wait for that.
    for at in 0..8 {
        case.pair.source.write_at(&[7; 4096], at * (1 << 20)).unwrap();
    }
    assert!(job.info().paused);
    case.target.fail(false);
    job.resume().unwrap();
    let end = until(&events, "null");
    assert!(end.ends_with(&["COMPLETED", "concluded", "null"].map(String::from)), "{end:?}");
    assert!(content(&case.pair.target) == was);
}

#[test]
fn an_error_that_is_ignored_is_tried_again() {
    let case = Case::filled();
    let ignores = JobOptions { on_target_error: OnError::Ignore, ..options("b") };
    let (backup, was) = begin_one(case.options(BackupSync::Full));
    case.target.fail(true);
    let (_job, events) = run(backup, ignores);
    until(&events, "Target ignore");
    let guests = Guests::on(&case.pair.source);
    until(&events, "Target ignore");
    case.target.fail(false);
    assert!(until(&events, "null").contains(&"COMPLETED".to_owned()));
    assert!(content(&case.pair.target) == was);
    guests.end();
}

#[test]
fn old_data_that_cannot_be_read_ends_it_whatever_its_policy_and_the_guest_goes_on() {
    let case = Case::filled();
    let (job, events, _) = start(case.options(BackupSync::None), stops());
    // The read of the old data fails, and so does the guest's write in this disk: but it was tried.
    case.source.fail(true);
    assert!(case.pair.source.write_at(&[2; 512], 0).is_err());
    let end = until(&events, "null");
    let bad = ["created", "running", "Source report", "aborting", "FAILED", "concluded", "null"];
    assert_eq!(end, bad);
    assert!(job.info().error.is_some_and(|error| error.contains("reading 65536 bytes at 0")));
    case.source.fail(false);
    case.pair.source.write_at(&[2; 512], 0).unwrap();
}

#[test]
fn a_target_that_hangs_does_not_delay_the_guest_until_memory_is_full_and_then_until_a_cancel() {
    let case = Case::of(4 * MAX_GUEST_BYTES);
    let node = case.pair.source.clone();
    let chunk = vec![1; 1 << 20];
    for at in 0..node.len_bytes() >> 20 {
        node.fill_at(&chunk, at << 20).unwrap();
    }
    let (job, events, _) = start(case.options(BackupSync::None), options("b"));
    case.target.hold(true);
    // All of this is overwritten while nothing reaches the target.
    for at in 0..MAX_GUEST_BYTES / CLUSTER {
        node.write_at(&[2; 512], at * CLUSTER).unwrap();
    }
    let waits = std::thread::spawn({
        let node = node.clone();
        move || node.write_at(&[3; 512], 2 * MAX_GUEST_BYTES)
    });
    assert!(job.wait_until(SOON, |info| info.len_bytes == MAX_GUEST_BYTES));
    assert!(!waits.is_finished(), "there is no room");
    let began = Instant::now();
    job.cancel(Cancel::Force).unwrap();
    waits.join().unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(until(&events, "null").contains(&"CANCELLED".to_owned()));
    case.target.hold(false);
}

#[test]
fn a_write_waits_for_the_read_of_what_it_overwrites_and_for_no_write_of_the_target() {
    let case = Case::filled();
    let (backup, was) = begin_one(case.options(BackupSync::Full));
    case.source.hold(true);
    let (_job, events) = run(backup, options("b"));
    case.source.wait_until_held();
    let waits = std::thread::spawn({
        let node = case.pair.source.clone();
        move || node.write_at(&[2; 512], 0)
    });
    case.target.hold(true);
    case.source.hold(false);
    // It ends although nothing reaches the target.
    waits.join().unwrap().unwrap();
    case.target.hold(false);
    assert_eq!(until(&events, "null"), GOOD);
    assert!(content(&case.pair.target) == was);
}

#[test]
fn a_paused_job_still_saves_what_the_guest_overwrites() {
    let case = Case::filled();
    let (job, events, was) = start(case.options(BackupSync::None), options("b"));
    job.pause().unwrap();
    until(&events, "paused");
    case.pair.source.write_at(&[2; 512], 0).unwrap();
    assert!(job.wait_until(SOON, |info| info.offset_bytes == CLUSTER));
    job.resume().unwrap();
    until(&events, "running");
    job.cancel(Cancel::Force).unwrap();
    until(&events, "null");
    assert!(content(&case.pair.target)[..4096] == was[..4096]);
}

#[test]
fn the_bitmap_ends_as_its_mode_says() {
    // The mode, whether the job succeeds, and the marks that are left of one old and one new.
    for (mode, succeeds, old_stays) in [
        (BitmapMode::OnSuccess, true, false),
        (BitmapMode::OnSuccess, false, true),
        (BitmapMode::Never, true, true),
        (BitmapMode::Never, false, true),
        (BitmapMode::Always, true, false),
        (BitmapMode::Always, false, false),
    ] {
        let case = Case::filled();
        case.add_bitmap();
        case.pair.source.write_at(&[2; 512], 0).unwrap();
        let slow = JobOptions { auto_finalize: false, ..options("b") };
        let part = case.with_bitmap(BackupSync::Bitmap, mode);
        let (job, events, _) = start(part, slow);
        until(&events, "PENDING");
        case.pair.source.write_at(&[2; 512], 1 << 20).unwrap();
        assert_eq!(case.bitmap(), (4096, true));
        match succeeds {
            true => job.finalize().unwrap(),
            // Too late to undo what was saved, which is what `always` is for.
            false => job.cancel(Cancel::Force).unwrap(),
        }
        until(&events, "null");
        let left = if old_stays { 2 } else { 1 };
        assert_eq!(case.bitmap(), (left * 4096, false), "{mode:?} {succeeds}");
    }
}

#[test]
fn what_was_not_saved_when_it_failed_stays_marked() {
    let case = Case::filled();
    case.add_bitmap();
    for at in [0, 1 << 20] {
        case.pair.source.write_at(&[2; 512], at).unwrap();
    }
    // One byte a second: the first operation is made, and the second waits.
    let slow = JobOptions { speed: 1, ..options("b") };
    let part = case.with_bitmap(BackupSync::Bitmap, BitmapMode::Always);
    let (job, events, _) = start(part, slow);
    assert!(job.wait_until(SOON, |info| info.offset_bytes == CLUSTER));
    job.cancel(Cancel::Force).unwrap();
    until(&events, "null");
    assert!(!case.is_marked(0) && case.is_marked(1 << 20));
}

#[test]
fn one_that_never_runs_leaves_everything_as_it_was() {
    let case = Case::filled();
    case.add_bitmap();
    case.pair.source.write_at(&[2; 512], 0).unwrap();
    let (backup, _) = begin_one(case.with_bitmap(BackupSync::Full, BitmapMode::Always));
    assert!(case.bitmap().1);
    drop(backup);
    case.target.hold(true);
    case.pair.source.write_at(&[2; 512], 1 << 20).unwrap();
    case.target.hold(false);
    assert!(!case.bitmap().1 && case.is_marked(0) && case.is_marked(1 << 20));
}

#[test]
fn events_name_the_job_as_a_backup() {
    let case = Case::new();
    let (_job, events, _) = start(case.options(BackupSync::Full), options("b"));
    let completed = std::iter::from_fn(|| events.recv_timeout(SOON).ok())
        .find(|event| short(event) == "COMPLETED");
    let Some(JobEvent::Completed(info)) = completed else { panic!("it did not complete") };
    assert_eq!((info.kind.name(), info.actively_synced, info.ready), ("backup", None, false));
}
