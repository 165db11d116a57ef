//! Disks that travel over several channels, and compressed: whole at the end, whatever channel is slow, and
//! whatever a peer says on some of them.

use super::fake::*;
use super::fake_disks::FakeDisks;
use crate::block::chunk_receiver::ChunkReceiver;
use crate::block::frame::{BlockSetup, BlockTotals, Chunk, DiskSetup, Frame, granules_of};
use crate::block::outgoing::DisksOutgoing;
use crate::block::{CHUNK_BYTES, GRANULE_BYTES};
use crate::cancel::CancelToken;
use crate::error::chain;
use crate::params::{Compression, Params};
use crate::participant::Outgoing;
use crate::ram::compress::{Compressor, Method};
use crate::ram::frame::Packing;
use crate::source::SourceOutcome;
use crate::transport::memory::{MemoryLink, MemoryTransport};
use crate::transport::{Channel, Transport};
use crate::wire::hello::{DISK_CHANNELS, DISK_PACKING};
use crate::wire::{Hello, MigrationId, Role};
use proptest::prelude::*;
use std::ops::ControlFlow;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Whole chunks, an odd tail, a single sector.
const SIZES: [u64; 3] = [3 * CHUNK_BYTES + GRANULE_BYTES + 512, 512, 6 * CHUNK_BYTES];

fn params(channels: u16, compression: Compression) -> Params {
    Params { multifd_channels: channels, compression, ..Default::default() }
}

/// A link so slow that compression pays.
const SLOW: u64 = 20_000_000;

fn noise(len: usize, mut state: u64) -> Vec<u8> {
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    })
    .take(len)
    .collect()
}

#[test]
fn disks_that_are_written_all_the_time_arrive_whole_over_any_number_of_channels() {
    for (channels, compression) in [
        (2, Compression::None),
        (3, Compression::Zstd),
        (4, Compression::Zlib),
        (16, Compression::Zstd),
    ] {
        let mut disks = FakeDisks::new(&SIZES);
        disks.busy = true;
        disks.fill();
        let end = migrate(&Scenario {
            ram_bytes: 4 << 20,
            dirtying: Some((500, Duration::from_micros(200))),
            disks: disks.clone(),
            params: params(channels, compression),
            ..Default::default()
        });
        end.assert_moved();
        disks.assert_same();
        assert!(disks.disks.iter().all(|disk| disk.there_script.flush_count() > 0));
    }
}

#[test]
fn a_stop_that_is_called_off_is_followed_by_another_on_every_channel() {
    let mut disks = FakeDisks::new(&SIZES);
    disks.busy = true;
    disks.fill();
    let params =
        Params { downtime_limit: Duration::from_millis(100), ..params(3, Compression::Zstd) };
    let scenario = Scenario { disks: disks.clone(), params, ..Default::default() };
    *scenario.destination.slow_locks.lock().unwrap() = (2, Duration::from_millis(300));
    let end = migrate(&scenario);
    end.assert_moved();
    disks.assert_same();
    assert!(end.counters.snapshot().called_off >= 1);
}

#[test]
fn text_is_compressed_on_a_slow_link_and_both_sides_say_by_how_much() {
    for (channels, compression) in [(1, Compression::Zstd), (2, Compression::Zlib)] {
        let disks = FakeDisks::new(&[8 * CHUNK_BYTES]);
        disks.fill();
        let params = Params { max_bandwidth: SLOW, ..params(channels, compression) };
        let end = migrate(&Scenario { params, disks: disks.clone(), ..Default::default() });
        end.assert_moved();
        disks.assert_same();
        let (here, there) = (end.counters.snapshot(), end.destination_counters.snapshot());
        let (here, there) = (here.disk.unwrap(), there.disk.unwrap());
        assert_eq!(here.disks[0].sent.data_bytes, 8 * CHUNK_BYTES);
        assert!(here.transferred_bytes < CHUNK_BYTES, "{here:?}");
        assert_eq!(here.packed.chunks, 8);
        assert_eq!((here.packed, here.disks[0].sent), (there.packed, there.disks[0].sent));
        let json = here.to_json();
        assert_eq!(json["normal-bytes"], 8 * CHUNK_BYTES);
        assert_eq!(json["x-compression"]["chunks"], 8);
        assert!(json["x-compression"]["compression-rate"].as_f64().unwrap() > 8.0, "{json}");
        let transferred = json["x-disks"][0]["transferred"].as_u64().unwrap();
        // Marks and ends belong to no disk.
        let others = here.transferred_bytes - transferred;
        assert!((64..2000).contains(&others), "{json}");
    }
}

#[test]
fn what_does_not_shrink_travels_as_it_is() {
    let disks = FakeDisks::new(&[4 * CHUNK_BYTES]);
    let data = noise(usize::try_from(4 * CHUNK_BYTES).unwrap(), 5);
    disks.disks[0].here.write_at(&data, 0).unwrap();
    let params = Params { max_bandwidth: SLOW, ..params(2, Compression::Zstd) };
    let end = migrate(&Scenario { params, disks: disks.clone(), ..Default::default() });
    end.assert_moved();
    disks.assert_same();
    let disk = end.counters.snapshot().disk.unwrap();
    assert_eq!(disk.packed.chunks, 0);
    assert!(disk.transferred_bytes >= 4 * CHUNK_BYTES);
    assert!(disk.to_json().get("x-compression").is_none());
}

/// A destination of an earlier version has none of the new capabilities.
#[test]
fn a_destination_that_knows_neither_gets_one_plain_channel() {
    let mut disks = DisksOutgoing::new(FakeDisks::new(&SIZES).outgoing(), 4);
    let hello = Hello::new(Role::Control, MigrationId([3; 16]), 4);
    assert_eq!(disks.roles(&hello), [Role::Disks { index: 0 }]);
    assert_eq!(disks.roles(&hello.clone().wanting(DISK_PACKING)).len(), 1);
    assert_eq!(disks.roles(&hello.wanting(DISK_CHANNELS)).len(), 4);
    disks.cleanup(crate::participant::Outcome::NotMoved);
}

/// Moves a guest whose second of three disk channels is narrow.
fn migrate_over_narrow(patience: Duration, room: u64, slow_reads: u64) -> (End, FakeDisks) {
    let disks = FakeDisks::new(&SIZES);
    disks.fill();
    let params = params(3, Compression::None);
    let scenario = Scenario { disks: disks.clone(), params, patience, ..Default::default() };
    let link = MemoryLink::new(None).with_patience(patience);
    let (main, main_in) = link.connect();
    let mut source = Ends { main: Arc::new(main), data: Vec::new(), disks: Vec::new() };
    let mut destination = Ends { main: Arc::new(main_in), data: Vec::new(), disks: Vec::new() };
    for index in 0..3 {
        let (out, into) = link.connect();
        source.data.push(Arc::new(out));
        destination.data.push(Arc::new(into));
        let narrow = |inner| -> Arc<dyn Transport> {
            let (room, slow_reads) = if index == 1 { (room, slow_reads) } else { (u64::MAX, 0) };
            let (room, slow_reads) = (AtomicU64::new(room), AtomicU64::new(slow_reads));
            Arc::new(Narrow { inner, room, slow_reads })
        };
        let (out, into) = link.connect();
        source.disks.push(narrow(out));
        destination.disks.push(narrow(into));
    }
    (migrate_over(&scenario, source, destination, || 0), disks)
}

#[test]
fn a_destination_that_reads_one_disk_channel_slowly_gets_its_guest() {
    let patience = Duration::from_millis(1500);
    // A chunk takes whichever channel is free: on a busy host perhaps never the slow one.
    for _ in 0..20 {
        let started = Instant::now();
        let (end, disks) = migrate_over_narrow(patience, u64::MAX, 1700);
        end.assert_moved();
        disks.assert_same();
        if started.elapsed() > patience {
            return;
        }
    }
    panic!("it was never slow");
}

#[test]
fn a_destination_that_stops_reading_one_disk_channel_is_named() {
    let given_up = |room| {
        let (end, _) = migrate_over_narrow(Duration::from_millis(1200), room, 0);
        let SourceOutcome::Failed(error) = &end.source else { panic!("{room}: {:?}", end.source) };
        assert!(chain(error).contains("disk channel 1: peer stalled"), "{}", chain(error));
        end.assert_back_at_source(&format!("room for {room} bytes"));
    };
    std::thread::scope(|scope| {
        for room in [100, 5000, 500_000] {
            scope.spawn(move || given_up(room));
        }
    });
}

/// What a channel of a source says, in bytes.
#[derive(Default, Clone)]
struct Speech(Vec<u8>);

impl Speech {
    fn frame(&mut self, frame: Frame) -> &mut Self {
        self.0.extend(frame.encode(0));
        self
    }

    fn chunk(&mut self, disk: u16, index: u64, data: u64, fill: u8) -> &mut Self {
        let len = crate::block::frame::bytes_of(index, data, SIZES[usize::from(disk)]);
        self.payload(
            Chunk { disk, index, data, zero: 0, packing: Packing::None },
            &vec![fill; usize::try_from(len).unwrap()],
        )
    }

    fn payload(&mut self, chunk: Chunk, payload: &[u8]) -> &mut Self {
        self.0.extend(Frame::Chunk(chunk).encode(u32::try_from(payload.len()).unwrap()));
        self.0.extend(payload);
        self
    }
}

/// Lets a receiver of disks hear these channels, to the first end; what it says of them, and its disks.
fn receive(speeches: &[Speech]) -> (Result<BlockTotals, String>, FakeDisks) {
    let disks = FakeDisks::new(&SIZES);
    let setup = disks.disks.iter().zip(SIZES).map(|(disk, len_bytes)| {
        let name = disk.there.id().to_owned();
        DiskSetup { name, len_bytes, only_top: false }
    });
    let setup = BlockSetup { disks: setup.collect() };
    let incoming = ChunkReceiver::start(disks.incoming(), &setup, Arc::default()).unwrap();
    let link = MemoryLink::new(None).with_patience(Duration::from_secs(5));
    let (ours, theirs): (Vec<MemoryTransport>, Vec<_>) =
        speeches.iter().map(|_| link.connect()).unzip();
    let channels: Vec<_> = theirs
        .into_iter()
        .map(|theirs| Arc::new(Channel::new(Arc::new(theirs), CancelToken::new())))
        .collect();
    let totals = Mutex::new(None);
    let at_end = |all: &BlockTotals| {
        *totals.lock().unwrap() = Some(all.clone());
        ControlFlow::Break(())
    };
    let result = std::thread::scope(|scope| {
        for (transport, speech) in ours.iter().zip(speeches) {
            scope.spawn(move || write_all(transport, &speech.0));
        }
        let result = incoming.receive_all(&channels, &at_end).map_err(|error| chain(&error));
        ours.iter().for_each(|one| one.shutdown());
        result
    });
    (result.map(|()| totals.into_inner().unwrap().expect("an end was said")), disks)
}

#[test]
fn lies_on_several_channels_are_refused_by_name() {
    type Lie = fn(&mut [Speech]);
    let mark = Frame::Mark;
    let packed = |data| Chunk { disk: 2, index: 1, data, zero: 0, packing: Packing::Zstd };
    let lies: &[(&str, Lie)] = &[
        ("the same on all channels of the disks", |all| {
            all[0].frame(Frame::Mark(1));
            all[1].frame(Frame::Mark(2));
        }),
        ("the same on all channels of the disks", |all| {
            all[0].frame(Frame::Mark(1));
            all[1].frame(Frame::End);
        }),
        ("chunk 0 of disk d0 comes twice in one pass", |all| {
            for one in all {
                one.chunk(0, 0, 1, 7);
            }
        }),
        ("disk channel 1: malformed disk frame: header", |all| {
            all[1].0.extend([0xff; 32]);
        }),
    ];
    for (expected, lie) in lies {
        let mut all = vec![Speech::default(); 2];
        lie(&mut all);
        let error = receive(&all).0.unwrap_err();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
    // Of what is compressed.
    let granule = usize::try_from(GRANULE_BYTES).unwrap();
    let pack = |bytes: &[u8]| {
        let mut packed = Vec::new();
        let method = Method::Zstd { level: 1 };
        assert!(Compressor::new(method).unwrap().compress(bytes, &mut packed));
        packed
    };
    // As long as sixteen thousand granules would be.
    let bomb = pack(&vec![0; 16_000 * granule]);
    assert!(bomb.len() < granule * 4, "{}", bomb.len());
    let two = pack(&vec![5; 2 * granule]);
    let named = "disk d2: chunk 1 cannot be unpacked: ";
    let cases = [
        (packed(0b1111), bomb, "zstd run unpacks to more than its 65536 bytes"),
        (packed(0b1), two.clone(), "zstd run unpacks to more than its 16384 bytes"),
        (packed(0b111), two, "zstd run unpacks to 32768 of its 49152 bytes"),
        (packed(0b1), noise(200, 3), "run of 200 bytes is not valid zstd"),
        (Chunk { packing: Packing::Zlib, ..packed(1) }, noise(200, 3), "is not valid zlib"),
    ];
    for (chunk, payload, expected) in cases {
        let mut all = vec![Speech::default(); 2];
        all[1].payload(chunk, &payload).frame(mark(1));
        all[0].frame(mark(1));
        let error = receive(&all).0.unwrap_err();
        assert!(error.starts_with(named) && error.contains(expected), "{error:?}");
    }
    let too_long: [(u64, u32, &str); 3] = [
        (1, 16_384, "16384 bytes for its granules"),
        (1, 0, "0 bytes for its granules"),
        (0b11, u32::MAX, "4294967295 bytes for its granules"),
    ];
    for (data, len, expected) in too_long {
        let mut all = vec![Speech::default(); 2];
        all[0].0.extend(Frame::Chunk(packed(data)).encode(len));
        let error = receive(&all).0.unwrap_err();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
    // A short tail of a disk: packed, it has to be shorter than that.
    let mut all = vec![Speech::default(); 1];
    let tail = Chunk { disk: 1, index: 0, data: 1, zero: 0, packing: Packing::Zstd };
    all[0].payload(tail, &[1; 512]);
    let error = receive(&all).0.unwrap_err();
    assert!(error.contains("512 packed bytes for 512 of disk d1"), "{error:?}");
}

#[test]
fn a_mark_is_answered_on_no_channel_before_it_has_come_on_all() {
    let disks = FakeDisks::new(&SIZES[1..2]);
    let setup = DiskSetup { name: "d0".into(), len_bytes: 512, only_top: false };
    let setup = BlockSetup { disks: vec![setup] };
    let incoming = ChunkReceiver::start(disks.incoming(), &setup, Arc::default()).unwrap();
    let link = MemoryLink::new(None).with_patience(Duration::from_secs(5));
    let (ours, theirs): (Vec<MemoryTransport>, Vec<_>) = (0..3).map(|_| link.connect()).unzip();
    let cancel = CancelToken::new();
    let channel = |one: MemoryTransport| Arc::new(Channel::new(Arc::new(one), cancel.clone()));
    let channels: Vec<_> = theirs.into_iter().map(channel).collect();
    let script = disks.disks[0].there_script.clone();
    std::thread::scope(|scope| {
        let at_end = |_: &BlockTotals| ControlFlow::Break(());
        let receiver = scope.spawn(move || incoming.receive_all(&channels, &at_end));
        let tell = |index: usize, frame: Frame| write_all(&ours[index], &frame.encode(0));
        let chunk = Chunk { disk: 0, index: 0, data: 1, zero: 0, packing: Packing::None };
        write_all(&ours[2], &Frame::Chunk(chunk).encode(512));
        tell(0, Frame::Mark(1));
        tell(1, Frame::Mark(1));
        let mut header = [0; 32];
        let silent = |one: &MemoryTransport| one.receive(&mut [0; 32]).is_err();
        assert!(silent(&ours[0]) && silent(&ours[1]));
        write_all(&ours[2], &[9; 512]);
        tell(2, Frame::Mark(1));
        for one in &ours {
            while one.receive(&mut header).is_err() {}
            assert!(matches!(Frame::decode(&header).unwrap().0, Frame::Flushed(1, _)));
        }
        assert_eq!(script.flush_count(), 1, "once for all channels");
        (0..3).for_each(|index| tell(index, Frame::End));
        receiver.join().unwrap().unwrap();
    });
    // One that ends while others wait: they are not left behind.
    let mut all = vec![Speech::default(); 3];
    all[0].frame(Frame::Mark(1));
    all[1].frame(Frame::Alive);
    let error = receive(&all).0.unwrap_err();
    assert!(error.contains("disk channel 1: unexpected Alive"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..Default::default() })]
    /// Every pass sends what it likes on whatever channel; the last version of each granule is what stays.
    #[test]
    fn versions_of_a_chunk_never_overtake_each_other(
        passes in prop::collection::vec(
            prop::collection::vec((0u16..3, 0u64..6, any::<u64>(), any::<u16>()), 0..8), 1..6),
        channels in 1usize..5,
    ) {
        let mut speeches = vec![Speech::default(); channels];
        let mut model: Vec<Vec<u8>> =
            SIZES.iter().map(|len| vec![0; usize::try_from(len.div_ceil(GRANULE_BYTES)).unwrap()]).collect();
        let (mut frames, mut fill) = (0, 0u8);
        for (number, pass) in (1u64..).zip(&passes) {
            let mut seen = std::collections::BTreeSet::new();
            for (disk, index, mask, channel) in pass {
                let mask = mask & granules_of(*index, SIZES[usize::from(*disk)]);
                if mask == 0 || !seen.insert((disk, index)) {
                    continue;
                }
                fill = fill.wrapping_add(1);
                frames += 1;
                speeches[usize::from(*channel) % channels].chunk(*disk, *index, mask, fill);
                for granule in (0..64usize).filter(|granule| mask >> granule & 1 == 1) {
                    model[usize::from(*disk)][usize::try_from(*index).unwrap() * 64 + granule] = fill;
                }
            }
            for speech in &mut speeches {
                speech.frame(if number == passes.len() as u64 { Frame::End } else { Frame::Mark(number) });
                frames += 1;
            }
        }
        let (result, disks) = receive(&speeches);
        let totals = result.unwrap();
        prop_assert_eq!((totals.ends, totals.frames), (1, frames));
        for (disk, model) in disks.disks.iter().zip(&model) {
            let mut bytes = vec![0; usize::try_from(disk.there.len_bytes()).unwrap()];
            disk.there.copy_at(&mut bytes, 0).unwrap();
            let granules = bytes.chunks(usize::try_from(GRANULE_BYTES).unwrap());
            for ((at, granule), expected) in granules.enumerate().zip(model) {
                prop_assert!(granule.iter().all(|byte| byte == expected), "granule {}", at);
            }
        }
    }
}
