//! Transitions of the machine, one at a time, each with a task for its slow part:
//!
//! ```text
//!  boot    build ─▶ run
//!  cont    lock the disks, if they may not be ours ─▶ run
//!  reset   build the new machine ─▶ stop the old one, wait for its requests ─▶ swap ─▶ run
//!          (any step fails: the old one goes on, or stays as it was)
//! ```
//! `stop` stops the vCPUs at once and replies when the requests in flight have ended; `cont` need not wait
//! for that.

use super::backends::BackendParts;
use super::messages::MachineId;
use super::tasks::{self, Done, TaskId, wait_in_steps};
use super::{Mode, Supervisor, ending};
use crate::boot::payload::BootPayload;
use crate::config::RunConfig;
use crate::control::command::Command;
use crate::control::message::QmpError;
use crate::control::{Event, Incoming, QmpResult};
use crate::error::chain;
use crate::exit_code::{self, Exit};
use crate::footprint;
use crate::kvm::Host;
use crate::log_queue::say;
use crate::machine::build::NewMachine;
use crate::machine::description::{Description, Platform};
use crate::machine::drain::Drains;
use crate::machine::run_state::RunState;
use crate::machine::vcpus::VcpusError;
use crate::machine::{Machine, MachineError, lock_disks};
use crate::setup::SetupError;
use devices::block::backend::GoOn;
use devices::block::{BlockNode, open_image};
use migration::guest::{PartTime, RunPermit};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long `stop` waits for the requests in flight before it fails.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// How long a reset waits for them.
const RESET_DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// How long building a machine for a reset may take: its kernel is read again.
const RESET_BUILD_LIMIT: Duration = Duration::from_secs(20);
/// How long locking the disks may take.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

/// A transition of the machine.
pub(super) enum Transition {
    /// The first machine is being built.
    Boot(MachineId),
    /// The disks are being locked for a resume.
    Lock(Incoming),
    /// The machine is being replaced.
    Reset(Reset),
}

/// A reset in progress.
pub(super) struct Reset {
    /// The client's request, if a client requested it.
    request: Option<Incoming>,
    /// Requested by the guest, which cannot continue without it.
    by_guest: bool,
    /// Whether to run the new machine.
    runs: bool,
    new_id: MachineId,
    /// The new machine, once it is built and the old one is being drained.
    new: Option<Box<Machine>>,
}

/// A drain in progress, and the requests that wait for it.
pub(super) struct Stopping {
    pub task: TaskId,
    pub requests: Vec<Incoming>,
}

impl Supervisor {
    /// Whether a command must wait: for a transition that changes the same state, or for the report of a
    /// migration that has ended.
    pub(super) fn must_wait(&self, command: &Command) -> bool {
        if self.ending.is_some() {
            return false;
        }
        let in_transition = self.transition.is_some();
        match command {
            // Its outcome decides where the guest is stopped.
            Command::Stop => in_transition || self.state == RunState::FinishMigrate,
            Command::Cont { .. }
            | Command::Reset
            | Command::Migrate { .. }
            | Command::CalcDirtyRate(_) => {
                let is_affected = match self.state {
                    // A guest that runs, or is about to, needs no report.
                    RunState::Running | RunState::Paused => {
                        !matches!(command, Command::Cont { .. })
                    }
                    // It is taken back only from a migration that has ended.
                    RunState::Postmigrate => true,
                    _ => false,
                };
                in_transition || is_affected && self.jobs.has_unreported_end()
            }
            // Its disks are not open yet.
            Command::ChangeBitmaps(_)
            | Command::StoreBitmaps { .. }
            | Command::Export(_)
            | Command::BitmapSha256 { .. } => {
                matches!(self.transition, Some((_, Transition::Boot(_))))
            }
            _ => false,
        }
    }

    /// Whether the old machine is stopped for its replacement.
    pub(super) fn is_swapping(&self) -> bool {
        matches!(&self.transition, Some((_, Transition::Reset(reset))) if reset.new.is_some())
    }

    /// Starts to build the configured machine.
    pub(super) fn boot(
        &mut self,
        config: RunConfig,
        platform: Platform,
        payload: Arc<BootPayload>,
    ) -> Result<(), SetupError> {
        let host = self.host.clone();
        let (id, parts) = self.backend_parts();
        let build = move |cancel: &tasks::Cancel| {
            let go_on = || !cancel.is_cancelled();
            Done::Built(build_first(&host, config, platform, &payload, parts, &go_on))
        };
        let started = self.tasks.start("boot", None, build);
        let task =
            started.map_err(SetupError::start("start the thread that builds the machine"))?;
        self.transition = Some((task, Transition::Boot(id)));
        Ok(())
    }

    /// The boot payload for a reset: opened at the start or received with the guest.
    fn boot_files(&self) -> Result<Arc<BootPayload>, &'static str> {
        self.payload.clone().ok_or("its kernel is not here: give --kernel to ferry receive")
    }

    /// A wanted task has ended.
    pub(super) fn on_task_ended(&mut self, id: TaskId, done: Done) {
        if let Some((_, transition)) = self.transition.take_if(|(task, _)| *task == id) {
            return self.on_step(transition, done);
        }
        if let Some(stopping) = self.stopping.take_if(|stopping| stopping.task == id) {
            let result = stopped(done);
            for request in stopping.requests {
                self.answer(&request, result.clone());
            }
            return;
        }
        let Some(done) = self.on_bitmaps_done(id, done) else { return };
        let Some(done) = self.on_target_opened(id, done) else { return };
        let Some(done) = self.on_exports_done(id, done) else { return };
        match done {
            Done::Flushed(late) => self.on_flushed(id, &late),
            // Even if some have not responded.
            Done::Sized => self.on_sized(id),
            Done::Nothing => {
                self.on_sized(id);
                let late = PartTime::not_ended("draining devices", Duration::ZERO);
                self.on_flushed(id, &[late]);
            }
            Done::Built(Ok(machine)) => tasks::discard(machine),
            Done::Built(Err(_))
            | Done::Drained(_)
            | Done::Locked(_)
            | Done::Bitmaps(_)
            | Done::Begun(_)
            | Done::Opened(_)
            | Done::Exports(_) => {}
        }
    }

    fn on_step(&mut self, transition: Transition, done: Done) {
        match transition {
            Transition::Boot(id) => match done {
                Done::Built(Ok(machine)) => self.on_booted(id, machine),
                Done::Built(Err(error)) => self.cannot_boot(&chain(&error)),
                _ => self.cannot_boot("building the machine failed"),
            },
            Transition::Lock(request) => {
                let locked = match done {
                    Done::Locked(result) => result.map_err(QmpError::generic),
                    _ => Err(QmpError::generic("the disks cannot be locked in time")),
                };
                let result = locked.and_then(|()| self.resume());
                self.answer(&request, result.map(|()| json!({})));
            }
            Transition::Reset(reset) => self.on_reset_step(reset, done),
        }
    }

    fn on_booted(&mut self, id: MachineId, mut machine: Box<Machine>) {
        machine.grant(RunPermit::cold_boot());
        self.console.attach(machine.serial().clone());
        self.machine_id = id;
        self.machine = Some(machine);
        if matches!(&self.mode, Mode::Run(config) if config.paused) {
            self.become_state(RunState::Paused);
        } else if let Err(error) = self.start() {
            return self.fail(&chain(&error));
        }
        footprint::return_start_memory();
    }

    fn cannot_boot(&mut self, why: &str) {
        let exit = Exit::new(exit_code::CANNOT_RUN, why);
        self.end(exit, &Event::ending("SHUTDOWN", false, "host-error"));
    }

    /// Starts a new machine.
    fn start(&mut self) -> Result<(), MachineError> {
        if let Some(machine) = &mut self.machine {
            machine.run()?;
            self.become_state(RunState::Running);
        }
        Ok(())
    }

    /// Stops the guest for the user. The reply comes when its requests have ended.
    pub(super) fn stop(&mut self, request: &Incoming) -> Option<QmpResult> {
        let may_have_requests =
            matches!(self.state, RunState::Running | RunState::Paused | RunState::IoError);
        if self.state == RunState::Postmigrate {
            let desc = "The guest has been handed over: stop it at the destination";
            return Some(Err(QmpError::generic(desc)));
        }
        if let (RunState::Inmigrate, Mode::Receive(config)) = (self.state, &mut self.mode) {
            // It arrives paused, as in QEMU.
            config.paused = true;
        }
        let machine = self.machine.as_mut().filter(|_| may_have_requests);
        let Some(machine) = machine else { return Some(Ok(json!({}))) };
        let drains = match machine.begin_pause() {
            Ok(drains) => drains,
            Err(error) => {
                let why = chain(&error);
                if !matches!(error, MachineError::Vcpus(VcpusError::Stuck { .. })) {
                    self.fail(&why);
                }
                return Some(Err(QmpError::generic(why)));
            }
        };
        machine.flush_output();
        if self.state == RunState::Running {
            if let Some(pausing) = &mut self.pausing {
                // It arrives paused, or stays paused here if the migration fails.
                pausing.was_running = false;
            }
            self.become_state(RunState::Paused);
            self.tell(&Event::plain("STOP"));
        }
        // The guest may have run since an earlier `stop`: what that waits for may not be all.
        let mut requests = Vec::new();
        if let Some(earlier) = self.stopping.take() {
            self.tasks.give_up(earlier.task);
            requests = earlier.requests;
        }
        requests.push(request.clone());
        match self.wait_for(drains, STOP_LIMIT) {
            Ok(task) => self.stopping = Some(Stopping { task, requests }),
            Err(error) => {
                for request in requests {
                    self.answer(&request, Err(QmpError::generic(error.clone())));
                }
            }
        }
        None
    }

    /// Starts a task that waits for the requests in flight.
    fn wait_for(&mut self, mut drains: Drains, limit: Duration) -> Result<TaskId, String> {
        let deadline = Instant::now() + limit;
        let wait = move |cancel: &tasks::Cancel| {
            let go_on = || !cancel.is_cancelled();
            let ended = wait_in_steps(deadline, &go_on, &mut |until| drains.wait_until(until));
            Done::Drained(if ended { Ok(()) } else { Err(drains.late()) })
        };
        self.tasks.start("drain", None, wait).map_err(|error| format!("cannot wait: {error}"))
    }

    /// Resumes the guest; its disks must be locked.
    pub(super) fn resume(&mut self) -> Result<(), QmpError> {
        if let Some(pausing) = self.pausing.as_mut().filter(|_| self.state == RunState::Paused) {
            // The migration has stopped it, too, and will resume it.
            pausing.was_running = true;
        } else if let Some(machine) = &mut self.machine {
            machine.run().map_err(|error| QmpError::generic(chain(&error)))?;
        } else {
            return Err(QmpError::generic("There is no machine"));
        }
        self.become_state(RunState::Running);
        self.tell(&Event::plain("RESUME"));
        Ok(())
    }

    /// Locks the disks, which may have been unlocked, then resumes the guest.
    pub(super) fn lock_and_resume(&mut self, request: &Incoming) -> Option<QmpResult> {
        // Without a machine there are no disks.
        let nodes = self.machine.as_ref().map(|machine| machine.nodes()).unwrap_or_default();
        let lock = move |_: &_| Done::Locked(lock_disks(&nodes).map_err(|error| chain(&error)));
        match self.tasks.start("lock", Some(LOCK_LIMIT), lock) {
            Ok(task) => self.transition = Some((task, Transition::Lock(request.clone()))),
            Err(error) => return Some(Err(QmpError::generic(chain(&error)))),
        }
        None
    }

    /// The guest has requested a reset.
    pub(super) fn guest_wants_reset(&mut self) {
        if self.ending.is_some() {
            return;
        }
        if let Some((_, Transition::Reset(reset))) = &mut self.transition {
            reset.by_guest = true;
            return;
        }
        if let Some((task, transition)) = self.transition.take() {
            // The guest has run before and cannot continue: end a pending resume.
            self.tasks.give_up(task);
            for request in self.give_up_transition(transition) {
                let desc = "the guest has asked for a reset meanwhile";
                self.answer(&request, Err(QmpError::generic(desc)));
            }
        }
        if let Some(machine) = &self.machine
            && self.jobs.busy()
            && self.jobs.moves(machine.vm())
        {
            say("the guest was reset while it moved: that ends here, start it again");
            self.jobs.cancel();
        }
        self.reset(true, None);
    }

    /// Replaces the machine by a new one that boots. The reply to `request` comes when that is done.
    pub(super) fn reset(&mut self, by_guest: bool, request: Option<Incoming>) {
        let runs = self.state == RunState::Running || by_guest;
        let (new_id, parts) = self.backend_parts();
        let reset = Reset { request, by_guest, runs, new_id, new: None };
        let Some(machine) = &self.machine else {
            return self.cannot_reset(reset, "there is no machine");
        };
        let payload = match self.boot_files() {
            Ok(payload) => payload,
            Err(why) => return self.cannot_reset(reset, why),
        };
        let (description, nodes) = (machine.description().clone(), machine.nodes());
        let host = self.host.clone();
        let build = move |cancel: &tasks::Cancel| {
            let go_on = || !cancel.is_cancelled();
            Done::Built(build_again(&host, &payload, description, nodes, parts, &go_on))
        };
        match self.tasks.start("reset", Some(RESET_BUILD_LIMIT), build) {
            Ok(task) => self.transition = Some((task, Transition::Reset(reset))),
            Err(error) => self.cannot_reset(reset, &chain(&error)),
        }
    }

    fn on_reset_step(&mut self, mut reset: Reset, done: Done) {
        match (done, reset.new.take()) {
            (Done::Built(Ok(new)), None) => {
                reset.new = Some(new);
                self.drain_for_reset(reset);
            }
            (Done::Built(Err(error)), None) => self.cannot_reset(reset, &chain(&error)),
            (Done::Drained(Ok(())), Some(new)) => self.swap(reset, new),
            (done, new) => {
                if let Some(new) = new {
                    tasks::discard(new);
                }
                let why = match done {
                    Done::Drained(Err(late)) => in_words(&late),
                    _ => "building the machine takes too long".to_owned(),
                };
                self.cannot_reset(reset, &why);
            }
        }
    }

    /// The new machine is built: stops the old one.
    fn drain_for_reset(&mut self, reset: Reset) {
        let drains = match &mut self.machine {
            Some(machine) => machine.begin_pause().map_err(|error| chain(&error)),
            None => Err("there is no machine".to_owned()),
        };
        match drains.and_then(|drains| self.wait_for(drains, RESET_DRAIN_LIMIT)) {
            Ok(task) => self.transition = Some((task, Transition::Reset(reset))),
            Err(why) => self.cannot_reset(reset, &why),
        }
    }

    /// The old machine is drained: swaps in the new one.
    fn swap(&mut self, reset: Reset, mut new: Box<Machine>) {
        self.dirty_rate.abort();
        self.console.detach();
        new.grant(RunPermit::cold_boot());
        self.console.attach(new.serial().clone());
        self.machine_id = reset.new_id;
        if let Some(old) = self.machine.replace(new) {
            tasks::discard(old);
        }
        let reason = if reset.by_guest { "guest-reset" } else { "host-qmp-system-reset" };
        self.tell(&Event::ending("RESET", reset.by_guest, reason));
        self.state = RunState::Prelaunch;
        let started = if reset.runs {
            self.start()
        } else {
            self.become_state(RunState::Paused);
            Ok(())
        };
        let result = started.map_err(|error| chain(&error));
        if let Some(request) = &reset.request {
            self.answer(request, result.clone().map(|()| json!({})).map_err(QmpError::generic));
        }
        if let Err(why) = result {
            self.fail(&why);
        }
    }

    /// The reset failed: the old machine stays, and resumes unless it requested the reset.
    fn cannot_reset(&mut self, reset: Reset, why: &str) {
        let why = format!("cannot reset the guest: {why}");
        if let Some(new) = reset.new {
            tasks::discard(new);
        }
        let was_running = self.state == RunState::Running && !reset.by_guest;
        let resumed = match &mut self.machine {
            Some(machine) if was_running => machine.run().map_err(|error| chain(&error)),
            _ => Ok(()),
        };
        if let Some(request) = &reset.request {
            self.answer(request, Err(QmpError::generic(why.clone())));
        }
        match resumed {
            Err(error) => self.fail(&error),
            Ok(()) if reset.by_guest => self.fail(&why),
            Ok(()) => {}
        }
    }

    /// Drops a transition; returns the requests that wait for it.
    pub(super) fn give_up_transition(&mut self, transition: Transition) -> Vec<Incoming> {
        match transition {
            Transition::Boot(_) => Vec::new(),
            Transition::Lock(request) => vec![request],
            Transition::Reset(reset) => {
                if let Some(new) = reset.new {
                    tasks::discard(new);
                }
                reset.request.into_iter().collect()
            }
        }
    }
}

/// The reply to `stop`.
fn stopped(done: Done) -> QmpResult {
    match done {
        Done::Drained(Ok(())) => Ok(json!({})),
        Done::Drained(Err(late)) => Err(QmpError::generic(format!(
            "the guest is stopped, but not its disks: {}",
            in_words(&late)
        ))),
        _ => Err(ending::shutting_down()),
    }
}

fn in_words(late: &[PartTime]) -> String {
    late.iter().map(PartTime::to_string).collect::<Vec<_>>().join(", ")
}

/// Opens and locks the disks and builds the configured machine.
fn build_first(
    host: &Host,
    config: RunConfig,
    platform: Platform,
    payload: &BootPayload,
    parts: BackendParts,
    go_on: GoOn<'_>,
) -> Result<Box<Machine>, SetupError> {
    let mut nodes = Vec::with_capacity(config.disks.len());
    for (id, disk) in &config.disks {
        let backing = disk.backing.clone();
        let backend = open_image(&disk.path, disk.format, disk.read_only, disk.cache, backing)?;
        let node = BlockNode::new(id.clone(), backend).with_policy(disk.errors);
        nodes.push(Arc::new(node));
    }
    let new = NewMachine {
        name: config.name,
        memory_bytes: config.memory_bytes,
        cpus: config.cpus,
        cpu: config.cpu,
        payload,
        go_on,
        cmdline: config.cmdline,
        acpi: config.acpi,
        disk_queues: config.disks.iter().map(|(_, disk)| disk.queues).collect(),
        rng: config.rng,
        platform: Some(platform),
    };
    let machine = Machine::boot(host, new, parts.with(nodes.clone()))?;
    lock_disks(&nodes)?;
    Ok(Box::new(machine))
}

/// Builds the machine again from its description, with the old one's disks, which are locked.
fn build_again(
    host: &Host,
    payload: &BootPayload,
    description: Description,
    nodes: Vec<Arc<BlockNode>>,
    parts: BackendParts,
    go_on: GoOn<'_>,
) -> Result<Box<Machine>, SetupError> {
    payload.check_unchanged().map_err(|error| MachineError::Boot(error.into()))?;
    let new = NewMachine {
        name: description.name,
        memory_bytes: description.memory_bytes,
        cpus: description.cpus,
        cpu: description.cpu,
        payload,
        go_on,
        cmdline: description.cmdline,
        acpi: description.acpi,
        disk_queues: description.disks.iter().map(|disk| disk.queues).collect(),
        rng: description.rng,
        platform: description.platform,
    };
    Ok(Box::new(Machine::boot(host, new, parts.with(nodes))?))
}
