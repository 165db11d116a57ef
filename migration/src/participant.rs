//! Participants: the parts of the machine that migrate (RAM, disks, boot payload). Each is an [`Outgoing`] at
//! the source and an [`Incoming`] at the destination: two types, so that no field is shared by accident.
//!
//! The drivers ([`crate::source`], [`crate::destination`]) know a list of these and nothing else. They call
//! them in this order:
//!
//! ```text
//! setup ─▶ (iterate… pending)… ─▶ [flush ahead] pause ─▶ complete ─┬▶ Go ─▶ [postcopy] ─▶ cleanup
//!              ▲                                                   └▶ called_off ──┐
//!              └────────────────────────────────────────────────────────────────────┘
//! setup ─▶ load(Part)… ─▶ load(End) ─▶ finish ─┬▶ Go ─▶ [load(Postcopy)… missing] ─▶ cleanup
//!              ▲                               └▶ called_off ──┐
//!              └───────────────────────────────────────────────┘
//! ```
//! **Moved and complete are two things.** What the guest does not need to run may wait: it is sent in the phase
//! after `Go` ([`Outgoing::postcopy`]), in which the guest runs at the destination. Nothing that fails in that
//! phase touches the guest. It is there only if a participant has asked for it.
//!
//! Plain devices are not participants: their records are sent in the section `device`.

use crate::cancel::CancelToken;
use crate::control::{Control, Limit};
use crate::error::ParticipantError;
use crate::pace::{Cap, LinkSpeed};
use crate::params::SharedParams;
use crate::stats::Counters;
use crate::transport::Channel;
use crate::wire::section::{Section, Stage};
use crate::wire::{Hello, Kind, Role, WireError};
use std::sync::Arc;
use std::time::Duration;

/// How a migration ended, for cleanup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs at the destination.
    Moved,
    /// It does not, or the outcome is unknown.
    NotMoved,
}

/// What a participant of the source works with: connections, limits, counters.
pub struct OutgoingContext {
    /// Shared by all participants.
    pub control: Control,
    /// The destination's Hello, with the capabilities that both sides have.
    pub agreed: Hello,
    /// Its own channels, in the order of [`Outgoing::roles`].
    pub channels: Vec<Arc<Channel>>,
    /// The bandwidth cap.
    pub cap: Cap,
    /// The measured bandwidth.
    pub speed: Arc<LinkSpeed>,
    /// Read at every step.
    pub params: SharedParams,
    /// For reports only: no decision reads them.
    pub counters: Arc<Counters>,
    /// Ends the migration early.
    pub cancel: CancelToken,
}

impl OutgoingContext {
    /// Sends a section on the control connection.
    pub fn send(&self, name: &str, stage: Stage, body: &[u8]) -> Result<(), WireError> {
        self.control.send(Kind::Section, &Section::encode(stage, name, body))
    }

    /// As [`OutgoingContext::send`], but together with the next frame that is sent.
    pub fn push(&self, name: &str, stage: Stage, body: &[u8]) -> Result<(), WireError> {
        self.control.push(Kind::Section, &Section::encode(stage, name, body))
    }

    /// Waits for the destination's section `name` of this stage; returns its body.
    pub fn answer(
        &self,
        name: &str,
        stage: Stage,
        what: &'static str,
    ) -> Result<Vec<u8>, WireError> {
        let payload = self.control.expect(Kind::Section, &Limit::alive(what))?;
        let section = Section::decode(&payload)?;
        if (section.name, section.stage) != (name, stage) {
            return Err(WireError::Unexpected { found: section.describe(), expected: what });
        }
        Ok(section.body.to_vec())
    }
}

/// How long a participant may send before it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// After this time it returns [`Step::More`], if it can.
    pub time: Duration,
}

/// Progress of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The budget is spent.
    More,
    /// All that was dirty when the pass began is in place at the destination.
    Done(Pass),
}

/// A finished pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pass {
    /// Dirty bytes that were sent.
    pub sent_bytes: u64,
    /// Time to send them at the measured bandwidth.
    pub send_time: Duration,
}

/// Whether [`Outgoing::pending`] may be slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Use known values.
    Estimate,
    /// May read dirty logs.
    Exact,
}

/// How fast a participant's state is dirtied and sent, in its own bytes per second. All zero: unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Dirty rate by samples in the middle of a pass; `None` before there were enough.
    pub dirtied: Option<u64>,
    /// Dirty rate over the whole last pass: a lower bound.
    pub seen: u64,
    /// The guest was throttled in this pass: earlier rates no longer apply.
    pub rate_changed: bool,
    /// Bytes sent per second.
    pub sent: u64,
    /// Time to send this pass's bytes with the guest stopped. `None` in the first pass, which sends
    /// everything whether in use or not.
    pub pass_time: Option<Duration>,
    /// Encoders are on, and it is still unknown how far they shrink the data.
    pub may_shrink: bool,
}

/// A participant's contribution to the downtime of a stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cost {
    /// Name of the part of the pause, for users.
    pub part: &'static str,
    pub time: Duration,
    /// Whether it is independent of how much is left to send.
    pub fixed: bool,
}

/// What a participant still has to send.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pending {
    /// Bytes that the destination needs before the guest can run there.
    pub must_precopy_bytes: u64,
    /// Time to send them with the guest stopped.
    pub send_time: Duration,
    /// Downtime of a stop, part by part, sending included.
    pub costs: Vec<Cost>,
    /// `None` for a participant that the guest does not write to.
    pub rates: Option<Rates>,
}

/// A part of the machine at the source.
pub trait Outgoing: Send {
    /// Name of its sections.
    fn section(&self) -> &'static str;
    /// Capability that the destination must have; named in Hello.
    fn capability(&self) -> Option<&'static str>;
    /// Capabilities that it uses if the destination has them; named in Hello too.
    fn options(&self) -> &'static [&'static str];
    /// The channels that it needs for itself, given what both sides can do. The number of data channels does
    /// not depend on that: Hello names it first.
    fn roles(&self, agreed: &Hello) -> Vec<Role>;
    /// Guest runs. Starts dirty tracking; sends the announcement.
    fn setup(&mut self, link: OutgoingContext) -> Result<(), ParticipantError>;
    /// Guest runs. Continues a pass or starts the next: sends everything dirty once, until it is in place or
    /// `budget` is spent.
    fn iterate(&mut self, pass: u64, budget: Budget) -> Result<Step, ParticipantError>;
    /// What is left to send, and its share of the downtime.
    fn pending(&mut self, precision: Precision) -> Result<Pending, ParticipantError>;
    /// The guest's throttle was changed.
    fn rate_has_changed(&mut self);
    /// Guest is paused. Sends everything that it needs to run, without a budget, and the end.
    fn complete(&mut self) -> Result<(), ParticipantError>;
    /// The stop was called off, perhaps after [`Outgoing::complete`]: the guest runs on, passes go on.
    fn called_off(&mut self) -> Result<(), ParticipantError>;
    /// Whether it has something that can wait for the handover. Asked after `setup`; may not change.
    fn can_postcopy(&self) -> bool {
        false
    }
    /// Guest runs at the destination. Sends what could wait. No failure brings the guest back.
    fn postcopy(&mut self) -> Result<(), ParticipantError> {
        Ok(())
    }
    /// Called exactly once after `setup`, successful or not; in reverse order of setup.
    fn cleanup(&mut self, outcome: Outcome);
}

/// What a participant of the destination works with.
pub struct IncomingContext {
    /// Shared by all participants.
    pub control: Control,
    /// Its own channels, by role.
    pub channels: Vec<(Role, Channel)>,
    /// For reports only.
    pub counters: Arc<Counters>,
}

impl IncomingContext {
    /// Sends a section back to the source.
    pub fn send(&self, name: &str, stage: Stage, body: &[u8]) -> Result<(), WireError> {
        self.control.send(Kind::Section, &Section::encode(stage, name, body))
    }
}

/// A part of the machine at the destination.
pub trait Incoming: Send {
    /// Name of its sections.
    fn section(&self) -> &'static str;
    /// Whether it owns channels of this role.
    fn owns(&self, role: Role) -> bool;
    /// Whether it needs a channel of its own.
    fn needs_connection(&self) -> bool;
    /// The first section: checks the announcement and starts receiving.
    fn setup(&mut self, link: IncomingContext, body: &[u8]) -> Result<(), ParticipantError>;
    /// Any further section, of stage [`Stage::Part`], [`Stage::End`] or, once the guest runs here,
    /// [`Stage::Postcopy`].
    fn load(&mut self, stage: Stage, body: &[u8]) -> Result<(), ParticipantError>;
    /// Last chance to refuse: on return everything is in place and durable. After `Ok`, nothing may fail.
    fn finish(&mut self) -> Result<(), ParticipantError>;
    /// The source called its stop off: more data and another end follow.
    fn called_off(&mut self) -> Result<(), ParticipantError>;
    /// Whether something of it comes after the handover. Asked when the guest runs here.
    fn can_postcopy(&self) -> bool {
        false
    }
    /// What of it has not arrived, for users; empty if all has. Asked when nothing follows any more: what is
    /// missing is dropped.
    fn missing(&mut self) -> Vec<String> {
        Vec::new()
    }
    /// Called exactly once after `setup`, successful or not; in reverse order of setup.
    fn cleanup(&mut self, outcome: Outcome);
}
