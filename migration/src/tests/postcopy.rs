//! The phase after the handover: the guest has moved, and what could wait follows.

use super::fake::*;
use crate::participant::Outcome;
use crate::source::{MigrationEvent, SourceOutcome};
use crate::stats::MigrationStatus;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

fn late() -> Scenario {
    Scenario { late: Some(Words::late(&[0, 1, 2, 3, 4])), ..Default::default() }
}

fn arrived(end: &End) -> usize {
    end.host.late.as_ref().unwrap().pieces.lock().unwrap().len()
}

fn cleaned_up(end: &End) -> Option<Outcome> {
    *end.host.late.as_ref().unwrap().outcome.lock().unwrap()
}

#[test]
fn what_can_wait_follows_a_guest_that_has_moved() {
    use MigrationEvent::{Pass, Status};
    use MigrationStatus::*;
    let end = migrate(&late());
    end.assert_moved();
    assert_eq!((arrived(&end), cleaned_up(&end)), (5, Some(Outcome::Moved)));
    let expected = [
        Status(Setup),
        Status(Active),
        Pass(1),
        Status(Device),
        Pass(2),
        Status(PostcopyActive),
        Status(Completed),
    ];
    assert_eq!(end.events, expected);
    let stats = [end.counters.snapshot(), end.destination_counters.snapshot()];
    assert!(stats.iter().all(|stats| stats.incomplete.is_none()));
}

/// Wherever the link breaks: one guest, and before the handover it is the source's. After it nothing harms
/// the guest, and both sides know whether everything is there.
#[test]
fn a_link_cut_at_any_byte_of_the_last_phase_costs_only_what_can_wait() {
    let whole = migrate(&late()).bytes_exchanged;
    let without = migrate(&Scenario::default()).bytes_exchanged;
    let (mut incomplete, mut complete) = (0, 0);
    for cut in without..=whole {
        let end = migrate(&Scenario { cut_after: Some(cut), ..late() });
        let case = format!("cut after {cut}: {:?}, {:?}", end.source, end.destination);
        assert!(end.running_guests() <= 1, "{case}");
        match &end.source {
            SourceOutcome::Completed => {
                end.assert_moved();
                assert_eq!(arrived(&end), 5, "{case}");
                complete += 1;
            }
            SourceOutcome::Incomplete(_) => {
                assert_eq!(end.running_guests(), 1, "{case}");
                assert!(end.destination_machine.running.load(SeqCst), "{case}");
                assert_eq!(cleaned_up(&end), Some(Outcome::Moved), "{case}");
                // All but the last answer may have arrived.
                let there = end.destination_counters.snapshot().incomplete;
                assert_eq!(there.is_some(), arrived(&end) < 5, "{case}: {there:?}");
                assert_eq!(end.counters.snapshot().status, MigrationStatus::Completed, "{case}");
                incomplete += 1;
            }
            SourceOutcome::Unknown(_) => assert!(end.permits() <= 1, "{case}"),
            other => assert!(end.source_machine.running.load(SeqCst), "{case}: {other:?}"),
        }
    }
    assert!(incomplete > 50 && complete > 0, "{incomplete} incomplete, {complete} complete");
}

#[test]
fn either_side_can_give_up_what_is_left_and_cancel_nothing() {
    // The source's cancel comes too late; its `give_up` is what counts.
    let scenario = late();
    let (cancel, give_up) = (scenario.cancel.clone(), scenario.give_up.clone());
    let watch: Watch = Arc::new(move |event: &MigrationEvent| {
        if *event == MigrationEvent::Status(MigrationStatus::PostcopyActive) {
            assert!(!cancel.cancel(), "it cannot be cancelled any more");
            give_up.cancel();
        }
    });
    let end = migrate(&Scenario { watch: Some(watch), ..scenario });
    assert!(
        matches!(&end.source, SourceOutcome::Incomplete(why) if why.contains("given up at the source"))
    );
    assert!(end.destination_machine.running.load(SeqCst) && end.running_guests() == 1);
    let last = end.events.last();
    assert_eq!(last, Some(&MigrationEvent::Status(MigrationStatus::Completed)));
    assert!(matches!(end.events[end.events.len() - 2], MigrationEvent::Incomplete(_)));

    let at = Some(MigrationStatus::PostcopyActive);
    let end = migrate(&Scenario { cancel_destination_at: at, ..late() });
    assert!(matches!(end.source, SourceOutcome::Incomplete(_)), "{:?}", end.source);
    assert!(end.destination_machine.running.load(SeqCst) && end.running_guests() == 1);
    assert_eq!(end.destination, Ok(()));
    let missing = end.destination_counters.snapshot().incomplete.unwrap();
    assert!(missing.contains("piece 0") && missing.contains("given up at the dest"), "{missing}");
}

/// Pieces out of order, of another stage, or of nobody: the destination keeps the guest, and says no to the rest.
#[test]
fn a_source_that_lies_in_the_last_phase_loses_only_what_could_wait() {
    let lies: [(&[u8], &str); 3] = [
        (&[0, 2], "unexpected [2] where the next piece belongs"),
        (&[0, WRONG_STAGE], "unexpected Part of section \"late\" where what could wait belongs"),
        (&[WRONG_SECTION], "unexpected Postcopy of section \"ram\" where what could wait belongs"),
    ];
    for (pieces, expected) in lies {
        let end = migrate(&Scenario { late: Some(Words::late(pieces)), ..Default::default() });
        let SourceOutcome::Incomplete(why) = &end.source else { panic!("{:?}", end.source) };
        assert!(why.contains(expected), "{why}");
        assert!(end.destination_machine.running.load(SeqCst) && end.running_guests() == 1);
        let missing = end.destination_counters.snapshot().incomplete.unwrap();
        assert!(missing.contains("piece 4") && missing.contains(expected), "{missing}");
    }
    // It stops half-way and says that this was all.
    let end = migrate(&Scenario { late: Some(Words::late(&[0, 1, 2])), ..Default::default() });
    assert!(matches!(&end.source, SourceOutcome::Incomplete(why) if why == "piece 3, piece 4"));
}
