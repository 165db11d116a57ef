//! Migration jobs: at most one runs, on its own thread; its counters outlive it. Started and reaped by the
//! supervisor.

use super::dirty_rate::Aborted;
use super::guest::arriving::{ArrivingGuest, BuildContext};
use super::guest::leaving::LeavingGuest;
use super::guest::served::{ServedDisks, ServerHandle};
use super::messages::{JobId, Mailbox, Message};
use crate::boot::payload::BootPayload;
use crate::boot::transfer::LeavingFiles;
use crate::control::ClientId;
use crate::kvm::vm::Vm;
use crate::machine::description::Description;
use devices::block::BlockNode;
use devices::block::backend::GoOn;
use devices::block::job::Job as BlockJob;
use migration::bitmap::outgoing::{BitmapsOutgoing, SourceBitmap};
use migration::block::outgoing::DisksOutgoing;
use migration::block::{SourceDisk, SourceDisks};
use migration::boot::outgoing::BootOutgoing;
use migration::cancel::CancelToken;
use migration::destination::{Destination, DestinationError};
use migration::guest::{GuestError, RunPermit};
use migration::params::{Params, SharedParams};
use migration::participant::Outgoing;
use migration::ram::outgoing::RamOutgoing;
use migration::source::{AppliedThrottle, Source, SourceRam};
use migration::stats::{Counters, MigrationStatus};
use migration::transport::unix::SocketFile;
use migration::transport::{Address, Listener};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

/// Nice value of migration threads: about a third of a vCPU's share of a contended processor, so that a
/// busy guest rarely loses a whole scheduler tick.
const NICE: i32 = 5;

struct Job {
    id: JobId,
    incoming: bool,
    thread: JoinHandle<()>,
    tokens: Tokens,
    /// Its own parameters, which may change while it runs.
    params: SharedParams,
    owner: Owner,
}

/// What ends a migration early.
#[derive(Clone, Default)]
struct Tokens {
    /// Until the handover.
    cancel: CancelToken,
    /// After it: gives up what could wait.
    give_up: CancelToken,
}

/// Who started a migration.
#[derive(Debug, Clone, Default)]
pub struct Owner {
    /// The name by which a client follows it.
    pub name: Option<String>,
    /// The process ends once the guest has moved and this client has gone.
    pub ends_with: Option<ClientId>,
}

/// How many ended migrations can still be asked for by name.
const MAX_PAST: usize = 8;

/// What an outgoing migration needs.
pub struct Leaving {
    /// The machine.
    pub vm: Arc<Vm>,
    /// Its description; the migration thread adds backing files' digests and data sizes.
    pub description: Description,
    /// The dirty bitmaps that move.
    pub bitmaps: Vec<SourceBitmap>,
    /// Its boot payload, if known.
    pub payload: Option<Arc<BootPayload>>,
    /// All its disks.
    pub nodes: Vec<Arc<BlockNode>>,
    /// Mirrors that must be in sync when the guest leaves.
    pub mirrors: Vec<Arc<BlockJob>>,
    /// Must end first: it uses the dirty log.
    pub measurement: Option<Aborted>,
    /// Its own parameters.
    pub params: Params,
    /// Who has started it.
    pub owner: Owner,
}

/// The current migration, and the counters of that or the last one.
#[derive(Default)]
pub struct Jobs {
    current: Option<Job>,
    last_id: JobId,
    /// Counters of the running migration, or of the last one.
    pub counters: Arc<Counters>,
    /// Parameters of the next one.
    pub params: Params,
    /// Counters of earlier ones that have a name.
    past: VecDeque<(String, Arc<Counters>)>,
    /// The name of the running or last one.
    name: Option<String>,
    /// The machine being migrated; not its replacement after a reset.
    leaving: Weak<Vm>,
    /// The path at which a guest is received. Its thread has the listener, and is not waited for when the
    /// process ends.
    arriving_at: Option<Arc<SocketFile>>,
    /// The server of the images that it offers, which is not waited for either.
    offering: ServerHandle,
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
        params: Params,
        owner: Owner,
        mailbox: Mailbox,
        work: impl FnOnce(JobId, Arc<Counters>, Tokens, SharedParams) -> Message + Send + 'static,
    ) -> io::Result<()> {
        let id = JobId(self.last_id.0 + 1);
        self.last_id = id;
        let name = if incoming { "mig-in" } else { "mig-out" };
        let earlier = std::mem::take(&mut self.counters);
        if let Some(name) = std::mem::replace(&mut self.name, owner.name.clone()) {
            self.past.truncate(MAX_PAST - 1);
            self.past.push_front((name, earlier));
        }
        let (tokens, params) = (Tokens::default(), SharedParams::new(params));
        let (counters, to_thread, shared) = (self.counters.clone(), tokens.clone(), params.clone());
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(512 << 10)
            .spawn(move || {
                yield_to_guests();
                // Unwinding resumes the guest or drops what has arrived; here its end is reported.
                let work = AssertUnwindSafe(|| work(id, counters, to_thread, shared));
                let end = catch_unwind(work);
                mailbox.post(end.unwrap_or(Message::MigrationPanicked(id)));
            })?;
        self.current = Some(Job { id, incoming, thread, tokens, params, owner });
        Ok(())
    }

    /// Starts an outgoing migration.
    pub fn send(
        &mut self,
        to: Address,
        leaving: Leaving,
        ram: SourceRam,
        disks: SourceDisks,
        mailbox: Mailbox,
    ) -> io::Result<()> {
        let Leaving {
            vm,
            mut description,
            bitmaps,
            payload,
            nodes,
            mirrors,
            measurement,
            params,
            owner,
        } = leaving;
        self.leaving = Arc::downgrade(&vm);
        let migrated = disks.disks.iter().map(|disk| disk.node.id().to_owned()).collect();
        let to_us = mailbox.clone();
        self.spawn(false, params, owner, to_us, move |id, counters, tokens, params| {
            let Tokens { cancel, give_up } = tokens;
            if let Some(measurement) = measurement {
                measurement.join();
            }
            let mut guest =
                LeavingGuest::new(mailbox.clone(), cancel.clone(), nodes, migrated, mirrors);
            let mut events = |event| mailbox.post(Message::Migration(event));
            let (leaving, token) = (disks.disks.clone(), cancel.clone());
            let participants = participants(payload, disks, bitmaps, ram, params.get().channels());
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
                throttle: AppliedThrottle::default(),
                cancel,
                give_up,
                events: &mut events,
            };
            Message::OutgoingEnded(id, source.migrate(&to))
        })
    }

    /// Starts an incoming migration.
    pub fn receive(
        &mut self,
        listener: Listener,
        context: BuildContext,
        served: ServedDisks,
        mailbox: Mailbox,
    ) -> io::Result<()> {
        let address = socket_address(listener.local_address());
        self.arriving_at = listener.file();
        self.offering = served.server();
        let (params, owner, to_us) = (Params::default(), Owner::default(), mailbox.clone());
        self.spawn(true, params, owner, to_us, move |id, counters, tokens, params| {
            let Tokens { cancel, give_up } = tokens;
            counters.listening(address);
            let mut host =
                ArrivingGuest::new(mailbox.clone(), cancel.clone(), params, context, served);
            let mut events = |event| mailbox.post(Message::Migration(event));
            let events = &mut events;
            let destination = Destination { host: &mut host, counters, cancel, give_up, events };
            let result = destination.receive(&listener);
            // The address is free again for a guest that migrates back.
            drop(listener);
            let result = result.map_err(|error: DestinationError| crate::error::chain(&error));
            host.clean_up();
            Message::IncomingEnded(id, result)
        })
    }

    /// Whether `vm` is being migrated.
    pub fn moves(&self, vm: &Arc<Vm>) -> bool {
        self.leaving.as_ptr() == Arc::as_ptr(vm)
    }

    /// Cancels the migration, which reports its end.
    pub fn cancel(&self) {
        if let Some(job) = &self.current {
            self.counters.cancelling();
            job.tokens.cancel.cancel();
        }
    }

    /// Whether the guest has moved, and the running migration sends or receives what could wait.
    pub fn is_past_handover(&self) -> bool {
        self.busy() && self.counters.snapshot().status == MigrationStatus::PostcopyActive
    }

    /// Gives up what could wait, if that is all that is left.
    pub fn give_up(&self) {
        if let Some(job) = self.current.as_ref().filter(|_| self.is_past_handover()) {
            job.tokens.give_up.cancel();
        }
    }

    /// Joins the thread of migration `id`, unless already joined; returns who had started it.
    pub fn reap(&mut self, id: JobId) -> Option<Owner> {
        let job = self.current.take_if(|job| job.id == id)?;
        if job.thread.join().is_err() {
            log::error!("the migration thread panicked");
        }
        Some(job.owner)
    }

    /// The name of the running migration.
    pub fn running_name(&self) -> Option<&str> {
        self.current.as_ref()?.owner.name.as_deref()
    }

    /// The parameters of the running migration, or of the next one.
    pub fn params_now(&self) -> Params {
        self.current.as_ref().map_or_else(|| self.params.clone(), |job| job.params.get())
    }

    /// Changes parameters: of the running migration, and of the next ones. None of them on error.
    pub fn change_params<E>(
        &mut self,
        change: impl Fn(Params) -> Result<Params, E>,
    ) -> Result<(), E> {
        let params = change(self.params.clone())?;
        if let Some(job) = &self.current {
            job.params.set(change(job.params.get())?);
        }
        self.params = params;
        Ok(())
    }

    /// The statistics of the migration called `name`, or of the running or last one. `None` if it is not
    /// known any more.
    pub fn info(&self, name: Option<&str>) -> Option<Value> {
        let of = |name: Option<&str>, counters: &Counters| {
            let mut info = counters.snapshot().to_json();
            if let Some(name) = name {
                info["x-id"] = name.into();
            }
            info
        };
        let last = || of(self.name.as_deref(), &self.counters);
        match name {
            None => Some(last()),
            Some(name) if self.name.as_deref() == Some(name) => Some(last()),
            Some(name) => {
                let past = self.past.iter().find(|(past, _)| past == name);
                past.map(|(name, counters)| of(Some(name), counters))
            }
        }
    }

    /// For a guest that runs, is paused or has been handed over: whether a migration has ended but its thread has not
    /// reported that yet. A client may know of the end already and send its next command, which then waits for the
    /// report.
    pub fn has_unreported_end(&self) -> bool {
        // The status that clients see.
        let status = self.counters.snapshot().status;
        let arriving = status != MigrationStatus::PostcopyActive;
        let unreported = |job: &Job| job.incoming && arriving || status.is_over();
        self.current.as_ref().is_some_and(unreported)
    }

    /// Whether migration `id` brings a guest.
    pub fn brings(&self, id: JobId) -> bool {
        self.current.as_ref().is_some_and(|job| job.id == id && job.incoming)
    }

    /// Whether a guest is incoming, and not here yet.
    pub fn is_arriving(&self) -> bool {
        self.current.as_ref().is_some_and(|job| job.incoming) && !self.is_past_handover()
    }

    /// The process ends, for this reason if the peer is to know it: cancels the migration without joining its thread,
    /// which may be waiting for a reply of the supervisor.
    pub fn abandon(&mut self, reason: Option<&str>) {
        if let Some(socket) = self.arriving_at.take() {
            socket.remove();
        }
        self.offering.abandon();
        if let Some(job) = self.current.take() {
            job.tokens.cancel.cancel_because(reason);
            job.tokens.give_up.cancel();
        }
    }
}

/// The participants, in the order of sending: slowest first, because RAM sent earlier would get dirty
/// again.
fn participants(
    payload: Option<Arc<BootPayload>>,
    disks: SourceDisks,
    bitmaps: Vec<SourceBitmap>,
    ram: SourceRam,
    channels: u16,
) -> Vec<Box<dyn Outgoing>> {
    let mut all: Vec<Box<dyn Outgoing>> = Vec::with_capacity(4);
    all.push(Box::new(BootOutgoing::new(Box::new(LeavingFiles(payload)))));
    if !disks.disks.is_empty() {
        all.push(Box::new(DisksOutgoing::new(disks, channels)));
    }
    if !bitmaps.is_empty() {
        all.push(Box::new(BitmapsOutgoing::new(bitmaps)));
    }
    all.push(Box::new(RamOutgoing::new(ram, channels)));
    all
}

/// Adds the data sizes of migrated disks and the digests of their backing files to a description. Reads
/// whole backing files, so it runs on the migration thread.
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

/// Estimated bytes of a disk to send.
fn data_bytes(disk: &SourceDisk) -> io::Result<u64> {
    let own_bytes = disk.node.allocated_bytes()?;
    // Compressed clusters below need more space at the destination, which notices only when it writes.
    let below = match disk.node.backing().filter(|_| !disk.only_top) {
        Some(below) => below.allocated_bytes()?,
        None => 0,
    };
    Ok(own_bytes.saturating_add(below).min(disk.node.len_bytes()))
}

/// Lowers the priority of the calling thread, and those that it spawns, below the vCPUs'.
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

/// The right to run, claimed by the operator: a guest whose migration ended as unknown runs nowhere else.
pub fn operators_permit() -> RunPermit {
    RunPermit::claimed_by_operator()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_thread_that_panics_is_reported_and_keeps_no_migration_busy() {
        for (surrendered, incoming) in [(false, false), (true, false), (false, true)] {
            let (mailbox, inbox) = crate::event_loop::mailbox_for_test();
            let mut jobs = Jobs::default();
            let owner = Owner { name: Some("one".into()), ends_with: None };
            let work = |_, _, _, _| panic!("as a test wants it");
            jobs.spawn(incoming, Params::default(), owner, mailbox, work).unwrap();
            let Ok(Message::MigrationPanicked(id)) = inbox.recv_timeout(Duration::from_secs(30))
            else {
                panic!("nothing was said of it");
            };
            assert_eq!(jobs.brings(id), incoming);
            jobs.counters.panicked(surrendered);
            jobs.reap(id);
            assert!(!jobs.busy());
            let info = jobs.info(Some("one")).unwrap();
            assert_eq!(info["status"], "failed", "{info}");
            assert_eq!(info["x-outcome"] == "unknown", surrendered, "{info}");
            assert!(info["error-desc"].as_str().unwrap().contains("panicked"), "{info}");
        }
    }
}
