//! The destination: accept, build, load, say `Ready`, run on `Go` and never without it. Called by the
//! VMM on the `mig-in` thread.
//!
//! ```text
//! mod        greet                     other clients are dropped, and the wait goes on
//! load       machine, sections, Eof    any failure: abandon the machine, then say Refused
//! handover   Ready, Go, run, Running   no Go: abandon; does not start: abandon, then say Declined;
//!                                      CalledOff: back to load
//! postcopy   what could wait           any failure: the guest runs on, without it
//! host       the machine's interface
//! ```
//! The incoming guest is a list of [`Incoming`](crate::participant::Incoming) participants; the driver
//! does not know RAM or disks.

mod handover;
mod host;
mod load;
mod postcopy;

pub use host::{DestinationHost, GoOn};

use crate::cancel::CancelToken;
use crate::control::Control;
use crate::error::{ParticipantError, chain};
use crate::guest::GuestError;
use crate::source::MigrationEvent;
use crate::stats::{Counters, MigrationStatus};
use crate::transport::channel::{GREETING_PATIENCE, receive_hello, send_hello};
use crate::transport::reception::{HasEnded, Reception};
use crate::transport::{Channel, Listener, Transport};
use crate::wire::hello::{DISK_CHANNELS, DISKS};
use crate::wire::{Hello, Kind, MigrationId, Role, WireError};
use load::Arrival;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Why an incoming migration failed.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    #[error("cannot accept a connection")]
    Accept(#[source] io::Error),
    /// The connection or the source.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// This side's machine.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// A participant's own reason.
    #[error(transparent)]
    Participant(Box<dyn std::error::Error + Send + Sync>),
    /// Cancelled on this side.
    #[error("cancelled at the destination")]
    Cancelled,
    #[error("cannot spawn a thread")]
    Thread(#[source] io::Error),
    /// `Go` has arrived, but the machine does not start. The source gets the right to run back if the
    /// connection still works.
    #[error("the guest was handed over and cannot be started here: {0}")]
    Run(GuestError),
    /// The source was already told this.
    #[error(transparent)]
    Declined(Box<DestinationError>),
}

impl From<ParticipantError> for DestinationError {
    fn from(error: ParticipantError) -> Self {
        match error {
            ParticipantError::Wire(error) => Self::Wire(error),
            ParticipantError::Guest(error) => Self::Guest(error),
            ParticipantError::Thread(error) => Self::Thread(error),
            ParticipantError::Own(error) => Self::Participant(error),
        }
    }
}

/// What an incoming migration needs.
pub struct Destination<'a> {
    /// The machine.
    pub host: &'a mut dyn DestinationHost,
    /// For reports only.
    pub counters: Arc<Counters>,
    /// Ends the migration early, until `Go` arrives.
    pub cancel: CancelToken,
    /// Gives up what could wait, once the guest runs here.
    pub give_up: CancelToken,
    /// Called for each step, on the `mig-in` thread.
    pub events: &'a mut dyn FnMut(MigrationEvent),
}

/// Waits for a migration's connection with this role, unless the migration ends.
type Open<'d> =
    &'d mut dyn FnMut(MigrationId, Role, HasEnded<'_>) -> Result<Arc<dyn Transport>, WireError>;

/// How long the end of a migration waits for the participants' threads. A write may hang with its disk: it is
/// then left to its threads, which end when it returns.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);

/// Ends the participants, on a thread of its own.
fn close(arrival: Arrival, moved: bool) {
    let (closing, closed) = channel::<()>();
    let work = move || {
        arrival.close(moved);
        drop(closing);
    };
    match std::thread::Builder::new().name("mig-close".into()).stack_size(64 << 10).spawn(work) {
        Ok(_) => {
            if closed.recv_timeout(CLOSE_PATIENCE) == Err(RecvTimeoutError::Timeout) {
                log::warn!(
                    "a disk of the guest hangs: its writes in flight are left to their threads"
                );
            }
        }
        // Dropped with the closure, which waits for the threads.
        Err(error) => log::error!("cannot start a thread: {error}"),
    }
}

/// Nobody opens the control connection of a migration a second time.
fn not_a_channel() -> WireError {
    WireError::Unexpected { found: "a control connection".into(), expected: "a channel" }
}

impl Destination<'_> {
    /// Waits for a source and takes its guest over. Connections that do not speak our protocol are dropped
    /// and the wait goes on; once a source has sent Hello, any failure is final.
    pub fn receive(mut self, listener: &Listener) -> Result<(), DestinationError> {
        let cancel = self.cancel.clone();
        let mut reception = Reception::open(listener, &cancel).map_err(DestinationError::Accept)?;
        let greeted = reception.control().map_err(|error| match error {
            WireError::Interrupted => DestinationError::Cancelled,
            WireError::Lost(error) => DestinationError::Accept(error),
            error => error.into(),
        });
        let (main, hello) = greeted?;
        self.arrive(Arc::new(main), &hello, &mut |id, role, has_ended| {
            Ok(Arc::new(match role {
                Role::Control => return Err(not_a_channel()),
                Role::Disks { index } => {
                    reception.disks(id, index, GREETING_PATIENCE, has_ended)?
                }
                Role::Data { index } => reception.data(id, index, GREETING_PATIENCE, has_ended)?,
            }))
        })
    }

    /// Takes a guest over from connections that exist already.
    pub fn receive_over(
        mut self,
        main: Arc<dyn Transport>,
        data: Vec<Arc<dyn Transport>>,
        disks: Vec<Arc<dyn Transport>>,
    ) -> Result<(), DestinationError> {
        let cancel = self.cancel.clone();
        let greeting = Channel::new(main.clone(), cancel.clone());
        let hello = receive_hello(&greeting, GREETING_PATIENCE).inspect_err(|error| {
            if matches!(error, WireError::Version { .. }) {
                // Another version can read the start of our Hello and report the mismatch.
                let ours = Hello::new(Role::Control, MigrationId([0; 16]), 0);
                let _ = send_hello(&greeting, &ours);
            }
        })?;
        // These connections exist: a source that gives up closes them.
        self.arrive(main, &hello, &mut |id, role, _| {
            let missing = || WireError::Lost(io::ErrorKind::NotConnected.into());
            let data = match role {
                Role::Control => return Err(not_a_channel()),
                Role::Disks { index } => disks.get(usize::from(index)),
                Role::Data { index } => data.get(usize::from(index)),
            };
            let data = data.ok_or_else(missing)?;
            let channel = Channel::new(data.clone(), cancel.clone());
            let hello = receive_hello(&channel, GREETING_PATIENCE)?;
            if (hello.id, hello.role) != (id, role) {
                let reason = "no such migration or channel".to_owned();
                return Err(WireError::Malformed { what: "hello", reason });
            }
            Ok(data.clone())
        })
    }

    fn status(&mut self, status: MigrationStatus) {
        self.counters.update(|stats| stats.status = status);
        (self.events)(MigrationEvent::Status(status));
    }

    /// Runs the migration, after the source's Hello, and reports its status.
    fn arrive(
        &mut self,
        main: Arc<dyn Transport>,
        hello: &Hello,
        open: Open<'_>,
    ) -> Result<(), DestinationError> {
        self.counters.update(|stats| stats.started = Some(Instant::now()));
        self.status(MigrationStatus::Setup);
        let result = self.greeted(main, hello, open);
        let error = result.as_ref().err().map(|error| chain(error));
        self.counters.update(|stats| {
            stats.total_time = stats.started.map(|started| started.elapsed());
            stats.error.clone_from(&error);
        });
        self.status(match &result {
            Ok(()) => MigrationStatus::Completed,
            Err(DestinationError::Cancelled) => MigrationStatus::Cancelled,
            Err(_) => MigrationStatus::Failed,
        });
        result
    }

    fn greeted(
        &mut self,
        main: Arc<dyn Transport>,
        hello: &Hello,
        open: Open<'_>,
    ) -> Result<(), DestinationError> {
        let answer = hello.answer();
        let greeting = Channel::new(main.clone(), self.cancel.clone());
        let checked = hello.check_channels().map_err(|reason| {
            let error = WireError::Malformed { what: "hello", reason };
            DestinationError::from(error)
        });
        if checked.is_ok() {
            send_hello(&greeting, &answer)?;
        }
        let (control, threads) =
            Control::start(main, self.cancel.clone()).map_err(DestinationError::Thread)?;
        let channels = checked.and_then(|()| self.open_channels(&control, hello, &answer, open));
        let mut arrived = None;
        let result = channels.and_then(|channels| {
            let arrival = Arrival::new(control.clone(), channels, self.counters.clone());
            self.load_and_take_over(arrived.insert(arrival))
        });
        let result = result.map_err(|error| self.refuse(&control, error, arrived.as_ref()));
        // All frames are out by now.
        drop(threads);
        // Last: the source has its answer.
        if let Some(arrival) = arrived {
            close(arrival, result.is_ok());
        }
        result
    }

    fn open_channels(
        &mut self,
        control: &Control,
        hello: &Hello,
        answer: &Hello,
        open: Open<'_>,
    ) -> Result<Vec<(Role, Channel)>, DestinationError> {
        let disk_channels = match (answer.has(DISKS), answer.has(DISK_CHANNELS)) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => hello.data_channels,
        };
        let disks = (0..disk_channels).map(|index| Role::Disks { index });
        let roles = (0..hello.data_channels).map(|index| Role::Data { index }).chain(disks);
        let channels = roles.map(|role| {
            let named = |error: WireError| error.on_channel(role);
            let transport = open(hello.id, role, &|| control.is_lost()).map_err(named)?;
            let channel = Channel::new(transport, self.cancel.clone())
                .with_liveness(control.liveness().clone());
            send_hello(&channel, &Hello { role, ..answer.clone() }).map_err(named)?;
            Ok::<_, WireError>((role, channel))
        });
        Ok(channels.collect::<Result<_, _>>()?)
    }

    /// Abandons the machine and its disks, sends the reason, and then closes the other connections: the
    /// source should hear the reason before it meets a closed one. All are harmless without a machine or a
    /// peer. After `Declined` the source knows already.
    fn refuse(
        &mut self,
        control: &Control,
        error: DestinationError,
        arrival: Option<&Arrival>,
    ) -> DestinationError {
        let hang_up = || arrival.into_iter().for_each(Arrival::hang_up);
        if let DestinationError::Declined(told) = error {
            hang_up();
            return *told;
        }
        let mut told = false;
        let error = match error {
            _ if self.cancel.is_cancelled() => DestinationError::Cancelled,
            DestinationError::Wire(met) => {
                let met = control.own_cause(met.into());
                if met.is_broken() {
                    // The source may not know, or meet next what is only the consequence: a channel that was
                    // closed here because another one broke.
                    self.host.abandon();
                    control.say_farewell(Kind::Refused, &chain(&met));
                    told = true;
                }
                control.cause_of(met).into()
            }
            error => error,
        };
        if !told {
            self.host.abandon();
            if !matches!(error, DestinationError::Wire(WireError::Aborted(_))) {
                control.say_farewell(Kind::Refused, &chain(&error));
                told = true;
            }
        }
        hang_up();
        if told {
            // Until the source closes: a refusal must not be overtaken by a reset.
            control.await_close();
        }
        error
    }
}
