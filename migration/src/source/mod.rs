//! The source: connect, rounds, stop, hand over. Called by the VMM on the `mig-out` thread.
//!
//! ```text
//! mod       greet, describe the machine        any failure: the guest has never stopped
//! freight   what travels: RAM and disks, weighed together
//! precopy   rounds until the rest is short     any failure: the guest has never stopped
//! stop      pause, send the rest, wait Ready   any failure: the guest is resumed; so it is, and the
//!                                              rounds go on, if more is left than was predicted
//! handover  spend the permit, Go, verdict      Completed, Declined (resumed), or Unknown
//! ```

mod error;
mod freight;
mod handover;
mod pace;
mod precopy;
mod stop;

pub use crate::ram::outgoing::SourceRam;
pub use error::{SourceError, SourceOutcome};

use crate::block::SourceDisks;
use crate::block::outgoing::DisksOutgoing;
use crate::cancel::{CancelToken, Registration};
use crate::guest::{GuestControl, GuestError, MachineDescription};
use crate::params::SharedParams;
use crate::policy;
use crate::ram::lanes::Lanes;
use crate::ram::outgoing::RamOutgoing;
use crate::ram::shard::{Common, Shard};
use crate::stats::{Counters, MigrationStatus, NotConverging};
use crate::transport::channels::{Pulse, payload_of, receive_hello, send_hello};
use crate::transport::{Address, Channel, Main, SocketTransport, Transport};
use crate::wire::hello::DISKS;
use crate::wire::section::{Section, Stage};
use crate::wire::{Hello, Kind, MigrationId, Role, WireError};
use freight::Freight;
use handover::Handover;
use pace::Pace;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stop::Stop;

/// A step of a migration, told while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationEvent {
    /// The status has changed.
    Status(MigrationStatus),
    /// Round `n` begins, counted from 1.
    Pass(u64),
    /// As things are the guest cannot be moved: it writes faster than is sent.
    NotConverging(NotConverging),
}

/// How long a destination may take to answer a greeting.
const GREETING_PATIENCE: Duration = Duration::from_secs(10);

/// Everything that a migration needs.
pub struct Source<'a> {
    /// The machine.
    pub guest: &'a mut dyn GuestControl,
    /// Asked once what it is, when the destination listens. It may take its time.
    pub machine: &'a mut dyn FnMut() -> Result<MachineDescription, GuestError>,
    /// Disks that leave with it.
    pub disks: SourceDisks,
    /// Limits, read anew at every step.
    pub params: SharedParams,
    /// What has been done.
    pub counters: Arc<Counters>,
    /// Ends it early.
    pub cancel: CancelToken,
    /// Told of every step, on the thread that migrates.
    pub events: &'a mut dyn FnMut(MigrationEvent),
}

/// The connections of one migration. Dropping it ends them.
struct Link {
    main: Arc<Main>,
    data: Vec<Arc<Channel>>,
    /// Of the disks, if they travel.
    disks: Option<Arc<Channel>>,
    /// Of a journey there and back.
    round_trip: Duration,
    /// A cancel wakes who writes pages or disks; the main connection stays usable, to say why.
    _wake: Vec<Registration>,
    /// After the others: its thread ends once they are shut down.
    _pulse: Pulse,
}

impl Link {
    /// How long a destination may be alive without getting on: so many times as long as it may stand
    /// still.
    fn patience(&self, times: u32) -> Duration {
        self.main.channel().transport().patience() * times
    }

    fn end_data(&self) {
        let all = self.data.iter().chain(&self.disks);
        all.for_each(|channel| channel.transport().shutdown());
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.end_data();
        self.main.channel().transport().shutdown();
    }
}

type Connect<'c> = &'c mut dyn FnMut() -> Result<Arc<dyn Transport>, SourceError>;

impl Source<'_> {
    /// Moves the guest to `address`. On return the guest runs there, here, or (unknown) nowhere.
    pub fn migrate(mut self, address: &Address, ram: SourceRam) -> SourceOutcome {
        let cancel = self.cancel.clone();
        let channels = self.params.get().channels();
        let result =
            self.run(ram, channels, &mut || match SocketTransport::connect(address, &cancel) {
                Ok(transport) => Ok(Arc::new(transport)),
                Err(_) if cancel.is_cancelled() => Err(SourceError::Cancelled),
                Err(source) => Err(SourceError::Connect { address: address.to_string(), source }),
            });
        self.finish(result)
    }

    /// Moves the guest over connections that exist already; there are as many data channels as `data`,
    /// and one for the disks if they travel.
    pub fn migrate_over(
        mut self,
        main: Arc<dyn Transport>,
        data: Vec<Arc<dyn Transport>>,
        disks: Option<Arc<dyn Transport>>,
        ram: SourceRam,
    ) -> SourceOutcome {
        let channels = u16::try_from(data.len()).unwrap_or(u16::MAX);
        let mut transports = std::iter::once(main).chain(data).chain(disks);
        let result = self.run(ram, channels, &mut || {
            let lost = || WireError::Lost(std::io::ErrorKind::NotConnected.into());
            transports.next().ok_or_else(|| lost().into())
        });
        self.finish(result)
    }

    fn status(&mut self, status: MigrationStatus) {
        self.counters.update(|stats| stats.status = status);
        (self.events)(MigrationEvent::Status(status));
    }

    fn run(
        &mut self,
        ram: SourceRam,
        channels: u16,
        connect: Connect<'_>,
    ) -> Result<Handover, SourceError> {
        self.counters.update(|stats| stats.started = Some(Instant::now()));
        self.status(MigrationStatus::Setup);
        let link = self.connect(channels, connect).map_err(SourceError::unexplained)?;
        let set_up = self.set_up(&link, ram);
        let (mut freight, mut pace) = set_up.map_err(|error| settle(&link, error))?;
        let handover = loop {
            self.precopy(&link, &mut freight, &mut pace).map_err(|error| settle(&link, error))?;
            match self.stop_and_hand_over(&link, &mut freight, &mut pace) {
                Ok(Stop::TooMuchLeft) => {}
                Ok(Stop::HandedOver(handover)) => break Ok(handover),
                Err(error) => break Err(error),
            }
        };
        // The guest runs again, there or here: now the dirty log may take its time to stop.
        drop(link);
        drop(freight);
        handover
    }

    /// Slows the guest down by `percent`. That it cannot be is no reason to fail.
    fn set_throttle(&mut self, percent: u8) {
        if self.counters.throttle_percent() == percent {
            return;
        }
        // Noted first: what may have been done is undone in the end.
        self.counters.update(|stats| stats.throttle_percent = percent);
        if let Err(error) = self.guest.throttle(percent) {
            log::warn!("the guest cannot be throttled by {percent} %: {error}");
        }
    }

    fn finish(&mut self, result: Result<Handover, SourceError>) -> SourceOutcome {
        // Before the end is told: the next migration may begin at once.
        self.set_throttle(0);
        let outcome = match result {
            Ok(Handover::Completed { .. }) => SourceOutcome::Completed,
            Ok(Handover::Unknown(error)) => SourceOutcome::Unknown(error),
            Ok(Handover::Declined(error)) => SourceOutcome::Failed(error),
            Err(error @ SourceError::NotResumed { .. }) => SourceOutcome::Failed(error),
            Err(_) if self.cancel.is_cancelled() => SourceOutcome::Cancelled,
            Err(error) => SourceOutcome::Failed(error),
        };
        let (status, error) = match &outcome {
            SourceOutcome::Completed => (MigrationStatus::Completed, None),
            SourceOutcome::Cancelled => (MigrationStatus::Cancelled, None),
            SourceOutcome::Failed(error) => (MigrationStatus::Failed, Some(chain(error))),
            SourceOutcome::Unknown(error) => {
                let text = format!(
                    "the answer to the handover was lost ({}): the guest may run at the destination",
                    chain(error)
                );
                (MigrationStatus::Failed, Some(text))
            }
        };
        self.counters.update(|stats| {
            stats.total_time = stats.started.map(|started| started.elapsed());
            stats.error = error;
            stats.outcome_unknown = matches!(outcome, SourceOutcome::Unknown(_));
            stats.remaining_bytes = 0;
        });
        self.status(status);
        outcome
    }

    /// The main connection first: the destination then knows the migration that the others belong to.
    fn connect(&mut self, channels: u16, connect: Connect<'_>) -> Result<Link, SourceError> {
        let id = MigrationId::random()?;
        let transport = connect()?;
        let main = Channel::new(transport, self.cancel.clone());
        let greeted = Instant::now();
        let hello = Hello::new(Role::Main, id, channels);
        let with_disks = !self.disks.disks.is_empty();
        let hello = if with_disks { hello.wanting(DISKS) } else { hello };
        let answer = greet(&main, &hello)?;
        if with_disks && !answer.has(DISKS) {
            return Err(SourceError::NoDisksThere);
        }
        let round_trip = greeted.elapsed();
        let mut wake = Vec::new();
        let mut open = |role| {
            let transport = connect()?;
            let woken = transport.clone();
            wake.push(self.cancel.on_cancel(move || woken.shutdown()));
            let channel = Channel::new(transport, self.cancel.clone());
            greet(&channel, &Hello::new(role, id, channels))
                .map_err(|error| error.on_channel(role))?;
            Ok::<_, SourceError>(Arc::new(channel))
        };
        let data = (0..channels).map(|index| open(Role::Data { index }));
        let data = data.collect::<Result<_, _>>()?;
        let disks = if with_disks { Some(open(Role::Disks)?) } else { None };
        let main = Arc::new(Main::new(main));
        let pulse = Pulse::start(main.clone()).map_err(SourceError::Thread)?;
        Ok(Link { main, data, disks, round_trip, _wake: wake, _pulse: pulse })
    }

    /// What comes before the first page.
    fn set_up(&mut self, link: &Link, ram: SourceRam) -> Result<(Freight, Pace), SourceError> {
        let machine = (self.machine)().map_err(SourceError::Guest)?;
        let machine = encode("machine description", &machine)?;
        link.main.send(Kind::Machine, &machine)?;
        let what = "the answer to the machine description";
        // However long it takes while the other side is alive: it may have terabytes of a base to read.
        // Nothing is under way and the guest runs; the user may cancel.
        payload_of(link.main.receive()?, Kind::Accepted, what)?;
        let disks = match &link.disks {
            None => None,
            Some(channel) => {
                let (leaving, counters) = (self.disks.clone(), self.counters.clone());
                let disks = DisksOutgoing::setup(leaving, channel.clone(), counters)?;
                let setup = disks.announcement().encode();
                link.main.send(Kind::Section, &Section::encode(Stage::Setup, "block", &setup))?;
                Some(disks)
            }
        };
        let fixed = policy::fixed_downtime(link.round_trip);
        let pace = Pace::new(self.params.clone(), self.cancel.clone(), fixed);
        let common = Common {
            ram: ram.ram.clone(),
            layout: ram.layout.clone(),
            params: self.params.clone(),
            counters: self.counters.clone(),
            shards: u16::try_from(link.data.len()).unwrap_or(u16::MAX),
        };
        let channels = link.data.iter();
        let shards = channels
            .map(|channel| Shard::new(common.clone(), channel.clone(), Box::new(pace.cap())));
        let lanes = Lanes::start(shards.collect(), &link.main)?;
        let ram = RamOutgoing::setup(ram, lanes)?;
        let setup = Section::encode(Stage::Setup, "ram", &ram.announcement().encode());
        link.main.send(Kind::Section, &setup)?;
        let total = ram.pending_bytes();
        let multifd = self.params.get().multifd;
        self.counters.update(|stats| {
            stats.multifd = multifd;
            stats.total_bytes = total;
            stats.remaining_bytes = total;
            stats.setup_time = stats.started.map(|started| started.elapsed());
        });
        self.status(MigrationStatus::Active);
        Ok((Freight { ram, disks }, pace))
    }
}

impl Drop for Source<'_> {
    /// Throttling never outlives a migration, not even one that panics.
    fn drop(&mut self) {
        self.set_throttle(0);
    }
}

fn greet(channel: &Channel, hello: &Hello) -> Result<Hello, WireError> {
    send_hello(channel, hello)?;
    let answer = receive_hello(channel, GREETING_PATIENCE)?;
    if (answer.role, answer.id) != (hello.role, hello.id) {
        let reason = "it is for another connection".to_owned();
        return Err(WireError::Malformed { what: "hello", reason });
    }
    Ok(answer)
}

/// Before the connections go: what the destination says of a broken one explains it better than the
/// break does; and of a failure of ours, or a cancel, the destination is told.
fn settle(link: &Link, error: SourceError) -> SourceError {
    let cancelled = link.main.channel().is_cancelled();
    match error {
        SourceError::Wire(WireError::Refused(_) | WireError::Aborted(_)) => error,
        // A cancel does not make it untrue that the guest stands still.
        SourceError::NotResumed { .. } => {
            link.main.say_farewell(Kind::Abort, &chain(&error));
            link.end_data();
            error
        }
        SourceError::Wire(broken) if broken.is_broken() && !cancelled => {
            // If it was only a data channel, the destination may not even know.
            link.main.say_farewell(Kind::Abort, &chain(&broken));
            let last = link.main.hear_farewell();
            link.end_data();
            match last {
                Some(last) => WireError::Refused(last.reason()).into(),
                None => SourceError::Wire(broken).unexplained(),
            }
        }
        error => {
            let error = if cancelled { SourceError::Cancelled } else { error };
            link.main.say_farewell(Kind::Abort, &chain(&error));
            link.end_data();
            error
        }
    }
}

/// The error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn encode(what: &'static str, value: &impl serde::Serialize) -> Result<Vec<u8>, SourceError> {
    serde_json::to_vec(value).map_err(|source| SourceError::Encode { what, source })
}
