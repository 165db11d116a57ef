//! The last step: from the moment the right to run is spent there is no error to undo.

use super::SourceError;
use crate::control::{Control, Limit};
use crate::guest::{PausedGuest, Surrendered};
use crate::wire::{Decoder, Kind, WireError};
use std::time::Duration;

/// How long the destination may take to start the guest.
const VERDICT_PATIENCE: Duration = Duration::from_secs(30);

/// How the handover ended.
#[derive(Debug)]
pub(super) enum Handover {
    /// The destination runs the guest.
    Completed {
        /// How long starting it took, as reported by the destination.
        started_in: Option<Duration>,
    },
    /// The destination has not run the guest and never will; it has been resumed here, or the error
    /// says why not.
    Declined(SourceError),
    /// `Go` may or may not have arrived. Two running guests is the outcome never risked, so the guest
    /// stays stopped here.
    Unknown(SourceError),
}

/// Gives up the right to run, then sends `Go`. Returns [`Handover`], not `Result`.
pub(super) fn hand_over(paused: PausedGuest<'_>, control: &Control) -> Handover {
    let surrendered = paused.surrender();
    let verdict = control.send(Kind::Go, &[]).and_then(|()| {
        control.next(&Limit::within("the answer to the handover", VERDICT_PATIENCE))
    });
    let lost = match verdict {
        Ok(frame) if frame.kind == Kind::Running => {
            return Handover::Completed { started_in: started_in(&frame.payload) };
        }
        // It declined, or gave up while `Go` was in flight. After a refusal it ignores `Go`.
        Err(WireError::Refused(reason)) => return declined(surrendered, reason),
        Ok(frame) => {
            let found = frame.describe();
            WireError::Unexpected { found, expected: "the answer to the handover" }
        }
        Err(error) => match control.hear_farewell() {
            Some(last) => return declined(surrendered, last.reason),
            None => error,
        },
    };
    Handover::Unknown(lost.into())
}

/// The start time in `Running`. `None` if absent or malformed: the guest runs either way.
fn started_in(payload: &[u8]) -> Option<Duration> {
    Decoder::new("the time of the start", payload).u64().ok().map(Duration::from_micros)
}

fn declined(surrendered: Surrendered<'_>, reason: String) -> Handover {
    let declined = SourceError::Declined { reason };
    Handover::Declined(match surrendered.take_back() {
        Ok(()) => declined,
        Err(source) => SourceError::NotResumed { cause: declined.to_string(), source },
    })
}
