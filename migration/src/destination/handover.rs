//! The last step: `Ready`, then `Go`, then the guest runs. Without `Go` it never runs here.

use super::{Destination, DestinationError};
use crate::control::{Control, Limit};
use crate::error::chain;
use crate::guest::RunPermit;
use crate::stats::DowntimeParts;
use crate::units::micros;
use crate::wire::section::Eof;
use crate::wire::{Encoder, Kind, WireError};
use std::time::{Duration, Instant};

/// How long the source may take to hand over, or to call its stop off, once everything is ready here.
const GO_PATIENCE: Duration = Duration::from_secs(30);

impl Destination<'_> {
    /// Sends `Ready` and waits for `Go`. Returns true if the guest now runs here, false if the source called
    /// its stop off.
    pub(super) fn take_over(
        &mut self,
        control: &Control,
        eof: Eof,
    ) -> Result<bool, DestinationError> {
        control.send(Kind::Ready, Encoder::default().u32(eof.attempt).bytes())?;
        let limit = Limit::within("the right to run", GO_PATIENCE);
        let frame = control.next(&limit)?;
        match frame.kind {
            Kind::Go => {}
            Kind::CalledOff => return Ok(false),
            _ => {
                let (found, expected) = (frame.describe(), limit.what);
                return Err(WireError::Unexpected { found, expected }.into());
            }
        }
        let arrived = Instant::now();
        let declined = if self.cancel.disarm() {
            match self.host.run(RunPermit::received(), eof.running) {
                Ok(()) => None,
                Err(error) => Some(DestinationError::Run(error)),
            }
        } else {
            Some(DestinationError::Cancelled)
        };
        if let Some(error) = declined {
            self.host.abandon();
            control.say_farewell(Kind::Declined, &chain(&error));
            control.await_close();
            return Err(DestinationError::Declined(Box::new(error)));
        }
        let started_in = micros(arrived.elapsed());
        self.counters.update(|stats| {
            let parts = DowntimeParts { resume: arrived.elapsed(), ..Default::default() };
            stats.downtime_parts = Some(parts);
        });
        // If this is lost the source reports the outcome as unknown, and stays stopped.
        let said = control.send(Kind::Running, Encoder::default().u64(started_in).bytes());
        if let Err(error) = said {
            log::warn!("cannot tell the source that the guest runs here: {}", chain(&error));
        }
        Ok(true)
    }
}
