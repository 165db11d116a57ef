//! A machine without KVM for both ends, a link in memory, and whole migrations made of them.

use super::fake_disks::{DiskWriters, FakeDisks};
use crate::block::IncomingDisk;
use crate::cancel::CancelToken;
use crate::destination::Destination;
use crate::guest::*;
use crate::params::{Params, SharedParams};
use crate::source::{MigrationEvent, Source, SourceOutcome, SourceRam, chain};
use crate::stats::{Counters, MigrationStatus};
use crate::transport::Transport;
use crate::transport::memory::{MemoryLink, MemoryTransport};
use devices::ram::{GuestAddress, GuestRam, PAGE_SIZE, PageIndex, RamLayout};
use devices::state::DeviceRecord;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestMemoryBackend};

pub const RAM_BYTES: u64 = 2 << 20;

/// The one disk that both ends see, and who holds its lock.
#[derive(Default)]
pub struct Disk {
    holder: Mutex<Option<&'static str>>,
    changed: Condvar,
}

impl Disk {
    /// Waits a while for a holder that is about to let go, as a machine that takes its disk back does.
    fn lock(&self, who: &'static str, patience: Duration) -> Result<(), GuestError> {
        let holder = self.holder.lock().unwrap();
        let others = |holder: &mut Option<&str>| holder.is_some_and(|holder| holder != who);
        let (mut holder, _) = self.changed.wait_timeout_while(holder, patience, others).unwrap();
        if let Some(other) = holder.filter(|other| *other != who) {
            return Err(GuestError::new(format!("the disk is locked by the {other}")));
        }
        *holder = Some(who);
        Ok(())
    }

    fn unlock(&self, who: &'static str) {
        let mut holder = self.holder.lock().unwrap();
        if *holder == Some(who) {
            *holder = None;
        }
        self.changed.notify_all();
    }

    pub fn holder(&self) -> Option<&'static str> {
        *self.holder.lock().unwrap()
    }
}

#[derive(Default)]
pub struct Machine {
    pub running: AtomicBool,
    pub permit: Mutex<Option<RunPermit>>,
    pub surrendered: AtomicBool,
    /// Every throttle that was set, in order.
    pub throttles: Mutex<Vec<u8>>,
    pub abandoned: AtomicU32,
}

/// Where a scripted failure happens.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Fail {
    #[default]
    Nothing,
    Track,
    Pause,
    Throttle,
    Save,
    Release,
    Resume,
    Build,
    Load,
    Lock,
    Run,
    PanicInSave,
}

pub struct FakeSource {
    pub machine: Arc<Machine>,
    pub disk: Arc<Disk>,
    pub fail: Fail,
    pub ram: GuestRam,
    /// Writes RAM while the guest runs.
    pub mutator: Option<Mutator>,
    /// Write its disks while the guest runs.
    pub disk_writers: DiskWriters,
    /// At so many pauses the guest writes much in its last moment.
    pub bursts: u32,
    pub script: Option<Script>,
}

fn step(fail: Fail, here: Fail) -> Result<(), GuestError> {
    if fail == here {
        Err(GuestError::new(format!("scripted failure of {here:?}")))
    } else {
        Ok(())
    }
}

impl GuestControl for FakeSource {
    fn pause(&mut self) -> Result<Stopped, GuestError> {
        step(self.fail, Fail::Pause)?;
        if let Some(mutator) = &mut self.mutator {
            mutator.stop();
        }
        self.disk_writers.stop();
        if let Some(left) = self.bursts.checked_sub(1) {
            self.bursts = left;
            for page in 16..816 {
                self.ram.write_obj(page + 1, GuestAddress(page * PAGE_SIZE)).unwrap();
            }
        }
        if let Some(script) = &self.script {
            script.write(&self.ram, LAST_VERSION);
        }
        let was_running = self.machine.running.swap(false, SeqCst);
        let permit = self.machine.permit.lock().unwrap().take().expect("the guest is here");
        Ok(Stopped { permit, was_running })
    }

    fn save_records(&mut self) -> Result<Vec<DeviceRecord>, GuestError> {
        assert!(self.fail != Fail::PanicInSave, "scripted panic");
        step(self.fail, Fail::Save)?;
        // Saving a device may write RAM.
        self.ram.write_obj(0x77u8, GuestAddress(9 * PAGE_SIZE)).unwrap();
        let state = serde_json::json!({"answer": 42});
        Ok(vec![DeviceRecord { kind: "fake".into(), instance: String::new(), version: 1, state }])
    }

    fn release_disks(&mut self) -> Result<(), GuestError> {
        step(self.fail, Fail::Release)?;
        self.disk.unlock("source");
        Ok(())
    }

    fn resume(&mut self, stopped: Stopped) -> Result<(), GuestError> {
        *self.machine.permit.lock().unwrap() = Some(stopped.permit);
        step(self.fail, Fail::Resume)?;
        self.disk.lock("source", Duration::from_secs(5))?;
        self.machine.running.store(stopped.was_running, SeqCst);
        Ok(())
    }

    fn surrendered(&mut self) {
        assert!(self.machine.permit.lock().unwrap().is_none());
        self.machine.surrendered.store(true, SeqCst);
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.machine.throttles.lock().unwrap().push(percent);
        step(self.fail, Fail::Throttle)
    }
}

pub struct FakeHost {
    pub machine: Arc<Machine>,
    pub disk: Arc<Disk>,
    pub fail: Fail,
    pub ram: Option<GuestRam>,
    pub records: Vec<DeviceRecord>,
    pub disks: Vec<IncomingDisk>,
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

    fn disks(&mut self) -> Result<Vec<IncomingDisk>, GuestError> {
        Ok(self.disks.clone())
    }

    fn load_records(&mut self, records: Vec<DeviceRecord>) -> Result<(), GuestError> {
        self.records.extend(records);
        step(self.fail, Fail::Load)
    }

    fn lock_disks(&mut self) -> Result<(), GuestError> {
        step(self.fail, Fail::Lock)?;
        self.disk.lock("destination", Duration::ZERO)
    }

    fn run(&mut self, permit: RunPermit, running: bool) -> Result<(), GuestError> {
        step(self.fail, Fail::Run)?;
        assert_eq!(self.disk.holder(), Some("destination"), "no guest runs on an unlocked disk");
        *self.machine.permit.lock().unwrap() = Some(permit);
        self.machine.running.store(running, SeqCst);
        Ok(())
    }

    fn abandon(&mut self) {
        assert!(!self.machine.running.load(SeqCst), "a running guest is not abandoned");
        self.machine.abandoned.fetch_add(1, SeqCst);
        self.disk.unlock("destination");
    }
}

/// What was written through vm-memory, as it marks it. Manual: a bit stays until it is cleared.
pub struct FakeDirty {
    pub ram: GuestRam,
    pub log: Vec<u64>,
    pub fail: Fail,
    pub script: Option<Script>,
    /// The pass that runs.
    pub pass: Arc<AtomicU64>,
    /// A lively guest, which writes all its pages in each of so many passes.
    pub lively: Option<(Arc<Progress>, u64)>,
    /// So many pages of a running guest are always dirty again, less those that throttling prevents.
    pub hot_pages: u64,
    pub machine: Arc<Machine>,
}

impl FakeDirty {
    fn collect_hot(&mut self) {
        if self.machine.running.load(SeqCst) {
            let throttle = self.machine.throttles.lock().unwrap().last().copied().unwrap_or(0);
            let hot = self.hot_pages * u64::from(100 - throttle) / 100;
            for page in 16..16 + hot {
                self.log[usize::try_from(page / 64).unwrap()] |= 1 << (page % 64);
            }
        }
    }

    fn collect(&mut self) {
        let mut words = self.log.as_mut_slice();
        for region in self.ram.iter() {
            let marks = region.get_mmap().bitmap().get_and_reset();
            let (here, rest) = words.split_at_mut(marks.len());
            here.iter_mut().zip(marks).for_each(|(word, marks)| *word |= marks);
            words = rest;
        }
    }
}

impl DirtySource for FakeDirty {
    fn start(&mut self) -> Result<(), GuestError> {
        step(self.fail, Fail::Track)?;
        self.log.fill(u64::MAX);
        Ok(())
    }

    fn drain_into(&mut self, bitmap: &mut [u64]) -> Result<(), GuestError> {
        self.collect();
        self.collect_hot();
        bitmap.iter_mut().zip(&self.log).for_each(|(word, log)| *word |= log);
        Ok(())
    }

    fn clear(&mut self, first: PageIndex, mask: &[u64]) -> Result<(), GuestError> {
        assert!(first.0.is_multiple_of(64));
        // Marks that are collected only now came before the clear, and so before the copy.
        self.collect();
        let log = &mut self.log[usize::try_from(first.0 / 64).unwrap()..];
        assert!(mask.len() <= log.len());
        log.iter_mut().zip(mask).for_each(|(log, mask)| *log &= !mask);
        let pass = self.pass.load(SeqCst);
        if let Some(script) = self.script.as_ref().filter(|script| pass <= script.passes) {
            script.write(&self.ram, pass);
        }
        if let Some((progress, _)) = self.lively.as_ref().filter(|(_, passes)| pass <= *passes) {
            progress.wait();
        }
        Ok(())
    }

    fn stop(&mut self) {}
}

/// Kinds of writes: each makes pages travel in a way of its own.
pub const KINDS: u64 = 5;
/// What a script writes when the guest is paused.
const LAST_VERSION: u64 = 1000;

/// Writes `page` as guests do.
fn write_kind(ram: &GuestRam, page: u64, kind: u64, version: u64) {
    const BYTES: usize = 4096;
    let start = page * PAGE_SIZE;
    let write = |bytes: &[u8], offset| ram.write_slice(bytes, GuestAddress(start + offset));
    match kind % KINDS {
        // A little of it changes: a delta.
        0 => [8, 4088]
            .into_iter()
            .try_for_each(|at| ram.write_obj(version, GuestAddress(start + at))),
        // It is written and stays as it is.
        1 => write(&[0xa5; 64], 100),
        // It becomes zero, and something again.
        2 if version % 2 == 1 => write(&[0; BYTES], 0),
        2 => write(format!("something again: {version}").as_bytes(), 1000),
        // Text, which can be compressed.
        3 => {
            let text = format!("page {page} goes on with its story in part {version}; ");
            let text: Vec<u8> = text.bytes().cycle().take(BYTES).collect();
            write(&text, 0)
        }
        // Noise, which cannot.
        _ => {
            let mut state = page << 32 | version;
            let noise: Vec<u8> = (0..BYTES)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    u8::try_from(state >> 56).unwrap()
                })
                .collect();
            write(&noise, 0)
        }
    }
    .unwrap();
}

/// Writes of a guest at fixed moments: in each pass after its pages are clear in the log, and in the
/// pause. So whatever is sent is the same in every run.
#[derive(Debug, Clone)]
pub struct Script {
    /// Pages of each kind in each huge page.
    pub pages: u64,
    /// Which kinds.
    pub kinds: std::ops::Range<u64>,
    /// In how many passes the guest writes.
    pub passes: u64,
}

impl Script {
    fn write(&self, ram: &GuestRam, version: u64) {
        const HUGE: u64 = 512;
        for huge in 0..ram.last_addr().0 / PAGE_SIZE / HUGE + 1 {
            for kind in self.kinds.clone() {
                let first = huge * HUGE + 16 + kind * self.pages;
                (first..first + self.pages).for_each(|page| write_kind(ram, page, kind, version));
            }
        }
    }
}

/// How often a guest has written all its pages.
#[derive(Default)]
pub struct Progress(Mutex<u64>, Condvar);

impl Progress {
    fn add(&self) {
        *self.0.lock().unwrap() += 1;
        self.1.notify_all();
    }

    /// Waits until all pages have been written from now on.
    fn wait(&self) {
        let count = self.0.lock().unwrap();
        let end = *count + 2;
        let waited = self.1.wait_timeout_while(count, Duration::from_secs(5), |now| *now < end);
        assert!(!waited.unwrap().1.timed_out(), "the guest does not get on");
    }
}

/// A guest that writes its RAM: pages in turn, each with an ever growing number.
pub struct Mutator {
    stop: Arc<AtomicBool>,
    progress: Arc<Progress>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Mutator {
    /// Writes all of `pages` about once every `gap`. On return they
    /// have been written. A `lively` one writes in every kind of way, else in two.
    pub fn start(ram: GuestRam, pages: std::ops::Range<u64>, gap: Duration, lively: bool) -> Self {
        const PIECES: u32 = 8;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let progress = Arc::<Progress>::default();
        let gets_on = progress.clone();
        let piece = (pages.end - pages.start).div_ceil(PIECES.into()).max(1);
        let thread = std::thread::spawn(move || {
            let (mut number, mut version) = (1u64, 1);
            while !stopped.load(SeqCst) {
                for (index, page) in (0..).zip(pages.clone()) {
                    if index % piece == 0 {
                        let end = Instant::now() + gap / PIECES;
                        while let left = end.saturating_duration_since(Instant::now())
                            && !left.is_zero()
                            && number > pages.end - pages.start
                            && !stopped.load(SeqCst)
                        {
                            if left > Duration::from_millis(1) {
                                // Other tests need the CPU too, and then let this one have it in time.
                                std::thread::sleep(left.min(Duration::from_millis(10)));
                            }
                        }
                    }
                    if lively {
                        write_kind(&ram, page, page, version);
                        number += 1;
                        continue;
                    }
                    // Now and then a page becomes zero again.
                    let value = if number.is_multiple_of(7) { 0 } else { number };
                    for offset in [8, 4088] {
                        ram.write_obj(value, GuestAddress(page * PAGE_SIZE + offset)).unwrap();
                    }
                    number += 1;
                }
                version += 1;
                gets_on.add();
            }
        });
        progress.wait();
        Self { stop, progress, thread: Some(thread) }
    }

    fn stop(&mut self) {
        self.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Mutator {
    fn drop(&mut self) {
        self.stop();
    }
}

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
    pub bursts: u32,
    pub params: Params,
    /// Parameters that are set as a pass begins.
    pub changes: Vec<(u64, Params)>,
    /// A data channel that is lost alone, after so many bytes.
    pub lose_channel: Option<(usize, u64)>,
    pub cancel_source_at: Option<MigrationEvent>,
    pub cancel_destination_at: Option<MigrationStatus>,
    pub patience: Duration,
    pub disks: FakeDisks,
    /// The source's machine, for who wants to look at it after a panic.
    pub machine: Arc<Machine>,
}

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
            bursts: 0,
            params: Params { multifd_channels: 1, ..Params::default() },
            changes: Vec::new(),
            lose_channel: None,
            cancel_source_at: None,
            cancel_destination_at: None,
            patience: Duration::from_secs(5),
            disks: FakeDisks::default(),
            machine: Arc::default(),
        }
    }
}

pub fn migrate(scenario: &Scenario) -> End {
    let link = MemoryLink::new(scenario.cut_after).with_patience(scenario.patience);
    let (main_out, main_in) = link.connect();
    let mut source = Ends { main: Arc::new(main_out), data: Vec::new(), disks: None };
    let mut destination = Ends { main: Arc::new(main_in), data: Vec::new(), disks: None };
    if !scenario.disks.is_empty() {
        let (disks_out, disks_in) = link.connect();
        source.disks = Some(Arc::new(disks_out));
        destination.disks = Some(Arc::new(disks_in));
    }
    for index in 0..usize::from(scenario.params.multifd_channels) {
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
    pub disks: Option<Arc<dyn Transport>>,
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
    let destination_machine = Arc::new(Machine::default());
    let destination_counters = Arc::new(Counters::new());
    let receiver = {
        let (machine, disk, fail) = (destination_machine.clone(), disk.clone(), scenario.fail);
        let (counters, cancel_at) = (destination_counters.clone(), scenario.cancel_destination_at);
        let disks = scenario.disks.incoming();
        std::thread::spawn(move || {
            let (ram, records) = (None, Vec::new());
            let mut host = FakeHost { machine, disk, fail, ram, records, disks };
            let cancel = CancelToken::new();
            let canceller = cancel.clone();
            let mut events = |event| {
                if cancel_at.is_some_and(|at| event == MigrationEvent::Status(at)) {
                    canceller.cancel();
                }
            };
            let result = Destination { host: &mut host, counters, cancel, events: &mut events }
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

/// A guest that runs, or is paused, with its disk locked.
fn boot(scenario: &Scenario, disk: &Disk) -> GuestRam {
    let layout = RamLayout::for_size(scenario.ram_bytes).unwrap();
    let ram = GuestRam::from_ranges(&layout.ranges()).unwrap();
    // One page of text; most of the rest was never touched.
    ram.write_slice(b"the guest's own memory", GuestAddress(3 * PAGE_SIZE + 5)).unwrap();
    for page in 16..16 + scenario.hot_pages {
        ram.write_obj(page, GuestAddress(page * PAGE_SIZE)).unwrap();
    }
    disk.lock("source", Duration::ZERO).unwrap();
    scenario.machine.running.store(!scenario.paused, SeqCst);
    *scenario.machine.permit.lock().unwrap() = Some(RunPermit::cold_boot());
    ram
}

fn run_source(
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
    let machine =
        MachineDescription { version: 1, ram_bytes: scenario.ram_bytes, machine: "fake".into() };
    let counters = Arc::new(Counters::new());
    let cancel = CancelToken::new();
    let canceller = cancel.clone();
    let mut seen = Vec::new();
    let params = SharedParams::new(scenario.params.clone());
    let (pass, shared) = (Arc::new(AtomicU64::new(0)), params.clone());
    let running = pass.clone();
    let mut events = |event| {
        seen.push(event);
        if let MigrationEvent::Pass(number) = event {
            running.store(number, SeqCst);
            let change = scenario.changes.iter().find(|(at, _)| *at == number);
            change.into_iter().for_each(|(_, params)| shared.set(params.clone()));
        }
        if scenario.cancel_source_at == Some(event) {
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
    let outcome = Source {
        guest: &mut guest,
        machine: &machine,
        disks: scenario.disks.outgoing(),
        params,
        counters: counters.clone(),
        cancel,
        events: &mut events,
    }
    .migrate_over(
        source.main,
        source.data,
        source.disks,
        SourceRam { ram: ram.clone(), layout, dirty: Box::new(dirty) },
    );
    (outcome, counters, seen)
}

/// One end of all connections, for a peer that does not play by the rules.
pub struct Liar {
    pub main: MemoryTransport,
    pub data: Vec<MemoryTransport>,
    pub disks: MemoryTransport,
}

impl Liar {
    /// A liar and who is lied to.
    fn meet(channels: u16, patience: Duration) -> (Self, Ends) {
        let link = MemoryLink::new(None).with_patience(patience);
        let (main, main_in) = link.connect();
        let (disks, disks_in) = link.connect();
        let mut victim =
            Ends { main: Arc::new(main_in), data: Vec::new(), disks: Some(Arc::new(disks_in)) };
        let mut liar = Self { main, data: Vec::new(), disks };
        for _ in 0..channels {
            let (data, data_in) = link.connect();
            liar.data.push(data);
            victim.data.push(Arc::new(data_in));
        }
        (liar, victim)
    }

    pub fn count(&self) -> u16 {
        u16::try_from(self.data.len()).unwrap()
    }

    pub fn say(&self, bytes: &[u8]) {
        write_all(&self.main, bytes);
    }

    pub fn frame(&self, kind: crate::wire::Kind, payload: &[u8]) {
        let mut bytes = Vec::new();
        crate::wire::append_frame(&mut bytes, kind, payload).unwrap();
        self.say(&bytes);
    }
}

pub fn write_all(transport: &dyn Transport, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match transport.send(bytes) {
            Ok(count) => bytes = &bytes[count..],
            // The victim has already had enough.
            Err(_) => return,
        }
    }
}

/// Lets `speak` be the source of a destination; returns what the destination says of it.
pub fn receive_from(channels: u16, patience: Duration, speak: impl FnOnce(&Liar)) -> String {
    receive_with_disks(channels, patience, Vec::new(), speak)
}

/// The same, for a machine whose disks arrive.
pub fn receive_with_disks(
    channels: u16,
    patience: Duration,
    disks: Vec<IncomingDisk>,
    speak: impl FnOnce(&Liar),
) -> String {
    let (liar, victim) = Liar::meet(channels, patience);
    let machine = Arc::new(Machine::default());
    let ours = machine.clone();
    let receiver = std::thread::spawn(move || {
        let (disk, fail) = (Arc::default(), Fail::Nothing);
        let (ram, records) = (None, Vec::new());
        let mut host = FakeHost { machine: ours, disk, fail, ram, records, disks };
        let destination = Destination {
            host: &mut host,
            counters: Arc::default(),
            cancel: CancelToken::new(),
            events: &mut |_| {},
        };
        destination
            .receive_over(victim.main, victim.data, victim.disks)
            .map_err(|error| chain(&error))
    });
    speak(&liar);
    drop(liar);
    let result = receiver.join().unwrap();
    assert!(!machine.running.load(SeqCst), "no guest may run without Go");
    result.unwrap_err()
}

/// Lets `speak` be the destination of a source, with as many data channels as `scenario` wants.
/// Returns how it ended, and whether the guest runs.
pub fn send_to(scenario: &Scenario, speak: impl FnOnce(&Liar) + Send) -> (SourceOutcome, bool) {
    let (liar, victim) = Liar::meet(scenario.params.multifd_channels, scenario.patience);
    let disk = Arc::<Disk>::default();
    let ram = boot(scenario, &disk);
    let outcome = std::thread::scope(|scope| {
        scope.spawn(move || speak(&liar));
        run_source(scenario, victim, &ram, &disk).0
    });
    let runs = scenario.machine.running.load(SeqCst);
    assert_eq!(runs, scenario.machine.permit.lock().unwrap().is_some());
    assert!(!runs || disk.holder() == Some("source"));
    (outcome, runs)
}
