//! The pause: device records, the rest of RAM, the end of the stream, and the destination's `Ready`.
//! The order and its reasons are in [`crate::wire`]. Whatever fails here, the guest is resumed.

use super::handover::{Handover, hand_over};
use super::pace::Pace;
use super::{Freight, Link, MigrationEvent, Source, SourceError, chain, encode, settle};
use crate::guest::PausedGuest;
use crate::stats::{Counters, DowntimeParts, MigrationStatus};
use crate::transport::channels::payload_of;
use crate::wire::section::{Eof, RamTotals, Section, Stage};
use crate::wire::{Kind, WireError};
use std::time::{Duration, Instant};

/// How long a destination may take to load the rest, besides the time that the rest may travel.
const READY_PATIENCE: Duration = Duration::from_secs(60);

/// How a stop has ended.
#[derive(Debug)]
pub(super) enum Stop {
    /// With the right to run spent.
    HandedOver(Handover),
    /// Called off: more was left than fits the limit. The guest runs.
    TooMuchLeft,
}

impl Source<'_> {
    /// Stops the guest and, unless that turns out to take too long, hands it over.
    pub(super) fn stop_and_hand_over(
        &mut self,
        link: &Link,
        freight: &mut Freight,
        pace: &mut Pace,
    ) -> Result<Stop, SourceError> {
        let Self { guest, counters, params, cancel, events, .. } = self;
        let mut watch = StopWatch::start();
        let mut parts = DowntimeParts::default();
        let before = counters.figures().transferred_bytes;
        let deadline = Instant::now() + READY_PATIENCE;
        let mut paused = match PausedGuest::pause(&mut **guest, deadline) {
            Ok(paused) => paused,
            Err(error) => return Err(settle(link, SourceError::Guest(error))),
        };
        parts.pause = watch.lap();
        // For certain now, and before anything of the last step has been sent.
        let harvested = freight.ram.harvest();
        freight.weigh_disks(pace);
        let left = freight.ram.pending_bytes();
        match harvested {
            Ok(()) if pace.keeps_limit(watch.total(), left) => {}
            Ok(()) => {
                log::info!("{left} bytes of RAM are left, or disks: too much, the guest runs on");
                counters.update(|stats| stats.called_off += 1);
                return match paused.resume() {
                    Ok(()) => Ok(Stop::TooMuchLeft),
                    Err(source) => {
                        let cause = "the stop was called off, as it would have taken too long";
                        Err(settle(link, SourceError::NotResumed { cause: cause.into(), source }))
                    }
                };
            }
            Err(error) => return Err(give_up(link, paused, error)),
        }
        counters.update(|stats| {
            stats.status = MigrationStatus::Device;
            stats.precopy_bytes = before;
        });
        parts.final_harvest = watch.lap();
        events(MigrationEvent::Status(MigrationStatus::Device));
        let patience = READY_PATIENCE + params.get().downtime_limit * 2;
        let sent = send_stopped(
            &mut LastStep { link, pace, counters, watch: &mut watch, parts: &mut parts },
            freight,
            &mut paused,
            &mut **events,
        );
        let ready = sent
            .and_then(|()| {
                let frame = link.main.receive_within("the destination's readiness", patience)?;
                Ok(payload_of(frame, Kind::Ready, "the destination's readiness")?)
            })
            // The point of no return: a cancel comes either before it or not at all.
            .and_then(|_| if cancel.disarm() { Ok(()) } else { Err(SourceError::Cancelled) });
        if let Err(error) = ready {
            return Err(give_up(link, paused, error));
        }
        parts.ready = watch.lap();
        let handover = hand_over(paused, &link.main);
        if let Handover::Completed { started_in } = handover {
            let whole = watch.lap();
            // The other side's own word: it cannot have taken longer than the whole.
            parts.resume = started_in.unwrap_or_default().min(whole);
            parts.handover = whole - parts.resume;
        }
        counters.update(|stats| {
            stats.downtime = Some(watch.total());
            stats.downtime_parts = Some(parts);
            stats.downtime_bytes = stats.transferred_bytes - before;
        });
        Ok(Stop::HandedOver(handover))
    }
}

/// Tells what the time with the guest stopped is spent on.
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

    fn total(&self) -> Duration {
        self.started.elapsed()
    }
}

/// What sending the rest needs besides the guest and its RAM.
struct LastStep<'s> {
    link: &'s Link,
    pace: &'s Pace,
    counters: &'s Counters,
    watch: &'s mut StopWatch,
    parts: &'s mut DowntimeParts,
}

fn send_stopped(
    step: &mut LastStep<'_>,
    freight: &mut Freight,
    paused: &mut PausedGuest<'_>,
    events: &mut dyn FnMut(MigrationEvent),
) -> Result<(), SourceError> {
    let LastStep { link, pace, counters, watch, parts } = step;
    let Freight { ram, disks } = freight;
    let records = encode("device state", &paused.save_records().map_err(SourceError::Guest)?)?;
    link.main.send(Kind::Section, &Section::encode(Stage::Full, "device", &records))?;
    parts.device_state = watch.lap();
    // The destination writes and flushes the last of the disks while the last pages travel.
    if let Some(disks) = disks {
        disks.complete(&mut pace.cap())?;
    }
    ram.harvest()?;
    parts.final_harvest += watch.lap();
    let (number, pending) = (counters.rounds() + 1, ram.pending_bytes());
    counters.update(|stats| {
        (stats.rounds, stats.remaining_bytes) = (number, pending);
        stats.transferred_bytes += records.len() as u64;
        stats.main_bytes += records.len() as u64;
    });
    events(MigrationEvent::Pass(number));
    let tallies = ram.complete()?;
    paused.release_disks(Instant::now() + READY_PATIENCE).map_err(SourceError::Guest)?;
    let totals: RamTotals = tallies.iter().map(|tally| tally.pages).sum();
    let frames = tallies.iter().map(|tally| tally.frames).collect();
    let eof = Eof { running: paused.was_running(), frames };
    let ram_end = Section::encode(Stage::End, "ram", &totals.encode());
    let disks_end =
        disks.as_ref().map(|disks| Section::encode(Stage::End, "block", &disks.totals().encode()));
    let eof = eof.encode();
    let mut frames: Vec<_> = disks_end.iter().map(|end| (Kind::Section, end.as_slice())).collect();
    frames.extend([(Kind::Section, ram_end.as_slice()), (Kind::Eof, &eof)]);
    link.main.send_all(&frames)?;
    parts.final_send = watch.lap();
    Ok(())
}

/// First the destination is told, so that it lets go of the disks; then the guest is resumed.
fn give_up(link: &Link, paused: PausedGuest<'_>, error: SourceError) -> SourceError {
    let told_by_peer = match &error {
        SourceError::Wire(error) => matches!(error, WireError::Refused(_)) || error.is_lost(),
        _ => false,
    };
    let error = settle(link, error);
    if !told_by_peer {
        // It closes the connection once the disks are free.
        link.main.hear_farewell();
    }
    match paused.resume() {
        Ok(()) => error,
        Err(source) => SourceError::NotResumed { cause: chain(&error), source },
    }
}
