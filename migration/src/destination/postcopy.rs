//! After the handover: the guest runs here, and what could wait arrives. Whatever happens here, the guest is
//! unharmed.

use super::load::{Arrival, LATER};
use super::{Destination, DestinationError};
use crate::cancel::CancelToken;
use crate::control::Limit;
use crate::error::chain;
use crate::priority;
use crate::source::MigrationEvent;
use crate::stats::MigrationStatus;
use crate::wire::{Kind, WireError, fit_reason};

impl Destination<'_> {
    /// Takes what could wait, if there is such, and reports what of it has not arrived.
    pub(super) fn postcopy(&mut self, arrival: &mut Arrival) {
        if !arrival.can_postcopy() {
            return;
        }
        priority::give_way();
        self.status(MigrationStatus::PostcopyActive);
        let control = arrival.control.clone();
        // Ends every wait and every write.
        let giving_up = self.give_up.on_cancel(move || control.hang_up());
        let ended = take_rest(arrival, &self.give_up);
        drop(giving_up);
        let mut missing = arrival.missing();
        let told = match ended {
            // The source waits for it.
            Ok(()) => arrival.control.send(Kind::Complete, fit_reason(&missing).as_bytes()),
            Err(error) => {
                let why = match error {
                    _ if self.give_up.is_cancelled() => "given up at the destination".to_owned(),
                    DestinationError::Wire(met) => chain(&arrival.control.cause_of(met.into())),
                    error => chain(&error),
                };
                arrival.control.say_farewell(Kind::Refused, &why);
                if !missing.is_empty() {
                    missing = format!("{missing}: {why}");
                }
                Ok(())
            }
        };
        if let Err(error) = told {
            log::info!("cannot tell the source that everything has arrived: {}", chain(&error));
        }
        if !missing.is_empty() {
            log::warn!("the guest is here, but not everything has arrived: {missing}");
            self.counters.update(|stats| stats.incomplete = Some(missing.clone()));
            (self.events)(MigrationEvent::Incomplete(missing));
        }
    }
}

fn take_rest(arrival: &mut Arrival, give_up: &CancelToken) -> Result<(), DestinationError> {
    loop {
        // What is here already would be read after the connection has been hung up, too.
        if give_up.is_cancelled() {
            return Err(DestinationError::Cancelled);
        }
        let frame = arrival.control.next(&Limit::alive(LATER))?;
        match frame.kind {
            Kind::Section => arrival.postcopy(&frame.payload)?,
            Kind::AllSent => return Ok(()),
            _ => {
                let found = frame.describe();
                return Err(WireError::Unexpected { found, expected: LATER }.into());
            }
        }
    }
}
