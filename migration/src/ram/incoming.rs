//! RAM at the destination, as a participant: starts a receiving thread per data channel, and compares
//! both sides' counts before the guest may run.

use super::outgoing::SECTION;
use super::page_receiver::PageReceiver;
use super::receivers::Receivers;
use crate::error::ParticipantError;
use crate::guest::IncomingRam;
use crate::participant::{Incoming, IncomingContext, Outcome};
use crate::wire::section::{RamEnd, RamSetup, Stage};
use crate::wire::{Role, WireError};

/// RAM at the destination.
pub struct RamIncoming {
    ram: IncomingRam,
    receivers: Option<Receivers>,
    /// The source's totals, once its end has come.
    end: Option<RamEnd>,
}

impl RamIncoming {
    /// `ram` is untouched: every page reads as zero.
    pub fn new(ram: IncomingRam) -> Self {
        Self { ram, receivers: None, end: None }
    }
}

impl Incoming for RamIncoming {
    fn section(&self) -> &'static str {
        SECTION
    }

    fn owns(&self, role: Role) -> bool {
        matches!(role, Role::Data { .. })
    }

    fn needs_connection(&self) -> bool {
        true
    }

    fn setup(&mut self, context: IncomingContext, body: &[u8]) -> Result<(), ParticipantError> {
        let setup = RamSetup::decode(body)?;
        let count = context.channels.len();
        if usize::from(setup.data_channels) != count {
            let reason = format!("{} data channels, {count} exist", setup.data_channels);
            return Err(WireError::Malformed { what: "RAM setup", reason }.into());
        }
        let total_bytes = self.ram.layout.size_bytes();
        context
            .counters
            .update(|stats| (stats.total_bytes, stats.multifd) = (total_bytes, count > 1));
        let channels = context.channels.into_iter().map(|(_, channel)| {
            let pages = PageReceiver::start(self.ram.clone(), setup, context.counters.clone())?;
            Ok((pages, channel))
        });
        let channels = channels.collect::<Result<_, WireError>>()?;
        self.receivers = Some(Receivers::start(channels, &context.control)?);
        Ok(())
    }

    fn load(&mut self, stage: Stage, body: &[u8]) -> Result<(), ParticipantError> {
        if stage != Stage::End {
            let (found, expected) = (format!("{stage:?} of section \"ram\""), "the end of RAM");
            return Err(WireError::Unexpected { found, expected }.into());
        }
        self.end = Some(RamEnd::decode(body)?);
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ParticipantError> {
        let theirs = self.end.take().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        let tallies =
            self.receivers.as_ref().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        let tallies = tallies.await_end(theirs.number)?;
        let ours = RamEnd {
            number: theirs.number,
            totals: tallies.iter().map(|tally| tally.pages).sum(),
            frames: tallies.iter().map(|tally| tally.frames).collect(),
        };
        if ours != theirs {
            let reason = format!("the source sent {theirs:?}, {ours:?} arrived");
            return Err(WireError::Malformed { what: "end of the stream", reason }.into());
        }
        Ok(())
    }

    fn called_off(&mut self) -> Result<(), ParticipantError> {
        self.end = None;
        Ok(())
    }

    fn cleanup(&mut self, _: Outcome) {
        self.receivers = None;
    }
}
