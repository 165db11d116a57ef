//! Migrations: at most one runs, on a thread of its own; its counters outlive it.

use super::dirty_rate::Aborted;
use super::guest::arriving::{ArrivingGuest, BuildContext};
use super::guest::leaving::LeavingGuest;
use super::messages::{Mailbox, Message};
use crate::boot::payload::BootPayload;
use crate::boot::transfer::LeavingFiles;
use crate::kvm::vm::Vm;
use crate::machine::description::Description;
use devices::block::BlockNode;
use devices::block::backend::GoOn;
use migration::block::outgoing::DisksOutgoing;
use migration::block::{SourceDisk, SourceDisks};
use migration::boot::outgoing::BootOutgoing;
use migration::cancel::CancelToken;
use migration::destination::{Destination, DestinationError};
use migration::guest::{GuestError, RunPermit};
use migration::params::SharedParams;
use migration::participant::Outgoing;
use migration::ram::outgoing::RamOutgoing;
use migration::source::{Source, SourceRam};
use migration::stats::Counters;
use migration::transport::{Address, Listener};
use serde_json::{Value, json};
use std::io;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

/// What migrations are nice by, a third of a vCPU's share of a processor that both want. A guest that
/// computes while it moves then seldom loses a whole tick of the scheduler's to it.
const NICE: i32 = 5;

/// One of this process's migrations, which come one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JobId(u64);

struct Job {
    id: JobId,
    incoming: bool,
    thread: JoinHandle<()>,
    cancel: CancelToken,
}

/// What leaves.
pub struct Leaving {
    /// The machine.
    pub vm: Arc<Vm>,
    /// What it is; what its disks stand on, and how much they hold, is found out on the way.
    pub description: Description,
    /// What it boots from when it is reset, if that is known.
    pub payload: Option<Arc<BootPayload>>,
    /// All its disks.
    pub nodes: Vec<Arc<BlockNode>>,
    /// Uses the dirty log until it has ended.
    pub measurement: Option<Aborted>,
}

/// The migration at work, and what is known of it or of the last one.
#[derive(Default)]
pub struct Jobs {
    current: Option<Job>,
    last_id: JobId,
    /// Counters of the running migration, or of the last one.
    pub counters: Arc<Counters>,
    /// Parameters, also while it runs.
    pub params: SharedParams,
    /// The machine that leaves. Another one in its place, after a reset, is not it.
    leaving: Weak<Vm>,
    /// The `events` capability.
    pub events_wanted: bool,
}

impl Jobs {
    /// Whether a migration runs.
    pub fn busy(&self) -> bool {
        self.current.is_some()
    }

    fn spawn(
        &mut self,
        incoming: bool,
        work: impl FnOnce(JobId, Arc<Counters>, CancelToken, SharedParams) + Send + 'static,
    ) -> io::Result<()> {
        let id = JobId(self.last_id.0 + 1);
        self.last_id = id;
        let name = if incoming { "mig-in" } else { "mig-out" };
        self.counters = Arc::default();
        let cancel = CancelToken::new();
        let (counters, token, params) =
            (self.counters.clone(), cancel.clone(), self.params.clone());
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(512 << 10)
            .spawn(move || {
                yield_to_guests();
                work(id, counters, token, params);
            })?;
        self.current = Some(Job { id, incoming, thread, cancel });
        Ok(())
    }

    /// Starts moving the guest away.
    pub fn send(
        &mut self,
        to: Address,
        leaving: Leaving,
        ram: SourceRam,
        disks: SourceDisks,
        mailbox: Mailbox,
    ) -> io::Result<()> {
        let Leaving { vm, mut description, payload, nodes, measurement } = leaving;
        self.leaving = Arc::downgrade(&vm);
        let migrated = disks.disks.iter().map(|disk| disk.node.id().to_owned()).collect();
        self.spawn(false, move |id, counters, cancel, params| {
            if let Some(measurement) = measurement {
                measurement.join();
            }
            let mut guest = LeavingGuest::new(mailbox.clone(), cancel.clone(), nodes, migrated);
            let mut events = |event| mailbox.post(Message::Migration(event));
            let (leaving, token) = (disks.disks.clone(), cancel.clone());
            let participants = participants(payload, disks, ram, params.get().channels());
            let mut machine = || {
                identify(&mut description, &leaving, &|| !token.is_cancelled())?;
                Ok(description.to_stream())
            };
            let source = Source {
                guest: &mut guest,
                machine: &mut machine,
                participants,
                params,
                counters,
                cancel,
                events: &mut events,
            };
            let outcome = source.migrate(&to);
            mailbox.post(Message::OutgoingEnded(id, outcome));
        })
    }

    /// Starts waiting for a guest.
    pub fn receive(
        &mut self,
        listener: Listener,
        context: BuildContext,
        mailbox: Mailbox,
    ) -> io::Result<()> {
        let address = socket_address(listener.local_address());
        self.spawn(true, move |id, counters, cancel, _| {
            counters.listening(address);
            let mut host = ArrivingGuest::new(mailbox.clone(), cancel.clone(), context);
            let mut events = |event| mailbox.post(Message::Migration(event));
            let destination =
                Destination { host: &mut host, counters, cancel, events: &mut events };
            let result = destination.receive(&listener);
            // A source that wants to come back here finds the address free.
            drop(listener);
            let result = result.map_err(|error: DestinationError| crate::error::chain(&error));
            host.clean_up();
            mailbox.post(Message::IncomingEnded(id, result));
        })
    }

    /// Whether it is this machine that leaves.
    pub fn moves(&self, vm: &Arc<Vm>) -> bool {
        self.leaving.as_ptr() == Arc::as_ptr(vm)
    }

    /// Asks the migration to end; it says when it has.
    pub fn cancel(&self) {
        if let Some(job) = &self.current {
            self.counters.cancelling();
            job.cancel.cancel();
        }
    }

    /// Joins the thread of migration `id`, unless that was done already.
    pub fn reap(&mut self, id: JobId) {
        if let Some(job) = self.current.take_if(|job| job.id == id)
            && job.thread.join().is_err()
        {
            log::error!("the migration thread panicked");
        }
    }

    /// For a guest that runs or is paused here: whether a migration is over but for saying so. Who has
    /// heard of its end from elsewhere may ask for the next, which then waits for that.
    pub fn has_unreported_end(&self) -> bool {
        // The question is what clients may have heard, and this is what they are told.
        let ended = self.counters.snapshot().status.is_over();
        self.current.as_ref().is_some_and(|job| job.incoming || ended)
    }

    /// Whether a guest is arriving.
    pub fn is_arriving(&self) -> bool {
        self.current.as_ref().is_some_and(|job| job.incoming)
    }

    /// The process ends: wakes the migration's thread and leaves it. It cannot be waited for, since it
    /// may wait for an answer of the supervisor's.
    pub fn abandon(&mut self) {
        if let Some(job) = self.current.take() {
            job.cancel.cancel();
        }
    }
}

/// What travels besides the devices, in the order in which it is sent: what takes longest first, since RAM
/// that was sent before would have to go again.
fn participants(
    payload: Option<Arc<BootPayload>>,
    disks: SourceDisks,
    ram: SourceRam,
    channels: u16,
) -> Vec<Box<dyn Outgoing>> {
    let mut all: Vec<Box<dyn Outgoing>> = Vec::with_capacity(3);
    if let Some(payload) = payload {
        all.push(Box::new(BootOutgoing::new(Box::new(LeavingFiles(payload)))));
    }
    if !disks.disks.is_empty() {
        all.push(Box::new(DisksOutgoing::new(disks)));
    }
    all.push(Box::new(RamOutgoing::new(ram, channels)));
    all
}

/// Completes a description with how much the disks hold that travel, and with what those stand on of which
/// only the top does: the storage is asked, and all of that is read, so it is for the thread that migrates.
fn identify(
    description: &mut Description,
    leaving: &[SourceDisk],
    go_on: GoOn<'_>,
) -> Result<(), GuestError> {
    for described in &mut description.disks {
        let disk = leaving.iter().find(|disk| disk.node.id() == described.id);
        if let (Some(disk), Some(travels)) = (disk, &mut described.travels) {
            travels.data_bytes = data_bytes(disk)
                .map_err(|error| GuestError::new(format!("disk {}: {error}", described.id)))?;
        }
        let backing = described.travels.as_mut().and_then(|travels| travels.backing.as_mut());
        let (Some(disk), Some(backing)) = (disk, backing) else { continue };
        let (id, name) = (&described.id, &backing.name);
        let failed = |error: io::Error| {
            GuestError::new(format!("disk {id}: cannot read backing file {name}: {error}"))
        };
        let chain = disk.node.backing().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        backing.sha256 = chain.digest(go_on).map_err(failed)?;
        log::info!("disk {id}: backing file {name} has SHA-256 {}", backing.sha256);
    }
    Ok(())
}

/// About how much of a disk travels.
fn data_bytes(disk: &SourceDisk) -> io::Result<u64> {
    let own_bytes = disk.node.allocated_bytes()?;
    // What is packed in a file below takes more at the destination: it finds out as it writes.
    let below = match disk.node.backing().filter(|_| !disk.only_top) {
        Some(below) => below.allocated_bytes()?,
        None => 0,
    };
    Ok(own_bytes.saturating_add(below).min(disk.node.len_bytes()))
}

/// Has the calling thread, and those that it starts, come behind the vCPUs where processors are few.
fn yield_to_guests() {
    let thread = Some(rustix::thread::gettid());
    if let Err(error) = rustix::process::setpriority_process(thread, NICE) {
        log::debug!("a migration's threads keep their priority: {error}");
    }
}

/// As QEMU's `SocketAddress`.
fn socket_address(address: &Address) -> Value {
    match address {
        Address::Unix(path) => json!({"type": "unix", "path": path.to_string_lossy()}),
        Address::Tcp(host_port) => {
            let (host, port) = host_port.rsplit_once(':').unwrap_or((host_port, ""));
            json!({"type": "inet", "host": host, "port": port})
        }
    }
}

/// The operator's word that a guest whose migration ended as unknown runs nowhere else.
pub fn operators_permit() -> RunPermit {
    RunPermit::claimed_by_operator()
}
