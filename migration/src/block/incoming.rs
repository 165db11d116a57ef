//! The disks at the destination, as a participant: starts [`Receiver`] at the setup, and compares both
//! sides' counts before the guest may run.

use super::IncomingDisk;
use super::frame::{BlockSetup, BlockTotals, DiskData};
use super::outgoing::SECTION;
use super::receiver::Receiver;
use crate::block::chunk_receiver::ChunkReceiver;
use crate::error::ParticipantError;
use crate::participant::{Incoming, IncomingContext, Outcome};
use crate::stats::Counters;
use crate::wire::section::Stage;
use crate::wire::{Role, WireError};
use std::sync::Arc;

/// The disks of an incoming guest.
pub struct DisksIncoming {
    disks: Vec<IncomingDisk>,
    receiver: Option<Receiver>,
    /// Set with the receiver.
    counters: Option<Arc<Counters>>,
    /// The source's totals, once its end has come.
    end: Option<BlockTotals>,
}

impl DisksIncoming {
    /// `disks` are blank images in exclusive use, in the order of the machine description.
    pub fn new(disks: Vec<IncomingDisk>) -> Self {
        Self { disks, receiver: None, counters: None, end: None }
    }
}

impl Incoming for DisksIncoming {
    fn section(&self) -> &'static str {
        SECTION
    }

    fn owns(&self, role: Role) -> bool {
        matches!(role, Role::Disks { .. })
    }

    fn needs_connection(&self) -> bool {
        true
    }

    fn setup(&mut self, context: IncomingContext, body: &[u8]) -> Result<(), ParticipantError> {
        let channels: Vec<_> = context.channels.into_iter().map(|(_, channel)| channel).collect();
        if channels.is_empty() {
            return Err(ParticipantError::not_set_up(SECTION));
        }
        let setup = BlockSetup::decode(body)?;
        let chunks = ChunkReceiver::start(self.disks.clone(), &setup, context.counters.clone())?;
        self.receiver = Some(Receiver::start(chunks, channels, &context.control)?);
        self.counters = Some(context.counters);
        Ok(())
    }

    fn load(&mut self, stage: Stage, body: &[u8]) -> Result<(), ParticipantError> {
        if let (Stage::Part, Some(counters)) = (stage, &self.counters) {
            let lens: Vec<_> = self.disks.iter().map(|disk| disk.node.len_bytes()).collect();
            let DiskData(data) = DiskData::decode(body, &lens)?;
            counters.update(|stats| stats.disk.get_or_insert_default().announced(&data));
            return Ok(());
        }
        if stage != Stage::End {
            let (found, expected) =
                (format!("{stage:?} of section \"block\""), "the end of the disks");
            return Err(WireError::Unexpected { found, expected }.into());
        }
        self.end = Some(BlockTotals::decode(body)?);
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ParticipantError> {
        let theirs = self.end.take().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        let ours = self
            .receiver
            .as_ref()
            .ok_or_else(|| ParticipantError::not_set_up(SECTION))?
            .await_end(theirs.ends)?;
        if ours != theirs {
            let reason = format!("the source sent {theirs:?}, {ours:?} arrived");
            return Err(WireError::Malformed { what: "end of the disks", reason }.into());
        }
        Ok(())
    }

    fn called_off(&mut self) -> Result<(), ParticipantError> {
        self.end = None;
        Ok(())
    }

    fn cleanup(&mut self, _: Outcome) {
        self.receiver = None;
    }
}
