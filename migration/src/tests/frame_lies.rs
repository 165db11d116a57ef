//! Page frames that no honest source sends: compressed runs and deltas that do not fit their pages.

use super::fake::*;
use super::lies::*;
use crate::guest::IncomingRam;
use crate::ram::compress::{Compressor, Method};
use crate::ram::frame::MAX_DELTA_BYTES;
use crate::ram::page_receiver::{Arrived, PageReceiver};
use crate::transport::memory::MemoryLink;
use crate::transport::{Channel, Transport};
use crate::wire::Encoder;
use crate::wire::section::RamSetup;
use devices::ram::{GuestAddress, GuestRam, PAGE_SIZE, RamLayout};
use proptest::prelude::*;
use std::sync::Arc;
use vm_memory::Bytes;

const ZERO: u8 = 0;
const RAW: u8 = 1;
const DELTA: u8 = 2;

/// Header and table of a frame, and room for more behind them.
fn head(method: u8, raw: u32, runs: &[(u64, u32, u8)]) -> Encoder {
    let mut frame = Encoder::default();
    frame.u8(1).u8(method).u16(u16::try_from(runs.len()).unwrap()).u32(raw);
    for (first, count, kind) in runs {
        frame.u64(*first).u32(*count).u8(*kind).u8(0).u16(0);
    }
    frame
}

/// Compressed pages from page 8 on.
fn packed(method: u8, pages: u32, part: &[u8]) -> Vec<u8> {
    let mut frame = head(method, pages, &[(8, pages, RAW)]);
    frame.u32(u32::try_from(part.len()).unwrap()).raw(part);
    frame.bytes().to_vec()
}

/// Pages 8 and 9 as zeroes, then a delta part for one or both.
fn deltas(count: u32, part: &[u8]) -> Vec<u8> {
    let mut frame = head(0, 0, &[(8, 2, ZERO)]);
    frame.raw(head(0, 0, &[(8, count, DELTA)]).bytes());
    frame.u32(u32::try_from(part.len()).unwrap()).raw(part);
    frame.bytes().to_vec()
}

/// A length and as many bytes of a delta.
fn delta(bytes: &[u8]) -> Vec<u8> {
    let mut delta = Encoder::default();
    delta.u16(u16::try_from(bytes.len()).unwrap()).raw(bytes);
    delta.bytes().to_vec()
}

fn compressed(method: Method, pages: usize) -> Vec<u8> {
    let text: Vec<u8> = b"so many words, so few of them new; ".repeat(120 * pages);
    let mut packed = Vec::new();
    assert!(Compressor::new(method).unwrap().compress(&text[..pages * 4096], &mut packed));
    packed
}

/// What a destination says of `frame` on the second of two channels.
fn said_of(frame: &[u8]) -> String {
    receive_from(2, PATIENCE, |liar| {
        introduce(liar);
        write_all(&liar.data[1], frame);
        listen(liar);
    })
}

fn assert_said(frame: &[u8], expected: &str) {
    let error = said_of(frame);
    assert!(error.contains("data channel 1: malformed page frame"), "{error}");
    assert!(error.contains(expected), "{error:?} lacks {expected:?}");
}

#[test]
fn compressed_runs_that_do_not_fit_their_pages_are_refused() {
    for (number, name, method) in
        [(1, "zlib", Method::Zlib { level: 6 }), (2, "zstd", Method::Zstd { level: 3 })]
    {
        let [one, two] = [1, 2].map(|pages| compressed(method, pages));
        let more = format!("{name} run unpacks to more than its 4096 bytes");
        assert_said(&packed(number, 1, &two), &more);
        let less = format!("{name} run unpacks to 4096 of its 8192 bytes");
        assert_said(&packed(number, 2, &one), &less);
        // A bomb: 64 MiB in some kilobytes.
        let mut bomb = Vec::new();
        Compressor::new(method).unwrap().compress(&vec![7; 64 << 20], &mut bomb);
        assert_said(&packed(number, 400, &bomb), "unpacks to more than its 1638400 bytes");
        let noise: Vec<u8> = (0..400u32).map(|n| u8::try_from(n * n / 8 % 256).unwrap()).collect();
        assert_said(&packed(number, 1, &noise), &format!("is not valid {name}"));
        assert_said(&packed(number, 1, &[]), name);
        assert_said(&packed(number, 2, &[&one[..], &[1, 2, 3]].concat()), name);
        assert_said(&packed(number, 1, &[&one[..], &[1, 2, 3]].concat()), name);
        for cut in [1, one.len() / 2, one.len() - 1] {
            assert_said(&packed(number, 1, &one[..cut]), name);
        }
        // The other one's.
        assert_said(&packed(3 - number, 1, &one), "is not valid");
    }
}

#[test]
fn lengths_that_cannot_be_are_refused_before_anything_is_read() {
    for (bytes, method) in [(u32::MAX, 1), (4097, 2), (1 << 31, 2)] {
        let mut frame = head(method, 1, &[(8, 1, RAW)]);
        frame.u32(bytes);
        let expected = format!("{bytes} bytes of packed pages, at most 4096 are possible");
        assert_said(frame.bytes(), &expected);
    }
    for bytes in [u32::MAX, u32::try_from(MAX_DELTA_BYTES).unwrap() + 1] {
        let mut frame = head(0, 0, &[(8, 1, ZERO), (8, 1, DELTA)]);
        frame.u32(bytes);
        assert_said(
            frame.bytes(),
            &format!("{bytes} bytes of deltas, at most 1048576 are possible"),
        );
    }
    assert_said(head(1, 1025, &[(8, 1025, RAW)]).bytes(), "1 runs of 1025 raw pages");
    assert_said(head(1, 0, &[(8, 1, ZERO)]).bytes(), "1 runs of 0 raw pages");
    assert_said(head(2, 1, &[(8, 2, RAW)]).bytes(), "more raw pages than announced");
    assert_said(head(0, 0, &[(511, 2, DELTA)]).bytes(), "pages 511+2 are outside");
    assert_said(head(0, 0, &[(u64::MAX, 1, DELTA)]).bytes(), "are outside the guest's RAM");
    assert_said(head(0, 0, &[(8, 0, DELTA)]).bytes(), "pages 8+0 are outside");
    assert_said(head(0, 0, &[(0, u32::MAX, DELTA)]).bytes(), "are outside the guest's RAM");
}

#[test]
fn deltas_that_do_not_fit_their_pages_are_refused() {
    let good = delta(&[0, 1, 0xaa]);
    let past = delta(&[0xff, 0x1f, 2, 1, 1]);
    assert_said(&deltas(1, &past), "ends at offset 4097 of a page of 4096 bytes");
    assert_said(&deltas(1, &delta(&[])), "XBZRLE delta is empty");
    assert_said(&deltas(1, &delta(&[4, 9, 1])), "ends within the run at byte 0");
    assert_said(&deltas(1, &delta(&[0xff, 0xff, 0xff, 1])), "not in its shortest form");
    assert_said(&deltas(1, &delta(&[3])), "XBZRLE delta ends with unchanged bytes");
    // Two pages and one delta, one page and two, and one that goes past the part.
    assert_said(&deltas(2, &good), "it is too short");
    assert_said(&deltas(1, &[&good[..], &good[..]].concat()), "5 bytes too many");
    assert_said(&deltas(1, &[9, 0, 1, 1]), "it is too short");
    assert_said(&deltas(1, &[]), "it is too short");
    // Neither page 10 nor, on this channel, page 5.
    let mut never = head(0, 0, &[(8, 2, ZERO), (9, 2, DELTA)]);
    never.u32(10).raw(&good).raw(&good);
    assert_said(never.bytes(), "a delta for page 10, which was never received");
    let error = receive_from(2, PATIENCE, |liar| {
        introduce(liar);
        write_all(&liar.data[0], head(0, 0, &[(5, 1, ZERO)]).bytes());
        let mut frame = head(0, 0, &[(5, 1, DELTA)]);
        frame.u32(5).raw(&good);
        write_all(&liar.data[1], frame.bytes());
        listen(liar);
    });
    assert!(error.contains("data channel 1: malformed page frame: a delta for page 5"), "{error}");
}

/// Guest RAM with a guard of RAM that is not the guest's on both sides.
struct Guarded {
    all: GuestRam,
    incoming: PageReceiver,
}

const PAGES: u64 = 16;
const LAYOUT_BYTES: u64 = 2 << 20;

impl Guarded {
    /// A machine of [`LAYOUT_BYTES`], in RAM that goes on behind it.
    fn new() -> Self {
        let layout = RamLayout::for_size(LAYOUT_BYTES).unwrap();
        let all = [(GuestAddress(0), usize::try_from(LAYOUT_BYTES * 2).unwrap())];
        let all = GuestRam::from_ranges(&all).unwrap();
        let behind = vec![0x5a; usize::try_from(LAYOUT_BYTES).unwrap()];
        all.write_slice(&behind, GuestAddress(LAYOUT_BYTES)).unwrap();
        let page_count = layout.page_count();
        let setup = RamSetup { page_count, page_bytes: 4096, data_channels: 1 };
        let incoming = IncomingRam { ram: all.clone(), layout };
        let incoming = PageReceiver::start(incoming, setup, Arc::default()).unwrap();
        Self { all, incoming }
    }

    /// Receives until the end or an error.
    fn receive(&mut self, bytes: &[u8]) {
        let (source, destination) = MemoryLink::new(None).connect();
        write_all(&source, bytes);
        drop(source);
        let channel = Channel::new(Arc::new(destination), crate::cancel::CancelToken::new());
        while matches!(self.incoming.receive(&channel), Ok(Arrived::Pages | Arrived::Mark(_))) {}
    }

    fn assert_nothing_written_but(&self, mut pages: impl FnMut(u64) -> bool) {
        let mut page = [0; 4096];
        for index in 0..LAYOUT_BYTES * 2 / PAGE_SIZE {
            self.all.read_slice(&mut page, GuestAddress(index * PAGE_SIZE)).unwrap();
            let untouched = if index * PAGE_SIZE < LAYOUT_BYTES { 0 } else { 0x5a };
            let is_untouched = page.iter().all(|byte| *byte == untouched);
            assert!(is_untouched || pages(index), "page {index} was written");
        }
    }
}

type RunParts = (u64, u32, u8);

fn runs() -> impl Strategy<Value = Vec<RunParts>> {
    // Mostly within the RAM, and near its end.
    let first = prop_oneof![
        4 => 0..PAGES,
        1 => 512 - 4..512 + 4u64,
        1 => any::<u64>(),
    ];
    let count = prop_oneof![6 => 1u32..4, 1 => any::<u32>()];
    prop::collection::vec((first, count, 0u8..4), 1..6)
}

fn frame_bytes(method: u8, raw: u32, runs: &[RunParts], parts: &[Vec<u8>]) -> Vec<u8> {
    let mut frame = head(method, raw, runs);
    for part in parts {
        frame.u32(u32::try_from(part.len()).unwrap()).raw(part);
    }
    frame.bytes().to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    #[test]
    fn arbitrary_tables_and_payloads_never_write_outside_of_ram(
        frames in prop::collection::vec((
            0u8..4,
            runs(),
            // None: as many as the table says.
            prop::option::weighted(0.2, 0u32..8),
            prop::collection::vec(prop::collection::vec(0u8..20, 0..200), 0..3),
        ), 1..4),
    ) {
        let mut stream = Vec::new();
        for (method, runs, raw, parts) in &frames {
            let sum = runs.iter().filter(|run| run.2 == RAW).map(|run| u64::from(run.1)).sum();
            let raw = raw.unwrap_or(u32::try_from(u64::min(sum, 2000)).unwrap());
            stream.extend(frame_bytes(*method, raw, runs, parts));
            if *method == 0 {
                stream.extend(vec![0x11; usize::try_from(raw.min(16)).unwrap() * 4096]);
            }
        }
        let mut guarded = Guarded::new();
        guarded.receive(&stream);
        guarded.assert_nothing_written_but(|page| {
            let of = |run: &RunParts| run.0 <= page && page - run.0 < run.1.into();
            page < 512 && frames.iter().any(|frame| frame.1.iter().any(of))
        });
    }

    #[test]
    fn anything_may_follow_an_honest_header(
        kind in 1u8..4,
        method in 0u8..3,
        run_count in 0u16..3,
        raw in 0u32..3,
        rest in prop::collection::vec(any::<u8>(), 0..300),
        whole in any::<bool>(),
    ) {
        let mut frame = Encoder::default();
        frame.u8(kind);
        if kind == 1 {
            frame.u8(method).u16(run_count).u32(raw);
        } else {
            frame.u8(0).u16(0).u32(0);
        }
        if whole && kind == 1 {
            // A table that is right too.
            for run in 0..u8::try_from(run_count).unwrap() {
                frame.u64(u64::from(run) * 4).u32(raw.max(1)).u8(RAW + run).u8(0).u16(0);
            }
        }
        frame.raw(&rest);
        let mut guarded = Guarded::new();
        guarded.receive(frame.bytes());
        guarded.assert_nothing_written_but(|page| page < 512);
        // And within a migration.
        receive_from(2, PATIENCE, |liar| {
            introduce(liar);
            write_all(&liar.data[usize::from(method % 2)], frame.bytes());
            liar.data.iter().for_each(Transport::shutdown);
            liar.main.shutdown();
        });
    }

    #[test]
    fn arbitrary_deltas_stay_within_their_page(
        part in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..4),
    ) {
        let mut bytes: Vec<u8> = part.iter().flat_map(|bytes| delta(bytes)).collect();
        // Some that are right at first.
        bytes.splice(0..0, delta(&[0, 1, 0xaa]));
        let count = u32::try_from(part.len() + 1).unwrap();
        let mut stream = head(0, 0, &[(8, count, ZERO)]);
        stream.raw(head(0, 0, &[(8, count, DELTA)]).bytes());
        stream.u32(u32::try_from(bytes.len()).unwrap()).raw(&bytes);
        let mut guarded = Guarded::new();
        guarded.receive(stream.bytes());
        guarded.assert_nothing_written_but(|page| (8..8 + u64::from(count)).contains(&page));
    }
}
