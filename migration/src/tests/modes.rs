//! Every capability, every pair of them, and all at once: whole moves, cuts, failures and cancels.

use super::fake::*;
use crate::error::chain;
use crate::params::{Compression, Params};
use crate::source::{MigrationEvent, SourceOutcome};
use crate::stats::{MigrationStatus, StatsSnapshot};
use proptest::prelude::*;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

type Wish = (&'static str, fn(&mut Params));

const WISHES: [Wish; 5] = [
    ("channels=3", |params| params.multifd_channels = 3),
    ("xbzrle", |params| params.xbzrle = true),
    ("zlib", |params| params.compression = Compression::Zlib),
    ("zstd", |params| params.compression = Compression::Zstd),
    ("auto-converge", |params| params.auto_converge = true),
];

struct Mode {
    name: String,
    params: Params,
}

impl Mode {
    fn of(wishes: &[Wish]) -> Self {
        let mut params = Params { multifd_channels: 1, ..Params::default() };
        wishes.iter().for_each(|(_, wish)| wish(&mut params));
        let names: Vec<_> = wishes.iter().map(|(name, _)| *name).collect();
        Self { name: format!("mode [{}]", names.join(" ")), params }
    }

    /// Nothing, each capability, each pair, all.
    fn all() -> Vec<Self> {
        let mut modes = vec![Self::of(&[])];
        for (index, one) in WISHES.iter().enumerate() {
            modes.push(Self::of(&[*one]));
            // Of the compressors there is only one at a time.
            let others =
                WISHES[index + 1..].iter().filter(|two| (one.0, two.0) != ("zlib", "zstd"));
            modes.extend(others.map(|two| Self::of(&[*one, *two])));
        }
        modes.push(Self::of(&[WISHES[0], WISHES[1], WISHES[3], WISHES[4]]));
        modes
    }

    /// A guest that writes `pages` of each kind in each huge page, in three rounds and in the pause; a
    /// fourth round finds them written, but the same.
    fn scripted(&self, pages: u64) -> Scenario {
        let script = Some(Script { pages, kinds: 0..KINDS, passes: 3 });
        Scenario { ram_bytes: 8 << 20, script, ..self.rounds(4) }
    }

    /// The same over a link so slow that no round is skipped: what is left is always worth another.
    fn all_rounds(&self, pages: u64) -> Scenario {
        self.scripted(pages).capped(if pages > 10 { 200_000_000 } else { 20_000_000 })
    }

    /// Does not stop the guest before round `stop`, unless next to nothing is left.
    fn rounds(&self, stop: u64) -> Scenario {
        let unwilling = Params { downtime_limit: Duration::ZERO, ..self.params.clone() };
        let changes = vec![(stop, self.willing())];
        Scenario { params: unwilling, changes, ..Default::default() }
    }

    fn willing(&self) -> Params {
        Params { downtime_limit: Duration::from_secs(1), ..self.params.clone() }
    }

    fn compresses(&self) -> bool {
        self.params.compression != Compression::None
    }

    /// Each thing that this mode can do to a page has been done, and nothing else.
    fn assert_exercised(&self, stats: &StatsSnapshot) {
        let case = format!("{}: {stats:?}", self.name);
        assert!(stats.normal_pages > 0 && stats.zero_pages > 0, "{case}");
        let xbzrle = stats.xbzrle;
        let all = [xbzrle.pages, xbzrle.bytes, xbzrle.misses, xbzrle.overflows, xbzrle.unchanged];
        let as_wanted = |count: &u64| (*count > 0) == self.params.xbzrle;
        assert!(all.iter().all(as_wanted), "{case}");
        let packed = stats.compression;
        assert_eq!(packed.pages > 0, self.compresses(), "{case}");
        assert_eq!(packed.bytes > 0, self.compresses(), "{case}");
        assert!(packed.bytes <= packed.pages * 4096 * 7 / 8 && packed.pages <= stats.normal_pages);
    }
}

impl Scenario {
    fn capped(mut self, bytes_per_sec: u64) -> Self {
        let params = self.changes.iter_mut().map(|(_, params)| params).chain([&mut self.params]);
        params.for_each(|params| params.max_bandwidth = bytes_per_sec);
        self
    }
}

impl End {
    fn assert_both_counted_the_same(&self, case: &str) {
        let (here, there) = (self.counters.snapshot(), self.destination_counters.snapshot());
        assert_eq!(
            (here.normal_pages, here.zero_pages, here.xbzrle.pages),
            (there.normal_pages, there.zero_pages, there.xbzrle.pages),
            "{case}"
        );
        let on_data_channels =
            |stats: &StatsSnapshot| stats.transferred_bytes - stats.control_bytes;
        assert_eq!(on_data_channels(&here), on_data_channels(&there), "{case}");
    }
}

#[test]
fn every_kind_of_frame_arrives_whole_in_every_mode() {
    for mode in Mode::all() {
        for pages in [2, 90] {
            let end = migrate(&mode.all_rounds(pages));
            end.assert_moved();
            assert_eq!(end.running_guests(), 1, "{}", mode.name);
            end.assert_both_counted_the_same(&mode.name);
            mode.assert_exercised(&end.counters.snapshot());
        }
    }
}

#[test]
fn a_guest_that_writes_all_the_time_arrives_whole_in_every_mode() {
    for mode in Mode::all() {
        // Under a cap, so that what makes pages smaller is worth its time.
        let scenario = Scenario {
            ram_bytes: 8 << 20,
            dirtying: Some((1000, Duration::from_millis(5))),
            lively: true,
            ..mode.rounds(4).capped(100_000_000)
        };
        let end = migrate(&scenario);
        end.assert_moved();
        assert_eq!(end.running_guests(), 1, "{}", mode.name);
        end.assert_both_counted_the_same(&mode.name);
        mode.assert_exercised(&end.counters.snapshot());
        let throttles = end.source_machine.throttles.lock().unwrap().clone();
        assert_eq!(throttles.last().copied().unwrap_or(0), 0, "{}", mode.name);
    }
}

/// The one that matters most, in every mode. Byte by byte where the guest changes hands.
#[test]
fn cutting_the_link_anywhere_in_any_mode_never_runs_two_guests() {
    for mode in Mode::all() {
        let all = migrate(&mode.scripted(1)).bytes_exchanged;
        let stride = usize::try_from(all / 97).unwrap();
        let (mut unknown, mut failed) = (0, 0);
        for cut in (0..all - 50).step_by(stride).chain(all - 50..all) {
            let case = format!("{} cut at byte {cut} of {all}", mode.name);
            let end = migrate(&Scenario { cut_after: Some(cut), ..mode.scripted(1) });
            assert!(end.running_guests() <= 1 && end.permits() <= 1, "{case}: two guests");
            match &end.source {
                SourceOutcome::Unknown(_) => unknown += 1,
                SourceOutcome::Failed(_) => {
                    failed += 1;
                    end.assert_back_at_source(&case);
                }
                // A busy host may do with a round less, and so with fewer bytes.
                SourceOutcome::Completed => end.assert_moved(),
                other => panic!("{case}: {other:?}"),
            }
        }
        assert!(failed > 40, "{}: only {failed} cuts were early enough", mode.name);
        // Only the bytes of `Go` and of `Running`, with its time, are in doubt.
        assert!(unknown <= 24, "{}: {unknown} cuts end as unknown", mode.name);
    }
}

#[test]
fn a_failure_at_any_step_in_any_mode_leaves_the_guest_running_at_the_source() {
    use Fail::*;
    for mode in Mode::all() {
        for fail in [Track, Pause, Save, Release, Build, Load, Lock, Run] {
            let case = format!("{} {fail:?}", mode.name);
            let end = migrate(&Scenario { fail, ..mode.scripted(2) });
            let SourceOutcome::Failed(error) = &end.source else {
                panic!("{case}: {:?}", end.source)
            };
            let expected = format!("scripted failure of {fail:?}");
            assert!(chain(error).contains(&expected), "{case}: {}", chain(error));
            let there = end.destination.as_ref().unwrap_err();
            assert!(there.contains(&expected), "{case}: the destination hears {there:?}");
            end.assert_back_at_source(&case);
            assert_eq!(end.destination_machine.abandoned.load(SeqCst), 1, "{case}");
        }
    }
}

#[test]
fn a_cancel_at_any_step_in_any_mode_leaves_the_guest_running_at_the_source() {
    use MigrationEvent::{Pass, Status};
    use MigrationStatus::{Active, Device, Setup};
    for mode in Mode::all() {
        // The fifth pass is in the pause.
        for at in [Status(Setup), Status(Active), Pass(1), Pass(3), Status(Device), Pass(5)] {
            let case = format!("{} {at:?}", mode.name);
            let end = migrate(&Scenario { cancel_source_at: Some(at), ..mode.all_rounds(2) });
            assert!(matches!(end.source, SourceOutcome::Cancelled), "{case}: {:?}", end.source);
            end.assert_back_at_source(&case);
        }
        for at in [Setup, Active] {
            let case = format!("{} {at:?} at the destination", mode.name);
            let end = migrate(&Scenario { cancel_destination_at: Some(at), ..mode.scripted(2) });
            assert!(matches!(end.source, SourceOutcome::Failed(_)), "{case}: {:?}", end.source);
            end.assert_back_at_source(&case);
        }
    }
}

#[test]
fn each_round_says_what_it_has_sent() {
    let mode = Mode::of(&WISHES[1..2]);
    let stats = migrate(&mode.all_rounds(2)).counters.snapshot();
    let rounds: Vec<_> = stats.history.iter().map(|round| round.period.xbzrle.pages).collect();
    // Of the four rounds the third is the first that finds older versions.
    assert!(rounds[..2] == [0, 0] && rounds[2] > 0, "{rounds:?}");
}

#[test]
fn noise_is_not_compressed() {
    for wish in &WISHES[2..4] {
        let mode = Mode::of(&[*wish]);
        let mut scenario = mode.all_rounds(90);
        scenario.script.as_mut().unwrap().kinds = 4..5;
        let end = migrate(&scenario);
        end.assert_moved();
        let stats = end.counters.snapshot();
        assert!(stats.normal_pages > 1000, "{stats:?}");
        assert!(stats.compression.pages < 200, "{stats:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Also a cache that is resized, and one that holds next to nothing.
    #[test]
    fn parameters_may_change_in_the_middle(
        three in any::<bool>(),
        rounds in prop::collection::vec((0usize..6, 0u8..4), 1..8),
    ) {
        let mode = Mode::of(if three { &WISHES[..1] } else { &[] });
        let mut scenario = mode.scripted(20);
        let first = scenario.params.clone();
        let stop = 1 + rounds.len() as u64;
        scenario.script.as_mut().unwrap().passes = stop - 1;
        scenario.changes = (1..).zip(&rounds).map(|(pass, (cache, compression))| {
            let compression = [
                Compression::None, Compression::Zlib, Compression::Zstd, Compression::Zstd,
            ][usize::from(*compression)];
            let pages = [0, 3, 40, 100, 399, 10_000][*cache];
            let (xbzrle, xbzrle_cache_size) = (pages > 0, pages * 4096);
            let zlib_level = (pass % 10) as u8;
            let params =
                Params { xbzrle, xbzrle_cache_size, compression, zlib_level, ..first.clone() };
            (pass, params)
        }).collect();
        let (_, last) = scenario.changes.last().unwrap().clone();
        scenario.changes.push((stop, Params { downtime_limit: Duration::from_secs(1), ..last }));
        let end = migrate(&scenario);
        end.assert_moved();
        end.assert_both_counted_the_same("changes");
    }
}

#[test]
fn a_cache_may_be_resized_while_the_guest_writes_all_the_time() {
    let mode = Mode::of(&WISHES[..2]);
    let mut scenario = Scenario {
        ram_bytes: 8 << 20,
        dirtying: Some((1000, Duration::from_millis(2))),
        lively: true,
        ..mode.rounds(12).capped(100_000_000)
    };
    let (stop, willing) = scenario.changes.remove(0);
    for (pass, pages) in (2..stop).zip([3, 2000, 300, 301, 299, 7, 900, 5000, 30, 600]) {
        let params = Params { xbzrle_cache_size: pages * 4096, ..scenario.params.clone() };
        scenario.changes.push((pass, params));
    }
    scenario.changes.push((stop, willing));
    let end = migrate(&scenario);
    end.assert_moved();
    end.assert_both_counted_the_same(&mode.name);
    mode.assert_exercised(&end.counters.snapshot());
}

#[test]
fn a_channel_that_dies_alone_is_named_and_the_guest_runs_at_the_source() {
    for mode in Mode::all() {
        let channels = usize::from(mode.params.multifd_channels);
        for bytes in [0, 60, 61, 300, 5000, 20_000] {
            let lost = channels - 1;
            let case = format!("{}: channel {lost} lost at byte {bytes}", mode.name);
            let lose_channel = Some((lost, bytes));
            let end = migrate(&Scenario { lose_channel, ..mode.scripted(4) });
            let SourceOutcome::Failed(error) = &end.source else {
                // Made small, fewer bytes may be all there is.
                assert!(mode.compresses() && bytes == 20_000, "{case}: {:?}", end.source);
                end.assert_moved();
                continue;
            };
            end.assert_back_at_source(&case);
            let (here, there) = (chain(error), end.destination.as_ref().unwrap_err());
            for said in [&here, there] {
                assert!(said.contains("connection lost"), "{case}: {said}");
                assert!(said.contains(&format!("data channel {lost}")), "{case}: {said}");
            }
        }
    }
}
