//! The source: connect, rounds, stop, hand over.

mod handover;

use crate::cancel::CancelToken;
use crate::guest::{GuestControl, GuestError, MachineDescription, PausedGuest};
use crate::params::SharedParams;
use crate::policy::{self, Decision, Round};
use crate::ram::outgoing::RamOutgoing;
pub use crate::ram::outgoing::SourceRam;
use crate::stats::{Counters, MigrationStatus};
use crate::transport::socket::SocketTransport;
use crate::transport::{Address, Transport};
use crate::wire::{self, Kind, WireError};
use handover::{Handover, hand_over};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A step of a migration, told while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationEvent {
    /// The status has changed.
    Status(MigrationStatus),
    /// Round `n` begins, counted from 1.
    Pass(u64),
}

/// Why a migration failed.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Nobody listens there.
    #[error("cannot connect to {address}: is `ferry receive` running there?")]
    Connect {
        /// Where.
        address: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The connection or the other side.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// This side's machine.
    #[error(transparent)]
    Guest(GuestError),
    /// Guest RAM cannot be read.
    #[error("guest RAM: {0}")]
    Ram(String),
    /// The user cancelled.
    #[error("cancelled")]
    Cancelled,
    /// Device state that cannot be encoded.
    #[error("cannot encode {what}")]
    Encode {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// How a migration ended.
#[derive(Debug)]
pub enum SourceOutcome {
    /// The guest runs at the destination.
    Completed,
    /// Cancelled; the guest goes on here.
    Cancelled,
    /// Failed; the guest goes on here, or the error says why it cannot.
    Failed(SourceError),
    /// The answer to `Go` was lost: the guest is stopped here and may run there. A person decides.
    Unknown(SourceError),
}

/// Everything that a migration needs.
pub struct Source<'a> {
    /// The machine.
    pub guest: &'a mut dyn GuestControl,
    /// What it is.
    pub machine: &'a MachineDescription,
    /// Limits, read anew at every step.
    pub params: SharedParams,
    /// What has been done.
    pub counters: Arc<Counters>,
    /// Ends it early.
    pub cancel: CancelToken,
    /// Told of every step.
    pub events: &'a mut dyn FnMut(MigrationEvent),
}

impl Source<'_> {
    /// Moves the guest to `address`. On return the guest runs there, here, or (unknown) nowhere.
    pub fn migrate(mut self, address: &Address, ram: SourceRam) -> SourceOutcome {
        self.begin();
        let connected = SocketTransport::connect(address)
            .map_err(|source| SourceError::Connect { address: address.to_string(), source });
        let result = match connected {
            Ok(mut transport) => self.run(&mut transport, ram),
            Err(error) => Err(error),
        };
        self.finish(result)
    }

    /// Moves the guest over a connection.
    pub fn migrate_over(mut self, transport: &mut dyn Transport, ram: SourceRam) -> SourceOutcome {
        self.begin();
        let result = self.run(transport, ram);
        self.finish(result)
    }

    fn status(&mut self, status: MigrationStatus) {
        self.counters.update(|stats| stats.status = status);
        (self.events)(MigrationEvent::Status(status));
    }

    fn begin(&mut self) {
        self.counters.update(|stats| stats.started = Some(Instant::now()));
        self.status(MigrationStatus::Setup);
    }

    fn finish(&mut self, result: Result<Handover, SourceError>) -> SourceOutcome {
        let outcome = match result {
            Ok(Handover::Completed) => SourceOutcome::Completed,
            Ok(Handover::Unknown(error)) => SourceOutcome::Unknown(error),
            Err(_) if self.cancel.is_cancelled() => SourceOutcome::Cancelled,
            Err(error) => SourceOutcome::Failed(error),
        };
        let (status, error) = match &outcome {
            SourceOutcome::Completed => (MigrationStatus::Completed, None),
            SourceOutcome::Cancelled => (MigrationStatus::Cancelled, None),
            SourceOutcome::Failed(error) => (MigrationStatus::Failed, Some(chain(error))),
            SourceOutcome::Unknown(error) => {
                let why = chain(error);
                let text = format!(
                    "the answer to the handover was lost ({why}): the guest may run at the destination"
                );
                (MigrationStatus::Failed, Some(text))
            }
        };
        self.counters.update(|stats| {
            stats.total_time = stats.started.map(|started| started.elapsed());
            stats.error = error;
            stats.outcome_unknown = matches!(outcome, SourceOutcome::Unknown(_));
            stats.remaining_bytes = 0;
        });
        self.status(status);
        outcome
    }

    fn run(
        &mut self,
        transport: &mut dyn Transport,
        ram: SourceRam,
    ) -> Result<Handover, SourceError> {
        let stopper =
            transport.stopper().map_err(|error| SourceError::Wire(WireError::Lost(error)))?;
        self.cancel.on_cancel(stopper);
        let result = self.run_connected(transport, ram);
        self.cancel.disarm();
        // A refusal explains a broken connection better than the break does.
        result.map_err(|error| match error {
            SourceError::Wire(WireError::Lost(_)) => refusal(transport).unwrap_or(error),
            error => error,
        })
    }

    fn run_connected(
        &mut self,
        transport: &mut dyn Transport,
        ram: SourceRam,
    ) -> Result<Handover, SourceError> {
        wire::send_hello(transport)?;
        wire::expect_hello(transport)?;
        let machine = encode("machine description", self.machine)?;
        wire::send(transport, Kind::Machine, &machine)?;
        wire::expect(transport, Kind::Accepted, "the answer to the machine description")?;
        let mut ram = RamOutgoing::start(ram, self.counters.clone())?;
        ram.announce(transport)?;
        let total = ram.pending_bytes();
        self.counters.update(|stats| {
            stats.total_bytes = total;
            stats.remaining_bytes = total;
            stats.setup_time = stats.started.map(|started| started.elapsed());
        });
        self.status(MigrationStatus::Active);
        let pace = Pace::new(self.params.clone(), self.cancel.clone());
        let pace = self.precopy(transport, &mut ram, pace)?;
        self.stop_and_hand_over(transport, ram, pace)
    }

    /// Rounds, until the rest fits into the pause.
    fn precopy(
        &mut self,
        transport: &mut dyn Transport,
        ram: &mut RamOutgoing,
        mut pace: Pace,
    ) -> Result<Pace, SourceError> {
        let mut polished = 0;
        for number in 1.. {
            self.counters.update(|stats| stats.rounds = number);
            (self.events)(MigrationEvent::Pass(number));
            let (started, before) = (Instant::now(), self.counters.snapshot().transferred_bytes);
            pace.round();
            ram.send_pending(transport, &mut |sent| pace.sent(sent))?;
            // A sign of life in a round that had nothing to send, and room for a cancel.
            wire::send(transport, Kind::KeepAlive, &[])?;
            if self.cancel.is_cancelled() {
                return Err(SourceError::Cancelled);
            }
            ram.sync()?;
            let sent_bytes = self.counters.snapshot().transferred_bytes - before;
            let duration = started.elapsed();
            let round = Round { sent_bytes, duration, dirtied_bytes: ram.pending_bytes() };
            let limit = self.params.get().downtime_limit;
            let bandwidth = pace.bandwidth();
            self.record(round, bandwidth);
            log::debug!("round {number}: {round:?}, {bandwidth} bytes/s");
            match policy::decide(round, bandwidth, limit, polished) {
                Decision::Stop => break,
                Decision::Again { polishing } => polished += u32::from(polishing),
            }
        }
        Ok(pace)
    }

    fn record(&self, round: Round, bandwidth: u64) {
        let dirtied_per_sec = policy::per_second(round.dirtied_bytes, round.duration);
        self.counters.update(|stats| {
            stats.bytes_per_sec = bandwidth;
            stats.dirty_pages_rate = dirtied_per_sec / devices::ram::PAGE_SIZE;
            stats.remaining_bytes = round.dirtied_bytes;
            stats.expected_downtime =
                Some(policy::expected_downtime(round.dirtied_bytes, bandwidth));
            stats.history.push(round);
        });
    }

    fn stop_and_hand_over(
        &mut self,
        transport: &mut dyn Transport,
        mut ram: RamOutgoing,
        mut pace: Pace,
    ) -> Result<Handover, SourceError> {
        let stopped_at = Instant::now();
        let precopy_bytes = self.counters.snapshot().transferred_bytes;
        let mut paused = PausedGuest::pause(self.guest).map_err(SourceError::Guest)?;
        self.counters.update(|stats| {
            stats.status = MigrationStatus::Device;
            stats.precopy_bytes = precopy_bytes;
        });
        (self.events)(MigrationEvent::Status(MigrationStatus::Device));
        // Devices first: the destination loads them while the last pages travel, and the look at the
        // dirty log that follows sees what saving them wrote into RAM.
        let records = paused.guest().save_records().map_err(SourceError::Guest)?;
        wire::send(transport, Kind::Devices, &encode("device state", &records)?)?;
        ram.sync()?;
        let number = self.counters.snapshot().rounds + 1;
        self.counters.update(|stats| stats.rounds = number);
        (self.events)(MigrationEvent::Pass(number));
        pace.round();
        ram.send_pending(transport, &mut |sent| pace.sent(sent))?;
        ram.end(transport)?;
        paused.guest().release_disks().map_err(SourceError::Guest)?;
        wire::send(transport, Kind::Eof, &[paused.was_running().into()])?;
        wire::expect(transport, Kind::Ready, "the destination's readiness")?;
        if !self.cancel.disarm() {
            return Err(SourceError::Cancelled);
        }
        let handover = hand_over(paused, transport);
        let downtime = stopped_at.elapsed();
        self.counters.update(|stats| {
            stats.downtime = Some(downtime);
            stats.downtime_bytes = stats.transferred_bytes - precopy_bytes;
        });
        // The dirty log goes off after the guest runs again, with `ram`.
        drop(ram);
        Ok(handover)
    }
}

/// The error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn encode(what: &'static str, value: &impl serde::Serialize) -> Result<Vec<u8>, SourceError> {
    serde_json::to_vec(value).map_err(|source| SourceError::Encode { what, source })
}

/// A refusal that the destination sent before it closed, if there is one.
fn refusal(transport: &mut dyn Transport) -> Option<SourceError> {
    transport.set_patience(Duration::from_millis(500)).ok()?;
    match wire::expect(transport, Kind::Refused, "a refusal") {
        Err(refused @ WireError::Refused(_)) => Some(refused.into()),
        _ => None,
    }
}

/// Keeps to the cap and measures the bandwidth.
struct Pace {
    params: SharedParams,
    cancel: CancelToken,
    round_started: Instant,
    round_sent: u64,
    slept: Duration,
    bandwidth: u64,
    /// The cap under which the current account runs, when it began and what was sent since.
    cap: u64,
    account: (Instant, u64),
}

/// A round must move this much before its bandwidth counts: less is mostly latency.
const MEASURABLE_BYTES: u64 = 1 << 20;
/// Longest sleep at once, so that changes of the cap are noticed and the peer sees bytes.
const SLICE: Duration = Duration::from_millis(100);

impl Pace {
    fn new(params: SharedParams, cancel: CancelToken) -> Self {
        let now = Instant::now();
        Self {
            params,
            cancel,
            round_started: now,
            round_sent: 0,
            slept: Duration::ZERO,
            bandwidth: 0,
            cap: 0,
            account: (now, 0),
        }
    }

    fn round(&mut self) {
        self.measure();
        (self.round_started, self.round_sent) = (Instant::now(), 0);
        self.slept = Duration::ZERO;
    }

    fn measure(&mut self) {
        if self.round_sent < MEASURABLE_BYTES {
            return;
        }
        let busy = self.round_started.elapsed().saturating_sub(self.slept);
        self.bandwidth = policy::per_second(self.round_sent, busy);
    }

    /// What the link moves; under a cap never more than the cap.
    fn bandwidth(&mut self) -> u64 {
        self.measure();
        // Nothing measurable was sent: a guess that any link of today keeps.
        let measured = if self.bandwidth == 0 { 100 << 20 } else { self.bandwidth };
        match self.params.get().max_bandwidth {
            0 => measured,
            cap => measured.min(cap),
        }
    }

    fn sent(&mut self, bytes: u64) -> Result<(), SourceError> {
        self.round_sent += bytes;
        loop {
            if self.cancel.is_cancelled() {
                return Err(SourceError::Cancelled);
            }
            let cap = self.params.get().max_bandwidth;
            let now = Instant::now();
            if cap != self.cap || now - self.account.0 > Duration::from_secs(1) {
                // A fresh account every second: a stall is not made good by a burst.
                (self.cap, self.account) = (cap, (now, 0));
            }
            let ahead = policy::ahead_of_cap(self.account.1 + bytes, now - self.account.0, cap);
            if ahead.is_zero() {
                self.account.1 += bytes;
                return Ok(());
            }
            self.cancel.wait(ahead.min(SLICE));
            self.slept += now.elapsed();
        }
    }
}
