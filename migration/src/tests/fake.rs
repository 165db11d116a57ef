//! Whole migrations over a link in memory: a scenario, and how it ends. The two machines, what their
//! guests write, and peers that lie have files of their own.

mod bitmaps;
mod late;
mod liar;
mod machine;
mod narrow;
mod writes;

pub use bitmaps::*;
pub use late::*;
pub use liar::*;
pub use machine::*;
pub use narrow::*;
pub use writes::*;

use super::fake_disks::FakeDisks;
use crate::block::outgoing::DisksOutgoing;
use crate::cancel::CancelToken;
use crate::destination::Destination;
use crate::error::chain;
use crate::guest::{MachineDescription, RunPermit};
use crate::params::{Params, SharedParams};
use crate::participant::Outgoing;
use crate::ram::outgoing::RamOutgoing;
use crate::source::{AppliedThrottle, MigrationEvent, Source, SourceOutcome, SourceRam};
use crate::stats::{Counters, MigrationStatus};
use crate::transport::Transport;
use crate::transport::memory::MemoryLink;
use devices::ram::{GuestAddress, GuestRam, PAGE_SIZE, RamLayout};
use devices::state::JsonText;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;
use vm_memory::{Bytes, GuestMemoryBackend};

pub const RAM_BYTES: u64 = 2 << 20;

pub struct End {
    pub source: SourceOutcome,
    pub destination: Result<(), String>,
    pub source_machine: Arc<Machine>,
    pub destination_machine: Arc<Machine>,
    pub disk: Arc<Disk>,
    pub source_ram: GuestRam,
    pub host: FakeHost,
    pub bytes_exchanged: u64,
    pub counters: Arc<Counters>,
    pub destination_counters: Arc<Counters>,
    pub events: Vec<MigrationEvent>,
}

impl End {
    pub fn running_guests(&self) -> usize {
        [&self.source_machine, &self.destination_machine]
            .iter()
            .filter(|machine| machine.running.load(SeqCst))
            .count()
    }

    pub fn permits(&self) -> usize {
        [&self.source_machine, &self.destination_machine]
            .iter()
            .filter(|machine| machine.permit.lock().unwrap().is_some())
            .count()
    }

    /// The guest goes on at the source as if nothing had happened.
    pub fn assert_back_at_source(&self, case: &str) {
        assert!(self.source_machine.running.load(SeqCst), "{case}: {:?}", self.source);
        assert!(!self.destination_machine.running.load(SeqCst), "{case}");
        assert_eq!(self.disk.holder(), Some("source"), "{case}");
        assert!(self.source_machine.permit.lock().unwrap().is_some(), "{case}");
        assert!(self.destination.is_err(), "{case}");
    }

    pub fn assert_moved(&self) {
        assert!(matches!(self.source, SourceOutcome::Completed), "{:?}", self.source);
        assert_eq!(self.destination, Ok(()));
        self.assert_same_ram();
        assert_eq!(self.disk.holder(), Some("destination"));
        assert!(self.source_machine.permit.lock().unwrap().is_none());
        assert!(self.destination_machine.permit.lock().unwrap().is_some());
        assert!(self.source_machine.surrendered.load(SeqCst));
        assert_eq!(self.destination_machine.abandoned.load(SeqCst), 0);
        assert_eq!(self.host.records.len(), 1);
    }

    fn assert_same_ram(&self) {
        let there = self.host.ram.as_ref().unwrap();
        for region in self.source_ram.iter() {
            use vm_memory::GuestMemoryRegion;
            let len = usize::try_from(region.len()).unwrap();
            let mut images = [vec![0u8; len], vec![0u8; len]];
            self.source_ram.read_slice(&mut images[0], region.start_addr()).unwrap();
            there.read_slice(&mut images[1], region.start_addr()).unwrap();
            let [here, there] = &images;
            let differs = (0..len / 4096)
                .find(|page| here[page * 4096..][..4096] != there[page * 4096..][..4096]);
            assert_eq!(differs, None, "a page differs");
        }
        let saved: u8 = there.read_obj(GuestAddress(9 * PAGE_SIZE)).unwrap();
        assert_eq!(saved, 0x77, "what saving wrote has travelled too");
    }
}

#[derive(Clone)]
pub struct Scenario {
    pub cut_after: Option<u64>,
    pub fail: Fail,
    pub paused: bool,
    pub ram_bytes: u64,
    pub dirtying: Option<(u64, Duration)>,
    /// It writes in every kind of way.
    pub lively: bool,
    pub script: Option<Script>,
    pub hot_pages: u64,
    /// Written pages above the hole, from its end on.
    pub high_pages: u64,
    pub bursts: u32,
    pub params: Params,
    /// Parameters that are set as a pass begins.
    pub changes: Vec<(u64, Params)>,
    /// A data channel that is lost alone, after so many bytes.
    pub lose_channel: Option<(usize, u64)>,
    /// The source's counters, and the token that cancels it.
    pub counters: Arc<Counters>,
    pub cancel: CancelToken,
    pub cancel_source_at: Option<MigrationEvent>,
    pub cancel_destination_at: Option<MigrationStatus>,
    pub patience: Duration,
    pub disks: FakeDisks,
    /// What of the guest waits for the handover, as the source tells it.
    pub late: Option<Words>,
    /// Dirty bitmaps of a disk that both sides have.
    pub bitmaps: Option<FakeBitmaps>,
    /// Gives that up at the source.
    pub give_up: CancelToken,
    /// The source's machine, for who wants to look at it meanwhile or after a panic.
    pub machine: Arc<Machine>,
    /// The destination's.
    pub destination: Arc<Machine>,
    /// Told of every event of the source.
    pub watch: Option<Watch>,
}

pub type Watch = Arc<dyn Fn(&MigrationEvent) + Send + Sync>;

impl Default for Scenario {
    fn default() -> Self {
        Self {
            cut_after: None,
            fail: Fail::Nothing,
            paused: false,
            ram_bytes: RAM_BYTES,
            dirtying: None,
            lively: false,
            script: None,
            hot_pages: 0,
            high_pages: 0,
            bursts: 0,
            params: Params { multifd_channels: 1, ..Params::default() },
            changes: Vec::new(),
            lose_channel: None,
            counters: Arc::new(Counters::new()),
            cancel: CancelToken::new(),
            cancel_source_at: None,
            cancel_destination_at: None,
            patience: Duration::from_secs(5),
            disks: FakeDisks::default(),
            late: None,
            bitmaps: None,
            give_up: CancelToken::new(),
            machine: Arc::default(),
            destination: Arc::default(),
            watch: None,
        }
    }
}

pub fn migrate(scenario: &Scenario) -> End {
    let link = MemoryLink::new(scenario.cut_after).with_patience(scenario.patience);
    let (main_out, main_in) = link.connect();
    let mut source = Ends { main: Arc::new(main_out), data: Vec::new(), disks: Vec::new() };
    let mut destination = Ends { main: Arc::new(main_in), data: Vec::new(), disks: Vec::new() };
    for index in 0..usize::from(scenario.params.multifd_channels) {
        if !scenario.disks.is_empty() {
            let (disks_out, disks_in) = link.connect();
            source.disks.push(Arc::new(disks_out));
            destination.disks.push(Arc::new(disks_in));
        }
        let fuse = scenario.lose_channel.filter(|(lost, _)| *lost == index);
        let (data_out, data_in) = link.connect_for(fuse.map(|(_, bytes)| bytes));
        source.data.push(Arc::new(data_out));
        destination.data.push(Arc::new(data_in));
    }
    migrate_over(scenario, source, destination, move || link.bytes_exchanged())
}

pub struct Ends {
    pub main: Arc<dyn Transport>,
    pub data: Vec<Arc<dyn Transport>>,
    pub disks: Vec<Arc<dyn Transport>>,
}

pub fn migrate_over(
    scenario: &Scenario,
    source: Ends,
    destination: Ends,
    exchanged: impl FnOnce() -> u64,
) -> End {
    let disk = Arc::<Disk>::default();
    let ram = boot(scenario, &disk);
    let source_machine = scenario.machine.clone();
    let destination_machine = scenario.destination.clone();
    let destination_counters = Arc::new(Counters::new());
    let receiver = {
        let (machine, disk, fail) = (destination_machine.clone(), disk.clone(), scenario.fail);
        let (counters, cancel_at) = (destination_counters.clone(), scenario.cancel_destination_at);
        let (disks, late) =
            (scenario.disks.incoming(), scenario.late.as_ref().map(|_| Late::default()));
        let (give_up, bitmaps) = (CancelToken::new(), scenario.bitmaps.clone());
        std::thread::spawn(move || {
            let (ram, records) = (None, Vec::new());
            let mut host = FakeHost { machine, disk, fail, ram, records, disks, late, bitmaps };
            let cancel = CancelToken::new();
            let canceller = cancel.clone();
            let giver_up = give_up.clone();
            let mut events = |event| {
                if cancel_at.is_some_and(|at| event == MigrationEvent::Status(at)) {
                    // Once the guest is here only the second has an effect.
                    canceller.cancel();
                    giver_up.cancel();
                }
            };
            let events = &mut events;
            let result = Destination { host: &mut host, counters, cancel, give_up, events }
                .receive_over(destination.main, destination.data, destination.disks);
            (result.map_err(|error| chain(&error)), host)
        })
    };
    let (outcome, counters, seen) = run_source(scenario, source, &ram, &disk);
    let (result, host) = receiver.join().unwrap();
    End {
        source: outcome,
        destination: result,
        source_machine,
        destination_machine,
        disk,
        source_ram: ram,
        host,
        bytes_exchanged: exchanged(),
        counters,
        destination_counters,
        events: seen,
    }
}

/// Where a page above the hole is, counted from its end.
pub fn high_page(page: u64) -> GuestAddress {
    GuestAddress((4 << 30) + page * PAGE_SIZE)
}

/// What each of them begins with.
pub fn high_content(page: u64) -> u64 {
    0xabcd_0000 + page
}

/// A guest that runs, or is paused, with its disk locked.
pub fn boot(scenario: &Scenario, disk: &Disk) -> GuestRam {
    let layout = RamLayout::for_size(scenario.ram_bytes).unwrap();
    let ram = GuestRam::from_ranges(&layout.ranges()).unwrap();
    // One page of text; most of the rest was never touched.
    ram.write_slice(b"the guest's own memory", GuestAddress(3 * PAGE_SIZE + 5)).unwrap();
    for page in 16..16 + scenario.hot_pages {
        ram.write_obj(page, GuestAddress(page * PAGE_SIZE)).unwrap();
    }
    for page in 0..scenario.high_pages {
        ram.write_obj(high_content(page), high_page(page)).unwrap();
    }
    disk.lock("source", Duration::ZERO).unwrap();
    scenario.machine.running.store(!scenario.paused, SeqCst);
    *scenario.machine.permit.lock().unwrap() = Some(RunPermit::cold_boot());
    ram
}

pub fn run_source(
    scenario: &Scenario,
    source: Ends,
    ram: &GuestRam,
    disk: &Arc<Disk>,
) -> (SourceOutcome, Arc<Counters>, Vec<MigrationEvent>) {
    let layout = RamLayout::for_size(scenario.ram_bytes).unwrap();
    let mutator = scenario
        .dirtying
        .map(|(pages, gap)| Mutator::start(ram.clone(), 16..16 + pages, gap, scenario.lively));
    let mut guest = FakeSource {
        machine: scenario.machine.clone(),
        disk: disk.clone(),
        fail: scenario.fail,
        ram: ram.clone(),
        mutator,
        disk_writers: scenario.disks.start_writers(),
        bursts: scenario.bursts,
        script: scenario.script.clone(),
    };
    let machine = MachineDescription {
        version: 1,
        ram_bytes: scenario.ram_bytes,
        machine: JsonText::of(&"fake"),
    };
    let counters = scenario.counters.clone();
    let cancel = scenario.cancel.clone();
    let canceller = cancel.clone();
    let mut seen = Vec::new();
    let params = SharedParams::new(scenario.params.clone());
    let (pass, shared) = (Arc::new(AtomicU64::new(0)), params.clone());
    let running = pass.clone();
    let mut events = |event: MigrationEvent| {
        seen.push(event.clone());
        if let Some(watch) = &scenario.watch {
            watch(&event);
        }
        if let MigrationEvent::Pass(number) = event {
            running.store(number, SeqCst);
            let change = scenario.changes.iter().find(|(at, _)| *at == number);
            change.into_iter().for_each(|(_, params)| shared.set(params.clone()));
        }
        if scenario.cancel_source_at.as_ref() == Some(&event) {
            canceller.cancel();
        }
    };
    let words = usize::try_from(layout.page_count() / 64).unwrap();
    let (log, script, fail) = (vec![0; words], scenario.script.clone(), scenario.fail);
    let mutator = guest.mutator.as_ref().filter(|_| scenario.lively);
    let last = scenario.changes.last().map_or(0, |(last, _)| last - 1);
    let lively = mutator.map(|mutator| (mutator.progress.clone(), last));
    let dirty = FakeDirty {
        ram: ram.clone(),
        log,
        fail,
        script,
        pass,
        lively,
        hot_pages: scenario.hot_pages,
        machine: scenario.machine.clone(),
    };
    let ram = SourceRam { ram: ram.clone(), layout, dirty: Box::new(dirty) };
    let disks = scenario.disks.outgoing();
    let mut participants: Vec<Box<dyn Outgoing>> = Vec::new();
    if !disks.disks.is_empty() {
        participants.push(Box::new(DisksOutgoing::new(disks, scenario.params.multifd_channels)));
    }
    participants.push(Box::new(RamOutgoing::new(ram, scenario.params.multifd_channels)));
    if let Some(bitmaps) = &scenario.bitmaps {
        participants.extend(bitmaps.outgoing());
    }
    if let Some(words) = scenario.late.clone() {
        participants.push(Box::new(LateOutgoing::new(scenario.machine.clone(), words)));
    }
    let outcome = Source {
        guest: &mut guest,
        machine: &mut || Ok(machine.clone()),
        participants,
        params,
        counters: counters.clone(),
        throttle: AppliedThrottle::default(),
        cancel,
        give_up: scenario.give_up.clone(),
        events: &mut events,
    }
    .migrate_over(source.main, source.data, source.disks);
    (outcome, counters, seen)
}
