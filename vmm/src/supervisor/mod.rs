//! The supervisor owns the machine and runs on the main thread's event loop. The run state changes only
//! here. It never blocks: slow work is done by a task or by the migration's thread.
//!
//! Its input is messages ([`messages`]), requests on the control socket, signals and the timeout. [`guest`]
//! is the interface for migration threads and [`moving`] executes their requests; [`commands`] executes QMP
//! commands and [`waiting`] queues those that must wait; [`transition`] boots, stops and resets the
//! machine, [`ending`] ends the process; [`tasks`] are threads for slow work, [`jobs`] starts and reaps
//! migrations, [`dirty_rate`] measures the dirty rate, [`bitmaps`] changes the disks' named dirty bitmaps,
//! [`block_jobs`] starts and steers mirrors, [`backups`] starts backups, [`exports`] offers the disks to NBD
//! clients.

mod backends;
mod backups;
mod bitmaps;
mod block_jobs;
mod commands;
mod dirty_rate;
mod ending;
mod exports;
pub mod guest;
mod hardware;
mod jobs;
pub mod messages;
mod moving;
mod nbd;
mod sizes;
mod tasks;
mod transition;
mod waiting;

use crate::boot::payload::BootPayload;
use crate::config::{BootFiles, HostConfig, ReceiveConfig, RunConfig};
use crate::console::{Console, ConsoleEvent, DebugBackend};
use crate::control::command::Command;
use crate::control::message::QmpError;
use crate::control::{ClientId, Event, Incoming, QmpResult};
use crate::error::chain;
use crate::event_loop::{self, EventLoop, Handler};
use crate::exit_code::{self, Exit};
use crate::kvm::Host;
use crate::log_queue::say;
use crate::machine::run_state::RunState;
use crate::machine::vcpus::VcpuEnd;
use crate::machine::{GuestEvents, Machine, MachineError};
use crate::setup::{SetupError, end_with_parent};
use backends::BackendParts;
use bitmaps::BitmapRequests;
use block_jobs::BlockJobs;
use devices::block::failure::{Action, Failure};
use devices::reset::GuestExit;
use dirty_rate::DirtyRate;
use ending::Ending;
use exports::Exports;
use guest::arriving::BuildContext;
use guest::served::ServedDisks;
use jobs::{Jobs, Owner};
use messages::{JobId, MachineId, Message};
use migration::source::{MigrationEvent, SourceOutcome};
use migration::stats::MigrationStatus;
use moving::Pausing;
use sizes::Sizes;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tasks::{Done, TaskId, Tasks};
use transition::{Stopping, Transition};
use waiting::{Behind, Waiting};

/// The process's mode.
enum Mode {
    Run(RunConfig),
    Receive(ReceiveConfig),
}

impl Mode {
    fn host(&self) -> &HostConfig {
        match self {
            Self::Run(config) => &config.host,
            Self::Receive(config) => &config.host,
        }
    }
}

/// The owner of the machine.
pub struct Supervisor {
    mode: Mode,
    host: Arc<Host>,
    /// Declared before the console and the control server, which its threads use.
    machine: Option<Box<Machine>>,
    /// The boot payload for resets. `None` until it is opened or received.
    payload: Option<Arc<BootPayload>>,
    machine_id: MachineId,
    last_machine_id: MachineId,
    state: RunState,
    /// Time of the last `BLOCK_IO_ERROR`.
    disk_failure_told: Option<Instant>,
    jobs: Jobs,
    dirty_rate: DirtyRate,
    tasks: Tasks,
    /// The transition in progress. Commands that would change the machine wait.
    transition: Option<(TaskId, Transition)>,
    /// A `stop` that waits for requests in flight.
    stopping: Option<Stopping>,
    /// A migration waits for requests in flight.
    pausing: Option<Pausing>,
    sizes: Sizes,
    bitmap_requests: BitmapRequests,
    block_jobs: BlockJobs,
    exports: Exports,
    waiting: Waiting,
    ending: Option<Ending>,
    /// The guest has moved, and the process ends when this client has gone.
    ends_with: Option<ClientId>,
    /// When the event loop's alarm fires.
    alarm: Option<Instant>,
    console: Console,
    debug_console: DebugBackend,
    event_loop: EventLoop<Message>,
}

/// Boots a guest and runs it until it ends.
pub fn run(config: RunConfig) -> Result<Exit, SetupError> {
    let host = Arc::new(Host::open()?);
    let payload = open_payload(&config.boot)?;
    let platform = hardware::platform(&config.hardware)?;
    let mut supervisor = Supervisor::new(Mode::Run(config.clone()), host)?;
    supervisor.payload = Some(payload.clone());
    supervisor.boot(config, platform, payload)?;
    Ok(event_loop::serve(supervisor)?)
}

/// Receives a guest and runs it until it ends.
pub fn receive(config: ReceiveConfig) -> Result<Exit, SetupError> {
    let host = Arc::new(Host::open()?);
    let listener = migration::transport::Listener::bind(&config.address)
        .map_err(|source| SetupError::Listen { address: config.address.to_string(), source })?;
    let payload = config.boot.as_ref().map(open_payload).transpose()?;
    let served = ServedDisks::open(&config).map_err(|error| SetupError::Serve(Box::new(error)))?;
    let mut supervisor = Supervisor::new(Mode::Receive(config.clone()), host)?;
    supervisor.payload.clone_from(&payload);
    supervisor.state = RunState::Inmigrate;
    say(format_args!("listening on {}", listener.local_address()));
    let mailbox = supervisor.event_loop.mailbox().clone();
    let (id, parts) = supervisor.backend_parts();
    supervisor.machine_id = id;
    let context = BuildContext { host: supervisor.host.clone(), config, parts, payload };
    let started = supervisor.jobs.receive(listener, context, served, mailbox);
    started.map_err(SetupError::start("start the thread of a migration"))?;
    Ok(event_loop::serve(supervisor)?)
}

fn open_payload(files: &BootFiles) -> Result<Arc<BootPayload>, SetupError> {
    let payload = BootPayload::open(&files.kernel, files.initrd.as_deref());
    Ok(Arc::new(payload.map_err(|error| MachineError::Boot(error.into()))?))
}

impl Supervisor {
    fn new(mode: Mode, host: Arc<Host>) -> Result<Self, SetupError> {
        let config = mode.host();
        if config.with_parent {
            end_with_parent()?;
        }
        let control = config.qmp.as_ref().map(|path| path.0.as_path());
        let event_loop = EventLoop::open(control, config.timeout)?;
        let (to_us, of_tasks) = (event_loop.mailbox().clone(), event_loop.mailbox().clone());
        let console = Console::open(
            &config.serial,
            config.expect.clone(),
            Arc::new(move |event| to_us.post(Message::Console(event))),
        )?;
        let arrives = matches!(mode, Mode::Receive(_));
        let debug_console = DebugBackend::open(&config.debugcon, console.output(), arrives)?;
        Ok(Self {
            mode,
            host,
            machine: None,
            payload: None,
            machine_id: MachineId(0),
            last_machine_id: MachineId(0),
            state: RunState::Prelaunch,
            disk_failure_told: None,
            jobs: Jobs::default(),
            dirty_rate: DirtyRate::default(),
            tasks: Tasks::new(move |id, done| of_tasks.post(Message::TaskEnded(id, done))),
            transition: None,
            stopping: None,
            pausing: None,
            sizes: Sizes::default(),
            bitmap_requests: BitmapRequests::default(),
            block_jobs: BlockJobs::default(),
            exports: Exports::default(),
            waiting: Waiting::default(),
            ending: None,
            ends_with: None,
            alarm: None,
            console,
            debug_console,
            event_loop,
        })
    }

    /// The backends of the next machine, and its id.
    fn backend_parts(&mut self) -> (MachineId, BackendParts) {
        let id = MachineId(self.last_machine_id.0 + 1);
        self.last_machine_id = id;
        let mailbox = self.event_loop.mailbox().clone();
        let (exits, ends, crashes) = (mailbox.clone(), mailbox.clone(), mailbox.clone());
        let events = GuestEvents {
            on_exit: Arc::new(move |exit| exits.post(Message::GuestExit(id, exit))),
            on_crash_loaded: Arc::new(move || crashes.post(Message::CrashLoaded(id))),
            on_end: Arc::new(move |end| ends.post(Message::VcpuEnd(id, end))),
        };
        let (serial_output, debug_output) = (self.console.output(), self.debug_console.output());
        (id, BackendParts { serial_output, debug_output, events, mailbox })
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
        self.event_loop.broadcast(event);
    }

    /// The guest or KVM cannot continue: reports that and ends the process.
    fn fail(&mut self, why: &str) {
        if self.ending.is_some() {
            return log::error!("while shutting down: {why}");
        }
        if self.state.may_become(RunState::InternalError) {
            self.become_state(RunState::InternalError);
        }
        let event = Event::ending("SHUTDOWN", false, "host-error");
        self.end(Exit::new(exit_code::CANNOT_RUN, why), &event);
    }

    /// Reports a failed request and stops the guest if the policy says so.
    fn on_disk_failed(&mut self, failure: &Failure) {
        let stops = failure.action == Action::Stop;
        // A dying disk fails every request: at most one event per second, except for stops.
        let told = self.disk_failure_told.filter(|told| told.elapsed() < Duration::from_secs(1));
        if stops || told.is_none() {
            self.disk_failure_told = Some(Instant::now());
            self.tell(&Event::block_io_error(failure));
        }
        // The guest may have been stopped or resumed meanwhile. A guest that is being reset is replaced
        // anyway.
        let runs = self.state == RunState::Running && self.ending.is_none() && !self.is_swapping();
        let Some(machine) = &mut self.machine else { return };
        if !stops || !runs || !machine.has_stopped_disk() {
            return;
        }
        // Callers that need the requests in flight to have ended wait for them.
        if let Err(error) = machine.begin_pause() {
            return self.fail(&chain(&error));
        }
        // The migration fails on a guest that was stopped by an error.
        self.pausing = None;
        let Failure { disk, reason, .. } = failure;
        say(format_args!("disk {disk}: {reason}; the guest is stopped, `cont` tries again"));
        self.become_state(RunState::IoError);
        self.tell(&Event::plain("STOP"));
    }

    fn on_migration_event(&mut self, event: MigrationEvent) {
        // Not in the pause: its client would ask for statistics.
        if !matches!(event, MigrationEvent::Status(MigrationStatus::Device))
            && let Some(name) = self.jobs.running_name()
        {
            let step = Event::migration_step(name, false);
            self.tell(&step);
        }
        if !self.jobs.events_wanted {
            return;
        }
        match event {
            MigrationEvent::Status(status) => self.tell(&Event::migration(status.name())),
            MigrationEvent::Pass(number) => self.tell(&Event::pass(number)),
            MigrationEvent::NotConverging(facts) => {
                self.tell(&Event::not_converging(facts.to_json()));
            }
            MigrationEvent::Incomplete(missing) => self.tell(&Event::incomplete(&missing)),
        }
    }
}

impl Handler for Supervisor {
    type Message = Message;

    fn event_loop(&mut self) -> &mut EventLoop<Message> {
        &mut self.event_loop
    }

    fn on_message(&mut self, message: Message) {
        match message {
            // Ignore messages of an earlier machine.
            Message::GuestExit(id, _) | Message::VcpuEnd(id, _) | Message::CrashLoaded(id)
                if id != self.machine_id => {}
            Message::GuestExit(_, GuestExit::Reset) if self.mode.host().no_reboot => {
                let exit =
                    Exit::new(exit_code::OK, "the guest asked for a reset, with --no-reboot");
                self.guest_has_ended(exit, "guest-reset");
            }
            Message::GuestExit(_, GuestExit::Reset) => self.guest_wants_reset(),
            Message::GuestExit(_, GuestExit::PowerOff) => {
                let exit = Exit::new(exit_code::OK, "the guest powered off");
                self.guest_has_ended(exit, "guest-shutdown");
            }
            Message::GuestExit(_, GuestExit::DebugExit(value)) => {
                let why = format!("the guest wrote {value} to the debug-exit port");
                let exit = Exit::new(exit_code::debug_exit(value), why);
                self.guest_has_ended(exit, "guest-shutdown");
            }
            Message::GuestExit(_, GuestExit::Panicked) => self.guest_has_panicked(),
            Message::CrashLoaded(_) => self.tell(&Event::guest_panic("GUEST_CRASHLOADED", "run")),
            Message::VcpuEnd(_, VcpuEnd::Crashed(why)) => self.guest_has_crashed(&why),
            Message::VcpuEnd(_, VcpuEnd::Failed(why)) => self.fail(&why),
            Message::Console(ConsoleEvent::Expected) => {
                let exit = Exit::new(exit_code::OK, "--expect matched");
                self.end(exit, &Event::ending("SHUTDOWN", false, "host-qmp-quit"));
            }
            Message::Console(ConsoleEvent::Quit) => {
                self.end(self.told_to("Ctrl-A x"), &Event::ending("SHUTDOWN", false, "host-ui"));
            }
            Message::DiskFailed(failure) => self.on_disk_failed(&failure),
            Message::ExportDeleted(id) => self.on_export_deleted(&id),
            Message::Guest(request) => self.on_guest_request(request),
            Message::TaskEnded(id, done) => {
                // An overdue task may still return a machine or a target, which takes time to drop.
                if self.tasks.ended(id) {
                    self.on_task_ended(id, done);
                } else {
                    tasks::discard(done);
                }
            }
            Message::BlockJob(event) => self.on_job_event(&event),
            Message::Migration(event) => self.on_migration_event(event),
            Message::OutgoingEnded(id, outcome) => {
                log::info!("migration: {outcome:?}");
                let owner = self.jobs.reap(id);
                // The migration has done so itself, unless its thread died.
                if let Some(machine) = &self.machine {
                    machine.throttle(0);
                }
                if let Some(owner) = owner {
                    self.migration_ended(owner, &outcome);
                }
            }
            Message::IncomingEnded(id, result) => self.on_incoming_ended(id, result),
            Message::MigrationPanicked(id) if self.jobs.brings(id) => {
                let why = "the migration's thread panicked, which is a bug".to_owned();
                self.on_incoming_ended(id, Err(why));
            }
            Message::MigrationPanicked(id) => {
                // After the handover the guest may run at the destination.
                self.jobs.counters.panicked(self.state == RunState::Postmigrate);
                self.jobs.reap(id);
                if let Some(machine) = &self.machine {
                    machine.throttle(0);
                }
            }
        }
        self.look_after_waiting();
    }

    fn on_request(&mut self, request: Incoming) {
        // The end of the process must not wait.
        if request.command == Command::Quit {
            if let Some(result) = self.execute(&request) {
                self.event_loop.reply(&request, result);
            }
            return self.look_after_waiting();
        }
        match self.waiting.behind(request) {
            Behind::Next(request) => self.serve(request),
            Behind::Waits => {}
            Behind::TooMany(request) => {
                let desc = "too many requests wait for the one before them";
                self.event_loop.reply(&request, Err(QmpError::generic(desc)));
            }
        }
        self.look_after_waiting();
    }

    fn on_client_gone(&mut self, client: ClientId) {
        if self.ends_with == Some(client) {
            self.end_if_moved();
        }
    }

    fn on_timeout(&mut self) {
        let event = Event::ending("SHUTDOWN", false, "host-signal");
        self.end(Exit::new(exit_code::TIMEOUT, "--timeout has passed"), &event);
        self.look_after_waiting();
    }

    fn on_signal(&mut self) {
        if self.ending.is_some() {
            return self.end_at_once();
        }
        let event = Event::ending("SHUTDOWN", false, "host-signal");
        self.end(Exit::new(exit_code::SIGNAL, "SIGINT or SIGTERM"), &event);
        self.look_after_waiting();
    }

    fn on_alarm(&mut self) {
        self.alarm = None;
        let now = Instant::now();
        for id in self.tasks.take_overdue(now) {
            self.on_task_ended(id, Done::Nothing);
        }
        for request in self.waiting.take_overdue(now) {
            let desc = "what the machine is doing takes too long: try again";
            self.answer(&request, Err(QmpError::generic(desc)));
        }
        if self.ending.as_ref().is_some_and(|ending| ending.deadline <= now) {
            self.end_at_once();
        }
        self.look_after_waiting();
    }

    fn shut_down(&mut self) {
        self.jobs.abandon(None);
        self.dirty_rate.abort();
        self.console.detach();
        if let Some(machine) = self.machine.take() {
            match &self.ending {
                // Dropping it would block on the hanging part.
                Some(ending) if ending.leaves_machine => std::mem::forget(machine),
                _ => drop(machine),
            }
        }
    }
}

impl Supervisor {
    /// Executes a request; replies now or later.
    fn serve(&mut self, request: Incoming) {
        if self.must_wait(&request.command) {
            self.waiting.hold(request.client);
            self.waiting.block(request);
        } else {
            self.waiting.hold(request.client);
            if let Some(result) = self.execute(&request) {
                self.answer(&request, result);
            }
        }
    }

    /// Replies to a waiting client and serves its queued requests.
    fn answer(&mut self, request: &Incoming, result: QmpResult) {
        self.event_loop.reply(request, result);
        for next in self.waiting.release(request.client) {
            self.on_request(next);
        }
    }

    /// Starts blocked requests that can run now, and sets the alarm for the next deadline.
    fn look_after_waiting(&mut self) {
        for blocked in self.waiting.take_blocked() {
            if self.must_wait(&blocked.request.command) {
                self.waiting.block_again(blocked);
            } else if let Some(result) = self.execute(&blocked.request) {
                self.answer(&blocked.request, result);
            }
        }
        let ending = self.ending.as_ref().map(|ending| ending.deadline);
        let deadlines = [self.tasks.deadline(), self.waiting.deadline(), ending];
        if let Some(next) = deadlines.into_iter().flatten().min()
            && self.alarm != Some(next)
        {
            self.alarm = Some(next);
            self.event_loop.set_alarm(next.saturating_duration_since(Instant::now()));
        }
    }

    fn on_incoming_ended(&mut self, id: JobId, result: Result<(), String>) {
        self.jobs.reap(id);
        if let Some(ending) = &mut self.ending {
            ending.arrival_at_work = false;
            self.finish_ending();
        } else if let Err(why) = result {
            let why = format!("the guest did not arrive: {why}");
            let event = Event::ending("SHUTDOWN", false, "host-error");
            self.end(Exit::new(exit_code::CANNOT_RUN, why), &event);
        }
    }

    /// An outgoing migration has ended.
    fn migration_ended(&mut self, owner: Owner, outcome: &SourceOutcome) {
        if let Some(name) = &owner.name {
            self.tell(&Event::migration_step(name, true));
        }
        if matches!(outcome, SourceOutcome::Completed | SourceOutcome::Incomplete(_)) {
            self.ends_with = owner.ends_with;
            self.end_if_moved();
        }
    }

    /// Ends the process of a guest that has moved, once the client that moved it has gone.
    fn end_if_moved(&mut self) {
        let Some(client) = self.ends_with else { return };
        if self.state == RunState::Postmigrate && !self.event_loop.has_client(client) {
            let event = Event::ending("SHUTDOWN", false, "host-qmp-quit");
            self.end(Exit::new(exit_code::OK, "the guest has moved"), &event);
        }
    }

    /// The guest has ended by itself.
    fn guest_has_ended(&mut self, exit: Exit, reason: &str) {
        if self.ending.is_none() {
            self.become_state(RunState::Shutdown);
            let exit = self.console.unless_expecting(exit);
            self.end(exit, &Event::ending("SHUTDOWN", true, reason));
        }
    }

    fn guest_has_crashed(&mut self, why: &str) {
        if self.ending.is_none() {
            self.become_state(RunState::Shutdown);
            let exit = Exit::new(exit_code::CRASHED, format!("the guest crashed: {why}"));
            self.end(exit, &Event::ending("SHUTDOWN", true, "guest-panic"));
        }
    }

    /// The guest has said so through pvpanic.
    fn guest_has_panicked(&mut self) {
        if self.ending.is_none() {
            self.become_state(RunState::Shutdown);
            self.tell(&Event::guest_panic("GUEST_PANICKED", "poweroff"));
            let exit = Exit::new(exit_code::CRASHED, "the guest panicked");
            self.end(exit, &Event::ending("SHUTDOWN", true, "guest-panic"));
        }
    }

    /// The end that a user has asked for with `how`.
    fn told_to(&self, how: &str) -> Exit {
        let why = format!("ended by {how}");
        if self.state == RunState::Postmigrate {
            let fate = match self.jobs.busy() {
                true if self.jobs.is_past_handover() => {
                    "the guest has moved; what had not arrived yet is lost"
                }
                true => "the guest was being handed over: it may run at the destination",
                false => "the guest has moved",
            };
            return Exit::new(exit_code::OK, format!("{why}; {fate}"));
        }
        self.console.unless_expecting(Exit::new(exit_code::OK, why))
    }
}
