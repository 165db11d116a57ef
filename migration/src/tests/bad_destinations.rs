//! Destinations that lie, read slowly, or not at all: the source says what is wrong, and keeps its guest.

use super::fake::*;
use crate::error::chain;
use crate::params::Params;
use crate::source::SourceOutcome;
use crate::transport::Transport;
use crate::transport::memory::MemoryLink;
use crate::wire::{self, Encoder, HEADER_BYTES, Hello, Kind, MigrationId, Role};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

fn read_exact(from: &dyn Transport, into: &mut [u8]) -> bool {
    let mut done = 0;
    while done < into.len() {
        match from.receive(&mut into[done..]) {
            Ok(0) => return false,
            Ok(count) => done += count,
            Err(_) => {}
        }
    }
    true
}

/// The next frame; none if the source has hung up.
fn frame(from: &dyn Transport) -> Option<(Kind, Vec<u8>)> {
    let mut header = [0; HEADER_BYTES];
    if !read_exact(from, &mut header) {
        return None;
    }
    let (kind, len) = wire::decode_header(&header).unwrap();
    let mut payload = vec![0; usize::try_from(len).unwrap()];
    read_exact(from, &mut payload).then_some((kind, payload))
}

fn answer(on: &dyn Transport, change: impl FnOnce(&mut Hello)) {
    let Some((Kind::Hello, payload)) = frame(on) else { return };
    let mut hello = Hello::decode(&payload).unwrap().answer();
    change(&mut hello);
    let mut bytes = Vec::new();
    wire::append_frame(&mut bytes, Kind::Hello, &hello.encode()).unwrap();
    write_all(on, &bytes);
}

fn greet(liar: &Liar) {
    answer(&liar.main, |_| {});
    liar.data.iter().for_each(|data| answer(data, |_| {}));
}

/// Up to where pages begin to come.
fn accept(liar: &Liar) {
    greet(liar);
    frame(&liar.main);
    liar.frame(Kind::Accepted, &[]);
    frame(&liar.main);
}

fn mark(liar: &Liar, number: u64, channel: u16) {
    liar.frame(Kind::Mark, Encoder::default().u64(number).u16(channel).bytes());
}

/// Reads until the source hangs up.
fn listen(liar: &Liar) {
    while frame(&liar.main).is_some() {}
}

const GONE: &str = "the destination has gone away, or the link to it is cut: ";

fn two_channels() -> Scenario {
    Scenario {
        params: Params { multifd_channels: 2, ..Params::default() },
        patience: Duration::from_secs(2),
        ..Default::default()
    }
}

#[test]
fn a_destination_that_lies_is_named_and_the_guest_runs_on() {
    type Lie = fn(&Liar);
    let lies: &[(&str, Lie)] = &[
        ("the other side is not Ferry", |liar| liar.say(b"220 mail.example.org ESMTP\r\n")),
        ("the answer is for another connection", |liar| {
            answer(&liar.main, |hello| hello.id = MigrationId([7; 16]));
        }),
        ("data channel 1: malformed hello: the answer is for another connection", |liar| {
            answer(&liar.main, |_| {});
            answer(&liar.data[0], |_| {});
            answer(&liar.data[1], |hello| hello.role = Role::Data { index: 0 });
        }),
        ("the destination refuses: no room", |liar| {
            greet(liar);
            liar.frame(Kind::Refused, b"no room");
        }),
        ("unexpected Ready where the answer to the machine description belongs", |liar| {
            greet(liar);
            liar.frame(Kind::Ready, Encoder::default().u32(1).bytes());
        }),
        ("unexpected mark 9 of channel 0", |liar| (accept(liar), mark(liar, 9, 0)).1),
        ("unexpected mark 1 of channel 7", |liar| (accept(liar), mark(liar, 1, 7)).1),
        ("unexpected mark 1 of channel 0", |liar| {
            accept(liar);
            mark(liar, 1, 0);
            mark(liar, 1, 0);
        }),
        ("malformed the answer to a mark", |liar| {
            accept(liar);
            liar.frame(Kind::Mark, &[1, 2, 3]);
        }),
        ("unexpected Ready where the answer to a mark belongs", |liar| {
            accept(liar);
            liar.frame(Kind::Ready, Encoder::default().u32(1).bytes());
        }),
        ("unexpected Go where the answer to a mark belongs", |liar| {
            accept(liar);
            liar.frame(Kind::Go, &[]);
        }),
        ("unexpected Running where the destination's readiness belongs", |liar| {
            accept(liar);
            [0, 1].into_iter().for_each(|channel| mark(liar, 1, channel));
            liar.frame(Kind::Running, &[]);
        }),
        (GONE, |liar| (greet(liar), liar.main.shutdown()).1),
        (GONE, |liar| (accept(liar), liar.main.shutdown()).1),
        ("or the link to it is cut: data channel 1: connection lost", |liar| {
            answer(&liar.main, |_| {});
            answer(&liar.data[0], |_| {});
            liar.data[1].shutdown();
            liar.main.shutdown();
        }),
        // Whichever channel sees it first.
        (GONE, |liar| {
            accept(liar);
            liar.data.iter().for_each(|data| data.shutdown());
            liar.main.shutdown();
        }),
        ("the destination refuses: I have changed my mind", |liar| {
            accept(liar);
            [0, 1].into_iter().for_each(|channel| mark(liar, 1, channel));
            while !matches!(frame(&liar.main), Some((Kind::Eof, _)) | None) {}
            liar.frame(Kind::Refused, b"I have changed my mind");
        }),
    ];
    for (expected, lie) in lies {
        let (outcome, runs) = send_to(&two_channels(), |liar| {
            lie(liar);
            listen(liar);
        });
        let SourceOutcome::Failed(error) = &outcome else { panic!("{expected}: {outcome:?}") };
        assert!(chain(error).contains(expected), "{} lacks {expected:?}", chain(error));
        assert!(runs, "{expected}");
    }
}

#[test]
fn a_destination_hears_why_a_channel_cannot_be_opened() {
    let link = MemoryLink::new(None);
    let (main, main_in) = link.connect();
    let (data, data_in) = link.connect();
    let (scenario, disk) = (two_channels(), Arc::default());
    let ram = boot(&scenario, &disk);
    // The second channel cannot be connected.
    let source = Ends { main: Arc::new(main), data: vec![Arc::new(data)], disks: Vec::new() };
    let heard = std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            answer(&main_in, |_| {});
            answer(&data_in, |_| {});
            frame(&main_in)
        });
        let (outcome, ..) = run_source(&scenario, source, &ram, &disk);
        assert!(matches!(outcome, SourceOutcome::Failed(_)), "{outcome:?}");
        destination.join().unwrap()
    });
    let (kind, reason) = heard.expect("it is told");
    assert_eq!((kind, reason.starts_with(b"connection lost")), (Kind::Abort, true), "{reason:?}");
}

#[test]
fn nonsense_in_answer_to_go_leaves_the_guest_stopped() {
    let (outcome, runs) = send_to(&two_channels(), |liar| {
        accept(liar);
        [0, 1].into_iter().for_each(|channel| mark(liar, 1, channel));
        liar.frame(Kind::Ready, Encoder::default().u32(1).bytes());
        while !matches!(frame(&liar.main), Some((Kind::Go, _)) | None) {}
        mark(liar, 1, 1);
    });
    let SourceOutcome::Unknown(error) = &outcome else { panic!("{outcome:?}") };
    assert!(chain(error).contains("where the answer to the handover belongs"), "{}", chain(error));
    assert!(!runs);
}

/// The guest has moved: whatever the destination says then, it does not run here.
#[test]
fn nonsense_in_the_last_phase_leaves_the_guest_stopped_too() {
    let late = Scenario { late: Some(Words::late(&[0, 1])), ..two_channels() };
    type Last = fn(&Liar);
    let lies: [(&str, Last); 3] = [
        ("unexpected mark 1 of channel 0 where word that everything", |liar| mark(liar, 1, 0)),
        ("unexpected Running where word that everything", |liar| liar.frame(Kind::Running, &[])),
        ("the destination refuses: no", |liar| liar.frame(Kind::Refused, b"no")),
    ];
    for (expected, lie) in lies {
        let (outcome, runs) = send_to(&late, |liar| {
            accept(liar);
            [0, 1].into_iter().for_each(|channel| mark(liar, 1, channel));
            liar.frame(Kind::Ready, Encoder::default().u32(1).bytes());
            while !matches!(frame(&liar.main), Some((Kind::Go, _)) | None) {}
            liar.frame(Kind::Running, &[]);
            while !matches!(frame(&liar.main), Some((Kind::AllSent, _)) | None) {}
            lie(liar);
            listen(liar);
        });
        let SourceOutcome::Incomplete(why) = &outcome else { panic!("{expected}: {outcome:?}") };
        assert!(why.contains(expected), "{why}");
        assert!(!runs);
    }
}

#[test]
fn a_destination_that_never_says_a_word_is_given_up() {
    let patience = Duration::from_millis(300);
    let (outcome, runs) = send_to(&Scenario { patience, ..two_channels() }, |liar| {
        accept(liar);
        listen(liar);
    });
    let SourceOutcome::Failed(error) = &outcome else { panic!("{outcome:?}") };
    assert!(chain(error).contains("peer stalled"), "{}", chain(error));
    assert!(runs);
}

/// Says that it is alive, and nothing else, until the source hangs up.
fn only_be_alive(liar: &Liar) {
    let mut heard = [0; 256];
    while !matches!(liar.main.receive(&mut heard), Ok(0)) {
        liar.frame(Kind::KeepAlive, &[]);
    }
}

#[test]
fn a_destination_that_is_alive_but_does_not_get_on_is_given_up() {
    type Lie = fn(&Liar);
    let lies: [(&str, Lie); 2] = [
        // It takes all pages and never says so; or says so of one channel only.
        ("the destination's answer to the marks of this round did not come within", accept),
        ("the destination's answer to the marks of this round did not come", |liar| {
            accept(liar);
            mark(liar, 1, 1);
        }),
    ];
    // Far less than a second, and yet so long that a busy host lets the liar speak in time.
    let patience = Duration::from_millis(400);
    let given_up = |expected: &str, lie: Lie| {
        let started = std::time::Instant::now();
        let (outcome, runs) = send_to(&Scenario { patience, ..two_channels() }, |liar| {
            lie(liar);
            only_be_alive(liar);
        });
        let SourceOutcome::Failed(error) = &outcome else { panic!("{expected}: {outcome:?}") };
        assert!(chain(error).contains(expected), "{} lacks {expected:?}", chain(error));
        assert!(runs, "{expected}");
        assert!(started.elapsed() > patience * 6, "{expected}: {:?}", started.elapsed());
    };
    std::thread::scope(|scope| {
        for (expected, lie) in lies {
            scope.spawn(move || given_up(expected, lie));
        }
    });
}

/// Moves a guest over three channels, of which the second is narrow.
fn migrate_over_narrow(patience: Duration, room: u64, slow_reads: u64) -> End {
    let script = Some(Script { pages: 60, kinds: 0..KINDS, passes: 0 });
    let params = Params { multifd_channels: 3, ..Params::default() };
    let scenario = Scenario { ram_bytes: 8 << 20, script, params, patience, ..Default::default() };
    let link = MemoryLink::new(None).with_patience(patience);
    let (main, main_in) = link.connect();
    let mut source = Ends { main: Arc::new(main), data: Vec::new(), disks: Vec::new() };
    let mut destination = Ends { main: Arc::new(main_in), data: Vec::new(), disks: Vec::new() };
    for index in 0..3 {
        let (out, into) = link.connect();
        let narrow = |inner| -> Arc<dyn Transport> {
            let (room, slow_reads) = if index == 1 { (room, slow_reads) } else { (u64::MAX, 0) };
            let (room, slow_reads) = (AtomicU64::new(room), AtomicU64::new(slow_reads));
            Arc::new(Narrow { inner, room, slow_reads })
        };
        source.data.push(narrow(out));
        destination.data.push(narrow(into));
    }
    migrate_over(&scenario, source, destination, || 0)
}

#[test]
fn a_destination_that_reads_one_channel_slowly_gets_its_guest() {
    // Longer than the source waits for one that stands still.
    let patience = Duration::from_millis(1500);
    let started = std::time::Instant::now();
    let end = migrate_over_narrow(patience, u64::MAX, 2000);
    end.assert_moved();
    assert!(started.elapsed() > patience, "it was not slow");
}

#[test]
fn a_destination_that_stops_reading_one_channel_is_named() {
    for room in [100, 5000, 200_000] {
        let end = migrate_over_narrow(Duration::from_millis(1200), room, 0);
        let SourceOutcome::Failed(error) = &end.source else { panic!("{room}: {:?}", end.source) };
        assert!(chain(error).contains("data channel 1: peer stalled"), "{}", chain(error));
        let there = end.destination.as_ref().unwrap_err();
        assert!(there.contains("data channel 1: peer stalled"), "{there}");
        end.assert_back_at_source(&format!("room for {room} bytes"));
    }
}
