//! The last step: `Ready`, then `Go`, then the guest runs. Without `Go` it never runs here.

use super::{Destination, DestinationError};
use crate::guest::RunPermit;
use crate::source::chain;
use crate::transport::Main;
use crate::transport::channels::payload_of;
use crate::wire::{Kind, WireError};
use std::time::Duration;

/// How long the source may take to hand over, once everything is ready here.
const GO_PATIENCE: Duration = Duration::from_secs(30);

impl Destination<'_> {
    pub(super) fn take_over(&mut self, main: &Main, running: bool) -> Result<(), DestinationError> {
        if let Err(error) = await_go(main) {
            return Err(self.refuse(main, error.into()));
        }
        let declined = if self.cancel.disarm() {
            match self.host.run(RunPermit::received(), running) {
                Ok(()) => None,
                Err(error) => Some(DestinationError::Run(error)),
            }
        } else {
            Some(DestinationError::Cancelled)
        };
        if let Some(error) = declined {
            self.host.abandon();
            main.say_farewell(Kind::Declined, &chain(&error));
            main.hear_farewell();
            return Err(error);
        }
        // If this is lost the source reports the outcome as unknown, and stays stopped.
        if let Err(error) = main.send(Kind::Running, &[]) {
            log::warn!("the source does not hear that the guest runs here: {}", chain(&error));
        }
        Ok(())
    }
}

fn await_go(main: &Main) -> Result<(), WireError> {
    main.send(Kind::Ready, &[])?;
    let frame = main.receive_within("the right to run", GO_PATIENCE)?;
    payload_of(frame, Kind::Go, "the right to run").map(drop)
}
