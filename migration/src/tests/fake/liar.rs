//! Peers that do not play by the rules, as the source or as the destination.

use super::machine::{Disk, Fail, FakeHost, Machine};
use super::{Ends, Scenario, boot, run_source};
use crate::block::IncomingDisk;
use crate::cancel::CancelToken;
use crate::destination::Destination;
use crate::error::chain;
use crate::source::SourceOutcome;
use crate::transport::Transport;
use crate::transport::memory::{MemoryLink, MemoryTransport};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

/// One end of all connections, for a peer that does not play by the rules.
pub struct Liar {
    pub main: MemoryTransport,
    pub data: Vec<MemoryTransport>,
    /// As many as data channels, whether or not they are used.
    pub disks: Vec<MemoryTransport>,
}

impl Liar {
    /// A liar and who is lied to.
    fn meet(channels: u16, patience: Duration) -> (Self, Ends) {
        let link = MemoryLink::new(None).with_patience(patience);
        let (main, main_in) = link.connect();
        let mut victim = Ends { main: Arc::new(main_in), data: Vec::new(), disks: Vec::new() };
        let mut liar = Self { main, data: Vec::new(), disks: Vec::new() };
        for _ in 0..channels {
            let (data, data_in) = link.connect();
            liar.data.push(data);
            victim.data.push(Arc::new(data_in));
            let (disks, disks_in) = link.connect();
            liar.disks.push(disks);
            victim.disks.push(Arc::new(disks_in));
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
        let mut host =
            FakeHost { machine: ours, disk, fail, ram, records, disks, late: None, bitmaps: None };
        let destination = Destination {
            host: &mut host,
            counters: Arc::default(),
            cancel: CancelToken::new(),
            give_up: CancelToken::new(),
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
