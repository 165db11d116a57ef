//! Every capability and every pair of them, with real guests that verify their memory: whole moves, and
//! moves that are killed, cut and cancelled.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::needs;
use ferry_tests::pair::Pair;
use ferry_tests::process::SOON;
use ferry_tests::proxy::{self, Proxy};
use ferry_tests::qmp::{ENDS, is_end};
use ferry_tests::traveller::Traveller;
use serde_json::{Value, json};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Channels(u16),
    Xbzrle,
    Zlib,
    Zstd,
    AutoConverge,
}

use Wish::{AutoConverge, Channels, Xbzrle, Zlib, Zstd};

impl Wish {
    fn options(self) -> Vec<String> {
        let words = match self {
            Channels(count) => format!("--channels {count}"),
            // More than the guest writes.
            Xbzrle => "--xbzrle --xbzrle-cache-size 32M".to_owned(),
            Zlib => "--compress zlib:1".to_owned(),
            Zstd => "--compress zstd".to_owned(),
            AutoConverge => "--auto-converge".to_owned(),
        };
        words.split(' ').map(str::to_owned).collect()
    }

    /// That it was done, says the summary; what was not wanted was not done.
    fn assert_seen(self, wanted: bool, summary: &Value, connections: usize) {
        let number = |path: &str| summary.pointer(path).and_then(Value::as_u64).unwrap();
        match self {
            Channels(count) => {
                let expected = if wanted { usize::from(count) + 1 } else { 2 };
                assert_eq!(connections, expected);
            }
            Xbzrle => assert_eq!(has_deltas(summary), wanted, "{summary}"),
            Zlib | Zstd => {
                let pages = number("/compression/pages");
                assert!(pages > 0, "{summary}");
                assert!(number("/compression/compressed-size") < pages * 2048, "{summary}");
            }
            // Whether it was needed, the guest decides; but it is over.
            AutoConverge => assert!(summary.get("cpu-throttle-percentage").is_none(), "{summary}"),
        }
    }
}

/// Each, each pair, and all that go together.
fn modes(wishes: &[Wish]) -> Vec<Vec<Wish>> {
    let mut modes = Vec::new();
    for (index, one) in wishes.iter().enumerate() {
        modes.push(vec![*one]);
        let others = wishes[index + 1..].iter().filter(|two| (*one, **two) != (Zlib, Zstd));
        modes.extend(others.map(|two| vec![*one, *two]));
    }
    modes.push(wishes.iter().copied().filter(|wish| *wish != Zlib).collect());
    modes
}

fn compresses(mode: &[Wish]) -> bool {
    mode.iter().any(|wish| matches!(wish, Zlib | Zstd))
}

/// Whether some pages went as what had changed of them.
fn has_deltas(summary: &Value) -> bool {
    let Some(cache) = summary.get("xbzrle-cache") else { return false };
    let number = |name: &str| cache[name].as_u64().unwrap();
    assert!(number("bytes") <= number("pages") * 3000, "{summary}");
    number("pages") > 0
}

/// A guest that writes text.
fn writer_of_text(work: &str) -> Traveller {
    let work = format!("work=dirty fill=text {work} hb_ms=20");
    Traveller::start(&Guest::new(&work, 128)).unwrap()
}

/// Moves it once; the guest has found every byte of its memory there, at any time, ever since.
fn hop(guest: &mut Traveller, mode: &[Wish], limits: &[&str]) -> Value {
    let destination = ferry::receive().unwrap();
    let proxy = proxy::start(&destination.address).unwrap();
    let one_channel = !mode.iter().any(|wish| matches!(wish, Channels(_)));
    let mut options: Vec<String> = mode.iter().flat_map(|wish| wish.options()).collect();
    options.extend(one_channel.then(|| Channels(1).options()).into_iter().flatten());
    let options: Vec<&str> =
        options.iter().map(String::as_str).chain(limits.iter().copied()).collect();
    let ended = guest.hop_to(destination, proxy.address(), &options).unwrap().ended;
    for wish in mode.iter().filter(|wish| **wish != Xbzrle) {
        wish.assert_seen(true, &ended.summary, proxy.connections());
    }
    if one_channel {
        assert_eq!(proxy.connections(), 2);
    }
    if !mode.contains(&Xbzrle) {
        Xbzrle.assert_seen(false, &ended.summary, 0);
    }
    if !compresses(mode) {
        assert!(ended.summary.get("compression").is_none(), "{}", ended.summary);
    }
    guest.verify().unwrap_or_else(|error| panic!("{mode:?}: {error:?}"));
    ended.summary
}

#[test]
#[needs(kvm)]
fn every_capability_and_every_pair_of_them_moves_a_guest_there_and_back() {
    // Writes little enough to converge by itself, and always the same 8 MiB, so that most of what is
    // sent in a later round has been sent before; and so little of a page that no compressor does
    // better than a delta.
    let mut guest = writer_of_text("fill_pct=20 ws_mb=8 rate_mbps=20 change_pct=1");
    for mode in modes(&[Channels(4), Xbzrle, Zlib, Zstd]) {
        // Under a cap, so that fewer bytes are less time; text shrinks to a twentieth.
        let cap = if compresses(&mode) { "4M" } else { "60M" };
        let limits = ["--max-bandwidth", cap, "--downtime-limit", "5ms"];
        let there_and_back = [hop(&mut guest, &mode, &limits), hop(&mut guest, &mode, &limits)];
        if mode.contains(&Xbzrle) && !there_and_back.iter().any(has_deltas) {
            // On a busy host the guest may have had no CPU for as long as a round takes.
            let seen = (0..4).any(|_| has_deltas(&hop(&mut guest, &mode, &limits)));
            assert!(seen, "{mode:?}: six moves without a delta, the first: {there_and_back:?}");
        }
    }
}

#[test]
#[needs(kvm)]
fn a_guest_that_has_to_be_slowed_down_moves_with_every_other_capability() {
    let mut guest = writer_of_text("fill_pct=15 ws_mb=16 rate_mbps=400 change_pct=50");
    for mode in modes(&[Channels(3), Xbzrle, Zlib, Zstd]) {
        if mode.len() == 2 {
            continue;
        }
        // Boldly: how it finds its way is not looked at here.
        let bold = json!({"cpu-throttle-initial": 70, "cpu-throttle-increment": 20});
        guest.vmm.qmp().unwrap().execute("migrate-set-parameters", bold).unwrap();
        // What is compressed would be no trouble otherwise; deltas are not.
        let cap = match (compresses(&mode), mode.contains(&Xbzrle)) {
            (true, true) => "3M",
            (true, false) => "2M",
            (false, _) => "30M",
        };
        let limits = ["--max-bandwidth", cap, "--downtime-limit", "40ms"];
        let mode = [&mode[..], &[AutoConverge]].concat();
        let throttled = |summary: &Value| {
            let rounds = summary["x-rounds"].as_array().unwrap();
            rounds.iter().any(|round| round["cpu-throttle-percentage"].as_u64() > Some(0))
        };
        // On a busy host the guest may be slow for want of a CPU.
        let seen = (0..4).map(|_| hop(&mut guest, &mode, &limits)).find(throttled);
        let summary = seen.unwrap_or_else(|| panic!("{mode:?}: four moves, never slowed down"));
        // What packs to less than its delta is packed.
        if mode.contains(&Xbzrle) && !compresses(&mode) {
            Xbzrle.assert_seen(true, &summary, 0);
        }
    }
}

/// The channels of a migration, and its other parameters and capabilities.
type Mode = (Value, &'static [&'static str]);

/// What is disturbed: every capability, alone or with others. All pairs of them are, byte by byte and step
/// by step, in the engine's own tests.
fn disturbed_modes() -> [Mode; 4] {
    [
        (json!({"multifd-channels": 4}), &[]),
        (json!({"multifd-channels": 3, "multifd-compression": "zstd"}), &["xbzrle"]),
        (json!({"multifd-channels": 1, "multifd-compression": "zlib"}), &["auto-converge"]),
        (json!({"multifd-channels": 2}), &["xbzrle", "auto-converge"]),
    ]
}

/// When something happens.
#[derive(Debug, Clone, Copy)]
enum Moment {
    Pass(u64),
    Pause,
}

const MOMENTS: [Moment; 4] = [Moment::Pass(1), Moment::Pass(2), Moment::Pass(3), Moment::Pause];

/// Starts to move a guest through a link, and waits for `moment`.
fn moving(moment: Moment, (parameters, capabilities): &Mode) -> (Pair, Proxy) {
    let work = "work=dirty fill=text fill_pct=40 ws_mb=4 rate_mbps=60 change_pct=30 hb_ms=20";
    let mut pair = Pair::new(&Guest::new(work, 128)).unwrap();
    let proxy = proxy::start(&pair.destination.address).unwrap();
    let on = |name: &&str| json!({"capability": name, "state": true});
    let capabilities: Vec<_> = capabilities.iter().map(on).collect();
    let capabilities = json!({"capabilities": capabilities});
    pair.qmp.execute("migrate-set-capabilities", capabilities).unwrap();
    pair.qmp.execute("migrate-set-parameters", parameters.clone()).unwrap();
    let limits = json!({"max-bandwidth": 100_000_000, "downtime-limit": 10});
    pair.qmp.execute("migrate-set-parameters", limits).unwrap();
    pair.start_by(proxy.address()).unwrap();
    let is_it = |event: &Value| {
        let data = &event["data"];
        is_end(&data["status"])
            || match moment {
                Moment::Pass(pass) => {
                    event["event"] == "MIGRATION_PASS" && data["pass"].as_u64() >= Some(pass)
                }
                Moment::Pause => event["event"] == "STOP",
            }
    };
    pair.qmp.wait_event_where(SOON, is_it).unwrap();
    (pair, proxy)
}

fn assert_moved(pair: &mut Pair) {
    assert_eq!(pair.qmp.run_state().unwrap(), "postmigrate");
    pair.check_moved().unwrap();
}

/// Whether the guest has stayed, after something that no side was killed by. Where it is, it is whole.
fn judge(pair: &mut Pair, info: &Value) -> bool {
    if info["status"] == "completed" {
        assert_moved(pair);
        return false;
    }
    if info["x-outcome"] == "unknown" {
        assert_eq!(pair.qmp.run_state().unwrap(), "postmigrate");
        return false;
    }
    assert_eq!(info["status"], "failed", "{info}");
    pair.check_stayed().unwrap();
    true
}

#[test]
#[needs(kvm)]
fn a_destination_that_is_killed_never_costs_the_guest_in_any_mode() {
    for mode in disturbed_modes() {
        let mut stayed = 0;
        for moment in MOMENTS {
            eprintln!("killing the destination of {mode:?} at {moment:?}");
            let (mut pair, _proxy) = moving(moment, &mode);
            pair.destination.vmm.process.kill().unwrap();
            let info = pair.qmp.migration_end().unwrap();
            if info["status"] == "completed" || info["x-outcome"] == "unknown" {
                assert_eq!(pair.qmp.run_state().unwrap(), "postmigrate");
                continue;
            }
            assert_eq!(info["status"], "failed", "{info}");
            pair.check_stayed().unwrap();
            pair.move_after_all().unwrap();
            stayed += 1;
        }
        assert!(stayed >= 2, "no moment was early enough to test anything");
    }
}

#[test]
#[needs(kvm)]
fn a_source_that_is_killed_never_leaves_half_a_guest_in_any_mode() {
    for mode in disturbed_modes() {
        for moment in MOMENTS {
            eprintln!("killing the source of {mode:?} at {moment:?}");
            let (mut pair, _proxy) = moving(moment, &mode);
            pair.source.process.kill().unwrap();
            let destination = &mut pair.destination.vmm;
            // The guest has arrived whole, or the destination ends without it.
            if destination.serial().wait_for("^HB ", SOON).is_ok() {
                ferry::verify_at(destination, &[pair.source.serial()]).unwrap();
            } else {
                assert_eq!(destination.process.exit_code(SOON).unwrap(), 126);
                assert_eq!(destination.serial().text(), "");
            }
        }
    }
}

#[test]
#[needs(kvm)]
fn a_link_that_is_cut_whole_or_in_one_channel_never_costs_the_guest() {
    for mode in disturbed_modes() {
        let mut stayed = 0;
        for moment in MOMENTS {
            // All; the control connection alone; the last data channel alone.
            for cut in ["all", "control", "data"] {
                eprintln!("cutting {cut} of {mode:?} at {moment:?}");
                let (mut pair, proxy) = moving(moment, &mode);
                let last = proxy.connections() - 1;
                proxy.cut(|index| match cut {
                    "all" => true,
                    "control" => index == 0,
                    _ => index == last,
                });
                let info = pair.qmp.migration_end().unwrap();
                if !judge(&mut pair, &info) {
                    continue;
                }
                stayed += 1;
                if cut == "data" {
                    let why = info["error-desc"].as_str().unwrap();
                    assert!(why.contains(&format!("data channel {}", last - 1)), "{why}");
                }
                assert_eq!(pair.destination.vmm.process.exit_code(SOON).unwrap(), 126);
            }
        }
        assert!(stayed >= 6, "no moment was early enough to test anything");
    }
}

#[test]
#[needs(kvm)]
fn a_cancel_leaves_the_guest_at_the_source_in_any_mode_and_a_retry_succeeds() {
    for mode in disturbed_modes() {
        let mut stayed = 0;
        for moment in MOMENTS {
            eprintln!("cancelling {mode:?} at {moment:?}");
            let (mut pair, _proxy) = moving(moment, &mode);
            pair.qmp.execute("migrate_cancel", json!({})).unwrap();
            let info = pair.qmp.migration_end().unwrap();
            if info["status"] == "completed" {
                assert_moved(&mut pair);
                continue;
            }
            assert_eq!(info["status"], "cancelled", "{info}");
            pair.check_stayed().unwrap();
            assert_eq!(pair.destination.vmm.process.exit_code(SOON).unwrap(), 126);
            pair.move_after_all().unwrap();
            stayed += 1;
        }
        assert!(stayed >= 2, "no moment was early enough to test anything");
    }
}

/// Moves a guest while everything about the migration changes; false if it went too fast for that.
fn move_with_changes() -> bool {
    let work = "work=dirty fill=text fill_pct=20 ws_mb=8 rate_mbps=200 change_pct=60 hb_ms=20";
    let source = ferry::run(&Guest::new(work, 128)).unwrap();
    let mut destination = ferry::receive().unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    let mut qmp = source.qmp().unwrap();
    let on = ["events", "xbzrle"].map(|name| json!({"capability": name, "state": true}));
    qmp.execute("migrate-set-capabilities", json!({"capabilities": on})).unwrap();
    // Never short enough, until that is wanted; and caps under which every round takes its time.
    let limits = json!({"multifd-channels": 2, "max-bandwidth": 80_000_000, "downtime-limit": 0});
    qmp.execute("migrate-set-parameters", limits).unwrap();
    qmp.execute("migrate", json!({"uri": destination.address})).unwrap();
    let mut done = true;
    for (pass, change) in [
        (3, json!({"xbzrle-cache-size": 1 << 20})),
        (4, json!({"multifd-compression": "zstd", "max-bandwidth": 4_000_000})),
        (5, json!({"multifd-compression": "zlib", "xbzrle-cache-size": 8192})),
        (
            6,
            json!({
                "multifd-compression": "none", "xbzrle-cache-size": 64 << 20,
                "max-bandwidth": 60_000_000,
            }),
        ),
        (8, json!({"multifd-compression": "zlib", "multifd-zlib-level": 9})),
        (10, json!({"downtime-limit": 1000, "max-bandwidth": 0})),
    ] {
        let later = |event: &Value| {
            event["data"]["pass"].as_u64() >= Some(pass) || is_end(&event["data"]["status"])
        };
        let event = qmp.wait_event_where(SOON, later).unwrap();
        if event["event"] != "MIGRATION_PASS" {
            done = false;
            break;
        }
        if pass == 3 {
            let channels = json!({"multifd-channels": 3});
            let refused = qmp.refused("migrate-set-parameters", channels).unwrap();
            assert!(refused.description.contains("migration process in progress"), "{refused}");
        }
        qmp.execute("migrate-set-parameters", change).unwrap();
    }
    if done {
        assert_eq!(qmp.wait_migration(&ENDS, SOON).unwrap(), "completed");
        let info = qmp.execute("query-migrate", json!({})).unwrap();
        Xbzrle.assert_seen(true, &info, 0);
        Zlib.assert_seen(true, &info, 0);
    }
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
    done
}

#[test]
#[needs(kvm)]
fn parameters_may_change_while_a_guest_moves() {
    // On a busy host the guest may write too little to be caught in the middle.
    assert!((0..4).any(|_| move_with_changes()), "four moves, and none took long enough");
}

#[test]
#[needs(kvm)]
fn options_that_cannot_be_are_named_and_the_guest_runs_on() {
    let mut source =
        ferry::run(&Guest::new("work=dirty ws_mb=4 rate_mbps=20 hb_ms=20", 64)).unwrap();
    source.wait_line("^HB n=1 ").unwrap();
    let destination = ferry::receive().unwrap();
    for (option, value, code, said) in [
        ("--channels", "0", 2, "0 is not in 1..=16"),
        ("--channels", "17", 2, "17 is not in 1..=16"),
        ("--channels", "many", 2, "--channels"),
        ("--compress", "lz4", 2, "\"lz4\" is not a method; there are none, zlib and zstd"),
        ("--compress", "zlib:10", 2, "\"10\" is not a level of zlib, from 0 to 9"),
        ("--compress", "zstd:21", 2, "\"21\" is not a level of zstd, from 0 to 20"),
        ("--compress", "none:1", 2, "none has no level"),
        ("--xbzrle-cache-size", "65M", 1, "expects at most the guest's memory, 67108864 bytes"),
        ("--xbzrle-cache-size", "0", 1, "expects a page of 4096 bytes for each channel at least"),
        ("--xbzrle-cache-size", "lots", 2, "--xbzrle-cache-size"),
    ] {
        let options = ["--xbzrle", option, value];
        let mut migration = ferry::start_migrate(&source, &destination.address, &options).unwrap();
        let found = migration.client.exit_code(SOON).unwrap();
        let errors = migration.client.err.text();
        assert_eq!(found, code, "{option} {value}: {errors}");
        assert!(errors.contains(said), "{option} {value}: {errors}");
        source.wait_next_line("^HB ").unwrap();
    }
    let info = source.qmp().unwrap().execute("query-migrate", json!({})).unwrap();
    assert_eq!(info, json!({}), "nothing was started");
    assert_eq!(source.check().unwrap().corrupt, 0);
    assert_eq!(destination.vmm.qmp().unwrap().run_state().unwrap(), "inmigrate");
}

#[test]
#[needs(kvm)]
fn parameters_out_of_range_are_refused_in_qemus_words_and_change_nothing() {
    let source = ferry::run(&Guest::new("work=idle", 64)).unwrap();
    let mut qmp = source.qmp().unwrap();
    let before = qmp.execute("query-migrate-parameters", json!({})).unwrap();
    for (name, value, expects) in [
        ("multifd-channels", json!(0), "expects a value between 1 and 16"),
        ("multifd-channels", json!(17), "expects a value between 1 and 16"),
        ("multifd-channels", json!(65537), "expects a value between 1 and 16"),
        ("multifd-zlib-level", json!(10), "expects a value between 0 and 9"),
        ("multifd-zlib-level", json!(256), "expects"),
        ("multifd-zstd-level", json!(21), "expects a value between 0 and 20"),
        ("multifd-compression", json!("lz4"), "does not accept value 'lz4'"),
        ("xbzrle-cache-size", json!(0), "expects"),
        ("xbzrle-cache-size", json!(4095), "expects"),
        ("xbzrle-cache-size", json!(1u64 << 40), "expects at most the guest's memory"),
        ("throttle-trigger-threshold", json!(101), "expects an integer in the range of 1 to 100"),
        ("cpu-throttle-initial", json!(0), "expects an integer in the range of 1 to 99"),
        ("cpu-throttle-increment", json!(100), "expects an integer in the range of 1 to 99"),
        ("max-cpu-throttle", json!(19), "expects an integer in the range of 20 to 99"),
        ("downtime-limit", json!(2_000_001), "expects an integer in the range of 0 to 2000000"),
    ] {
        // Beside one that is right.
        let both = json!({name: value, "max-bandwidth": 123_456_789});
        let refused = qmp.refused("migrate-set-parameters", both).unwrap();
        assert_eq!(refused.class, "GenericError", "{name}={value}");
        let said = refused.description;
        assert!(said.starts_with(&format!("Parameter '{name}' ")), "{name}={value}: {said}");
        assert!(said.contains(expects), "{name}={value}: {said}");
    }
    assert_eq!(qmp.execute("query-migrate-parameters", json!({})).unwrap(), before);
}
