//! Peers that do not play by the rules: each gets a clear error, and no guest runs.

use super::fake::*;
use crate::guest::MachineDescription;
use crate::ram::frame::{Batch, Packing, RunKind, encode_end};
use crate::transport::Transport;
use crate::wire::section::{Eof, RamEnd, RamSetup, RamTotals, Section, Stage};
use crate::wire::{self, Encoder, Hello, Kind, MigrationId, Role};
use devices::ram::{PAGE_SIZE, PageIndex, RamLayout};
use devices::state::JsonText;
use proptest::prelude::*;
use std::time::Duration;

pub const PATIENCE: Duration = Duration::from_secs(2);

pub fn greet(liar: &Liar) {
    let id = MigrationId([3; 16]);
    liar.frame(Kind::Hello, &Hello::new(Role::Control, id, liar.count()).encode());
    greet_data(liar, id, &Vec::from_iter(0..liar.count()));
}

pub fn describe(liar: &Liar) {
    greet(liar);
    let machine =
        MachineDescription { version: 1, ram_bytes: RAM_BYTES, machine: JsonText::of(&"x") };
    liar.frame(Kind::Machine, &serde_json::to_vec(&machine).unwrap());
}

fn ram_setup(liar: &Liar) {
    let (page_count, data_channels) = (RAM_BYTES / PAGE_SIZE, liar.count());
    let setup = RamSetup { page_count, page_bytes: 4096, data_channels };
    liar.frame(Kind::Section, &Section::encode(Stage::Setup, "ram", &setup.encode()));
}

pub fn introduce(liar: &Liar) {
    describe(liar);
    ram_setup(liar);
}

pub fn devices(liar: &Liar) {
    liar.frame(Kind::Section, &Section::encode(Stage::Full, "device", b"[]"));
}

fn ram_end(liar: &Liar, totals: RamTotals, frames: Vec<u64>) {
    let end = RamEnd { number: 1, totals, frames };
    liar.frame(Kind::Section, &Section::encode(Stage::End, "ram", &end.encode().unwrap()));
}

fn eof(liar: &Liar) {
    liar.frame(Kind::Eof, &Eof { running: true, attempt: 1 }.encode());
}

pub fn end_data(liar: &Liar) {
    let mut end = Encoder::default();
    encode_end(&mut end);
    liar.data.iter().for_each(|data| write_all(data, end.bytes()));
}

pub fn end_stream(liar: &Liar, frames: Vec<u64>) {
    ram_end(liar, RamTotals::default(), frames);
    eof(liar);
}

/// A frame of one run, made by hand, with a payload of `raw` pages.
fn pages(liar: &Liar, first: u64, count: u32, kind: u8, raw: u32) {
    let mut frame = Encoder::default();
    frame.u8(1).u8(0).u16(1).u32(raw).u64(first).u32(count).u8(kind).u8(0).u16(0);
    frame.raw(&vec![1; raw as usize * 4096]);
    write_all(&liar.data[0], frame.bytes());
}

/// Waits until the destination has had enough, and says so or hangs up.
pub fn listen(liar: &Liar) {
    let (mut heard, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        match liar.main.receive(&mut buffer) {
            Ok(0) => return,
            Ok(count) => heard.extend_from_slice(&buffer[..count]),
            Err(_) => {}
        }
        while let Some(header) = heard.first_chunk() {
            let (kind, len) = wire::decode_header(header).unwrap();
            let end = wire::HEADER_BYTES + usize::try_from(len).unwrap();
            if kind == Kind::Refused {
                return;
            }
            if heard.len() < end {
                break;
            }
            heard.drain(..end);
        }
    }
}

#[test]
fn lies_are_refused_by_name() {
    type Lie = fn(&Liar);
    let lies: &[(&str, Lie)] = &[
        ("is not Ferry", |liar| liar.say(b"GET / HTTP/1.1\r\n\r\n")),
        ("is not Ferry", |liar| liar.say(&[0; 64])),
        ("is not Ferry", |liar| liar.frame(Kind::Go, &[])),
        ("is not Ferry", |liar| liar.say(&wire::header(Kind::Hello, u32::MAX))),
        ("speaks stream version 9, this one 3", |liar| {
            let mut hello = Encoder::default();
            hello.raw(b"FERRYMIG").u16(9).raw(b"whatever version 9 says here");
            liar.frame(Kind::Hello, hello.bytes());
        }),
        ("no such migration", |liar| {
            liar.frame(Kind::Hello, &Hello::new(Role::Control, MigrationId([3; 16]), 1).encode());
            let mut bytes = Vec::new();
            let other = Hello::new(Role::Data { index: 0 }, MigrationId([4; 16]), 1);
            wire::append_frame(&mut bytes, Kind::Hello, &other.encode()).unwrap();
            write_all(&liar.data[0], &bytes);
        }),
        ("at most 1048576 are possible", |liar| {
            greet(liar);
            liar.say(&wire::header(Kind::Machine, u32::MAX));
        }),
        ("malformed machine description", |liar| {
            greet(liar);
            liar.frame(Kind::Machine, b"{\"version\": 1}");
        }),
        ("out of range", |liar| {
            greet(liar);
            liar.frame(
                Kind::Machine,
                br#"{"version":1,"ram_bytes":9223372036854775808,"machine":{}}"#,
            );
        }),
        ("unexpected Section where the machine description", |liar| {
            greet(liar);
            ram_setup(liar);
        }),
        ("malformed RAM setup: 7 pages", |liar| {
            describe(liar);
            let setup = RamSetup { page_count: 7, page_bytes: 4096, data_channels: 1 };
            liar.frame(Kind::Section, &Section::encode(Stage::Setup, "ram", &setup.encode()));
        }),
        ("unexpected Machine where the setup of the participants", |liar| {
            describe(liar);
            liar.frame(Kind::Machine, b"{}");
        }),
        ("unexpected unknown section \"teapot\"", |liar| {
            introduce(liar);
            liar.frame(Kind::Section, &Section::encode(Stage::Full, "teapot", &[]));
        }),
        ("unexpected Setup of section \"ram\" where the state of the devices", |liar| {
            introduce(liar);
            ram_setup(liar);
        }),
        ("unexpected Full of section \"device\" where the end of the participants", |liar| {
            introduce(liar);
            devices(liar);
            devices(liar);
        }),
        ("unexpected End of section \"ram\" where the state of the devices", |liar| {
            introduce(liar);
            ram_end(liar, RamTotals::default(), vec![0]);
        }),
        ("unexpected Eof where the state of the devices", |liar| {
            introduce(liar);
            eof(liar);
        }),
        ("unexpected Go where the state of the devices", |liar| {
            introduce(liar);
            liar.frame(Kind::Go, &[]);
        }),
        ("malformed device state", |liar| {
            introduce(liar);
            liar.frame(Kind::Section, &Section::encode(Stage::Full, "device", b"[{}]"));
        }),
        ("the source sent", |liar| {
            introduce(liar);
            devices(liar);
            end_data(liar);
            ram_end(liar, RamTotals { raw_pages: 1, ..Default::default() }, vec![1]);
            eof(liar);
        }),
        ("the source sent", |liar| {
            introduce(liar);
            devices(liar);
            end_data(liar);
            end_stream(liar, vec![1, 1]);
        }),
        ("the source has ended the migration: I changed my mind", |liar| {
            introduce(liar);
            liar.frame(Kind::Abort, b"I changed my mind");
        }),
        ("pages 512+1 are outside", |liar| (introduce(liar), pages(liar, 512, 1, 1, 1)).1),
        ("pages 511+2 are outside", |liar| (introduce(liar), pages(liar, 511, 2, 1, 2)).1),
        ("are outside the guest's RAM", |liar| (introduce(liar), pages(liar, u64::MAX, 1, 0, 0)).1),
        ("pages 0+0 are outside", |liar| (introduce(liar), pages(liar, 0, 0, 0, 0)).1),
        ("more raw pages", |liar| (introduce(liar), pages(liar, 0, 2, 1, 1)).1),
        ("belong to no run", |liar| (introduce(liar), pages(liar, 0, 1, 0, 1)).1),
        ("unknown kind 7", |liar| (introduce(liar), pages(liar, 0, 1, 7, 0)).1),
        ("1 runs of 1025 raw pages", |liar| (introduce(liar), pages(liar, 0, 1025, 1, 1025)).1),
        ("pages packed with unknown method 255", |liar| {
            introduce(liar);
            write_all(&liar.data[0], &[0xff; 8]);
        }),
        ("connection lost", |liar| {
            introduce(liar);
            liar.data[0].shutdown();
        }),
    ];
    for (expected, lie) in lies {
        let error = receive_from(1, PATIENCE, |liar| {
            lie(liar);
            listen(liar);
        });
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

#[test]
fn channels_that_are_not_as_announced_are_refused_by_name() {
    type Lie = fn(&Liar);
    let lies: &[(&str, Lie)] = &[
        ("0 data channels, 1 to 16 are possible", |liar| {
            let hello = Hello::new(Role::Control, MigrationId([3; 16]), 0);
            liar.frame(Kind::Hello, &hello.encode());
        }),
        ("17 data channels, 1 to 16 are possible", |liar| {
            let hello = Hello::new(Role::Control, MigrationId([3; 16]), 17);
            liar.frame(Kind::Hello, &hello.encode());
        }),
        ("data channel 3: connection lost", |liar| {
            // A fourth one never comes.
            let id = MigrationId([3; 16]);
            liar.frame(Kind::Hello, &Hello::new(Role::Control, id, 4).encode());
            greet_data(liar, id, &[0, 1, 2]);
        }),
        ("data channel 0: malformed hello: no such migration or channel", |liar| {
            let id = MigrationId([3; 16]);
            liar.frame(Kind::Hello, &Hello::new(Role::Control, id, 3).encode());
            greet_data(liar, id, &[1, 0, 2]);
        }),
        ("data channel 1: malformed hello: no such migration or channel", |liar| {
            let id = MigrationId([3; 16]);
            liar.frame(Kind::Hello, &Hello::new(Role::Control, id, 3).encode());
            greet_data(liar, id, &[0, 0, 2]);
        }),
        ("malformed RAM setup: 2 data channels, 3 exist", |liar| {
            describe(liar);
            let page_count = RAM_BYTES / PAGE_SIZE;
            let setup = RamSetup { page_count, page_bytes: 4096, data_channels: 2 };
            liar.frame(Kind::Section, &Section::encode(Stage::Setup, "ram", &setup.encode()));
        }),
        // All is sent, and ended, on one of them.
        ("data channel 1: peer stalled", |liar| {
            introduce(liar);
            devices(liar);
            let mut end = Encoder::default();
            encode_end(&mut end);
            write_all(&liar.data[0], end.bytes());
            end_stream(liar, vec![1, 0, 0]);
        }),
        ("the source sent", |liar| {
            introduce(liar);
            devices(liar);
            end_data(liar);
            end_stream(liar, vec![1, 0, 0]);
        }),
        // As many frames in all, but not where they should be.
        ("the source sent", |liar| {
            introduce(liar);
            devices(liar);
            let mut mark = Encoder::default();
            crate::ram::frame::encode_mark(&mut mark, 1);
            write_all(&liar.data[2], mark.bytes());
            end_data(liar);
            end_stream(liar, vec![2, 1, 1]);
        }),
        ("data channel 1: connection lost", |liar| {
            introduce(liar);
            liar.data[1].shutdown();
        }),
        ("data channel 2: malformed page frame", |liar| {
            introduce(liar);
            write_all(&liar.data[2], &[9; 8]);
        }),
        // Before the end of the stream one channel is cut off in the middle of a frame.
        ("data channel 1: peer stalled", |liar| {
            introduce(liar);
            devices(liar);
            write_all(&liar.data[1], &[1, 0, 1]);
            let mut end = Encoder::default();
            encode_end(&mut end);
            [0, 2].into_iter().for_each(|index| write_all(&liar.data[index], end.bytes()));
            end_stream(liar, vec![1, 1, 1]);
        }),
    ];
    for (expected, lie) in lies {
        let error = receive_from(3, Duration::from_secs(1), |liar| {
            lie(liar);
            listen(liar);
        });
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

fn greet_data(liar: &Liar, id: MigrationId, indices: &[u16]) {
    for (data, index) in liar.data.iter().zip(indices) {
        let mut bytes = Vec::new();
        let hello = Hello::new(Role::Data { index: *index }, id, liar.count());
        wire::append_frame(&mut bytes, Kind::Hello, &hello.encode()).unwrap();
        write_all(data, &bytes);
    }
}

#[test]
fn a_refusal_names_its_reason_to_the_source() {
    receive_from(1, PATIENCE, |liar| {
        introduce(liar);
        pages(liar, 512, 1, 1, 1);
        let mut heard = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match liar.main.receive(&mut buffer) {
                Ok(0) => break,
                Ok(count) => heard.extend_from_slice(&buffer[..count]),
                Err(_) => {}
            }
        }
        let text = String::from_utf8_lossy(&heard);
        assert!(text.contains("are outside the guest's RAM"), "{text}");
    });
}

#[test]
fn a_source_that_stands_still_is_noticed() {
    let patience = Duration::from_millis(200);
    let error = receive_from(1, patience, |liar| (introduce(liar), listen(liar)).1);
    assert!(error.contains("stalled"), "{error}");
    // In the middle of a page.
    let error = receive_from(1, patience, |liar| {
        introduce(liar);
        write_all(&liar.data[0], &[1, 0, 1, 0, 1, 0, 0, 0]);
        listen(liar);
    });
    assert!(error.contains("stalled"), "{error}");
    // All is sent but the last pages.
    let error = receive_from(1, patience, |liar| {
        introduce(liar);
        devices(liar);
        end_stream(liar, vec![1]);
        listen(liar);
    });
    assert!(error.contains("stalled"), "{error}");
}

#[test]
fn without_go_no_guest_runs() {
    let error = receive_from(1, Duration::from_millis(200), |liar| {
        introduce(liar);
        devices(liar);
        end_data(liar);
        end_stream(liar, vec![1]);
        listen(liar);
    });
    assert!(error.contains("stalled"), "{error}");
}

/// The fixed parts of a stream, as they were recorded when version 3 was made.
#[test]
fn a_stream_of_version_3_looks_as_it_always_did() {
    let mut stream = Vec::new();
    let hello = Hello {
        role: Role::Data { index: 2 },
        id: MigrationId(*b"0123456789abcdef"),
        data_channels: 3,
        capabilities: vec!["xbzrle".into()],
    };
    let mut add = |kind, payload: &[u8]| wire::append_frame(&mut stream, kind, payload).unwrap();
    add(Kind::Hello, &hello.encode());
    add(Kind::Machine, br#"{"version":1,"ram_bytes":2097152,"machine":{}}"#);
    let setup = RamSetup { page_count: 512, page_bytes: 4096, data_channels: 3 };
    add(Kind::Section, &Section::encode(Stage::Setup, "ram", &setup.encode()));
    add(Kind::Section, &Section::encode(Stage::Full, "device", b"[]"));
    let totals = RamTotals { raw_pages: 2, zero_pages: 509, delta_pages: 1 };
    let end = RamEnd { number: 1, totals, frames: vec![4, 1, 1] };
    add(Kind::Section, &Section::encode(Stage::Part, "boot", b"a piece"));
    add(Kind::Section, &Section::encode(Stage::End, "ram", &end.encode().unwrap()));
    add(Kind::Eof, &Eof { running: true, attempt: 2 }.encode());
    for kind in [Kind::Go, Kind::KeepAlive, Kind::Accepted, Kind::CalledOff] {
        add(kind, &[]);
    }
    add(Kind::Ready, Encoder::default().u32(2).bytes());
    add(Kind::Running, Encoder::default().u64(120).bytes());
    add(Kind::Mark, Encoder::default().u64(7).u16(2).bytes());
    for kind in [Kind::Abort, Kind::Refused, Kind::Declined] {
        add(kind, b"why");
    }
    let layout = RamLayout::for_size(2 << 20).unwrap();
    let mut batch = Batch::default();
    batch.push(PageIndex(0), 3, RunKind::Zero, &layout);
    batch.push(PageIndex(3), 2, RunKind::Raw, &layout);
    batch.push(PageIndex(9), 1, RunKind::Delta, &layout);
    let mut head = Encoder::default();
    for packing in [Packing::None, Packing::Zlib, Packing::Zstd] {
        batch.encode_head(packing, &mut head).unwrap();
        stream.extend_from_slice(head.bytes());
    }
    crate::ram::frame::encode_mark(&mut head, 7);
    stream.extend_from_slice(head.bytes());
    encode_end(&mut head);
    stream.extend_from_slice(head.bytes());
    let lines: Vec<String> = stream
        .chunks(16)
        .map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect())
        .collect();
    assert_eq!(lines.join("\n") + "\n", include_str!("golden-v3.hex"));
}

#[test]
fn a_machine_that_takes_long_to_build_is_not_built_for_a_source_that_has_gone() {
    let error = receive_from(1, PATIENCE, |liar| {
        greet(liar);
        let machine = JsonText::of(&SLOW_MACHINE);
        let machine = MachineDescription { version: 1, ram_bytes: RAM_BYTES, machine };
        liar.frame(Kind::Machine, &serde_json::to_vec(&machine).unwrap());
        liar.main.shutdown();
    });
    assert!(error.contains("connection lost"), "{error}");
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic_or_run_a_guest(
        main in prop::collection::vec(any::<u8>(), 0..200),
        data in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..4),
        depth in 0..4,
    ) {
        let channels = u16::try_from(data.len()).unwrap();
        receive_from(channels, PATIENCE, |liar| {
            match depth {
                0 => {}
                1 => greet(liar),
                2 => introduce(liar),
                _ => (introduce(liar), devices(liar)).1,
            }
            liar.say(&main);
            for (channel, bytes) in liar.data.iter().zip(&data) {
                write_all(channel, bytes);
                channel.shutdown();
            }
            liar.main.shutdown();
        });
    }
}
