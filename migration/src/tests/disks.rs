//! Disks that travel with their guest: whole at the end, or untouched at the source.

use super::fake::*;
use super::fake_disks::{FakeDisks, PanickingDisk};
use crate::block::frame::{BlockSetup, BlockTotals, Chunk, DiskData, DiskSetup, DiskTotals, Frame};
use crate::block::{CHUNK_BYTES, GRANULE_BYTES, Tuning};
use crate::error::chain;
use crate::guest::MachineDescription;
use crate::params::Params;
use crate::ram::frame::{Packing, encode_end};
use crate::source::{MigrationEvent, SourceOutcome};
use crate::stats::MigrationStatus;
use crate::transport::Transport;
use crate::wire::hello::DISKS;
use crate::wire::section::{Eof, RamEnd, RamSetup, RamTotals, Section, Stage};
use crate::wire::{self, Encoder, Hello, Kind, MigrationId, Role};
use devices::block::BlockNode;
use devices::block::memory::MemoryDisk;
use devices::ram::PAGE_SIZE;
use devices::state::JsonText;
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// Of all kinds: whole chunks, an odd tail, a single sector.
const SIZES: [u64; 3] = [3 * CHUNK_BYTES + GRANULE_BYTES + 512, 512, 2 * CHUNK_BYTES];

fn move_disks(disks: &FakeDisks) -> End {
    migrate(&Scenario { disks: disks.clone(), ..Default::default() })
}

#[test]
fn disks_of_any_size_arrive_whole_and_flushed() {
    let disks = FakeDisks::new(&SIZES);
    disks.fill();
    let end = move_disks(&disks);
    end.assert_moved();
    disks.assert_same();
    assert!(disks.disks.iter().all(|disk| disk.there_script.flush_count() > 0));
    let json = end.counters.snapshot().to_json();
    assert_eq!(json["disk"]["remaining"], 0);
    assert_eq!(json["disk"]["total"], SIZES.iter().sum::<u64>());
    assert_eq!(json["disk"]["x-disks"][2]["percent"], 100, "{json}");
    assert_eq!(end.counters.snapshot().total_bytes, RAM_BYTES, "RAM is counted apart");
}

#[test]
fn a_guest_without_disks_to_move_has_no_figures_of_disks() {
    let json = migrate(&Scenario::default()).counters.snapshot().to_json();
    assert!(json.get("disk").is_none(), "{json}");
}

#[test]
fn what_was_never_written_does_not_travel_and_zeroes_cost_a_header() {
    let disks = FakeDisks::new(&[64 * CHUNK_BYTES]);
    let node = &disks.disks[0].here;
    node.write_at(&[1; 4096], 7 * CHUNK_BYTES + GRANULE_BYTES).unwrap();
    let end = move_disks(&disks);
    end.assert_moved();
    disks.assert_same();
    let disk = end.counters.snapshot().disk.unwrap();
    assert_eq!(disk.disks[0].sent.data_bytes, GRANULE_BYTES);
    assert_eq!(disk.disks[0].total_bytes, GRANULE_BYTES);
    let headers = disk.transferred_bytes - GRANULE_BYTES;
    assert!(headers <= 4 * 32, "{headers} bytes of headers");
}

#[test]
fn disks_that_are_written_all_the_time_arrive_whole() {
    for round in 0..20 {
        let mut disks = FakeDisks::new(&SIZES);
        disks.busy = true;
        if round % 2 == 0 {
            disks.fill();
        }
        let end = migrate(&Scenario {
            ram_bytes: 4 << 20,
            dirtying: Some((500, Duration::from_micros(200))),
            disks: disks.clone(),
            ..Default::default()
        });
        end.assert_moved();
        disks.assert_same();
        assert_eq!(end.running_guests(), 1);
    }
}

#[test]
fn a_cap_holds_for_ram_and_disks_together() {
    let disks = FakeDisks::new(&[4 * CHUNK_BYTES]);
    disks.fill();
    let params = Params { max_bandwidth: 20 << 20, ..Default::default() };
    let end = migrate(&Scenario { params, disks: disks.clone(), ..Default::default() });
    end.assert_moved();
    disks.assert_same();
    let stats = end.counters.snapshot();
    let sent = stats.transferred_bytes + stats.disk.unwrap().transferred_bytes;
    let rate = sent as f64 / stats.total_time.unwrap().as_secs_f64();
    assert!(rate < 1.05 * f64::from(20 << 20), "{rate} bytes/s");
}

#[test]
fn rate_and_expected_downtime_are_shown_while_a_disk_travels() {
    let disks = FakeDisks::new(&[32 * CHUNK_BYTES]);
    // Half a second under the cap, of which the driver looks up once or more.
    for at in 0..10 {
        let data = vec![7; usize::try_from(CHUNK_BYTES).unwrap()];
        disks.disks[0].here.write_at(&data, 3 * at * CHUNK_BYTES).unwrap();
    }
    let params = Params { max_bandwidth: 20 << 20, multifd_channels: 1, ..Params::default() };
    let scenario = Scenario { params, disks: disks.clone(), ..Default::default() };
    let counters = scenario.counters.clone();
    let moving = std::thread::spawn(move || migrate(&scenario));
    let mut looks = Vec::new();
    while !moving.is_finished() {
        let stats = counters.snapshot();
        // The first pass of RAM is a matter of milliseconds.
        if stats.disk.as_ref().is_some_and(|disk| disk.passes == 0 && disk.bytes_per_sec > 0) {
            looks.push(stats);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let end = moving.join().unwrap();
    end.assert_moved();
    disks.assert_same();
    assert!(!looks.is_empty(), "the disk was never seen on its way");
    for look in looks {
        let info = look.to_json();
        assert_eq!(info["ram"]["mbps"], info["disk"]["mbps"], "{info}");
        let mbps = info["ram"]["mbps"].as_f64().unwrap();
        assert!((40.0..180.0).contains(&mbps), "{info}");
        let left = look.disk.unwrap().remaining_bytes();
        let expected = info["expected-downtime"].as_u64().unwrap_or_else(|| panic!("{info}"));
        // As of the last look of the driver.
        assert!(expected >= left * 1000 / (23 << 20), "{left} bytes in {expected} ms: {info}");
    }
}

#[test]
fn holes_count_on_neither_side() {
    let disks = FakeDisks::new(&[32 * CHUNK_BYTES]);
    for at in 0..10 {
        disks.disks[0].here.write_at(&[7; 512], 3 * at * CHUNK_BYTES).unwrap();
    }
    let end = move_disks(&disks);
    end.assert_moved();
    for (side, counters) in [("source", &end.counters), ("there", &end.destination_counters)] {
        let disk = counters.snapshot().disk.unwrap();
        assert_eq!(disk.disks[0].total_bytes, 10 * GRANULE_BYTES, "{side}");
        assert_eq!(disk.remaining_bytes(), 0, "{side}");
    }
}

#[test]
fn a_disk_that_cannot_be_read_or_written_fails_the_migration_and_the_guest_runs_on() {
    for (at_source, expected) in [
        (true, "disk d1: reading 512 bytes at 0 failed: scripted fault"),
        (false, "disk d1: writing 512 bytes at 0 failed: scripted fault"),
    ] {
        let disks = FakeDisks::new(&SIZES);
        disks.fill();
        let disk = &disks.disks[1];
        if at_source { &disk.here_script } else { &disk.there_script }.fail(true);
        let end = move_disks(&disks);
        let SourceOutcome::Failed(error) = &end.source else { panic!("{:?}", end.source) };
        assert!(chain(error).contains(expected), "{} lacks {expected}", chain(error));
        let there = end.destination.as_ref().unwrap_err();
        assert!(there.contains(expected), "the destination hears {there:?}");
        end.assert_back_at_source(expected);
    }
}

#[test]
fn no_more_reads_are_in_flight_than_were_asked_for() {
    let mut disks = FakeDisks::new(&[24 * CHUNK_BYTES]);
    disks.fill();
    disks.tuning = Tuning { reads: 3, buffers: 2 };
    let script = disks.disks[0].here_script.clone();
    script.hold(true);
    let moving = {
        let disks = disks.clone();
        std::thread::spawn(move || move_disks(&disks))
    };
    script.wait_until_held_by(3);
    assert_eq!(script.held(), 3);
    script.hold(false);
    moving.join().unwrap().assert_moved();
    disks.assert_same();
    let silly = Tuning { reads: 0, buffers: 100_000 };
    assert_eq!(silly.clamped(), Tuning { reads: 1, buffers: 512 });
}

#[test]
fn a_thread_that_panics_ends_the_migration_and_the_guest_runs_on() {
    for (panics, expected) in [
        ("read", "the thread that reads disks panicked"),
        ("write", "the thread that writes disks panicked"),
        ("flush", "the thread that writes disks panicked"),
    ] {
        let mut disks = FakeDisks::new(&[4 * CHUNK_BYTES]);
        disks.fill();
        let panicking = PanickingDisk::node("d0", 4 * CHUNK_BYTES, panics);
        let disk = &mut disks.disks[0];
        let side = if panics == "read" { &mut disk.here } else { &mut disk.there };
        *side = panicking;
        let (tell, ended) = channel();
        std::thread::spawn(move || drop(tell.send(move_disks(&disks))));
        let end = ended.recv_timeout(Duration::from_secs(20)).expect("it ends");
        let SourceOutcome::Failed(error) = &end.source else { panic!("{:?}", end.source) };
        assert!(chain(error).contains(expected), "{} lacks {expected}", chain(error));
        end.assert_back_at_source(expected);
    }
}

#[test]
fn a_read_that_hangs_keeps_nobody_from_cancelling() {
    // Less than there are readers, and more.
    for chunks in [1, 24] {
        let disks = FakeDisks::new(&[chunks * CHUNK_BYTES]);
        disks.fill();
        let script = disks.disks[0].here_script.clone();
        script.hold(true);
        let scenario = Scenario { disks: disks.clone(), ..Default::default() };
        let cancel = scenario.cancel.clone();
        let (tell, ended) = channel();
        let moving = std::thread::spawn(move || drop(tell.send(migrate(&scenario))));
        script.wait_until_held();
        assert!(cancel.cancel());
        let end = ended.recv_timeout(Duration::from_secs(20));
        let hanging = script.held();
        script.hold(false);
        moving.join().unwrap();
        let end = end.expect("it ends though the read hangs");
        assert!(matches!(end.source, SourceOutcome::Cancelled), "{:?}", end.source);
        assert!(hanging > 0, "the read has ended");
        end.assert_back_at_source("a read that hangs");
        // What the thread that was left behind has read harms no other attempt.
        move_disks(&disks).assert_moved();
        disks.assert_same();
    }
}

#[test]
fn a_write_that_hangs_keeps_the_destination_from_nothing() {
    let disks = FakeDisks::new(&[24 * CHUNK_BYTES]);
    disks.fill();
    let script = disks.disks[0].there_script.clone();
    script.hold(true);
    let scenario = Scenario { disks: disks.clone(), ..Default::default() };
    let cancel = scenario.cancel.clone();
    let (tell, ended) = channel();
    let moving = std::thread::spawn(move || drop(tell.send(migrate(&scenario))));
    script.wait_until_held();
    assert!(cancel.cancel());
    let end = ended.recv_timeout(Duration::from_secs(20));
    let hanging = script.held();
    script.hold(false);
    moving.join().unwrap();
    let end = end.expect("both sides end though the write hangs");
    assert!(hanging > 0, "the write has ended");
    assert!(end.destination.is_err());
    end.assert_back_at_source("a write that hangs");
}

#[test]
fn a_cancel_while_disks_travel_leaves_the_guest_at_the_source_and_a_retry_moves_it() {
    use MigrationStatus::{Active, Device, Setup};
    let disks = FakeDisks::new(&SIZES);
    disks.fill();
    for at in [Setup, Active, Device] {
        let cancel_source_at = Some(MigrationEvent::Status(at));
        let disks = disks.clone();
        let end = migrate(&Scenario { cancel_source_at, disks, ..Default::default() });
        assert!(matches!(end.source, SourceOutcome::Cancelled), "{at:?}: {:?}", end.source);
        end.assert_back_at_source(&format!("{at:?}"));
    }
    let params = Params { max_bandwidth: 100, ..Default::default() };
    let end = migrate(&Scenario {
        params,
        cancel_destination_at: Some(Active),
        disks: disks.clone(),
        ..Default::default()
    });
    assert!(matches!(end.source, SourceOutcome::Failed(_)), "{:?}", end.source);
    move_disks(&disks).assert_moved();
    disks.assert_same();
}

#[test]
fn cutting_the_link_anywhere_never_runs_two_guests_nor_one_on_half_a_disk() {
    let fresh = || {
        let disks = FakeDisks::new(&[GRANULE_BYTES + 512]);
        disks.fill();
        disks
    };
    let all = move_disks(&fresh()).bytes_exchanged;
    // Every byte near the frames' borders; within pages and granules a sample of them.
    let ends = 600;
    let cuts = (0..all).filter(|cut| *cut < ends || all - cut < ends || cut % 97 == 0);
    for cut in cuts {
        let disks = fresh();
        let scenario =
            Scenario { cut_after: Some(cut), disks: disks.clone(), ..Default::default() };
        let end = migrate(&scenario);
        assert!(end.running_guests() <= 1, "two guests after a cut at byte {cut}");
        assert!(end.permits() <= 1, "two permits after a cut at byte {cut}");
        if end.destination.is_ok() {
            disks.assert_same();
        }
        match &end.source {
            SourceOutcome::Unknown(_) => {}
            SourceOutcome::Failed(_) => end.assert_back_at_source(&format!("cut at byte {cut}")),
            other => panic!("cut at byte {cut}: {other:?}"),
        }
    }
}

#[test]
fn a_disk_whose_writes_cannot_be_tracked_is_named_and_the_guest_stays() {
    let mut disks = FakeDisks::new(&SIZES[..2]);
    // No host has the memory for the dirty bitmap of such a disk.
    let endless = MemoryDisk::without_storage(u64::MAX);
    disks.disks[1].here = Arc::new(BlockNode::new("endless", Box::new(endless)));
    let end = move_disks(&disks);
    let SourceOutcome::Failed(error) = &end.source else { panic!("{:?}", end.source) };
    let said = chain(error);
    assert!(said.contains("disk endless: its writes cannot be tracked"), "{said}");
    end.assert_back_at_source("an endless disk");
    let heard = end.destination.as_ref().unwrap_err();
    assert!(heard.contains("disk endless: its writes cannot be tracked"), "{heard}");
}

/// Greets as a source with disks does.
fn greet(liar: &Liar, with_disks: bool) {
    let id = MigrationId([3; 16]);
    let hello = Hello::new(Role::Control, id, 1);
    let hello = if with_disks { hello.wanting(DISKS) } else { hello };
    liar.frame(Kind::Hello, &hello.encode());
    for (transport, role) in
        [(&liar.data[0], Role::Data { index: 0 }), (&liar.disks[0], Role::Disks { index: 0 })]
    {
        let mut bytes = Vec::new();
        wire::append_frame(&mut bytes, Kind::Hello, &Hello::new(role, id, 1).encode()).unwrap();
        write_all(transport, &bytes);
    }
    let machine =
        MachineDescription { version: 1, ram_bytes: RAM_BYTES, machine: JsonText::of(&"x") };
    liar.frame(Kind::Machine, &serde_json::to_vec(&machine).unwrap());
}

fn announce(liar: &Liar, disks: &[(&str, u64)]) {
    let disk = |(name, len_bytes): &(&str, u64)| DiskSetup {
        name: (*name).to_owned(),
        len_bytes: *len_bytes,
        only_top: false,
    };
    let setup = BlockSetup { disks: disks.iter().map(disk).collect() };
    liar.frame(Kind::Section, &Section::encode(Stage::Setup, "block", &setup.encode().unwrap()));
}

fn announce_data(liar: &Liar, data: &[u64]) {
    let body = DiskData(data.to_vec()).encode().unwrap();
    liar.frame(Kind::Section, &Section::encode(Stage::Part, "block", &body));
}

fn introduce(liar: &Liar) {
    greet(liar, true);
    announce(liar, &[("d0", CHUNK_BYTES + 512)]);
    let setup = RamSetup { page_count: RAM_BYTES / PAGE_SIZE, page_bytes: 4096, data_channels: 1 };
    liar.frame(Kind::Section, &Section::encode(Stage::Setup, "ram", &setup.encode()));
}

fn chunk(liar: &Liar, disk: u16, index: u64, (data, zero): (u64, u64), payload: usize) {
    let frame = Frame::Chunk(Chunk { disk, index, data, zero, packing: Packing::None });
    write_all(&liar.disks[0], &frame.encode(u32::try_from(payload).unwrap()));
    write_all(&liar.disks[0], &vec![1; payload]);
}

fn finish(liar: &Liar, totals: &BlockTotals) {
    liar.frame(Kind::Section, &Section::encode(Stage::Full, "device", b"[]"));
    let mut end = Encoder::default();
    encode_end(&mut end);
    write_all(&liar.data[0], end.bytes());
    write_all(&liar.disks[0], &Frame::End.encode(0));
    liar.frame(Kind::Section, &Section::encode(Stage::End, "block", &totals.encode().unwrap()));
    let ram = RamEnd { number: 1, totals: RamTotals::default(), frames: vec![1] };
    liar.frame(Kind::Section, &Section::encode(Stage::End, "ram", &ram.encode().unwrap()));
    liar.frame(Kind::Eof, &Eof { running: true, attempt: 1 }.encode());
}

fn listen(liar: &Liar) {
    let mut buffer = [0; 4096];
    while !matches!(liar.main.receive(&mut buffer), Ok(0)) {}
}

const PATIENCE: Duration = Duration::from_secs(2);

fn hear(speak: impl FnOnce(&Liar)) -> String {
    let disks = FakeDisks::new(&[CHUNK_BYTES + 512]);
    receive_with_disks(1, PATIENCE, disks.incoming(), |liar| {
        speak(liar);
        listen(liar);
    })
}

#[test]
fn lies_about_disks_are_refused_by_name() {
    type Lie = fn(&Liar);
    let lies: &[(&str, Lie)] = &[
        ("section \"block\" has no connection", |liar| greet(liar, false)),
        ("prepared are", |liar| (greet(liar, true), announce(liar, &[("d0", 512)])).1),
        ("prepared are", |liar| {
            (greet(liar, true), announce(liar, &[("../d0", CHUNK_BYTES + 512)])).1
        }),
        ("0 disks", |liar| (greet(liar, true), announce(liar, &[])).1),
        ("unexpected Setup of section \"ram\" where the setup of the participants", |liar| {
            greet(liar, true);
            let setup = RamSetup { page_count: 512, page_bytes: 4096, data_channels: 1 };
            liar.frame(Kind::Section, &Section::encode(Stage::Setup, "ram", &setup.encode()));
        }),
        ("2 disks instead of 1", |liar| (introduce(liar), announce_data(liar, &[0, 0])).1),
        ("1049089 bytes in a disk of 1049088", |liar| {
            (introduce(liar), announce_data(liar, &[CHUNK_BYTES + 513])).1
        }),
        ("no disk number 1", |liar| (introduce(liar), chunk(liar, 1, 0, (0, 1), 0)).1),
        ("chunk 2 of disk d0 lies past its end", |liar| {
            (introduce(liar), chunk(liar, 0, 2, (0, 1), 0)).1
        }),
        ("chunk 1 of disk d0 lies past its end", |liar| {
            (introduce(liar), chunk(liar, 0, 1, (3, 0), 0)).1
        }),
        ("lies past its end", |liar| (introduce(liar), chunk(liar, 0, u64::MAX, (0, 1), 0)).1),
        ("chunk 0 of disk d0 comes twice in one pass", |liar| {
            introduce(liar);
            chunk(liar, 0, 0, (0, 1), 0);
            chunk(liar, 0, 0, (0, 2), 0);
        }),
        ("512 bytes for 16384 of disk d0", |liar| {
            (introduce(liar), chunk(liar, 0, 0, (1, 0), 512)).1
        }),
        ("16384 bytes for 512 of disk d0", |liar| {
            (introduce(liar), chunk(liar, 0, 1, (1, 0), 16_384)).1
        }),
        ("32768 bytes for its granules", |liar| {
            (introduce(liar), chunk(liar, 0, 0, (1, 0), 32_768)).1
        }),
        ("no granules, or with one twice", |liar| {
            (introduce(liar), chunk(liar, 0, 0, (1, 1), 0)).1
        }),
        ("no granules, or with one twice", |liar| {
            (introduce(liar), chunk(liar, 0, 0, (0, 0), 0)).1
        }),
        ("malformed disk frame: header", |liar| {
            introduce(liar);
            write_all(&liar.disks[0], &[0xff; 32]);
        }),
        ("unexpected Alive where a chunk", |liar| {
            introduce(liar);
            write_all(&liar.disks[0], &Frame::Alive.encode(0));
        }),
        ("connection lost", |liar| {
            introduce(liar);
            liar.disks[0].shutdown();
        }),
        ("the source sent", |liar| {
            introduce(liar);
            chunk(liar, 0, 0, (0, 1), 0);
            let disks = vec![DiskTotals { data_bytes: 0, zero_bytes: 0 }];
            finish(liar, &BlockTotals { ends: 1, frames: 2, disks });
        }),
    ];
    // Each refusal waits a moment for the liar to hear it.
    std::thread::scope(|scope| {
        for (expected, lie) in lies {
            scope.spawn(move || {
                let error = hear(lie);
                assert!(error.contains(expected), "{error:?} lacks {expected:?}");
            });
        }
    });
}

#[test]
fn a_write_that_hangs_does_not_keep_the_refusal_from_the_source() {
    let disks = FakeDisks::new(&[CHUNK_BYTES + 512]);
    let script = disks.disks[0].there_script.clone();
    script.hold(true);
    let mut heard = None;
    let error = receive_with_disks(1, PATIENCE, disks.incoming(), |liar| {
        introduce(liar);
        chunk(liar, 0, 0, (1, 0), 16_384);
        script.wait_until_held();
        liar.frame(Kind::Go, &[]);
        heard = hear_refusal(liar);
        liar.main.shutdown();
        script.hold(false);
    });
    let reason = heard.expect("the source is told");
    assert!(reason.contains("unexpected Go where"), "{reason}");
    assert!(error.contains("unexpected Go where"), "{error}");
}

/// The reason of a refusal that comes soon.
fn hear_refusal(liar: &Liar) -> Option<String> {
    let (began, mut heard) = (Instant::now(), Vec::new());
    let mut buffer = [0; 4096];
    while began.elapsed() < Duration::from_secs(20) {
        if let Ok(count) = liar.main.receive(&mut buffer) {
            heard.extend_from_slice(&buffer[..count]);
        }
        let mut frames = &heard[..];
        while let Some((header, rest)) = frames.split_first_chunk() {
            let (kind, len) = wire::decode_header(header).unwrap();
            let Some((payload, rest)) = rest.split_at_checked(usize::try_from(len).unwrap()) else {
                break;
            };
            if kind == Kind::Refused {
                return Some(String::from_utf8_lossy(payload).into_owned());
            }
            frames = rest;
        }
        // The destination waits for someone who is alive.
        liar.frame(Kind::KeepAlive, &[]);
    }
    None
}

#[test]
fn a_source_whose_disks_stand_still_is_noticed() {
    let disks = FakeDisks::new(&[CHUNK_BYTES + 512]);
    let error = receive_with_disks(1, Duration::from_millis(200), disks.incoming(), |liar| {
        introduce(liar);
        // The middle of a granule.
        write_all(
            &liar.disks[0],
            &Frame::Chunk(Chunk { disk: 0, index: 0, data: 1, zero: 0, packing: Packing::None })
                .encode(16_384),
        );
        write_all(&liar.disks[0], &[0; 100]);
        listen(liar);
    });
    assert!(error.contains("stalled"), "{error}");
}

proptest! {
    #[test]
    fn arbitrary_frames_never_panic_or_run_a_guest(
        bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0u8..7, mask in any::<u64>(),
    ) {
        let disks = FakeDisks::new(&[CHUNK_BYTES + 512]);
        receive_with_disks(1, PATIENCE, disks.incoming(), |liar| {
            introduce(liar);
            let mut header = Frame::Chunk(Chunk { disk: 0, index: 0, data: mask, zero: 0, packing: Packing::None }).encode(0);
            header[0] = kind;
            write_all(&liar.disks[0], &header);
            write_all(&liar.disks[0], &bytes);
            liar.disks[0].shutdown();
            liar.main.shutdown();
        });
    }
}
