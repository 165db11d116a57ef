//! The boot payload at the destination, as a participant: asks for the missing files and passes pieces
//! on to a [`BootSink`].

use super::frame::{Piece, decode_bytes, decode_setup, encode_bytes, encode_wanted};
use super::{BootSink, SECTION};
use crate::error::ParticipantError;
use crate::participant::{Incoming, IncomingContext, Outcome};
use crate::wire::section::Stage;
use crate::wire::{Role, WireError};

/// The boot payload at the destination.
pub struct BootIncoming {
    files: Box<dyn BootSink>,
    context: Option<IncomingContext>,
    /// Bytes of the wanted files, and how many of them have arrived.
    wanted_bytes: u64,
    written_bytes: u64,
    /// The source's byte count, once its end has come.
    end: Option<u64>,
    finished: bool,
}

fn malformed(what: &'static str, reason: String) -> ParticipantError {
    WireError::Malformed { what, reason }.into()
}

impl BootIncoming {
    /// Files go to `files`.
    pub fn new(files: Box<dyn BootSink>) -> Self {
        Self { files, context: None, wanted_bytes: 0, written_bytes: 0, end: None, finished: false }
    }
}

impl Incoming for BootIncoming {
    fn section(&self) -> &'static str {
        SECTION
    }

    fn owns(&self, _: Role) -> bool {
        false
    }

    fn needs_connection(&self) -> bool {
        false
    }

    fn setup(&mut self, context: IncomingContext, body: &[u8]) -> Result<(), ParticipantError> {
        let identities = decode_setup(body)?;
        let sizes: Vec<u64> = identities.iter().map(|identity| identity.len_bytes).collect();
        let context = self.context.insert(context);
        let control = context.control.clone();
        let go_on = || !control.is_lost() && !control.is_cancelled();
        let wanted = self.files.announce(identities, &go_on)?;
        let all = wanted
            .iter()
            .filter_map(|file| sizes.get(*file))
            .try_fold(0u64, |sum, bytes| sum.checked_add(*bytes));
        let too_much = || malformed("boot setup", "the sizes overflow 64 bits".into());
        self.wanted_bytes = all.ok_or_else(too_much)?;
        context.send(SECTION, Stage::Setup, &encode_wanted(&wanted)?)?;
        Ok(())
    }

    fn load(&mut self, stage: Stage, body: &[u8]) -> Result<(), ParticipantError> {
        if stage == Stage::End {
            self.end = Some(decode_bytes(body)?);
            return Ok(());
        }
        let piece = Piece::decode(body)?;
        let bytes = piece.bytes.len() as u64;
        if bytes == 0 || bytes > self.wanted_bytes - self.written_bytes {
            let left = self.wanted_bytes - self.written_bytes;
            return Err(malformed("boot piece", format!("{bytes} bytes, {left} are wanted")));
        }
        self.files.write(piece.file.into(), piece.offset_bytes, piece.bytes)?;
        self.written_bytes += bytes;
        if self.written_bytes == self.wanted_bytes
            && let Some(context) = &self.context
        {
            context.send(SECTION, Stage::Part, &encode_bytes(self.written_bytes))?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ParticipantError> {
        let (theirs, ours) = (self.end.take(), self.written_bytes);
        if theirs != Some(ours) || ours != self.wanted_bytes {
            let reason = format!(
                "the source sent {theirs:?} bytes, {ours} arrived, {} are wanted",
                self.wanted_bytes
            );
            return Err(malformed("end of the boot files", reason));
        }
        if !std::mem::replace(&mut self.finished, true) {
            self.files.finish()?;
        }
        Ok(())
    }

    fn called_off(&mut self) -> Result<(), ParticipantError> {
        self.end = None;
        Ok(())
    }

    fn cleanup(&mut self, _: Outcome) {
        self.context = None;
    }
}
