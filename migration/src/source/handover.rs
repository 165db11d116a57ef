//! The last step: from the moment the right to run is spent there is no error to undo.

use super::SourceError;
use crate::guest::PausedGuest;
use crate::transport::Transport;
use crate::wire::{self, Kind};

/// How the handover ended.
#[derive(Debug)]
pub(super) enum Handover {
    /// The destination runs the guest.
    Completed,
    /// `Go` may or may not have arrived. Two running guests is the outcome never risked, so the guest
    /// stays stopped here.
    Unknown(SourceError),
}

/// Gives up the right to run, then sends `Go`. Returns [`Handover`], not `Result`.
pub(super) fn hand_over(paused: PausedGuest<'_>, transport: &mut dyn Transport) -> Handover {
    paused.surrender();
    let answer = wire::send(transport, Kind::Go, &[])
        .and_then(|_| wire::expect(transport, Kind::Running, "the answer to the handover"));
    match answer {
        Ok(_) => Handover::Completed,
        Err(lost) => Handover::Unknown(lost.into()),
    }
}
