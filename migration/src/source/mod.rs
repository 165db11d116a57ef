//! The source: connect, passes, stop, hand over. Called by the VMM on the `mig-out` thread.
//!
//! ```text
//! session   greet, describe the machine, set up    any failure: the guest has never stopped
//! precopy   passes until the rest is short         any failure: the guest has never stopped
//! stop      pause, send the rest, wait for Ready   any failure: the guest is resumed; so it is, and
//!           (deadline, estimate)                   the passes go on, if it takes too long
//! handover  spend the permit, Go, verdict          Completed, Declined (resumed), or Unknown
//! postcopy  send what could wait                   any failure: Incomplete; the guest runs there
//! ```
//! The guest is sent as a list of [`Outgoing`] participants; the driver does not know RAM or disks.

mod deadline;
mod error;
mod estimate;
mod handover;
mod postcopy;
mod precopy;
mod session;
mod stop;

pub use crate::ram::outgoing::SourceRam;
pub use error::{SourceError, SourceOutcome};

use crate::cancel::CancelToken;
use crate::error::chain;
use crate::guest::{GuestControl, GuestError, MachineDescription};
use crate::params::SharedParams;
use crate::participant::{Outcome, Outgoing};
use crate::stats::{Counters, MigrationStatus, NotConverging};
use crate::transport::{Address, Peer, Transport};
use crate::wire::{Role, WireError};
use handover::Handover;
use session::{Connect, Session};
use std::sync::Arc;
use std::time::Instant;
use stop::Stop;

/// Reports a step of a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MigrationEvent {
    /// The status has changed.
    Status(MigrationStatus),
    /// Round `n` begins, counted from 1.
    Pass(u64),
    /// The migration does not converge.
    NotConverging(NotConverging),
    /// The guest has moved; this, which could wait, has not arrived.
    Incomplete(String),
}

/// How much the guest is throttled: not at all when a migration begins.
#[derive(Debug, Default)]
pub struct AppliedThrottle {
    percent: u8,
}

/// A migration that came to a handover.
struct Ended {
    handover: Handover,
    /// What has not arrived of what could wait.
    incomplete: Option<String>,
}

/// What an outgoing migration needs.
pub struct Source<'a> {
    pub guest: &'a mut dyn GuestControl,
    /// Describes the machine. Called once, when the destination is connected; may be slow.
    pub machine: &'a mut dyn FnMut() -> Result<MachineDescription, GuestError>,
    /// In the order of setup and sending.
    pub participants: Vec<Box<dyn Outgoing>>,
    /// Read at every step, so that changes apply at once.
    pub params: SharedParams,
    /// For reports only.
    pub counters: Arc<Counters>,
    pub throttle: AppliedThrottle,
    /// Ends the migration early, until the handover.
    pub cancel: CancelToken,
    /// Gives up what could wait, after the handover.
    pub give_up: CancelToken,
    /// Called for each step, on the `mig-out` thread.
    pub events: &'a mut dyn FnMut(MigrationEvent),
}

impl Source<'_> {
    /// Moves the guest to `address`. On return the guest runs there, here, or (unknown) nowhere.
    pub fn migrate(self, address: &Address) -> SourceOutcome {
        let cancel = self.cancel.clone();
        let mut resolved = None;
        self.migrate_by(&mut |_| {
            let peer = match resolved.take() {
                Some(peer) => Ok(peer),
                None => Peer::resolve(address),
            };
            match peer.and_then(|peer| resolved.insert(peer).connect(&cancel)) {
                Ok(transport) => Ok(Arc::new(transport)),
                Err(_) if cancel.is_cancelled() => Err(SourceError::Cancelled),
                Err(source) => Err(SourceError::Connect { address: address.to_string(), source }),
            }
        })
    }

    /// Moves the guest over connections that exist already: the control connection, then the data and
    /// disk channels by number.
    pub fn migrate_over(
        self,
        main: Arc<dyn Transport>,
        data: Vec<Arc<dyn Transport>>,
        disks: Vec<Arc<dyn Transport>>,
    ) -> SourceOutcome {
        self.migrate_by(&mut |role| {
            let transport = match role {
                Role::Control => Some(&main),
                Role::Data { index } => data.get(usize::from(index)),
                Role::Disks { index } => disks.get(usize::from(index)),
            };
            let missing = || WireError::Lost(std::io::ErrorKind::NotConnected.into());
            transport.cloned().ok_or_else(|| missing().into())
        })
    }

    fn migrate_by(mut self, connect: Connect<'_>) -> SourceOutcome {
        let result = self.run(connect);
        self.finish(result)
    }

    fn status(&mut self, status: MigrationStatus) {
        show(&self.counters, self.events, status);
    }

    fn run(&mut self, connect: Connect<'_>) -> Result<Ended, SourceError> {
        self.counters.update(|stats| stats.started = Some(Instant::now()));
        self.status(MigrationStatus::Setup);
        let participants = std::mem::take(&mut self.participants);
        let opened = Session::open(participants, &self.cancel, connect);
        let mut session = opened.map_err(SourceError::unexplained)?;
        if let Err(error) = session.set_up(self) {
            return Err(session.abort(error));
        }
        let handover = loop {
            if let Err(error) = self.precopy(&mut session) {
                break Err(session.abort(error));
            }
            match self.stop_and_hand_over(&mut session) {
                Ok(Stop::CalledOff) => {}
                Ok(Stop::HandedOver(handover)) => break Ok(handover),
                Err(error) => break Err(error),
            }
        };
        let moved = matches!(handover, Ok(Handover::Completed { .. }));
        let incomplete = if moved { self.postcopy(&mut session) } else { None };
        session.close(if moved { Outcome::Moved } else { Outcome::NotMoved });
        handover.map(|handover| Ended { handover, incomplete })
    }

    /// Throttles the guest by `percent`. Failure is logged and not fatal.
    fn set_throttle(&mut self, percent: u8) {
        self.throttle.percent = percent;
        self.counters.update(|stats| stats.throttle_percent = percent);
        if let Err(error) = self.guest.throttle(percent) {
            log::warn!("the guest cannot be throttled by {percent} %: {error}");
        }
    }

    fn finish(mut self, result: Result<Ended, SourceError>) -> SourceOutcome {
        // Before the end is reported: the next migration may begin at once.
        self.release_throttle();
        let outcome = match result {
            Ok(Ended { handover: Handover::Completed { .. }, incomplete }) => match incomplete {
                None => SourceOutcome::Completed,
                Some(missing) => SourceOutcome::Incomplete(missing),
            },
            Ok(Ended { handover: Handover::Unknown(error), .. }) => SourceOutcome::Unknown(error),
            Ok(Ended { handover: Handover::Declined(error), .. }) => SourceOutcome::Failed(error),
            Err(error @ SourceError::NotResumed { .. }) => SourceOutcome::Failed(error),
            Err(_) if self.cancel.is_cancelled() => SourceOutcome::Cancelled,
            Err(error) => SourceOutcome::Failed(error),
        };
        let (status, error) = match &outcome {
            SourceOutcome::Completed | SourceOutcome::Incomplete(_) => {
                (MigrationStatus::Completed, None)
            }
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

    /// Ends throttling.
    fn release_throttle(&mut self) {
        if self.throttle.percent > 0 {
            self.set_throttle(0);
        }
    }
}

impl Drop for Source<'_> {
    /// Throttling never outlives a migration, not even one that panics.
    fn drop(&mut self) {
        self.release_throttle();
    }
}

/// Sets the status and reports it. A cancel that is in progress is shown until the end, or the handover.
fn show(counters: &Counters, events: &mut dyn FnMut(MigrationEvent), status: MigrationStatus) {
    let mut shown = true;
    counters.update(|stats| {
        let past_cancel = status.is_over() || status == MigrationStatus::PostcopyActive;
        shown = stats.status != MigrationStatus::Cancelling || past_cancel;
        if shown {
            stats.status = status;
        }
    });
    if shown {
        events(MigrationEvent::Status(status));
    }
}

fn encode(what: &'static str, value: &impl serde::Serialize) -> Result<Vec<u8>, SourceError> {
    serde_json::to_vec(value).map_err(|source| SourceError::Encode { what, source })
}
