//! A part of the machine that travels: RAM, the disks, the boot payload. An [`Outgoing`] at the source
//! and an [`Incoming`] at the destination: two types, so that no field is shared by accident.
//!
//! The drivers ([`crate::source`], [`crate::destination`]) know a list of these and nothing else. They call
//! them in this order:
//!
//! ```text
//! setup ─▶ (iterate… pending)… ─▶ [flush ahead] pause ─▶ complete ─┬▶ Go ─▶ cleanup
//!              ▲                                                   └▶ called_off ──┐
//!              └────────────────────────────────────────────────────────────────────┘
//! setup ─▶ load(Part)… ─▶ load(End) ─▶ finish ─┬▶ Go ─▶ cleanup
//!              ▲                               └▶ called_off ──┐
//!              └───────────────────────────────────────────────┘
//! ```
//! Plain devices are not participants: their records travel in the section `device`.

use crate::cancel::CancelToken;
use crate::control::{Control, Limit};
use crate::error::ParticipantError;
use crate::pace::{Cap, LinkSpeed};
use crate::params::SharedParams;
use crate::stats::Counters;
use crate::transport::Channel;
use crate::wire::section::{Section, Stage};
use crate::wire::{Kind, Role, WireError};
use std::sync::Arc;
use std::time::Duration;

/// How a migration has ended, for who cleans up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs at the destination.
    Moved,
    /// It does not, or nobody knows.
    NotMoved,
}

/// What a participant of the source sends through, and what it keeps to.
pub struct OutgoingContext {
    /// Frames; several participants share it.
    pub control: Control,
    /// Connections of its own, in the order of [`Outgoing::roles`].
    pub channels: Vec<Arc<Channel>>,
    /// The cap on bandwidth.
    pub cap: Cap,
    /// What the link lately moved.
    pub speed: Arc<LinkSpeed>,
    /// Read anew at every step.
    pub params: SharedParams,
    /// For reports only: nothing is decided by them.
    pub counters: Arc<Counters>,
    /// Ends everything early.
    pub cancel: CancelToken,
}

impl OutgoingContext {
    /// Sends a section on the control connection.
    pub fn send(&self, name: &str, stage: Stage, body: &[u8]) -> Result<(), WireError> {
        self.control.send(Kind::Section, &Section::encode(stage, name, body))
    }

    /// The same, together with the next frame that is sent.
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

/// How long a participant may send before it comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// After this time it comes back with [`Step::More`], if it can.
    pub time: Duration,
}

/// How far a pass has come.
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
    /// What was dirty and was sent.
    pub sent_bytes: u64,
    /// How long that takes to send, at the rate that was measured.
    pub send_time: Duration,
}

/// Whether [`Outgoing::pending`] may take time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// From what is known.
    Estimate,
    /// May look at dirty logs.
    Exact,
}

/// How fast a participant's state is written and sent, in its own bytes per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Dirtied, as looks in the middle of a pass have shown; none before there were enough.
    pub dirtied: Option<u64>,
    /// Dirtied, by what the last pass has left: no less than that.
    pub seen: u64,
    /// The guest was slowed down in this pass: what it has dirtied before proves nothing any more.
    pub rate_changed: bool,
    /// Sent.
    pub sent: u64,
    /// How long what this pass sends would take with the guest stopped. None in the first, in which
    /// everything is sent whether the guest uses it or not.
    pub pass_time: Option<Duration>,
    /// Whether it is still unknown how far what is sent can be made smaller.
    pub may_shrink: bool,
}

/// What the guest's stop would cost on account of one participant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cost {
    /// A part of the pause, as it is named to users.
    pub part: &'static str,
    /// How long it would take.
    pub time: Duration,
    /// Whether it takes as long however little is left, and cannot be had shorter.
    pub fixed: bool,
}

/// What a participant has still to send.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pending {
    /// Bytes that have to be at the destination before the guest runs there.
    pub must_precopy_bytes: u64,
    /// How long they would take with the guest stopped.
    pub send_time: Duration,
    /// What the stop would cost, part by part, the time of sending included.
    pub costs: Vec<Cost>,
    /// For a participant that the guest writes to.
    pub rates: Option<Rates>,
}

/// A part of the machine at the source.
pub trait Outgoing: Send {
    /// Names its sections.
    fn section(&self) -> &'static str;
    /// What the destination has to be able to do; named in Hello.
    fn capability(&self) -> Option<&'static str>;
    /// The connections that it wants for itself.
    fn roles(&self) -> Vec<Role>;
    /// Guest runs. Starts tracking; announces what will come.
    fn setup(&mut self, link: OutgoingContext) -> Result<(), ParticipantError>;
    /// Guest runs. Goes on with a pass, or begins the next: sends what is dirty, once, until that is in
    /// place or `budget` is spent.
    fn iterate(&mut self, pass: u64, budget: Budget) -> Result<Step, ParticipantError>;
    /// What is still to be sent, and what the stop would cost.
    fn pending(&mut self, precision: Precision) -> Result<Pending, ParticipantError>;
    /// The guest writes faster or slower from now on.
    fn rate_has_changed(&mut self);
    /// Guest is paused. Sends all that it needs to run, without a budget, and the end.
    fn complete(&mut self) -> Result<(), ParticipantError>;
    /// The stop was called off, perhaps after [`Outgoing::complete`]: the guest runs on, passes go on.
    fn called_off(&mut self) -> Result<(), ParticipantError>;
    /// Exactly once if `setup` was called, whatever it returned; last set up, first cleaned up.
    fn cleanup(&mut self, outcome: Outcome);
}

/// What a participant of the destination receives from.
pub struct IncomingContext {
    /// Frames; several participants share it.
    pub control: Control,
    /// Its own connections, by role.
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
    /// Names its sections.
    fn section(&self) -> &'static str;
    /// Whether a connection of this role is for it.
    fn owns(&self, role: Role) -> bool;
    /// Whether it can arrive without a connection of its own.
    fn needs_connection(&self) -> bool;
    /// The first section: checks what is announced, and starts receiving.
    fn setup(&mut self, link: IncomingContext, body: &[u8]) -> Result<(), ParticipantError>;
    /// Any further section, of stage [`Stage::Part`] or [`Stage::End`].
    fn load(&mut self, stage: Stage, body: &[u8]) -> Result<(), ParticipantError>;
    /// The last chance to object: everything is in place and durable on return. After `Ok`, nothing may
    /// fail.
    fn finish(&mut self) -> Result<(), ParticipantError>;
    /// The source has called its stop off; more will come, and another end.
    fn called_off(&mut self) -> Result<(), ParticipantError>;
    /// Exactly once if `setup` was called; last set up, first cleaned up.
    fn cleanup(&mut self, outcome: Outcome);
}
