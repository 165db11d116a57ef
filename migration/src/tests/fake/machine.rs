//! A machine without KVM for each end: its lock, its right to run, and failures where a test wants them.

use super::super::fake_disks::DiskWriters;
use super::bitmaps::FakeBitmaps;
use super::late::{Late, LateIncoming};
use super::writes::{LAST_VERSION, Mutator, Script};
use crate::block::IncomingDisk;
use crate::block::incoming::DisksIncoming;
use crate::destination::{DestinationHost, GoOn};
use crate::guest::*;
use crate::participant::Incoming;
use crate::ram::incoming::RamIncoming;
use devices::ram::{GuestAddress, GuestRam, PAGE_SIZE, RamLayout};
use devices::state::{DeviceRecord, JsonText};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use vm_memory::Bytes;

/// The one disk that both ends see, and who holds its lock.
#[derive(Default)]
pub struct Disk {
    holder: Mutex<Option<&'static str>>,
    changed: Condvar,
}

impl Disk {
    /// Waits a while for a holder that is about to let go, as a machine that takes its disk back does.
    pub fn lock(&self, who: &'static str, patience: Duration) -> Result<(), GuestError> {
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
    /// How long its disk takes to drain, and to be flushed.
    pub drain: Mutex<Duration>,
    pub flush: Mutex<Duration>,
    /// Stops that ended before the guest was stopped.
    pub overdue: AtomicU32,
    /// How often records were loaded into it.
    pub loads: AtomicU32,
    /// How long it takes to lock its disk, for so many stops.
    pub slow_locks: Mutex<(u32, Duration)>,
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

/// What a stop that waits for the disk is said to wait for.
pub const SLOW_DISK: &str = "draining disk `root`";

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

pub fn step(fail: Fail, here: Fail) -> Result<(), GuestError> {
    if fail == here {
        Err(GuestError::new(format!("scripted failure of {here:?}")))
    } else {
        Ok(())
    }
}

impl GuestControl for FakeSource {
    fn flush_ahead(&mut self, _: Instant) -> Result<PartTime, GuestError> {
        let took = *self.machine.flush.lock().unwrap();
        Ok(PartTime::new("flushing disk `shared`", took))
    }

    fn pause(&mut self, deadline: Instant) -> Result<Stopped, GuestError> {
        step(self.fail, Fail::Pause)?;
        let drain = PartTime::new(SLOW_DISK, *self.machine.drain.lock().unwrap());
        if Instant::now() + drain.took > deadline {
            self.machine.overdue.fetch_add(1, SeqCst);
            return Err(GuestError::Overdue(drain));
        }
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
        Ok(Stopped { permit, was_running, drains: vec![drain] })
    }

    fn save_records(&mut self) -> Result<Vec<DeviceRecord>, GuestError> {
        assert!(self.fail != Fail::PanicInSave, "scripted panic");
        step(self.fail, Fail::Save)?;
        // Saving a device may write RAM.
        self.ram.write_obj(0x77u8, GuestAddress(9 * PAGE_SIZE)).unwrap();
        let state = serde_json::json!({"answer": 42}).into();
        Ok(vec![DeviceRecord { kind: "fake".into(), instance: String::new(), version: 1, state }])
    }

    fn release_disks(&mut self, deadline: Instant) -> Result<PartTime, GuestError> {
        step(self.fail, Fail::Release)?;
        let flush = PartTime::new("flushing disk `shared`", *self.machine.flush.lock().unwrap());
        if Instant::now() + flush.took > deadline {
            return Err(GuestError::Overdue(flush));
        }
        self.disk.unlock("source");
        Ok(flush)
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

/// A description that a [`FakeHost`] builds until it is told to give up.
pub const SLOW_MACHINE: &str = "slow";

pub struct FakeHost {
    pub machine: Arc<Machine>,
    pub disk: Arc<Disk>,
    pub fail: Fail,
    pub ram: Option<GuestRam>,
    pub records: Vec<DeviceRecord>,
    pub disks: Vec<IncomingDisk>,
    /// What comes after the handover, if anything does.
    pub late: Option<Late>,
    pub bitmaps: Option<FakeBitmaps>,
}

impl DestinationHost for FakeHost {
    fn build(
        &mut self,
        description: &MachineDescription,
        go_on: GoOn<'_>,
    ) -> Result<Vec<Box<dyn Incoming>>, GuestError> {
        step(self.fail, Fail::Build)?;
        if description.machine == JsonText::of(&SLOW_MACHINE) {
            while go_on() {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            return Err(GuestError::new("told to give up"));
        }
        let layout = RamLayout::for_size(description.ram_bytes)
            .map_err(|error| GuestError::new(error.to_string()))?;
        let ram = GuestRam::from_ranges(&layout.ranges()).unwrap();
        self.ram = Some(ram.clone());
        let mut participants: Vec<Box<dyn Incoming>> = Vec::new();
        if !self.disks.is_empty() {
            participants.push(Box::new(DisksIncoming::new(self.disks.clone())));
        }
        participants.push(Box::new(RamIncoming::new(IncomingRam { ram, layout })));
        if let Some(bitmaps) = &self.bitmaps {
            participants.push(bitmaps.incoming());
        }
        if let Some(late) = self.late.as_ref().filter(|_| self.bitmaps.is_none()) {
            let machine = self.machine.clone();
            participants.push(Box::new(LateIncoming::new(late.clone(), machine)));
        }
        Ok(participants)
    }

    fn load_records(&mut self, records: Vec<DeviceRecord>) -> Result<(), GuestError> {
        self.records = records;
        self.machine.loads.fetch_add(1, SeqCst);
        step(self.fail, Fail::Load)
    }

    fn lock_disks(&mut self) -> Result<(), GuestError> {
        step(self.fail, Fail::Lock)?;
        self.disk.lock("destination", Duration::ZERO)?;
        let mut slow = self.machine.slow_locks.lock().unwrap();
        if let Some(left) = slow.0.checked_sub(1) {
            slow.0 = left;
            // Being slow is what it is for.
            std::thread::sleep(slow.1);
        }
        Ok(())
    }

    fn called_off(&mut self) -> Result<(), GuestError> {
        self.disk.unlock("destination");
        Ok(())
    }

    fn run(&mut self, permit: RunPermit, running: bool) -> Result<(), GuestError> {
        step(self.fail, Fail::Run)?;
        assert_eq!(self.disk.holder(), Some("destination"), "no guest runs on an unlocked disk");
        *self.machine.permit.lock().unwrap() = Some(permit);
        self.machine.running.store(running, SeqCst);
        if let Some(bitmaps) = &self.bitmaps {
            bitmaps.guest_runs_there();
        }
        Ok(())
    }

    fn abandon(&mut self) {
        assert!(!self.machine.running.load(SeqCst), "a running guest is not abandoned");
        self.machine.abandoned.fetch_add(1, SeqCst);
        self.disk.unlock("destination");
    }
}
