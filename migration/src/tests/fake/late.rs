//! A participant with something that can wait for the handover: numbered pieces, and flags of who saw what.

use super::machine::Machine;
use crate::error::ParticipantError;
use crate::participant::*;
use crate::wire::section::Stage;
use crate::wire::{Hello, Role, WireError};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

const SECTION: &str = "late";
/// How many pieces there are.
pub const PIECES: u8 = 5;
/// Sent in the wrong stage.
pub const WRONG_STAGE: u8 = 254;
/// Sent to another participant.
pub const WRONG_SECTION: u8 = 255;

/// What a source says of a section: as it should, or not.
#[derive(Clone)]
pub struct Words {
    pub section: &'static str,
    pub setup: Vec<u8>,
    /// After the handover: the section's name, its stage and its body.
    pub after: Vec<(&'static str, Stage, Vec<u8>)>,
}

impl Words {
    /// The pieces, in this order.
    pub fn late(pieces: &[u8]) -> Self {
        let piece = |piece: &u8| match *piece {
            WRONG_STAGE => (SECTION, Stage::Part, Vec::new()),
            WRONG_SECTION => ("ram", Stage::Postcopy, Vec::new()),
            piece => (SECTION, Stage::Postcopy, vec![piece]),
        };
        let after = pieces.iter().map(piece).collect();
        Self { section: SECTION, setup: Vec::new(), after }
    }
}

/// At the source.
pub struct LateOutgoing {
    machine: Arc<Machine>,
    words: Words,
    context: Option<OutgoingContext>,
}

impl LateOutgoing {
    pub fn new(machine: Arc<Machine>, words: Words) -> Self {
        Self { machine, words, context: None }
    }

    fn send(&self, name: &str, stage: Stage, body: &[u8]) -> Result<(), ParticipantError> {
        let context = self.context.as_ref().expect("set up");
        Ok(context.send(name, stage, body)?)
    }
}

impl Outgoing for LateOutgoing {
    fn section(&self) -> &'static str {
        self.words.section
    }

    fn capability(&self) -> Option<&'static str> {
        None
    }

    fn options(&self) -> &'static [&'static str] {
        &[]
    }

    fn roles(&self, _: &Hello) -> Vec<Role> {
        Vec::new()
    }

    fn setup(&mut self, link: OutgoingContext) -> Result<(), ParticipantError> {
        self.context = Some(link);
        self.send(self.words.section, Stage::Setup, &self.words.setup)
    }

    fn iterate(&mut self, _: u64, _: Budget) -> Result<Step, ParticipantError> {
        Ok(Step::Done(Pass::default()))
    }

    fn pending(&mut self, _: Precision) -> Result<Pending, ParticipantError> {
        Ok(Pending::default())
    }

    fn rate_has_changed(&mut self) {}

    fn complete(&mut self) -> Result<(), ParticipantError> {
        self.send(self.words.section, Stage::End, &[])
    }

    fn called_off(&mut self) -> Result<(), ParticipantError> {
        Ok(())
    }

    fn can_postcopy(&self) -> bool {
        true
    }

    fn postcopy(&mut self) -> Result<(), ParticipantError> {
        assert!(self.machine.surrendered.load(SeqCst) && !self.machine.running.load(SeqCst));
        let mut after = self.words.after.iter();
        after.try_for_each(|(name, stage, body)| self.send(name, *stage, body))
    }

    fn cleanup(&mut self, _: Outcome) {}
}

/// What has arrived of it.
#[derive(Clone, Default)]
pub struct Late {
    pub pieces: Arc<Mutex<Vec<u8>>>,
    /// How it was cleaned up.
    pub outcome: Arc<Mutex<Option<Outcome>>>,
}

/// At the destination.
pub struct LateIncoming {
    late: Late,
    machine: Arc<Machine>,
}

impl LateIncoming {
    pub fn new(late: Late, machine: Arc<Machine>) -> Self {
        Self { late, machine }
    }
}

impl Incoming for LateIncoming {
    fn section(&self) -> &'static str {
        SECTION
    }

    fn owns(&self, _: crate::wire::Role) -> bool {
        false
    }

    fn needs_connection(&self) -> bool {
        false
    }

    fn setup(&mut self, _: IncomingContext, _: &[u8]) -> Result<(), ParticipantError> {
        Ok(())
    }

    fn load(&mut self, stage: Stage, body: &[u8]) -> Result<(), ParticipantError> {
        if stage != Stage::Postcopy {
            return Ok(());
        }
        assert!(self.machine.running.load(SeqCst), "the guest runs before what can wait arrives");
        let mut pieces = self.late.pieces.lock().unwrap();
        match body {
            [piece] if usize::from(*piece) == pieces.len() => pieces.push(*piece),
            _ => {
                let (found, expected) = (format!("{body:?}"), "the next piece");
                return Err(WireError::Unexpected { found, expected }.into());
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ParticipantError> {
        Ok(())
    }

    fn called_off(&mut self) -> Result<(), ParticipantError> {
        Ok(())
    }

    fn can_postcopy(&self) -> bool {
        true
    }

    fn missing(&mut self) -> Vec<String> {
        let arrived = self.late.pieces.lock().unwrap().len();
        (arrived..usize::from(PIECES)).map(|piece| format!("piece {piece}")).collect()
    }

    fn cleanup(&mut self, outcome: Outcome) {
        let earlier = self.late.outcome.lock().unwrap().replace(outcome);
        assert_eq!(earlier, None, "cleaned up once");
    }
}
