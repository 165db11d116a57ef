//! What has to hold for whole migrations, however they end.

use super::fake::*;
use crate::error::chain;
use crate::params::Params;
use crate::source::{MigrationEvent, SourceOutcome};
use crate::stats::MigrationStatus;
use devices::ram::{GuestAddress, PAGE_SIZE};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use vm_memory::Bytes;

#[test]
fn a_guest_moves_whole_and_runs_once() {
    let end = migrate(&Scenario::default());
    end.assert_moved();
    assert_eq!(end.running_guests(), 1);
    let stats = end.counters.snapshot();
    assert!(stats.downtime.is_some() && stats.total_time.is_some());
    assert_eq!(stats.normal_pages, 2);
    let there = end.destination_counters.snapshot();
    assert_eq!((there.normal_pages, there.zero_pages), (stats.normal_pages, stats.zero_pages));
}

#[test]
fn events_come_in_qemus_order() {
    use MigrationEvent::{Pass, Status};
    use MigrationStatus::*;
    let end = migrate(&Scenario::default());
    let expected =
        [Status(Setup), Status(Active), Pass(1), Status(Device), Pass(2), Status(Completed)];
    assert_eq!(end.events, expected);
}

#[test]
fn a_paused_guest_arrives_paused() {
    let end = migrate(&Scenario { paused: true, ..Default::default() });
    end.assert_moved();
    assert_eq!(end.running_guests(), 0);
}

#[test]
fn a_guest_that_writes_all_the_time_arrives_whole() {
    for gap_us in [0, 50, 500] {
        let end = migrate(&Scenario {
            ram_bytes: 16 << 20,
            dirtying: Some((700, Duration::from_micros(gap_us))),
            ..Default::default()
        });
        end.assert_moved();
        assert_eq!(end.running_guests(), 1);
    }
}

#[test]
fn memory_on_both_sides_of_the_hole_arrives_whole() {
    // Mapped, but hardly touched.
    let (ram_bytes, high_pages) = ((3 << 30) + (4 << 20), 700);
    let end = migrate(&Scenario { ram_bytes, high_pages, ..Default::default() });
    assert!(matches!(end.source, SourceOutcome::Completed), "{:?}", end.source);
    let stats = end.counters.snapshot();
    assert_eq!(stats.zero_pages, ram_bytes / 4096 - 1 - high_pages);
    // As above, the page that saving writes is sent a second time.
    assert_eq!(stats.normal_pages, 2 + high_pages);
    let there = end.host.ram.as_ref().unwrap();
    for page in 0..1024 {
        let found: u64 = there.read_obj(high_page(page)).unwrap();
        let expected = if page < high_pages { high_content(page) } else { 0 };
        assert_eq!(found, expected, "page {page} above the hole");
    }
    let text: [u8; 22] = there.read_obj(GuestAddress(3 * PAGE_SIZE + 5)).unwrap();
    assert_eq!(&text, b"the guest's own memory");
}

#[test]
fn a_cap_is_kept_also_while_the_guest_writes() {
    let params = Params { max_bandwidth: 20 << 20, ..Default::default() };
    let end = migrate(&Scenario {
        ram_bytes: 4 << 20,
        dirtying: Some((700, Duration::from_millis(400))),
        params,
        ..Default::default()
    });
    end.assert_moved();
    let stats = end.counters.snapshot();
    let rate = stats.transferred_bytes as f64 / stats.total_time.unwrap().as_secs_f64();
    assert!(rate < 1.05 * f64::from(20 << 20), "{rate} bytes/s");
}

#[test]
fn a_guest_with_more_left_than_predicted_runs_on_and_moves_later() {
    let limit = Duration::from_millis(60);
    let params = Params { max_bandwidth: 20 << 20, downtime_limit: limit, ..Params::default() };
    let end = migrate(&Scenario { ram_bytes: 4 << 20, bursts: 2, params, ..Default::default() });
    end.assert_moved();
    assert_eq!(end.running_guests(), 1);
    let stats = end.counters.snapshot();
    assert_eq!(stats.called_off, 2, "800 pages take 156 ms at this cap");
    assert!(stats.downtime.unwrap() < limit, "{:?}", stats.downtime);
}

#[test]
fn a_guest_that_cannot_go_on_when_the_stop_is_called_off_is_said_to_stand_still() {
    let limit = Duration::from_millis(60);
    let params = Params { max_bandwidth: 20 << 20, downtime_limit: limit, ..Params::default() };
    let (bursts, fail) = (1, Fail::Resume);
    let end = migrate(&Scenario { ram_bytes: 4 << 20, bursts, fail, params, ..Default::default() });
    let SourceOutcome::Failed(error) = &end.source else { panic!("{:?}", end.source) };
    let said = chain(error);
    assert!(said.contains("called off") && said.contains("stays paused"), "{said}");
    assert_eq!((end.running_guests(), end.permits()), (0, 1), "{said}");
}

/// The one that matters most.
#[test]
fn cutting_the_link_at_any_byte_never_runs_two_guests() {
    let all = migrate(&Scenario::default()).bytes_exchanged;
    let mut unknown = 0;
    for cut in 0..all {
        let end = migrate(&Scenario { cut_after: Some(cut), ..Default::default() });
        let running = end.running_guests();
        assert!(running <= 1, "two guests after a cut at byte {cut}");
        assert!(end.permits() <= 1, "two permits after a cut at byte {cut}");
        match &end.source {
            SourceOutcome::Unknown(_) => unknown += 1,
            SourceOutcome::Failed(_) => end.assert_back_at_source(&format!("cut at byte {cut}")),
            other => panic!("cut at byte {cut}: {other:?}"),
        }
    }
    // Only the bytes of `Go` and of `Running`, with its time, are in doubt.
    assert!(unknown <= 24, "{unknown} cuts end as unknown");
    let end = migrate(&Scenario { cut_after: Some(all), ..Default::default() });
    end.assert_moved();
}

#[test]
fn a_failure_at_any_step_leaves_the_guest_running_at_the_source() {
    use Fail::*;
    for fail in [Track, Pause, Save, Release, Build, Load, Lock, Run] {
        let end = migrate(&Scenario { fail, ..Default::default() });
        let SourceOutcome::Failed(error) = &end.source else {
            panic!("{fail:?}: {:?}", end.source)
        };
        let expected = format!("scripted failure of {fail:?}");
        assert!(chain(error).contains(&expected), "{}", chain(error));
        let there = end.destination.as_ref().unwrap_err();
        assert!(there.contains(&expected), "{fail:?}: the destination hears {there:?}");
        end.assert_back_at_source(&format!("{fail:?}"));
        assert_eq!(end.destination_machine.abandoned.load(SeqCst), 1, "{fail:?}");
    }
}

#[test]
fn a_panic_at_the_source_resumes_its_guest() {
    let scenario = Scenario { fail: Fail::PanicInSave, ..Default::default() };
    let (here, there) = (scenario.machine.clone(), scenario.destination.clone());
    let end = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| migrate(&scenario)));
    assert!(end.is_err(), "the panic goes on");
    assert!(here.running.load(SeqCst), "and the guest runs");
    assert!(here.permit.lock().unwrap().is_some() && !here.surrendered.load(SeqCst));
    assert!(!there.running.load(SeqCst) && there.permit.lock().unwrap().is_none());
}

#[test]
fn a_guest_that_left_may_come_back_any_number_of_times() {
    for _ in 0..20 {
        migrate(&Scenario::default()).assert_moved();
    }
}
