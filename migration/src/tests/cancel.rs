//! A cancel at any step, from either side.

use super::fake::*;
use crate::params::Params;
use crate::source::{MigrationEvent, SourceOutcome};
use crate::stats::MigrationStatus;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

#[test]
fn a_cancel_at_any_step_leaves_the_guest_running_at_the_source() {
    use MigrationEvent::{Pass, Status};
    use MigrationStatus::{Active, Device, Setup};
    for at in [Status(Setup), Status(Active), Pass(1), Status(Device), Pass(2)] {
        let end = migrate(&Scenario { cancel_source_at: Some(at.clone()), ..Default::default() });
        assert!(matches!(end.source, SourceOutcome::Cancelled), "{at:?}: {:?}", end.source);
        end.assert_back_at_source(&format!("{at:?}"));
        assert_eq!(end.events.last(), Some(&Status(MigrationStatus::Cancelled)));
    }
}

#[test]
fn a_cancel_between_ready_and_go_leaves_the_guest_running_at_the_source() {
    let scenario = Scenario::default();
    scenario.cancel.cancel_at_disarm();
    let end = migrate(&scenario);
    assert!(matches!(end.source, SourceOutcome::Cancelled), "{:?}", end.source);
    end.assert_back_at_source("after Ready");
    // It was ready, with the disk locked, and has been told.
    assert_eq!(end.destination_machine.loads.load(SeqCst), 1);
    let heard = end.destination.unwrap_err();
    assert!(heard.contains("cancelled"), "{heard}");
    assert!(!end.source_machine.surrendered.load(SeqCst));
}

#[test]
fn a_cancel_that_is_in_progress_is_shown_until_the_end() {
    use MigrationEvent::Status;
    use MigrationStatus::{Cancelled, Setup};
    // What `migrate_cancel` does: the status first, then the token.
    let scenario = Scenario::default();
    let (counters, cancel) = (scenario.counters.clone(), scenario.cancel.clone());
    let watch: Watch = Arc::new(move |event| {
        if *event == Status(Setup) {
            counters.cancelling();
        }
        if matches!(event, MigrationEvent::Pass(_)) {
            cancel.cancel();
        }
    });
    let end = migrate(&Scenario { watch: Some(watch), ..scenario });
    assert!(matches!(end.source, SourceOutcome::Cancelled), "{:?}", end.source);
    let statuses = end.events.iter().filter(|event| matches!(event, Status(_)));
    assert_eq!(statuses.collect::<Vec<_>>(), [&Status(Setup), &Status(Cancelled)]);
}

#[test]
fn the_destination_hears_that_the_source_has_cancelled() {
    let at = MigrationEvent::Status(MigrationStatus::Device);
    let end = migrate(&Scenario { cancel_source_at: Some(at), ..Default::default() });
    let heard = end.destination.unwrap_err();
    assert!(heard.contains("cancelled"), "{heard}");
}

#[test]
fn a_cancel_at_the_destination_leaves_the_guest_running_at_the_source() {
    for at in [MigrationStatus::Setup, MigrationStatus::Active] {
        let end = migrate(&Scenario { cancel_destination_at: Some(at), ..Default::default() });
        assert!(matches!(end.source, SourceOutcome::Failed(_)), "{at:?}: {:?}", end.source);
        end.assert_back_at_source(&format!("{at:?}"));
    }
}

#[test]
fn a_cancel_ends_a_migration_that_would_take_hours() {
    let params = Params { max_bandwidth: 100, ..Default::default() };
    let started = Instant::now();
    let at = MigrationEvent::Pass(1);
    let end = migrate(&Scenario { params, cancel_source_at: Some(at), ..Default::default() });
    assert!(matches!(end.source, SourceOutcome::Cancelled), "{:?}", end.source);
    assert!(started.elapsed() < Duration::from_secs(3));
    end.assert_back_at_source("a low cap");
}
