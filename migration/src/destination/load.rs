//! From the machine description to the last page: checks the order of frames and dispatches sections to
//! participants. A frame out of order is refused by name.

use super::{Destination, DestinationError};
use crate::control::{Control, Limit};
use crate::guest::MachineDescription;
use crate::participant::{Incoming, IncomingContext, Outcome};
use crate::stats::{Counters, MigrationStatus};
use crate::transport::{Channel, Transport};
use crate::wire::section::{BODY_VERSION, Eof, Section, Stage};
use crate::wire::{Frame, Kind, Role, WireError, fit_reason};
use devices::state::DeviceRecord;
use std::sync::Arc;
use std::time::Duration;

/// Name of the section with the device records, which belong to no participant.
const DEVICE: &str = "device";

/// How long after a lock that cannot be had the source's word may come that it has it again.
const LOCK_RACE: Duration = Duration::from_millis(50);
/// Most stops of one migration: with their rests, days of them.
const MAX_ATTEMPTS: u32 = 10_000;

/// What comes after the handover, for error messages.
pub(super) const LATER: &str = "what could wait";

/// State of a participant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    New,
    SetUp,
    /// Its end of this attempt was received.
    Ended,
}

/// An incoming guest. Dropping it cleans up.
pub(super) struct Arrival {
    pub(super) control: Control,
    /// Not yet taken by their participants.
    channels: Vec<(Role, Channel)>,
    /// Of all channels.
    transports: Vec<Arc<dyn Transport>>,
    counters: Arc<Counters>,
    participants: Vec<(Box<dyn Incoming>, Progress)>,
    /// The device records of this attempt were received.
    stopped: bool,
}

/// How loading ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loaded {
    /// Everything is in place.
    All(Eof),
    /// The source has called its stop off.
    CalledOff,
}

impl Arrival {
    pub(super) fn new(
        control: Control,
        channels: Vec<(Role, Channel)>,
        counters: Arc<Counters>,
    ) -> Self {
        let transports = channels.iter().map(|(_, channel)| channel.transport().clone()).collect();
        let participants = Vec::new();
        Self { control, channels, transports, counters, participants, stopped: false }
    }

    /// Ends the channels, which the source notices, without waiting for the participants' threads.
    pub(super) fn hang_up(&self) {
        self.transports.iter().for_each(|transport| transport.shutdown());
    }

    /// The migration is over. Waits for the participants' threads.
    pub(super) fn close(mut self, moved: bool) {
        self.clean_up(if moved { Outcome::Moved } else { Outcome::NotMoved });
    }

    fn clean_up(&mut self, outcome: Outcome) {
        for (mut participant, progress) in self.participants.drain(..).rev() {
            if progress != Progress::New {
                participant.cleanup(outcome);
            }
        }
    }

    /// What is expected next, for error messages.
    fn expected(&self) -> &'static str {
        let missing = |progress| self.participants.iter().any(|(_, has)| *has == progress);
        match (missing(Progress::New), self.stopped, missing(Progress::SetUp)) {
            (true, ..) => "the setup of the participants",
            (_, false, _) => "the state of the devices",
            (.., true) => "the end of the participants",
            _ => "the end of the stream",
        }
    }

    fn unexpected(&self, found: String) -> DestinationError {
        WireError::Unexpected { found, expected: self.expected() }.into()
    }

    /// Dispatches a section to its participant.
    fn dispatch(&mut self, section: &Section<'_>) -> Result<(), DestinationError> {
        let named = |one: &(Box<dyn Incoming>, Progress)| one.0.section() == section.name;
        let Some(index) = self.participants.iter().position(named) else {
            return Err(self.unexpected(format!("unknown section {:?}", section.name)));
        };
        // In order: a later participant may depend on an earlier one.
        let in_turn = self.participants[..index].iter().all(|(_, has)| *has != Progress::New);
        let (participant, progress) = &mut self.participants[index];
        match (section.stage, *progress, self.stopped) {
            (Stage::Setup, Progress::New, false) if in_turn => {
                // From here on it is cleaned up, whether or not the setup succeeds.
                *progress = Progress::SetUp;
                let owned = self.channels.extract_if(.., |(role, _)| participant.owns(*role));
                let link = IncomingContext {
                    control: self.control.clone(),
                    channels: owned.collect(),
                    counters: self.counters.clone(),
                };
                participant.setup(link, section.body)?;
            }
            (Stage::Part, Progress::SetUp, false) => participant.load(Stage::Part, section.body)?,
            (Stage::End, Progress::SetUp, true) => {
                *progress = Progress::Ended;
                participant.load(Stage::End, section.body)?;
            }
            _ => return Err(self.unexpected(section.describe())),
        }
        Ok(())
    }

    /// Whether something comes after the handover.
    pub(super) fn can_postcopy(&self) -> bool {
        self.participants.iter().any(|(participant, _)| participant.can_postcopy())
    }

    /// Hands data that could wait to its participant.
    pub(super) fn postcopy(&mut self, payload: &[u8]) -> Result<(), DestinationError> {
        let section = decoded(payload, LATER)?;
        let wants = |one: &dyn Incoming| one.section() == section.name && one.can_postcopy();
        let found = self.participants.iter_mut().find(|(one, _)| wants(one.as_ref()));
        match (section.stage, found) {
            (Stage::Postcopy, Some((participant, _))) => {
                Ok(participant.load(Stage::Postcopy, section.body)?)
            }
            _ => Err(WireError::Unexpected { found: section.describe(), expected: LATER }.into()),
        }
    }

    /// What has not arrived, for users; empty if all has.
    pub(super) fn missing(&mut self) -> String {
        let missing = self.participants.iter_mut().flat_map(|(one, _)| one.missing());
        missing.collect::<Vec<_>>().join(", ")
    }

    /// The source called its stop off. Another attempt follows.
    pub(super) fn called_off(&mut self) -> Result<(), DestinationError> {
        self.stopped = false;
        for (participant, progress) in &mut self.participants {
            *progress = Progress::SetUp;
            participant.called_off()?;
        }
        Ok(())
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.clean_up(Outcome::NotMoved);
    }
}

impl Destination<'_> {
    pub(super) fn load_and_take_over(
        &mut self,
        arrival: &mut Arrival,
    ) -> Result<(), DestinationError> {
        self.build(arrival)?;
        loop {
            let taken = match self.load(arrival)? {
                Loaded::All(eof) => self.take_over(&arrival.control, eof)?,
                Loaded::CalledOff => false,
            };
            if taken {
                self.postcopy(arrival);
                return Ok(());
            }
            log::info!("the source called its stop off; its guest runs on");
            self.host.called_off()?;
            arrival.called_off()?;
            self.status(MigrationStatus::Active);
        }
    }

    /// Builds the machine that the source describes.
    fn build(&mut self, arrival: &mut Arrival) -> Result<(), DestinationError> {
        let control = &arrival.control;
        let limit = Limit::alive("the machine description");
        let machine = control.expect(Kind::Machine, &limit)?;
        let machine: MachineDescription = from_json("machine description", &machine)?;
        // The source may go away meanwhile: comparing files takes long.
        let built = self.host.build(&machine, &|| !control.is_lost());
        let participants = built.map_err(|error| match control.is_lost() {
            true => WireError::Lost(std::io::ErrorKind::BrokenPipe.into()).into(),
            false => DestinationError::Guest(error),
        })?;
        for participant in participants.iter().filter(|one| one.needs_connection()) {
            if !arrival.channels.iter().any(|(role, _)| participant.owns(*role)) {
                let name = participant.section();
                let reason = format!("section {name:?} has no connection");
                return Err(WireError::Malformed { what: "machine description", reason }.into());
            }
        }
        control.send(Kind::Accepted, &[])?;
        let new = |participant| (participant, Progress::New);
        arrival.participants = participants.into_iter().map(new).collect();
        Ok(())
    }

    /// Handles the control connection until the end of the stream, while other threads receive.
    fn load(&mut self, arrival: &mut Arrival) -> Result<Loaded, DestinationError> {
        loop {
            let frame = arrival.control.next(&Limit::alive(arrival.expected()))?;
            match frame.kind {
                Kind::Section => self.section(arrival, &frame)?,
                Kind::Eof => {
                    let missing =
                        arrival.participants.iter().any(|(_, has)| *has != Progress::Ended);
                    if missing || !arrival.stopped {
                        return Err(arrival.unexpected(frame.describe()));
                    }
                    let eof = Eof::decode(&frame.payload)?;
                    if eof.attempt > MAX_ATTEMPTS {
                        let reason = format!("stop number {}", eof.attempt);
                        return Err(
                            WireError::Malformed { what: "end of the stream", reason }.into()
                        );
                    }
                    for (participant, _) in &mut arrival.participants {
                        participant.finish()?;
                    }
                    if arrival.control.is_next(Kind::CalledOff) {
                        continue;
                    }
                    if let Err(error) = self.host.lock_disks() {
                        // A source that has called its stop off has taken the locks back.
                        let limit = Limit::within("word of a stop called off", LOCK_RACE);
                        return match arrival.control.next(&limit) {
                            Ok(frame) if frame.kind == Kind::CalledOff => Ok(Loaded::CalledOff),
                            _ => Err(error.into()),
                        };
                    }
                    return Ok(Loaded::All(eof));
                }
                Kind::CalledOff if arrival.stopped => return Ok(Loaded::CalledOff),
                _ => return Err(arrival.unexpected(frame.describe())),
            }
        }
    }

    fn section(&mut self, arrival: &mut Arrival, frame: &Frame) -> Result<(), DestinationError> {
        let section = decoded(&frame.payload, arrival.expected())?;
        if section.name != DEVICE {
            let set_up = |arrival: &Arrival| {
                arrival.participants.iter().all(|(_, has)| *has != Progress::New)
            };
            let before = set_up(arrival);
            arrival.dispatch(&section)?;
            if !before && set_up(arrival) {
                self.counters.update(|stats| {
                    stats.setup_time = stats.started.map(|at| at.elapsed());
                });
                self.status(MigrationStatus::Active);
            }
            return Ok(());
        }
        let set_up = arrival.participants.iter().all(|(_, has)| *has == Progress::SetUp);
        if section.stage != Stage::Full || arrival.stopped || !set_up {
            return Err(arrival.unexpected(section.describe()));
        }
        let records = DeviceRecord::list_from_json(section.body)
            .map_err(|error| malformed("device state", &error))?;
        arrival.stopped = true;
        self.host.load_records(records)?;
        Ok(())
    }
}

/// A section whose body has a layout that is known here.
fn decoded<'p>(payload: &'p [u8], what: &'static str) -> Result<Section<'p>, WireError> {
    let section = Section::decode(payload)?;
    if section.version != BODY_VERSION {
        let reason = format!("version {}, known is {BODY_VERSION}", section.version);
        return Err(WireError::Malformed { what, reason });
    }
    Ok(section)
}

fn from_json<T: serde::de::DeserializeOwned>(
    what: &'static str,
    json: &[u8],
) -> Result<T, WireError> {
    serde_json::from_slice(json).map_err(|error| malformed(what, &error))
}

fn malformed(what: &'static str, error: &serde_json::Error) -> WireError {
    // It may quote a value of any length.
    WireError::Malformed { what, reason: fit_reason(&error.to_string()).to_owned() }
}
