//! The destination: accept, build, load, say `Ready`, run on `Go` and never without it. Called by the
//! VMM on the `mig-in` thread; page frames are received on threads `mig-recv-N`.
//!
//! ```text
//! mod        greet                     who is not Ferry is dropped, and the wait goes on
//! load       machine, sections, Eof    any failure: abandon the machine, then say Refused
//! receiver   page frames, meanwhile
//! disks      chunks of disks, meanwhile, if they travel
//! handover   Ready, Go, run, Running   no Go: abandon; does not start: abandon, then say Declined
//! ```

mod disks;
mod handover;
mod load;
mod receiver;

use crate::block::LoadError;
use crate::cancel::CancelToken;
use crate::guest::{DestinationHost, GuestError};
use crate::source::{MigrationEvent, chain};
use crate::stats::{Counters, MigrationStatus};
use crate::transport::channels::{Pulse, receive_hello, send_hello};
use crate::transport::reception::Reception;
use crate::transport::{Channel, Listener, Main, Transport};
use crate::wire::hello::DISKS;
use crate::wire::{Hello, Kind, MigrationId, Role, WireError};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a source may take to greet, and to open its data connection.
const GREETING_PATIENCE: Duration = Duration::from_secs(10);

/// Why a guest did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// Nobody can connect.
    #[error("cannot accept a connection")]
    Accept(#[source] io::Error),
    /// The connection or the source.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// This side's machine.
    #[error(transparent)]
    Guest(GuestError),
    /// A disk that arrives.
    #[error(transparent)]
    Disk(LoadError),
    /// Cancelled on this side.
    #[error("cancelled at the destination")]
    Cancelled,
    /// The host does not give a thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The right to run has arrived, but the machine does not start. The source has it back, if the
    /// connection still stands.
    #[error("the guest was handed over and cannot be started here: {0}")]
    Run(GuestError),
}

/// Everything that an arrival needs.
pub struct Destination<'a> {
    /// The machine to be.
    pub host: &'a mut dyn DestinationHost,
    /// What has been done.
    pub counters: Arc<Counters>,
    /// Ends it early, until `Go` has arrived.
    pub cancel: CancelToken,
    /// Told of every step, on the thread that receives.
    pub events: &'a mut dyn FnMut(MigrationEvent),
}

/// Waits for the connection of a migration that has this role.
type Open<'d> = &'d mut dyn FnMut(MigrationId, Role) -> Result<Arc<dyn Transport>, WireError>;

impl Destination<'_> {
    /// Waits for a source and takes its guest over. A connection that does not speak our protocol is
    /// dropped and the wait goes on; once a source has introduced itself, its failure is final.
    pub fn receive(mut self, listener: &Listener) -> Result<(), DestinationError> {
        let cancel = self.cancel.clone();
        let mut reception = Reception::open(listener, &cancel).map_err(DestinationError::Accept)?;
        let greeted = reception.main().map_err(|error| match error {
            WireError::Interrupted => DestinationError::Cancelled,
            WireError::Lost(error) => DestinationError::Accept(error),
            error => error.into(),
        });
        let (main, hello) = greeted?;
        self.arrive(Arc::new(main), &hello, &mut |id, role| {
            Ok(Arc::new(match role {
                Role::Main | Role::Disks => reception.disks(id, GREETING_PATIENCE)?,
                Role::Data { index } => reception.data(id, index, GREETING_PATIENCE)?,
            }))
        })
    }

    /// Takes a guest over from connections that exist already.
    pub fn receive_over(
        mut self,
        main: Arc<dyn Transport>,
        data: Vec<Arc<dyn Transport>>,
        disks: Option<Arc<dyn Transport>>,
    ) -> Result<(), DestinationError> {
        let cancel = self.cancel.clone();
        let greeting = Channel::new(main.clone(), cancel.clone());
        let hello = receive_hello(&greeting, GREETING_PATIENCE).inspect_err(|error| {
            if matches!(error, WireError::Version { .. }) {
                // It understands the start of our Hello, and can say so.
                let ours = Hello::new(Role::Main, MigrationId([0; 16]), 0);
                let _ = send_hello(&greeting, &ours);
            }
        })?;
        self.arrive(main, &hello, &mut |id, role| {
            let missing = || WireError::Lost(io::ErrorKind::NotConnected.into());
            let data = match role {
                Role::Main | Role::Disks => disks.as_ref(),
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

    /// A source has introduced itself.
    fn arrive(
        &mut self,
        main: Arc<dyn Transport>,
        hello: &Hello,
        open: Open<'_>,
    ) -> Result<(), DestinationError> {
        self.counters.update(|stats| stats.started = Some(Instant::now()));
        self.status(MigrationStatus::Setup);
        let main = Arc::new(Main::new(Channel::new(main, self.cancel.clone())));
        let result = self.connected(&main, hello, open);
        // Everything that could be said has been said.
        main.channel().transport().shutdown();
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

    fn connected(
        &mut self,
        main: &Arc<Main>,
        hello: &Hello,
        open: Open<'_>,
    ) -> Result<(), DestinationError> {
        let loaded = (|| {
            let malformed = |reason| WireError::Malformed { what: "hello", reason };
            hello.check_channels().map_err(malformed)?;
            let answer = hello.answer();
            send_hello(main.channel(), &answer)?;
            let mut open = |role| {
                let named = |error: WireError| error.on_channel(role);
                let channel =
                    Channel::new(open(hello.id, role).map_err(named)?, self.cancel.clone());
                send_hello(&channel, &Hello { role, ..answer.clone() }).map_err(named)?;
                Ok::<_, WireError>(channel)
            };
            let data = (0..hello.data_channels).map(|index| open(Role::Data { index }));
            let data = data.collect::<Result<_, _>>()?;
            let disks = if answer.has(DISKS) { Some(open(Role::Disks)?) } else { None };
            let pulse = Pulse::start(main.clone()).map_err(DestinationError::Thread)?;
            let running = self.load(main, data, disks)?;
            Ok((running, pulse))
        })();
        match loaded {
            Ok((running, _pulse)) => self.take_over(main, running),
            Err(error) => Err(self.refuse(main, error)),
        }
    }

    /// Lets go of the machine and its disks, then says why. Both are harmless if there is no machine
    /// yet, or nobody to hear it.
    fn refuse(&mut self, main: &Main, error: DestinationError) -> DestinationError {
        let error = match error {
            DestinationError::Wire(WireError::Interrupted) if self.cancel.is_cancelled() => {
                DestinationError::Cancelled
            }
            error => error,
        };
        self.host.abandon();
        if !matches!(error, DestinationError::Wire(WireError::Aborted(_))) {
            main.say_farewell(Kind::Refused, &chain(&error));
            // Reading on until the source closes keeps the refusal from being overtaken by a reset.
            main.hear_farewell();
        }
        error
    }
}
