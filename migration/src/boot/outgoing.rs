//! The boot payload at the source, as a participant: announces the files, then sends the wanted ones.

use super::frame::{Piece, decode_bytes, decode_wanted, encode_bytes, encode_setup};
use super::{BootSource, Identity, PIECE_BYTES, SECTION};
use crate::error::ParticipantError;
use crate::participant::{
    Budget, Cost, Outcome, Outgoing, OutgoingContext, Pass, Pending, Precision, Step,
};
use crate::policy;
use crate::transport::Throttle;
use crate::wire::hello::BOOT;
use crate::wire::section::Stage;
use crate::wire::{Hello, Role, WireError};
use std::collections::VecDeque;
use std::io;
use std::time::Instant;

/// Reading a boot file failed at the source.
#[derive(Debug, thiserror::Error)]
#[error("boot file {file} cannot be read at {offset_bytes}")]
pub struct BootReadError {
    file: usize,
    offset_bytes: u64,
    #[source]
    source: io::Error,
}

/// A file to send, from `offset_bytes` on.
struct Unsent {
    file: usize,
    offset_bytes: u64,
    len_bytes: u64,
}

/// The boot payload at the source.
pub struct BootOutgoing {
    files: Box<dyn BootSource>,
    context: Option<OutgoingContext>,
    unsent: VecDeque<Unsent>,
    sent_bytes: u64,
    /// The destination has not yet confirmed that everything is written.
    unconfirmed: bool,
}

impl BootOutgoing {
    pub fn new(files: Box<dyn BootSource>) -> Self {
        Self { files, context: None, unsent: VecDeque::new(), sent_bytes: 0, unconfirmed: false }
    }

    fn left_bytes(&self) -> u64 {
        self.unsent.iter().map(|unsent| unsent.len_bytes - unsent.offset_bytes).sum()
    }

    /// Sends the next piece within the bandwidth cap.
    fn send_piece(&mut self) -> Result<(), ParticipantError> {
        let context = self.context.as_ref().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        let Some(next) = self.unsent.front_mut() else { return Ok(()) };
        let left = next.len_bytes - next.offset_bytes;
        let piece_bytes = left.min(PIECE_BYTES.into());
        let too_long = |_| WireError::TooLong {
            what: "boot piece",
            found: piece_bytes,
            most: PIECE_BYTES.into(),
        };
        let mut bytes = vec![0; usize::try_from(piece_bytes).map_err(too_long)?];
        let Unsent { file, offset_bytes, .. } = *next;
        self.files.read_at(file, offset_bytes, &mut bytes).map_err(|source| {
            ParticipantError::own(BootReadError { file, offset_bytes, source })
        })?;
        let number = u8::try_from(file).map_err(|_| ParticipantError::not_set_up(SECTION))?;
        let body = Piece { file: number, offset_bytes, bytes: &bytes }.encode();
        let mut cap = context.cap.clone();
        let mut allowed = 0;
        while allowed < body.len() {
            let now = cap.allow(body.len() - allowed)?;
            cap.sent(now);
            allowed += now;
        }
        context.send(SECTION, Stage::Part, &body)?;
        context.counters.update(|stats| {
            stats.transferred_bytes += body.len() as u64;
            stats.control_bytes += body.len() as u64;
        });
        next.offset_bytes += piece_bytes;
        self.sent_bytes += piece_bytes;
        self.unconfirmed = true;
        if next.offset_bytes == next.len_bytes {
            self.unsent.pop_front();
        }
        Ok(())
    }
}

impl Outgoing for BootOutgoing {
    fn section(&self) -> &'static str {
        SECTION
    }

    fn capability(&self) -> Option<&'static str> {
        Some(BOOT)
    }

    fn options(&self) -> &'static [&'static str] {
        &[]
    }

    fn roles(&self, _: &Hello) -> Vec<Role> {
        Vec::new()
    }

    fn setup(&mut self, context: OutgoingContext) -> Result<(), ParticipantError> {
        let context = self.context.insert(context);
        let identities = self.files.identities(&|| !context.cancel.is_cancelled())?;
        context.send(SECTION, Stage::Setup, &encode_setup(&identities)?)?;
        let answer = context.answer(SECTION, Stage::Setup, "the list of wanted boot files")?;
        let wanted = decode_wanted(&answer, identities.len())?;
        let unsent = |file: usize| {
            let Identity { len_bytes, .. } = identities.get(file)?;
            Some(Unsent { file, offset_bytes: 0, len_bytes: *len_bytes })
        };
        self.unsent = wanted.into_iter().filter_map(unsent).collect();
        self.unsent.retain(|unsent| unsent.len_bytes > 0);
        Ok(())
    }

    fn iterate(&mut self, _: u64, budget: Budget) -> Result<Step, ParticipantError> {
        let began = Instant::now();
        while !self.unsent.is_empty() {
            self.send_piece()?;
            if began.elapsed() >= budget.time && !self.unsent.is_empty() {
                return Ok(Step::More);
            }
        }
        if self.unconfirmed {
            let context =
                self.context.as_ref().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
            let answer = context.answer(SECTION, Stage::Part, "the end of writing boot files")?;
            let written = decode_bytes(&answer)?;
            if written != self.sent_bytes {
                let found = format!("{written} bytes of boot files");
                return Err(
                    WireError::Unexpected { found, expected: "those that were sent" }.into()
                );
            }
            self.unconfirmed = false;
        }
        // Sent once, so it predicts nothing about later rounds.
        Ok(Step::Done(Pass::default()))
    }

    fn pending(&mut self, _: Precision) -> Result<Pending, ParticipantError> {
        let left = self.left_bytes();
        let context = self.context.as_ref().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        let send_time = policy::send_time(left, context.speed.bytes_per_sec());
        let costs = if left == 0 {
            Vec::new()
        } else {
            vec![Cost { part: "sending boot files", time: send_time, fixed: false }]
        };
        Ok(Pending { must_precopy_bytes: left, send_time, costs, rates: None })
    }

    fn rate_has_changed(&mut self) {}

    fn complete(&mut self) -> Result<(), ParticipantError> {
        let context = self.context.as_ref().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        context.push(SECTION, Stage::End, &encode_bytes(self.sent_bytes))?;
        Ok(())
    }

    fn called_off(&mut self) -> Result<(), ParticipantError> {
        Ok(())
    }

    fn cleanup(&mut self, _: Outcome) {
        self.context = None;
    }
}
