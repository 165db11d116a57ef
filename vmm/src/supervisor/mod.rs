//! The main thread: the one event loop that owns the machine. Run state changes here and nowhere else.
//!
//! Everything reaches it as a message ([`messages`]), a request on the control socket, a signal or the
//! timeout; [`guest`] is its face to migration threads, [`moving`] what it does for them, [`commands`]
//! answers the control socket, [`jobs`] starts and reaps migrations, [`dirty_rate`] measures how fast
//! the guest writes.

mod commands;
mod dirty_rate;
pub mod guest;
mod jobs;
pub mod messages;
mod moving;

use crate::boot::payload::BootPayload;
use crate::config::{BootFiles, HostConfig, ReceiveConfig, RunConfig};
use crate::console::{Console, ConsoleEvent};
use crate::control::{Event, Incoming};
use crate::desk::{self, Clerk, Desk, DeskError};
use crate::error::chain;
use crate::images::Images;
use crate::kvm::Host;
use crate::machine::build::NewMachine;
use crate::machine::run_state::RunState;
use crate::machine::vcpus::VcpuEnd;
use crate::machine::{Backends, GuestEvents, Machine, MachineError};
use devices::block::failure::{Action, Failure};
use devices::block::raw::OpenError;
use devices::block::{BlockNode, open_image};
use devices::reset::GuestExit;
use dirty_rate::DirtyRate;
use jobs::Jobs;
use messages::Message;
use migration::guest::RunPermit;
use migration::source::MigrationEvent;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How the process ends: `ferry run`'s exit codes.
pub mod exit_code {
    /// The guest powered off, or `--expect` matched.
    pub const OK: u8 = 0;
    /// The guest failed.
    pub const GUEST_FAILED: u8 = 1;
    /// The command line makes no sense.
    pub const USAGE: u8 = 2;
    /// This host cannot run it.
    pub const HOST: u8 = 3;
    /// `--timeout`.
    pub const TIMEOUT: u8 = 124;
}

/// Why a guest could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The control socket or the event loop.
    #[error(transparent)]
    Desk(#[from] DeskError),
    /// COM1.
    #[error(transparent)]
    Console(#[from] crate::console::ConsoleError),
    /// A disk image.
    #[error(transparent)]
    Disk(#[from] OpenError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] crate::kvm::KvmError),
    /// The address of an arriving guest.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The host has no more threads.
    #[error("cannot start a migration's thread")]
    Thread(#[source] io::Error),
    /// `--expect`.
    #[error("--expect")]
    Expect(#[source] regex_lite::Error),
}

impl SetupError {
    /// The exit code: 3 where the host is at fault, 1 otherwise.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Kvm(_)
            | Self::Machine(MachineError::Kvm(_))
            | Self::Thread(_)
            | Self::Desk(DeskError::EventLoop(_)) => exit_code::HOST,
            _ => exit_code::GUEST_FAILED,
        }
    }
}

/// What this process is for.
enum Mission {
    Run(RunConfig),
    Receive(ReceiveConfig),
}

impl Mission {
    fn host(&self) -> &HostConfig {
        match self {
            Self::Run(config) => &config.host,
            Self::Receive(config) => &config.host,
        }
    }
}

/// The owner of the machine.
pub struct Supervisor {
    mission: Mission,
    host: Host,
    /// Before the console and the control server: its threads use them.
    machine: Option<Machine>,
    /// What the guest boots from at its start and at each reset: opened once. None if it arrives and
    /// `--kernel` is not given.
    payload: Option<Arc<BootPayload>>,
    /// Images, kept over a reset.
    disks: Vec<Arc<BlockNode>>,
    /// Images of the guest that arrives, until it has.
    images: Images,
    state: RunState,
    /// When clients last heard of a failed request.
    disk_failure_told: Option<Instant>,
    jobs: Jobs,
    dirty_rate: DirtyRate,
    console: Console,
    desk: Desk<Message>,
}

/// Boots a guest and runs it to its end; returns the exit code.
pub fn run(config: RunConfig) -> Result<u8, SetupError> {
    let host = Host::open()?;
    let payload = open_payload(&config.boot)?;
    let mut disks = Vec::new();
    for (id, disk) in &config.disks {
        let backend = open_image(&disk.path, disk.format, disk.read_only, disk.cache)?;
        let node = BlockNode::new(id.clone(), backend).with_policy(disk.errors);
        disks.push(Arc::new(node));
    }
    let mut supervisor = Supervisor::new(Mission::Run(config), host, Some(payload), disks)?;
    supervisor.boot()?;
    supervisor.start()?;
    // What reading the command line and building the machine needed and gave back, some 100 KiB, would
    // otherwise stay with the process.
    // SAFETY: releases pages that the allocator holds free; nothing refers to them.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
    Ok(desk::serve(supervisor)?)
}

/// Waits for a guest and runs it to its end; returns the exit code.
pub fn receive(config: ReceiveConfig) -> Result<u8, SetupError> {
    let host = Host::open()?;
    let payload = config.boot.as_ref().map(open_payload).transpose()?;
    let listener = migration::transport::Listener::bind(&config.address)
        .map_err(|source| SetupError::Listen { address: config.address.to_string(), source })?;
    let mut supervisor = Supervisor::new(Mission::Receive(config), host, payload, Vec::new())?;
    supervisor.state = RunState::Inmigrate;
    eprintln!("ferry: listening on {}", listener.local_address());
    let mailbox = supervisor.desk.mailbox().clone();
    supervisor.jobs.receive(listener, mailbox).map_err(SetupError::Thread)?;
    Ok(desk::serve(supervisor)?)
}

fn open_payload(files: &BootFiles) -> Result<Arc<BootPayload>, SetupError> {
    let payload = BootPayload::open(&files.kernel, files.initrd.as_deref());
    Ok(Arc::new(payload.map_err(|error| MachineError::Boot(error.into()))?))
}

impl Supervisor {
    fn new(
        mission: Mission,
        host: Host,
        payload: Option<Arc<BootPayload>>,
        disks: Vec<Arc<BlockNode>>,
    ) -> Result<Self, SetupError> {
        let config = mission.host();
        if config.with_parent {
            let kill = rustix::process::Signal::KILL;
            let set = rustix::process::set_parent_process_death_signal(Some(kill));
            set.map_err(|error| SetupError::Thread(error.into()))?;
        }
        let control = config.qmp.as_ref().map(|path| path.0.as_path());
        let desk = Desk::open(control, config.timeout)?;
        let expect = config.expect.as_deref().map(regex_lite::Regex::new).transpose();
        let to_us = desk.mailbox().clone();
        let console = Console::open(
            &config.serial,
            expect.map_err(SetupError::Expect)?,
            Arc::new(move |event| to_us.post(Message::Console(event))),
        )?;
        Ok(Self {
            mission,
            host,
            machine: None,
            payload,
            disks,
            images: Images::default(),
            state: RunState::Prelaunch,
            disk_failure_told: None,
            jobs: Jobs::default(),
            dirty_rate: DirtyRate::default(),
            console,
            desk,
        })
    }

    fn backends(&self) -> Backends {
        let (exits, ends) = (self.desk.mailbox().clone(), self.desk.mailbox().clone());
        for disk in &self.disks {
            let to_us = self.desk.mailbox().clone();
            disk.on_failure(move |failure| to_us.post(Message::DiskFailed(failure)));
        }
        Backends {
            disks: self.disks.clone(),
            serial_output: self.console.output(),
            events: GuestEvents {
                on_exit: Arc::new(move |exit| exits.post(Message::GuestExit(exit))),
                on_end: Arc::new(move |end| ends.post(Message::VcpuEnd(end))),
            },
        }
    }

    /// Builds the machine that the configuration describes, with its disks locked.
    fn boot(&mut self) -> Result<(), MachineError> {
        let (Mission::Run(config), Some(payload)) = (&self.mission, self.payload.clone()) else {
            return Ok(());
        };
        let config = config.clone();
        self.install(NewMachine {
            name: config.name,
            memory_bytes: config.memory_bytes,
            cpus: config.cpus,
            payload: &payload,
            go_on: &|| true,
            cmdline: config.cmdline,
            acpi: config.acpi,
            disk_queues: config.disks.iter().map(|(_, disk)| disk.queues).collect(),
            rng: config.rng,
        })
    }

    /// Runs the machine for the first time.
    fn start(&mut self) -> Result<(), MachineError> {
        if let Some(machine) = &mut self.machine {
            machine.run()?;
            self.become_state(RunState::Running);
        }
        Ok(())
    }

    fn become_state(&mut self, next: RunState) {
        if self.state == next {
            return;
        }
        debug_assert!(self.state.may_become(next), "{:?} -> {next:?}", self.state);
        log::info!("{} -> {}", self.state.name(), next.name());
        self.state = next;
    }

    fn tell(&mut self, event: &Event) {
        self.desk.tell(event);
    }

    fn end(&mut self, code: u8, event: &Event) {
        self.desk.tell(event);
        self.desk.end(code);
    }

    /// Stops the guest because the user asked.
    fn stop(&mut self) -> Result<(), MachineError> {
        if let (Some(machine), RunState::Running) = (&mut self.machine, self.state) {
            machine.pause()?;
            self.become_state(RunState::Paused);
            self.tell(&Event::plain("STOP"));
        }
        Ok(())
    }

    /// Runs the guest; its disks must be ours.
    fn resume(&mut self) -> Result<(), MachineError> {
        if let Some(machine) = &mut self.machine {
            machine.lock_disks()?;
            machine.run()?;
            self.become_state(RunState::Running);
            self.tell(&Event::plain("RESUME"));
        }
        Ok(())
    }

    /// Builds the machine anew, as a reset does.
    fn reset(&mut self, by_guest: bool) {
        let reason = if by_guest { "guest-reset" } else { "host-qmp-system-reset" };
        let was_running = self.state == RunState::Running || by_guest;
        match self.rebuild() {
            Ok(()) => {
                self.tell(&Event::ending("RESET", by_guest, reason));
                self.state = RunState::Prelaunch;
                let result = if was_running { self.start() } else { Ok(()) };
                if !was_running {
                    self.become_state(RunState::Paused);
                }
                if let Err(error) = result {
                    self.fail(&chain(&error));
                }
            }
            Err(error) => self.fail(&format!("cannot reset the guest: {error}")),
        }
    }

    fn rebuild(&mut self) -> Result<(), String> {
        let payload = self.payload.clone().ok_or(
            "it arrived by migration and its kernel is not here: give --kernel to ferry receive",
        )?;
        // Before the old machine goes.
        payload.check_unchanged().map_err(|error| error.to_string())?;
        self.dirty_rate.abort();
        let machine = self.machine.take().ok_or("there is no machine")?;
        if self.jobs.busy() && self.jobs.moves(machine.vm()) {
            eprintln!("ferry: the guest was reset while it moved: that ends here, start it again");
            self.jobs.cancel();
        }
        let description = machine.description().clone();
        // The old machine's threads and locks go before the new one's come.
        self.console.detach();
        drop(machine);
        let new = NewMachine {
            name: description.name,
            memory_bytes: description.memory_bytes,
            cpus: description.cpus,
            payload: &payload,
            go_on: &|| true,
            cmdline: description.cmdline,
            acpi: description.acpi,
            disk_queues: description.disks.iter().map(|disk| disk.queues).collect(),
            rng: description.rng,
        };
        self.install(new).map_err(|error| chain(&error))
    }

    fn install(&mut self, new: NewMachine<'_>) -> Result<(), MachineError> {
        let mut machine = Machine::boot(&self.host, new, self.backends())?;
        machine.lock_disks()?;
        machine.grant(RunPermit::cold_boot());
        self.console.attach(machine.serial().clone());
        self.machine = Some(machine);
        Ok(())
    }

    /// The guest or KVM cannot go on.
    fn fail(&mut self, why: &str) {
        eprintln!("ferry: {why}");
        if self.state.may_become(RunState::InternalError) {
            self.become_state(RunState::InternalError);
        }
        let event = Event::ending("SHUTDOWN", false, "host-error");
        self.end(exit_code::GUEST_FAILED, &event);
    }

    /// Tells of a failed request, and stops the guest if that is what was decided.
    fn on_disk_failed(&mut self, failure: &Failure) {
        let stops = failure.action == Action::Stop;
        // A dying disk fails every request: clients hear of it once a second, of a stop always.
        let told = self.disk_failure_told.filter(|told| told.elapsed() < Duration::from_secs(1));
        if stops || told.is_none() {
            self.disk_failure_told = Some(Instant::now());
            self.tell(&Event::block_io_error(failure));
        }
        let Some(machine) = &mut self.machine else { return };
        // The guest may have been stopped, or gone on, meanwhile.
        if !stops || self.state != RunState::Running || !machine.has_stopped_disk() {
            return;
        }
        if let Err(error) = machine.pause() {
            return self.fail(&chain(&error));
        }
        let Failure { disk, reason, .. } = failure;
        eprintln!("ferry: disk {disk}: {reason}; the guest is stopped, `cont` tries again");
        self.become_state(RunState::IoError);
        self.tell(&Event::plain("STOP"));
    }

    fn on_migration_event(&mut self, event: MigrationEvent) {
        if !self.jobs.events_wanted {
            return;
        }
        match event {
            MigrationEvent::Status(status) => self.tell(&Event::migration(status.name())),
            MigrationEvent::Pass(number) => self.tell(&Event::pass(number)),
            MigrationEvent::NotConverging(facts) => {
                self.tell(&Event::not_converging(facts.to_json()));
            }
        }
    }
}

impl Clerk for Supervisor {
    type Message = Message;

    fn desk(&mut self) -> &mut Desk<Message> {
        &mut self.desk
    }

    fn on_message(&mut self, message: Message) {
        match message {
            Message::GuestExit(GuestExit::Reset) if self.mission.host().no_reboot => {
                self.become_state(RunState::Shutdown);
                self.end(
                    self.console.code_unless_expecting(exit_code::OK),
                    &Event::ending("SHUTDOWN", true, "guest-reset"),
                );
            }
            Message::GuestExit(GuestExit::Reset) => self.reset(true),
            Message::GuestExit(GuestExit::PowerOff) => {
                self.become_state(RunState::Shutdown);
                self.end(
                    self.console.code_unless_expecting(exit_code::OK),
                    &Event::ending("SHUTDOWN", true, "guest-shutdown"),
                );
            }
            Message::GuestExit(GuestExit::DebugExit(value)) => {
                self.become_state(RunState::Shutdown);
                // An exit code has 8 bits; QEMU's exit() keeps the low ones as well.
                let code = u8::try_from((value << 1 | 1) & 0xff).unwrap_or(u8::MAX);
                self.end(
                    self.console.code_unless_expecting(code),
                    &Event::ending("SHUTDOWN", true, "guest-shutdown"),
                );
            }
            Message::VcpuEnd(VcpuEnd::TripleFault) => {
                eprintln!("ferry: the guest has crashed (triple fault)");
                self.become_state(RunState::Shutdown);
                let event = Event::ending("SHUTDOWN", true, "guest-panic");
                self.end(exit_code::GUEST_FAILED, &event);
            }
            Message::VcpuEnd(VcpuEnd::Failed(why)) => self.fail(&why),
            Message::Console(ConsoleEvent::Expected) => {
                self.end(exit_code::OK, &Event::ending("SHUTDOWN", false, "host-qmp-quit"));
            }
            Message::Console(ConsoleEvent::Quit) => {
                self.end(exit_code::OK, &Event::ending("SHUTDOWN", false, "host-ui"));
            }
            Message::DiskFailed(failure) => self.on_disk_failed(&failure),
            Message::Guest(request) => self.on_guest_request(request),
            Message::Migration(event) => self.on_migration_event(event),
            Message::OutgoingEnded(id, outcome) => {
                self.jobs.reap(id);
                // It has done so itself, unless its thread died before it could.
                if let Some(machine) = &self.machine {
                    machine.throttle(0);
                }
                log::info!("migration: {outcome:?}");
            }
            Message::IncomingEnded(id, Ok(())) => self.jobs.reap(id),
            Message::IncomingEnded(id, Err(why)) => {
                self.jobs.reap(id);
                eprintln!("ferry: the guest did not arrive: {why}");
                self.end(exit_code::GUEST_FAILED, &Event::ending("SHUTDOWN", false, "host-error"));
            }
        }
    }

    fn on_request(&mut self, request: Incoming) {
        let result = self.execute(request.command.clone());
        self.desk.reply(&request, result);
    }

    fn on_timeout(&mut self) {
        eprintln!("ferry: --timeout has passed");
        let event = Event::ending("SHUTDOWN", false, "host-signal");
        self.end(exit_code::TIMEOUT, &event);
    }

    fn on_signal(&mut self) {
        let event = Event::ending("SHUTDOWN", false, "host-signal");
        self.end(exit_code::GUEST_FAILED, &event);
    }

    /// Stops everything before the process ends, so that logs and disks are whole.
    fn shut_down(&mut self) {
        self.jobs.abandon();
        self.dirty_rate.abort();
        self.console.detach();
        if let Some(machine) = &mut self.machine
            && let Err(error) = machine.pause().and_then(|()| machine.flush_disks(|_| true))
        {
            log::error!("while shutting down: {}", chain(&error));
        }
        self.machine = None;
    }
}
