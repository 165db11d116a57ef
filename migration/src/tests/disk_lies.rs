//! Disk frames in any order and with any content, against a plain model of what may become of the images;
//! and the bytes that they have been since format version 3.

use super::fake_disks::FakeDisks;
use crate::block::chunk_receiver::ChunkReceiver;
use crate::block::frame::{
    BlockSetup, BlockTotals, Chunk, DiskData, DiskSetup, DiskTotals, Frame, bytes_of, granules_of,
};
use crate::block::{CHUNK_BYTES, GRANULE_BYTES};
use crate::cancel::CancelToken;
use crate::ram::frame::Packing;
use crate::transport::memory::MemoryLink;
use crate::transport::{Channel, Transport};
use crate::wire::hello::DISKS;
use crate::wire::section::{Section, Stage};
use crate::wire::{self, Hello, Kind, MigrationId, Role};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Whole chunks, an odd tail, a single sector.
const SIZES: [u64; 3] = [2 * CHUNK_BYTES, CHUNK_BYTES + 3 * GRANULE_BYTES + 512, 512];

#[derive(Debug, Clone)]
enum Step {
    Chunk {
        disk: u16,
        index: u64,
        data: u64,
        zero: u64,
        payload: i64,
    },
    Mark(u64),
    End,
    /// What only a destination says.
    Ours(bool),
    Noise(Vec<u8>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let honest = (0u16..3, 0u64..2, any::<[u64; 4]>()).prop_map(|(disk, index, masks)| {
        let most = granules_of(index, SIZES[usize::from(disk)]);
        let (data, zero) = (masks[0] & masks[1] & masks[2] & most, masks[3] & masks[0] & most);
        // One granule at least, if there is any.
        let data = if data | zero == 0 { most & most.wrapping_neg() } else { data };
        Step::Chunk { disk, index, data, zero: zero & !data, payload: 0 }
    });
    let lie = (0u16..5, 0u64..5, any::<[u64; 2]>(), -600i64..600).prop_map(
        |(disk, index, [data, zero], payload)| {
            let far = index == 4;
            let index = if far { u64::MAX - u64::from(disk) } else { index };
            Step::Chunk { disk, index, data: data & 0b1111, zero: zero & 0b111_1000, payload }
        },
    );
    let step = prop_oneof![
        20 => honest,
        2 => lie,
        8 => any::<u64>().prop_map(Step::Mark),
        2 => Just(Step::End),
        1 => any::<bool>().prop_map(Step::Ours),
        1 => prop::collection::vec(any::<u8>(), 0..100).prop_map(Step::Noise),
    ];
    prop::collection::vec(step, 0..24)
}

/// What the images may hold: of each granule every byte that it was ever filled with.
struct Model {
    held: Vec<Vec<BTreeSet<u8>>>,
    last: Vec<Vec<u8>>,
    seen: BTreeSet<(u16, u64)>,
    totals: Vec<DiskTotals>,
    frames: u64,
}

impl Model {
    fn new() -> Self {
        let granules = |len: &u64| usize::try_from(len.div_ceil(GRANULE_BYTES)).unwrap();
        let blank = BTreeSet::from([0]);
        Self {
            held: SIZES.iter().map(|len| vec![blank.clone(); granules(len)]).collect(),
            last: SIZES.iter().map(|len| vec![0; granules(len)]).collect(),
            seen: BTreeSet::new(),
            totals: vec![DiskTotals::default(); SIZES.len()],
            frames: 0,
        }
    }

    /// Whether a chunk is acceptable; if so what it does.
    fn chunk(&mut self, chunk: Chunk, payload: i64, fill: u8) -> bool {
        let Chunk { disk, index, data, zero, .. } = chunk;
        let Some(len) = SIZES.get(usize::from(disk)) else { return false };
        let fits = (data | zero) & !granules_of(index, *len) == 0;
        if data & zero != 0 || data | zero == 0 || !fits || payload != 0 {
            return false;
        }
        if !self.seen.insert((disk, index)) {
            return false;
        }
        let disk = usize::from(disk);
        for granule in 0..64 {
            let at = usize::try_from(index).unwrap() * 64 + granule;
            let byte = match (data >> granule & 1, zero >> granule & 1) {
                (1, _) => fill,
                (_, 1) => 0,
                _ => continue,
            };
            self.held[disk][at].insert(byte);
            self.last[disk][at] = byte;
        }
        self.totals[disk].data_bytes += bytes_of(index, data, *len);
        self.totals[disk].zero_bytes += bytes_of(index, zero, *len);
        true
    }
}

/// The bytes of a step, and whether a destination goes on after it: `None` if nobody can tell.
fn bytes_of_step(model: &mut Model, step: &Step, fill: u8) -> (Vec<u8>, Option<bool>) {
    let header = |frame: Frame| frame.encode(0).to_vec();
    model.frames += 1;
    match step {
        Step::Chunk { disk, index, data, zero, payload } => {
            let packing = Packing::None;
            let chunk = Chunk { disk: *disk, index: *index, data: *data, zero: *zero, packing };
            let len = SIZES.get(usize::from(*disk)).copied().unwrap_or(CHUNK_BYTES);
            let right = bytes_of((*index).min(9), *data, len);
            let sent = right.saturating_add_signed(*payload);
            let extra = sent.cast_signed() - right.cast_signed();
            let mut bytes =
                Frame::Chunk(chunk).encode(u32::try_from(sent).unwrap_or(u32::MAX)).to_vec();
            bytes.resize(bytes.len() + usize::try_from(sent.min(CHUNK_BYTES)).unwrap(), fill);
            let good = model.chunk(chunk, extra, fill);
            (bytes, Some(good))
        }
        Step::Mark(number) => {
            model.seen.clear();
            (header(Frame::Mark(*number)), Some(true))
        }
        Step::End => (header(Frame::End), Some(false)),
        Step::Ours(alive) => {
            let settled = Frame::Flushed(1, Duration::ZERO);
            (header(if *alive { Frame::Alive } else { settled }), Some(false))
        }
        Step::Noise(bytes) => (bytes.clone(), None),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..Default::default() })]
    #[test]
    fn whatever_comes_only_what_was_named_is_written_and_an_end_means_whole(steps in steps()) {
        let disks = FakeDisks::new(&SIZES);
        let names = disks.disks.iter().map(|disk| disk.there.id().to_owned());
        let setup = names.zip(SIZES).map(|(name, len_bytes)| DiskSetup { name, len_bytes, only_top: false });
        let setup = BlockSetup { disks: setup.collect() };
        let mut model = Model::new();
        let (mut stream, mut ends_well, mut unsure) = (Vec::new(), false, false);
        for (fill, step) in (1u8..).zip(&steps) {
            let (bytes, goes_on) = bytes_of_step(&mut model, step, fill);
            stream.extend(bytes);
            match goes_on {
                Some(true) => {}
                Some(false) => {
                    ends_well = matches!(step, Step::End);
                    break;
                }
                // It may name anything, though most of it is refused.
                None => {
                    unsure = true;
                    break;
                }
            }
        }
        let (ours, theirs) = MemoryLink::new(None).with_patience(Duration::from_secs(5)).connect();
        let incoming = ChunkReceiver::start(disks.incoming(), &setup, Arc::default()).unwrap();
        let result = std::thread::scope(|scope| {
            let receiver = scope.spawn(move || {
                let channels = [Arc::new(Channel::new(Arc::new(theirs), CancelToken::new()))];
                let totals = Mutex::new(None);
                let at_end = |all: &BlockTotals| {
                    *totals.lock().unwrap() = Some(all.clone());
                    ControlFlow::Break(())
                };
                let result = incoming.receive_all(&channels, &at_end);
                channels[0].transport().shutdown();
                result.map(|()| totals.into_inner().unwrap().expect("an end was said"))
            });
            super::fake::write_all(&ours, &stream);
            if !ends_well {
                ours.shutdown();
            }
            receiver.join().unwrap()
        });
        if unsure {
            // No end was said, in whatever it may have been taken for.
            prop_assert!(result.is_err());
            return Ok(());
        }
        prop_assert_eq!(result.is_ok(), ends_well, "{:?}", result);
        if let Ok(totals) = &result {
            prop_assert_eq!(totals, &BlockTotals { ends: 1, frames: model.frames, disks: model.totals.clone() });
        }
        for (number, disk) in disks.disks.iter().enumerate() {
            let len = usize::try_from(SIZES[number]).unwrap();
            let mut bytes = vec![0; len];
            disk.there.copy_at(&mut bytes, 0).unwrap();
            let granules = bytes.chunks(usize::try_from(GRANULE_BYTES).unwrap());
            for (at, granule) in granules.enumerate() {
                prop_assert!(granule.iter().all(|byte| *byte == granule[0]), "granule {} is torn", at);
                if result.is_ok() {
                    prop_assert_eq!(granule[0], model.last[number][at], "granule {}", at);
                } else {
                    prop_assert!(model.held[number][at].contains(&granule[0]), "granule {}", at);
                }
            }
        }
    }
}

/// One of everything that is said of disks. If this fails, the format has changed, and with it the
/// version has to.
#[test]
fn the_format_of_disks_is_what_it_was() {
    let id = MigrationId(*b"0123456789abcdef");
    let mut stream = Vec::new();
    let mut add = |kind, payload: &[u8]| wire::append_frame(&mut stream, kind, payload).unwrap();
    add(Kind::Hello, &Hello::new(Role::Control, id, 1).wanting(DISKS).encode());
    add(Kind::Hello, &Hello::new(Role::Disks { index: 0 }, id, 1).encode());
    let disk =
        |name: &str, len_bytes, only_top| DiskSetup { name: name.into(), len_bytes, only_top };
    let setup = BlockSetup { disks: vec![disk("root", 3 << 20, false), disk("data", 512, true)] };
    add(Kind::Section, &Section::encode(Stage::Setup, "block", &setup.encode().unwrap()));
    let totals = |data_bytes, zero_bytes| DiskTotals { data_bytes, zero_bytes };
    let totals =
        BlockTotals { ends: 1, frames: 5, disks: vec![totals(32768, 16384), totals(512, 0)] };
    add(Kind::Section, &Section::encode(Stage::End, "block", &totals.encode().unwrap()));
    let frames = [
        (
            Frame::Chunk(Chunk {
                disk: 0,
                index: 2,
                data: 0b101,
                zero: 0b1000,
                packing: Packing::None,
            }),
            32768,
        ),
        (Frame::Chunk(Chunk { disk: 1, index: 0, data: 1, zero: 0, packing: Packing::None }), 512),
        (Frame::Mark(7), 0),
        (Frame::Alive, 0),
        (Frame::Flushed(7, Duration::from_micros(1500)), 0),
        (Frame::End, 0),
        // Since there is the capability `disk-packing`.
        (Frame::Chunk(Chunk { disk: 0, index: 3, data: 3, zero: 0, packing: Packing::Zstd }), 700),
    ];
    let headers = frames.iter().map(|(frame, payload)| frame.encode(*payload));
    let lines = stream.chunks(16).map(<[u8]>::to_vec).chain(headers.map(|one| one.to_vec()));
    let hex = |line: Vec<u8>| line.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let lines: Vec<String> = lines.map(hex).collect();
    let golden = include_str!("golden-disks-v3.hex");
    assert_eq!(lines.join("\n") + "\n", golden);
    // Since there is the capability `disk-data`.
    let data = DiskData(vec![2 << 20, 512]).encode().unwrap();
    assert_eq!(hex(data), "020000002000000000000002000000000000");
    // Read back from the record, not from what was just written.
    let recorded: Vec<&str> = golden.lines().collect();
    for (line, frame) in recorded[recorded.len() - frames.len()..].iter().zip(frames) {
        let byte = |at: usize| u8::from_str_radix(&line[2 * at..2 * at + 2], 16).unwrap();
        assert_eq!(Frame::decode(&std::array::from_fn(byte)).unwrap(), frame);
    }
}
