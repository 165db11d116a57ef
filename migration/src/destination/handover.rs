//! The last step: `Ready`, then `Go`, then the guest runs. Without `Go` it never runs here.

use super::{Destination, DestinationError};
use crate::guest::RunPermit;
use crate::source::chain;
use crate::stats::DowntimeParts;
use crate::transport::Main;
use crate::transport::channels::payload_of;
use crate::wire::{Encoder, Kind, WireError};
use std::time::{Duration, Instant};

/// How long the source may take to hand over, once everything is ready here.
const GO_PATIENCE: Duration = Duration::from_secs(30);

impl Destination<'_> {
    pub(super) fn take_over(&mut self, main: &Main, running: bool) -> Result<(), DestinationError> {
        if let Err(error) = await_go(main) {
            return Err(self.refuse(main, error.into()));
        }
        let arrived = Instant::now();
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
        let started_in = u64::try_from(arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.counters.update(|stats| {
            let parts = DowntimeParts { resume: arrived.elapsed(), ..Default::default() };
            stats.downtime_parts = Some(parts);
        });
        // If this is lost the source reports the outcome as unknown, and stays stopped.
        if let Err(error) = main.send(Kind::Running, Encoder::default().u64(started_in).bytes()) {
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
