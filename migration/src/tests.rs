//! Whole migrations in memory: a fake guest, a link that is cut, peers that lie.

use crate::cancel::CancelToken;
use crate::destination::Destination;
use crate::guest::*;
use crate::params::SharedParams;
use crate::source::{MigrationEvent, Source, SourceOutcome, SourceRam};
use crate::stats::{Counters, MigrationStatus};
use crate::transport::Transport;
use crate::transport::memory::{MemoryTransport, pair};
use crate::wire::{self, Encoder, Kind};
use devices::ram::{GuestAddress, GuestRam, PAGE_SIZE, PageIndex, RamLayout};
use devices::state::DeviceRecord;
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm_memory::Bytes;

const RAM_BYTES: u64 = 2 << 20;

#[derive(Default)]
struct Machine {
    running: AtomicBool,
    locked: AtomicBool,
    permit: Mutex<Option<RunPermit>>,
}

/// Fails at the step named, if any.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Fail {
    #[default]
    Nothing,
    Pause,
    Save,
    Release,
    Build,
    Load,
    Lock,
}

struct FakeSource(Arc<Machine>, Fail, GuestRam);

fn step(fail: Fail, here: Fail) -> Result<(), GuestError> {
    if fail == here {
        Err(GuestError::new(format!("scripted failure of {here:?}")))
    } else {
        Ok(())
    }
}

impl GuestControl for FakeSource {
    fn pause(&mut self) -> Result<Stopped, GuestError> {
        step(self.1, Fail::Pause)?;
        let was_running = self.0.running.swap(false, SeqCst);
        let permit = self.0.permit.lock().unwrap().take().expect("the guest is here");
        Ok(Stopped { permit, was_running })
    }
    fn save_records(&mut self) -> Result<Vec<DeviceRecord>, GuestError> {
        step(self.1, Fail::Save)?;
        // Saving a device may write RAM.
        self.2.write_obj(0x77u8, GuestAddress(9 * PAGE_SIZE)).unwrap();
        let state = serde_json::json!({"answer": 42});
        Ok(vec![DeviceRecord { kind: "fake".into(), instance: String::new(), version: 1, state }])
    }
    fn release_disks(&mut self) -> Result<(), GuestError> {
        step(self.1, Fail::Release)?;
        self.0.locked.store(false, SeqCst);
        Ok(())
    }
    fn resume(&mut self, stopped: Stopped) -> Result<(), GuestError> {
        self.0.locked.store(true, SeqCst);
        self.0.running.store(stopped.was_running, SeqCst);
        *self.0.permit.lock().unwrap() = Some(stopped.permit);
        Ok(())
    }
    fn surrendered(&mut self) {}
}

struct FakeHost {
    machine: Arc<Machine>,
    fail: Fail,
    ram: Option<GuestRam>,
    records: usize,
}

impl DestinationHost for FakeHost {
    fn build(&mut self, description: &MachineDescription) -> Result<IncomingRam, GuestError> {
        step(self.fail, Fail::Build)?;
        let layout = RamLayout::for_size(description.ram_bytes)
            .map_err(|error| GuestError::new(error.to_string()))?;
        let ram = GuestRam::from_ranges(&layout.ranges()).unwrap();
        self.ram = Some(ram.clone());
        Ok(IncomingRam { ram, layout })
    }
    fn load_records(&mut self, records: Vec<DeviceRecord>) -> Result<(), GuestError> {
        self.records += records.len();
        step(self.fail, Fail::Load)
    }
    fn lock_disks(&mut self) -> Result<(), GuestError> {
        step(self.fail, Fail::Lock)?;
        self.machine.locked.store(true, SeqCst);
        Ok(())
    }
    fn run(&mut self, permit: RunPermit, running: bool) -> Result<(), GuestError> {
        *self.machine.permit.lock().unwrap() = Some(permit);
        self.machine.running.store(running, SeqCst);
        Ok(())
    }
    fn abandon(&mut self) {
        self.machine.locked.store(false, SeqCst);
    }
}

/// All RAM is dirty at the start; then only what device writes mark, as vm-memory marks them.
struct FakeDirty(GuestRam);

impl DirtySource for FakeDirty {
    fn start(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn drain_into(&mut self, bitmap: &mut [u64]) -> Result<(), GuestError> {
        use vm_memory::GuestMemoryBackend;
        for region in self.0.iter() {
            let marks = region.get_mmap().bitmap().get_and_reset();
            bitmap.iter_mut().zip(marks).for_each(|(word, marks)| *word |= marks);
        }
        Ok(())
    }
    fn clear(&mut self, _: PageIndex, _: &[u64]) -> Result<(), GuestError> {
        Ok(())
    }
    fn stop(&mut self) {}
}

struct End {
    source: SourceOutcome,
    source_machine: Arc<Machine>,
    destination_machine: Arc<Machine>,
    source_ram: GuestRam,
    destination_ram: Option<GuestRam>,
    bytes_exchanged: u64,
    downtime: Option<Duration>,
}

impl End {
    fn running_guests(&self) -> usize {
        [&self.source_machine, &self.destination_machine]
            .iter()
            .filter(|machine| machine.running.load(SeqCst))
            .count()
    }
}

#[derive(Clone, Copy, Default)]
struct Scenario {
    cut_after: Option<u64>,
    fail: Fail,
    paused: bool,
    cancel_at: Option<MigrationStatus>,
}

fn migrate(scenario: Scenario) -> End {
    let layout = RamLayout::for_size(RAM_BYTES).unwrap();
    let ram = GuestRam::from_ranges(&layout.ranges()).unwrap();
    // One page of text, one that became zero again; the rest was never touched.
    ram.write_slice(b"the guest's own memory", GuestAddress(3 * PAGE_SIZE + 5)).unwrap();
    let source_machine = Arc::new(Machine::default());
    source_machine.running.store(!scenario.paused, SeqCst);
    source_machine.locked.store(true, SeqCst);
    *source_machine.permit.lock().unwrap() = Some(RunPermit::cold_boot());
    let destination_machine = Arc::new(Machine::default());
    let (mut to_destination, mut to_source, link) = pair(scenario.cut_after);
    for transport in [&mut to_destination, &mut to_source] {
        transport.set_patience(Duration::from_secs(5)).unwrap();
    }
    let mut host = FakeHost {
        machine: destination_machine.clone(),
        fail: scenario.fail,
        ram: None,
        records: 0,
    };
    let receiver = std::thread::spawn(move || {
        let result = Destination {
            host: &mut host,
            counters: Arc::default(),
            cancel: CancelToken::new(),
            events: &mut |_| {},
        }
        .receive_over(&mut to_source);
        (result.is_ok(), host)
    });
    let mut guest = FakeSource(source_machine.clone(), scenario.fail, ram.clone());
    let machine = MachineDescription { version: 1, ram_bytes: RAM_BYTES, machine: "fake".into() };
    let counters = Arc::new(Counters::new());
    let cancel = CancelToken::new();
    let canceller = cancel.clone();
    let mut events = |event| {
        if let (MigrationEvent::Status(status), Some(at)) = (event, scenario.cancel_at)
            && status == at
        {
            canceller.cancel();
        }
    };
    let source = Source {
        guest: &mut guest,
        machine: &machine,
        params: SharedParams::default(),
        counters: counters.clone(),
        cancel,
        events: &mut events,
    }
    .migrate_over(
        &mut to_destination,
        SourceRam { ram: ram.clone(), layout, dirty: Box::new(FakeDirty(ram.clone())) },
    );
    drop(to_destination);
    let (_, host) = receiver.join().unwrap();
    End {
        source,
        source_machine,
        destination_machine,
        source_ram: ram,
        destination_ram: host.ram,
        bytes_exchanged: link.bytes_exchanged(),
        downtime: counters.snapshot().downtime,
    }
}

fn assert_moved(end: &End) {
    assert!(matches!(end.source, SourceOutcome::Completed), "{:?}", end.source);
    let mut images = [vec![0u8; 2 << 20], vec![0u8; 2 << 20]];
    end.source_ram.read_slice(&mut images[0], GuestAddress(0)).unwrap();
    let there = end.destination_ram.as_ref().unwrap();
    there.read_slice(&mut images[1], GuestAddress(0)).unwrap();
    assert!(images[0] == images[1], "RAM differs");
    assert_eq!(images[1][9 * 4096], 0x77, "what saving wrote has travelled too");
    assert!(end.destination_machine.locked.load(SeqCst));
    assert!(end.source_machine.permit.lock().unwrap().is_none());
}

#[test]
fn a_guest_moves_whole_and_runs_once() {
    let end = migrate(Scenario::default());
    assert_moved(&end);
    assert_eq!(end.running_guests(), 1);
    assert!(end.downtime.is_some());
}

#[test]
fn a_paused_guest_arrives_paused() {
    let end = migrate(Scenario { paused: true, ..Default::default() });
    assert_moved(&end);
    assert_eq!(end.running_guests(), 0);
}

#[test]
fn cutting_the_link_at_any_byte_never_runs_two_guests() {
    let all = migrate(Scenario::default()).bytes_exchanged;
    for cut in 0..all {
        let end = migrate(Scenario { cut_after: Some(cut), ..Default::default() });
        let running = end.running_guests();
        assert!(running <= 1, "two guests after a cut at byte {cut}");
        let unknown = matches!(end.source, SourceOutcome::Unknown(_));
        assert!(running == 1 || unknown, "no guest after a cut at byte {cut}: {:?}", end.source);
        if matches!(end.source, SourceOutcome::Failed(_)) {
            assert!(end.source_machine.running.load(SeqCst), "cut at byte {cut}");
            assert!(end.source_machine.locked.load(SeqCst), "locks are back, cut at byte {cut}");
            assert!(end.source_machine.permit.lock().unwrap().is_some());
        }
    }
}

#[test]
fn a_failure_at_any_step_leaves_the_guest_running_at_the_source() {
    for fail in [Fail::Pause, Fail::Save, Fail::Release, Fail::Build, Fail::Load, Fail::Lock] {
        let end = migrate(Scenario { fail, ..Default::default() });
        let SourceOutcome::Failed(error) = &end.source else {
            panic!("{fail:?}: {:?}", end.source)
        };
        let text = crate::source::chain(error);
        assert!(text.contains(&format!("scripted failure of {fail:?}")), "{text}");
        assert!(end.source_machine.running.load(SeqCst), "{fail:?}");
        assert!(!end.destination_machine.running.load(SeqCst), "{fail:?}");
        assert!(end.source_machine.locked.load(SeqCst), "{fail:?}");
    }
}

#[test]
fn a_cancel_at_any_step_leaves_the_guest_running_at_the_source() {
    for at in [MigrationStatus::Setup, MigrationStatus::Active, MigrationStatus::Device] {
        let end = migrate(Scenario { cancel_at: Some(at), ..Default::default() });
        assert!(matches!(end.source, SourceOutcome::Cancelled), "{at:?}: {:?}", end.source);
        assert!(end.source_machine.running.load(SeqCst), "{at:?}");
        assert_eq!(end.running_guests(), 1, "{at:?}");
    }
}

/// Lets `speak` be the source of a destination; returns what the destination says of it.
fn receive_from(speak: impl FnOnce(&mut MemoryTransport)) -> String {
    let (mut liar, mut transport, _) = pair(None);
    transport.set_patience(Duration::from_millis(200)).unwrap();
    liar.set_patience(Duration::from_millis(200)).unwrap();
    let machine = Arc::new(Machine::default());
    let mut host =
        FakeHost { machine: machine.clone(), fail: Fail::Nothing, ram: None, records: 0 };
    let receiver = std::thread::spawn(move || {
        let destination = Destination {
            host: &mut host,
            counters: Arc::default(),
            cancel: CancelToken::new(),
            events: &mut |_| {},
        };
        destination.receive_over(&mut transport).map_err(|error| crate::source::chain(&error))
    });
    speak(&mut liar);
    let result = receiver.join().unwrap();
    assert!(!machine.running.load(SeqCst), "no guest may run without Go");
    result.unwrap_err()
}

fn introduce(liar: &mut MemoryTransport) {
    wire::send_hello(liar).unwrap();
    let machine = MachineDescription { version: 1, ram_bytes: RAM_BYTES, machine: "x".into() };
    wire::send(liar, Kind::Machine, &serde_json::to_vec(&machine).unwrap()).unwrap();
    let mut setup = Encoder::default();
    setup.u64(RAM_BYTES / PAGE_SIZE).u32(4096);
    wire::send(liar, Kind::RamSetup, setup.bytes()).unwrap();
}

fn batch(liar: &mut MemoryTransport, first: u64, count: u32, kind: u32, raw: u32) {
    let mut payload = Encoder::default();
    payload.u32(1).u32(raw).u64(first).u32(count).u32(kind);
    payload.raw(&vec![1; raw as usize * 4096]);
    wire::send(liar, Kind::RamBatch, payload.bytes()).unwrap();
}

#[test]
fn lies_are_refused_by_name() {
    type Lie = fn(&mut MemoryTransport);
    let lies: [(Lie, &str); 11] = [
        (|liar| liar.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap(), "not Ferry"),
        (
            |liar| {
                let mut hello = Encoder::default();
                hello.raw(wire::MAGIC).u16(9);
                wire::send(liar, Kind::Hello, hello.bytes()).unwrap();
            },
            "version 9",
        ),
        (
            |liar| {
                wire::send_hello(liar).unwrap();
                liar.write_all(&wire::header(Kind::Machine, u32::MAX)).unwrap();
            },
            "at most",
        ),
        (
            |liar| {
                introduce(liar);
                batch(liar, 512, 1, 1, 1);
            },
            "outside the guest's RAM",
        ),
        (
            |liar| {
                introduce(liar);
                batch(liar, u64::MAX, 1, 0, 0);
            },
            "outside the guest's RAM",
        ),
        (
            |liar| {
                introduce(liar);
                batch(liar, 0, 2, 1, 1);
            },
            "more raw pages",
        ),
        (
            |liar| {
                introduce(liar);
                batch(liar, 0, 1, 0, 1);
            },
            "belong to no run",
        ),
        (
            |liar| {
                introduce(liar);
                batch(liar, 0, 1, 7, 0);
            },
            "unknown kind",
        ),
        (
            |liar| {
                introduce(liar);
                wire::send(liar, Kind::Eof, &[1]).unwrap();
            },
            "unexpected Eof",
        ),
        (
            |liar| {
                introduce(liar);
                wire::send(liar, Kind::Devices, b"[]").unwrap();
                wire::send(liar, Kind::Devices, b"[]").unwrap();
            },
            "unexpected Devices",
        ),
        (
            |liar| {
                introduce(liar);
                wire::send(liar, Kind::Go, &[]).unwrap();
            },
            "unexpected Go",
        ),
    ];
    for (lie, expected) in lies {
        let error = receive_from(lie);
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

#[test]
fn a_peer_that_stands_still_is_noticed() {
    let error = receive_from(|liar| {
        introduce(liar);
        // The link stays open while the destination loses its patience.
        while liar.read_exact(&mut [0]).is_ok() {}
    });
    assert!(error.contains("has not moved"), "{error}");
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic_or_run_a_guest(bytes in prop::collection::vec(any::<u8>(), 0..400), greet in any::<bool>()) {
        receive_from(|liar| {
            if greet { introduce(liar); }
            let _ = liar.write_all(&bytes);
            (liar.stopper().unwrap())();
        });
    }
}
