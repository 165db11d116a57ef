//! The state of one outgoing migration: its connections and participants, from Hello to the end.

use super::estimate::Estimate;
use super::{Source, SourceError, encode};
use crate::cancel::{CancelToken, Registration};
use crate::control::{Control, ControlThreads, Limit};
use crate::error::{ParticipantError, chain};
use crate::pace::{Cap, LinkSpeed};
use crate::participant::{Outcome, Outgoing, OutgoingContext, Rates};
use crate::policy::Convergence;
use crate::stats::encoders::Periods;
use crate::stats::{MigrationStatus, StatsSnapshot};
use crate::transport::channel::{GREETING_PATIENCE, receive_hello, send_hello};
use crate::transport::{Channel, Transport};
use crate::wire::{Hello, Kind, MigrationId, Role, WireError};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Opens the connection of a role.
pub(super) type Connect<'c> = &'c mut dyn FnMut(Role) -> Result<Arc<dyn Transport>, SourceError>;

/// A running migration. Dropping it ends its connections.
pub(super) struct Session {
    pub(super) control: Control,
    _threads: ControlThreads,
    /// The destination's Hello: what both sides can do.
    agreed: Hello,
    channels: Vec<(Role, Arc<Channel>)>,
    pub(super) link: Arc<LinkSpeed>,
    pub(super) participants: Vec<Box<dyn Outgoing>>,
    /// How many of them were set up.
    set_up: usize,
    pub(super) estimate: Estimate,
    pub(super) convergence: Convergence,
    /// Of the last pass that has measured them.
    pub(super) rates: Option<Rates>,
    /// For reports, from the first pass on.
    pub(super) periods: Periods,
    /// Predicted downtime of the last decision to stop.
    pub(super) predicted: Duration,
    /// Passes begun, counted from 1.
    pub(super) pass: u64,
    /// Stops begun.
    pub(super) attempt: u32,
    /// Flushes ahead of the next stop.
    pub(super) flushes: u32,
    /// The part of the pause last reported as too long.
    pub(super) blocked_by: Option<String>,
    /// A cancel shuts down data and disk channels, which wakes their writers; the control connection stays
    /// usable for the reason.
    _wake: Vec<Registration>,
}

impl Session {
    /// Opens all connections, the control connection first: its Hello introduces the migration to the
    /// destination.
    pub(super) fn open(
        participants: Vec<Box<dyn Outgoing>>,
        cancel: &CancelToken,
        connect: Connect<'_>,
    ) -> Result<Self, SourceError> {
        let id = MigrationId::random()?;
        let wanted = participants.iter().flat_map(|participant| {
            participant.capability().into_iter().chain(participant.options().iter().copied())
        });
        let mut hello = wanted.fold(Hello::new(Role::Control, id, 0), Hello::wanting);
        let data = participants.iter().flat_map(|one| one.roles(&hello));
        let data = data.filter(|role| matches!(role, Role::Data { .. })).count();
        hello.data_channels = u16::try_from(data).map_err(|_| WireError::TooLong {
            what: "list of data channels",
            found: data as u64,
            most: u64::from(u16::MAX),
        })?;
        let transport = connect(Role::Control)?;
        let greeted = Instant::now();
        let answer = greet(&Channel::new(transport.clone(), cancel.clone()), &hello)?;
        let round_trip = greeted.elapsed();
        if let Some(refused) = participants
            .iter()
            .find(|participant| participant.capability().is_some_and(|wanted| !answer.has(wanted)))
        {
            return Err(SourceError::Unsupported { section: refused.section() });
        }
        let mut roles: Vec<Role> = participants.iter().flat_map(|one| one.roles(&answer)).collect();
        // The destination accepts them in this order.
        roles.sort_by_key(|role| match role {
            Role::Control => (0, 0),
            Role::Data { index } => (1, *index),
            Role::Disks { index } => (2, *index),
        });
        let (control, threads) =
            Control::start(transport, cancel.clone()).map_err(SourceError::Thread)?;
        let mut session = Self {
            control,
            _threads: threads,
            agreed: answer,
            channels: Vec::with_capacity(roles.len()),
            link: Arc::new(LinkSpeed::new(round_trip)),
            participants,
            set_up: 0,
            estimate: Estimate::new(),
            convergence: Convergence::default(),
            rates: None,
            periods: Periods::new(Instant::now(), StatsSnapshot::default()),
            predicted: Duration::ZERO,
            pass: 0,
            attempt: 0,
            flushes: 0,
            blocked_by: None,
            _wake: Vec::new(),
        };
        for role in roles {
            let transport = match connect(role) {
                Ok(transport) => transport,
                // The destination waits for this connection.
                Err(error) => return Err(session.abort(error)),
            };
            let woken = transport.clone();
            session._wake.push(cancel.on_cancel(move || woken.shutdown()));
            let channel = Channel::new(transport, cancel.clone())
                .with_liveness(session.control.liveness().clone());
            let greeted = greet(&channel, &Hello::new(role, id, hello.data_channels));
            if let Err(error) = greeted.map_err(|error| error.on_channel(role)) {
                return Err(session.abort(error.into()));
            }
            session.channels.push((role, Arc::new(channel)));
        }
        Ok(session)
    }

    /// Sends the machine description and sets up the participants.
    pub(super) fn set_up(&mut self, source: &mut Source<'_>) -> Result<(), SourceError> {
        let machine = (source.machine)().map_err(SourceError::Guest)?;
        let machine = encode("machine description", &machine)?;
        self.control.send(Kind::Machine, &machine)?;
        // No deadline while the peer is alive: it may have to read terabytes of a base image. The guest
        // runs, and the user may cancel.
        let limit = Limit::alive("the answer to the machine description");
        self.control.expect(Kind::Accepted, &limit)?;
        let cap = Cap::new(source.params.clone(), source.cancel.clone());
        for participant in &mut self.participants {
            let roles = participant.roles(&self.agreed);
            let own = self.channels.iter().filter(|(role, _)| roles.contains(role));
            let link = OutgoingContext {
                control: self.control.clone(),
                agreed: self.agreed.clone(),
                channels: own.map(|(_, channel)| channel.clone()).collect(),
                cap: cap.clone(),
                speed: self.link.clone(),
                params: source.params.clone(),
                counters: source.counters.clone(),
                cancel: source.cancel.clone(),
            };
            // From here on it is cleaned up, whether or not the setup succeeds.
            self.set_up += 1;
            participant.setup(link)?;
        }
        source.counters.update(|stats| {
            stats.setup_time = stats.started.map(|started| started.elapsed());
        });
        source.status(MigrationStatus::Active);
        Ok(())
    }

    /// Ends the migration because of `error`: finds the root cause, sends it to the destination and shuts
    /// the channels down. Returns the root cause.
    pub(super) fn abort(&self, error: SourceError) -> SourceError {
        let cancelled = self.control.is_cancelled();
        let error = match error {
            // More important than a cancel: the guest is stopped.
            error @ SourceError::NotResumed { .. } => error,
            _ if cancelled => SourceError::Cancelled,
            SourceError::Wire(met) => {
                if met.is_broken() {
                    // If only a data channel broke, the destination may not know.
                    self.control.say_farewell(Kind::Abort, &chain(&met));
                }
                SourceError::from(self.control.cause_of(met.into())).unexplained()
            }
            error => error,
        };
        if !matches!(
            error,
            SourceError::Wire(WireError::Refused(_) | WireError::Aborted(_)) | SourceError::Gone(_)
        ) {
            let reason = Some(&error).filter(|error| matches!(error, SourceError::Cancelled));
            let reason = reason.and_then(|_| self.control.cancel_reason());
            self.control.say_farewell(Kind::Abort, &reason.unwrap_or_else(|| chain(&error)));
        }
        self.end_channels();
        error
    }

    fn end_channels(&self) {
        self.channels.iter().for_each(|(_, channel)| channel.transport().shutdown());
    }

    /// Ends the connections, then cleans participants up in reverse order. The guest runs on one side by
    /// now, so stopping the dirty log may be slow.
    pub(super) fn close(mut self, outcome: Outcome) {
        self.clean_up(outcome);
    }

    fn clean_up(&mut self, outcome: Outcome) {
        self.end_channels();
        let count = std::mem::take(&mut self.set_up);
        self.participants.iter_mut().take(count).rev().for_each(|one| one.cleanup(outcome));
    }

    /// Runs `work` on every participant, in order, until one fails.
    pub(super) fn each(
        &mut self,
        work: impl FnMut(&mut Box<dyn Outgoing>) -> Result<(), ParticipantError>,
    ) -> Result<(), SourceError> {
        self.participants.iter_mut().try_for_each(work).map_err(SourceError::from)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.clean_up(Outcome::NotMoved);
    }
}

fn greet(channel: &Channel, hello: &Hello) -> Result<Hello, WireError> {
    send_hello(channel, hello)?;
    let answer = receive_hello(channel, GREETING_PATIENCE)?;
    if (answer.role, answer.id) != (hello.role, hello.id) {
        let reason = "the answer is for another connection".to_owned();
        return Err(WireError::Malformed { what: "hello", reason });
    }
    Ok(answer)
}
