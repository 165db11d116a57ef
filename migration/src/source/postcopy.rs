//! After the handover: the guest runs at the destination, and what could wait is sent. Whatever happens here, the
//! guest has moved.

use super::session::Session;
use super::{MigrationEvent, Source, SourceError};
use crate::control::Limit;
use crate::error::chain;
use crate::priority;
use crate::stats::MigrationStatus;
use crate::wire::{Kind, WireError};

impl Source<'_> {
    /// Sends what could wait, if there is such; returns what of it has not arrived.
    pub(super) fn postcopy(&mut self, session: &mut Session) -> Option<String> {
        if !session.participants.iter().any(|one| one.can_postcopy()) {
            return None;
        }
        priority::give_way();
        self.status(MigrationStatus::PostcopyActive);
        let control = session.control.clone();
        // Ends every wait and every write.
        let giving_up = self.give_up.on_cancel(move || control.hang_up());
        let missing = self.send_rest(session);
        drop(giving_up);
        let missing = match missing {
            Ok(missing) => missing?,
            Err(_) if self.give_up.is_cancelled() => "given up at the source".to_owned(),
            Err(error) => chain(&session.abort(error)),
        };
        log::warn!("the guest has moved, but not everything has arrived: {missing}");
        self.counters.update(|stats| stats.incomplete = Some(missing.clone()));
        (self.events)(MigrationEvent::Incomplete(missing.clone()));
        Some(missing)
    }

    fn send_rest(&mut self, session: &mut Session) -> Result<Option<String>, SourceError> {
        session.each(|one| one.postcopy())?;
        session.control.send(Kind::AllSent, &[])?;
        let answer = session.control.next(&Limit::alive("word that everything has arrived"))?;
        if answer.kind != Kind::Complete {
            let (found, expected) = (answer.describe(), "word that everything has arrived");
            return Err(WireError::Unexpected { found, expected }.into());
        }
        Ok(Some(answer.reason()).filter(|missing| !missing.is_empty()))
    }
}
