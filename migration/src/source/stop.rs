//! The pause: device records, the rest of everything, the end of the stream, and the destination's `Ready`.
//! The order is explained in [`crate::wire`]. After any failure the guest is resumed; after a stop that
//! takes too long it is resumed and the passes go on.

use super::deadline::{EndWatch, Overran, StopClock};
use super::handover::{Handover, hand_over};
use super::session::Session;
use super::{MigrationEvent, Source, SourceError, encode, show};
use crate::cancel::CancelToken;
use crate::control::Limit;
use crate::error::{ParticipantError, chain};
use crate::guest::{GuestError, PartTime, PausedGuest};
use crate::participant::Precision;
use crate::policy;
use crate::stats::{Counters, DowntimeParts, MigrationStatus};
use crate::wire::section::{Eof, Section, Stage};
use crate::wire::{Decoder, Kind, WireError};
use std::time::{Duration, Instant};

/// Called-off stops in a row before the user is told: one may be an accident.
const REPORTED_AFTER: u32 = 2;

/// Stops in a row that a prediction may call off. After those only the deadline does.
const PREDICTION_TRIES: u32 = 2;

/// How a stop ended.
#[derive(Debug)]
pub(super) enum Stop {
    /// The right to run is spent.
    HandedOver(Handover),
    /// It took or would have taken too long. The guest runs.
    CalledOff,
}

/// Why a stop did not reach the handover.
enum Ended {
    /// This part takes too long.
    TooLong(PartTime),
    /// Either side failed.
    Failed(SourceError),
}

impl From<Overran> for Ended {
    fn from(overran: Overran) -> Self {
        match overran.not_resumed {
            None => Self::TooLong(overran.part),
            Some(source) => Self::Failed(not_resumed(source)),
        }
    }
}

/// A stop was called off, and then the guest could not be resumed.
fn not_resumed(source: GuestError) -> SourceError {
    let cause = "the stop was called off, as it took too long".to_owned();
    SourceError::NotResumed { cause, source }
}

impl From<SourceError> for Ended {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Guest(GuestError::Overdue(part)) => Self::TooLong(part),
            error => Self::Failed(error),
        }
    }
}

impl From<GuestError> for Ended {
    fn from(error: GuestError) -> Self {
        SourceError::from(error).into()
    }
}

impl From<WireError> for Ended {
    fn from(error: WireError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<ParticipantError> for Ended {
    fn from(error: ParticipantError) -> Self {
        Self::Failed(error.into())
    }
}

/// A finished stop.
struct Stopped {
    result: Result<Handover, Ended>,
    parts: DowntimeParts,
    took: Duration,
    /// Bytes sent before it.
    before: u64,
    /// The destination knows of it.
    announced: bool,
    told: bool,
    /// Clients have heard of it.
    shown: bool,
    /// Where it was when it ended.
    phase: Phase,
}

/// Where a stop is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Pausing,
    Sending,
    Flushing,
    AwaitingReady,
}

impl Source<'_> {
    /// Stops the guest and hands it over, unless that takes too long.
    pub(super) fn stop_and_hand_over(
        &mut self,
        session: &mut Session,
    ) -> Result<Stop, SourceError> {
        let mut stopped = self.attempt(session);
        let Stopped { parts, took, before, .. } = stopped;
        match std::mem::replace(&mut stopped.result, Err(Ended::Failed(SourceError::Cancelled))) {
            Ok(handover) => {
                self.counters.update(|stats| {
                    stats.downtime = Some(took);
                    stats.downtime_parts = Some(parts);
                    stats.downtime_bytes = stats.transferred_bytes - before;
                });
                Ok(Stop::HandedOver(handover))
            }
            Err(Ended::TooLong(part)) => {
                self.call_off(session, part, &stopped)?;
                Ok(Stop::CalledOff)
            }
            // The destination knows.
            Err(Ended::Failed(error)) => Err(error),
        }
    }

    /// One stop, from the pause to the handover or the resume.
    fn attempt(&mut self, session: &mut Session) -> Stopped {
        session.attempt += 1;
        let limit = self.params.get().downtime_limit;
        let longest = policy::longest(session.estimate.floor(), limit);
        let stop_within = policy::stop_within(longest, session.predicted);
        let before = self.counters.figures().transferred_bytes;
        let clock = StopClock::new(stop_within, session.control.clone());
        let Self { guest, counters, cancel, events, .. } = self;
        let mut step = LastStep {
            clock: &clock,
            counters,
            cancel,
            events: &mut **events,
            watch: StopWatch::start(),
            parts: DowntimeParts::default(),
            announced: false,
            shown: false,
            phase: Phase::Pausing,
            before,
        };
        let result = std::thread::scope(|scope| {
            // Before the pause: spawning takes time.
            let watcher = std::thread::Builder::new()
                .name("mig-deadline".into())
                .stack_size(64 << 10)
                .spawn_scoped(scope, || clock.watch());
            let _end = EndWatch(&clock);
            let stopped = watcher.map_err(SourceError::Thread).map_err(Ended::from);
            let stopped = stopped.and_then(|_| {
                step.watch = StopWatch::start();
                let paused = PausedGuest::pause(&mut **guest, clock.start())?;
                step.stopped(session, paused)?;
                step.send_all(session)?;
                step.await_ready(session)?;
                step.hand_over(session)
            });
            // The deadline still applies: telling the destination may take longer.
            stopped.map_err(|ended| match ended {
                Ended::TooLong(part) => match clock.resume() {
                    Ok(()) => Ended::TooLong(part),
                    Err(source) => Ended::Failed(session.abort(not_resumed(source))),
                },
                Ended::Failed(error) => Ended::Failed(give_up(session, &clock, error)),
            })
        });
        // Not the end of the watcher, which a loaded host lets wait.
        let mut took = if result.is_ok() { step.watch.laps() } else { step.watch.total() };
        if matches!(result, Err(Ended::TooLong(_))) {
            // The guest ran again then, whatever the driver was blocked by.
            took = took.min(stop_within);
        }
        let LastStep { parts, announced, shown, phase, .. } = step;
        let told = clock.has_told();
        Stopped { result, parts, took, before, announced, told, shown, phase }
    }

    /// Records a called-off stop, and tells the destination if it knows of the stop.
    fn call_off(
        &mut self,
        session: &mut Session,
        part: PartTime,
        stopped: &Stopped,
    ) -> Result<(), SourceError> {
        let Stopped { took, announced, told, shown, phase, .. } = *stopped;
        match phase {
            Phase::Pausing => session.estimate.drained_in(&part),
            Phase::Flushing => session.estimate.flushed_in(&part),
            Phase::AwaitingReady => session.estimate.not_ready_in(part.took),
            Phase::Sending => {}
        }
        let limit = self.params.get().downtime_limit;
        log::info!("a stop was called off after {took:?}: {part}; the limit is {limit:?}");
        self.counters.update(|stats| stats.called_off += 1);
        session.estimate.was_called_off(took, session.predicted, limit);
        if announced {
            session.control.ignore_ready_up_to(session.attempt);
            let told = if told {
                session.control.flush_pushed()
            } else {
                session.control.send(Kind::CalledOff, &[])
            };
            let told = told.map_err(SourceError::from);
            let told = told.and_then(|()| session.each(|one| one.called_off()));
            if let Err(error) = told {
                return Err(session.abort(error));
            }
        }
        if shown {
            self.status(MigrationStatus::Active);
        }
        if session.estimate.called_off() >= REPORTED_AFTER
            && session.blocked_by.as_ref() != Some(&part.part)
        {
            session.blocked_by = Some(part.part.clone());
            self.report_not_converging(session, session.rates, took, Some(part));
        }
        Ok(())
    }
}

/// Measures the parts of the pause.
struct StopWatch {
    started: Instant,
    lap: Instant,
}

impl StopWatch {
    fn start() -> Self {
        let now = Instant::now();
        Self { started: now, lap: now }
    }

    /// Since the last lap.
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.lap, now)
    }

    /// Of all laps.
    fn laps(&self) -> Duration {
        self.lap - self.started
    }

    fn total(&self) -> Duration {
        self.started.elapsed()
    }
}

/// What the steps from the pause to the handover share.
struct LastStep<'s, 'g> {
    clock: &'s StopClock<'g>,
    counters: &'s Counters,
    cancel: &'s CancelToken,
    events: &'s mut dyn FnMut(MigrationEvent),
    watch: StopWatch,
    parts: DowntimeParts,
    /// The destination knows of this stop.
    announced: bool,
    /// Clients have.
    shown: bool,
    phase: Phase,
    /// Bytes sent before the pause.
    before: u64,
}

impl<'g> LastStep<'_, 'g> {
    /// The guest has stopped: computes exactly what is left, and checks whether that fits.
    fn stopped(&mut self, session: &mut Session, paused: PausedGuest<'g>) -> Result<(), Ended> {
        self.parts.pause = self.watch.lap();
        self.phase = Phase::Sending;
        session.estimate.stopped_in(self.parts.pause, paused.drains());
        self.clock.enter("reading the dirty log")?;
        self.clock.hold(paused);
        let pending: Result<Vec<_>, _> =
            session.participants.iter_mut().map(|one| one.pending(Precision::Exact)).collect();
        session.estimate.weigh(pending?.iter(), session.link.round_trip());
        self.parts.final_harvest = self.watch.lap();
        let left = session.estimate.left_after_stop();
        let deadline = self.clock.deadline();
        // A stale prediction must not call off every stop.
        let trusted = session.estimate.called_off() < PREDICTION_TRIES;
        if trusted && Instant::now() + left > deadline {
            return Err(Ended::TooLong(session.estimate.largest()));
        }
        let before = self.before;
        self.counters.update(|stats| stats.precopy_bytes = before);
        self.shown = true;
        show(self.counters, self.events, MigrationStatus::Device);
        Ok(())
    }

    fn send_all(&mut self, session: &mut Session) -> Result<(), Ended> {
        self.clock.enter("saving device state")?;
        let records = self.clock.with(|guest| guest.save_records())??;
        let records = encode("device state", &records)?;
        self.announced = true;
        session.control.send(Kind::Section, &Section::encode(Stage::Full, "device", &records))?;
        self.parts.device_state = self.watch.lap();
        session.estimate.saved_in(self.parts.device_state);
        session.pass += 1;
        let number = session.pass;
        self.counters.update(|stats| {
            stats.rounds = number;
            stats.transferred_bytes += records.len() as u64;
            stats.control_bytes += records.len() as u64;
        });
        (self.events)(MigrationEvent::Pass(number));
        for participant in &mut session.participants {
            // What is left out once the deadline has passed is sent by the next attempt.
            self.clock
                .enter(&format!("sending the rest of section {:?}", participant.section()))?;
            participant.complete()?;
        }
        self.clock.enter("flushing disks")?;
        self.phase = Phase::Flushing;
        let deadline = self.clock.deadline();
        let flush = self.clock.with(|guest| guest.release_disks(deadline))??;
        session.estimate.flushed_in(&flush);
        self.phase = Phase::Sending;
        self.clock.enter("ending the stream")?;
        let running = self.clock.with(|guest| guest.was_running())?;
        let eof = Eof { running, attempt: session.attempt };
        self.clock.end_stream(&eof.encode())??;
        self.parts.final_send = self.watch.lap();
        Ok(())
    }

    fn await_ready(&mut self, session: &mut Session) -> Result<(), Ended> {
        const WHAT: &str = "the destination's readiness";
        const WAITING: &str = "waiting for the destination";
        self.clock.enter(WAITING)?;
        self.phase = Phase::AwaitingReady;
        let limit = Limit::until(WHAT, self.clock.deadline());
        let payload = match session.control.expect(Kind::Ready, &limit) {
            Err(WireError::Late { .. }) => {
                return Err(Ended::TooLong(PartTime::not_ended(WAITING, self.watch.lap())));
            }
            result => result?,
        };
        let mut decoder = Decoder::new(WHAT, &payload);
        let attempt = decoder.u32()?;
        decoder.finish()?;
        if attempt != session.attempt {
            let found = format!("Ready of attempt {attempt}");
            return Err(WireError::Unexpected { found, expected: WHAT }.into());
        }
        self.parts.ready = self.watch.lap();
        session.estimate.ready_in(self.parts.ready);
        Ok(())
    }

    fn hand_over(&mut self, session: &mut Session) -> Result<Handover, Ended> {
        // The point of no return: a cancel comes either before it or not at all.
        let taken = self.clock.take_if(|| self.cancel.disarm())?;
        let paused = taken.ok_or(Ended::Failed(SourceError::Cancelled))?;
        let handover = hand_over(paused, &session.control);
        let whole = self.watch.lap();
        if let Handover::Completed { started_in } = handover {
            // Reported by the peer; bounded by the whole.
            self.parts.resume = started_in.map_or(Duration::ZERO, |time| time.min(whole));
            self.parts.handover = whole - self.parts.resume;
        }
        Ok(handover)
    }
}

/// Tells the destination first, so that it releases the disks; then resumes the guest.
fn give_up(session: &Session, clock: &StopClock<'_>, error: SourceError) -> SourceError {
    let told_by_peer = match &error {
        SourceError::Wire(error) => matches!(error, WireError::Refused(_)) || error.is_lost(),
        _ => false,
    };
    let error = session.abort(error);
    if !told_by_peer {
        // It closes the connection once the disks are free.
        session.control.await_close();
    }
    match clock.resume() {
        Ok(()) => error,
        Err(source) => SourceError::NotResumed { cause: chain(&error), source },
    }
}
