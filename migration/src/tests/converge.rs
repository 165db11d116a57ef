//! A guest that writes faster than the link sends: slowed down if that is wanted, else said to be; and
//! never left throttled.

use super::fake::*;
use crate::params::{Params, ThrottleParams};
use crate::source::{MigrationEvent, SourceOutcome};
use crate::stats::MigrationStatus;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

/// 8 MiB of RAM, half of which are always dirty again, over a link of 40 MB/s.
fn too_fast(auto_converge: bool) -> Scenario {
    let params = Params {
        max_bandwidth: 40_000_000,
        downtime_limit: Duration::from_millis(30),
        auto_converge,
        ..Params::default()
    };
    Scenario { ram_bytes: 8 << 20, hot_pages: 1000, params, ..Default::default() }
}

impl End {
    fn throttles(&self) -> Vec<u8> {
        self.source_machine.throttles.lock().unwrap().clone()
    }

    /// Throttled it was, and is no more.
    fn assert_let_go(&self, case: &str) {
        let set = self.throttles();
        assert!(set.iter().any(|percent| *percent > 0), "{case}: {set:?}");
        assert_eq!(set.last(), Some(&0), "{case}: {set:?}");
        assert_eq!(self.counters.snapshot().throttle_percent, 0, "{case}");
    }
}

#[test]
fn a_guest_that_is_too_fast_is_slowed_down_moves_and_is_let_go() {
    let mut scenario = too_fast(true);
    // Long enough rounds to be looked at on their way.
    scenario.params.max_bandwidth = 5_000_000;
    let end = migrate(&scenario);
    end.assert_moved();
    end.assert_let_go("moved");
    let stats = end.counters.snapshot();
    assert!(stats.downtime.unwrap() < Duration::from_millis(60), "{:?}", stats.downtime);
    let set = end.throttles();
    let rising = set[..set.len() - 1].is_sorted_by(|earlier, later| earlier < later);
    assert!(rising && set[0] >= 20, "{set:?}");
    let history: Vec<_> = stats.history.iter().collect();
    assert!(history.iter().any(|round| round.throttle_percent > 0), "{history:?}");
    assert!(history.windows(2).all(|pair| pair[0].number + 1 == pair[1].number));
}

#[test]
fn a_guest_that_fits_is_not_slowed_down() {
    let end = migrate(&Scenario { hot_pages: 100, ..too_fast(true) });
    end.assert_moved();
    assert_eq!(end.throttles(), [0u8; 0]);
}

#[test]
fn throttling_ends_with_every_failure() {
    use Fail::*;
    for fail in [Pause, Save, Release, Lock, Run] {
        let end = migrate(&Scenario { fail, ..too_fast(true) });
        assert!(matches!(end.source, SourceOutcome::Failed(_)), "{fail:?}: {:?}", end.source);
        end.assert_back_at_source(&format!("{fail:?}"));
        end.assert_let_go(&format!("{fail:?}"));
    }
}

#[test]
fn throttling_ends_with_a_cancel() {
    use MigrationEvent::{Pass, Status};
    for at in [Pass(4), Status(MigrationStatus::Device)] {
        let end = migrate(&Scenario { cancel_source_at: Some(at.clone()), ..too_fast(true) });
        assert!(matches!(end.source, SourceOutcome::Cancelled), "{at:?}: {:?}", end.source);
        end.assert_back_at_source(&format!("{at:?}"));
        end.assert_let_go(&format!("{at:?}"));
    }
}

#[test]
fn throttling_ends_with_the_link() {
    let mut scenario = too_fast(true);
    // Never enough, so that it is still throttled when the link is cut.
    scenario.params.throttle.max = 30;
    scenario.cut_after = Some(16 << 20);
    let end = migrate(&scenario);
    assert!(matches!(end.source, SourceOutcome::Failed(_)), "{:?}", end.source);
    end.assert_back_at_source("cut");
    end.assert_let_go("cut");
}

#[test]
fn throttling_ends_with_a_migration_that_panics() {
    let scenario = Scenario { fail: Fail::PanicInSave, ..too_fast(true) };
    let machine = scenario.machine.clone();
    let end = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| migrate(&scenario)));
    assert!(end.is_err(), "the panic goes on");
    let set = machine.throttles.lock().unwrap().clone();
    assert!(set.len() > 1 && set.last() == Some(&0), "{set:?}");
    assert!(machine.running.load(SeqCst), "and the guest runs");
}

#[test]
fn a_guest_that_cannot_be_throttled_is_no_failure() {
    let scenario = Scenario {
        fail: Fail::Throttle,
        cancel_source_at: Some(MigrationEvent::Pass(6)),
        ..too_fast(true)
    };
    let end = migrate(&scenario);
    assert!(!matches!(end.source, SourceOutcome::Failed(_)), "{:?}", end.source);
    end.assert_let_go("refused");
}

fn not_converging(end: &End) -> Vec<&MigrationEvent> {
    let said = |event: &&MigrationEvent| matches!(event, MigrationEvent::NotConverging(_));
    end.events.iter().filter(said).collect()
}

#[test]
fn a_migration_that_gets_nowhere_says_so_and_goes_on() {
    let cancel_source_at = Some(MigrationEvent::Pass(6));
    let end = migrate(&Scenario { cancel_source_at, ..too_fast(false) });
    assert!(matches!(end.source, SourceOutcome::Cancelled), "{:?}", end.source);
    let said = not_converging(&end);
    let [MigrationEvent::NotConverging(facts)] = said[..] else { panic!("{said:?}") };
    assert!(facts.dirty_bytes_per_sec > facts.bytes_per_sec / 10 * 8, "{facts:?}");
    assert!(facts.expected_downtime > facts.downtime_limit, "{facts:?}");
    assert_eq!(end.throttles(), [0u8; 0]);
    let early = end.events.iter().position(|event| event == said[0]);
    let fourth = end.events.iter().position(|event| *event == MigrationEvent::Pass(4));
    assert!(early < fourth, "{:?}", end.events);
}

#[test]
fn a_throttle_that_is_not_enough_is_said_too() {
    let mut scenario = too_fast(true);
    scenario.params.throttle = ThrottleParams { initial: 1, max: 1, ..Default::default() };
    scenario.cancel_source_at = Some(MigrationEvent::Pass(8));
    let end = migrate(&scenario);
    end.assert_let_go("gentle");
    let said = not_converging(&end);
    let [MigrationEvent::NotConverging(facts)] = said[..] else { panic!("{said:?}") };
    assert_eq!(facts.throttle_percent, 1);
}
