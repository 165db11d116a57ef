//! The destination: accept, build, load, say Ready, run on `Go` and never without it.

use crate::cancel::CancelToken;
use crate::guest::{DestinationHost, GuestError, MachineDescription, RunPermit};
use crate::ram::incoming::RamIncoming;
use crate::source::{MigrationEvent, chain};
use crate::stats::{Counters, MigrationStatus};
use crate::transport::{Listener, Transport};
use crate::wire::{self, Kind, WireError};
use devices::state::DeviceRecord;
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// Why a guest did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// Nobody can connect.
    #[error("cannot accept a connection")]
    Accept(#[source] io::Error),
    /// The connection or the source.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// This side's machine.
    #[error(transparent)]
    Guest(GuestError),
    /// The right to run has arrived, but the machine does not start.
    #[error("the guest was handed over and cannot be started here: {0}")]
    Run(GuestError),
}

/// Everything that an arrival needs.
pub struct Destination<'a> {
    /// The machine to be.
    pub host: &'a mut dyn DestinationHost,
    /// What has been done.
    pub counters: Arc<Counters>,
    /// Ends it early, until `Go` has arrived.
    pub cancel: CancelToken,
    /// Told of every step.
    pub events: &'a mut dyn FnMut(MigrationEvent),
}

impl Destination<'_> {
    /// Waits for a source and takes its guest over. A connection that does not speak our protocol is
    /// dropped and the wait goes on; once a source has introduced itself, its failure is final.
    pub fn receive(mut self, listener: &Listener) -> Result<(), DestinationError> {
        loop {
            let mut transport = listener.accept(&self.cancel).map_err(DestinationError::Accept)?;
            match greet(&mut transport) {
                Ok(()) => return self.receive_greeted(&mut transport),
                Err(error) => log::warn!("connection dropped: {error}"),
            }
            if self.cancel.is_cancelled() {
                return Err(DestinationError::Accept(io::ErrorKind::Interrupted.into()));
            }
        }
    }

    /// Takes a guest over from a connection.
    pub fn receive_over(mut self, transport: &mut dyn Transport) -> Result<(), DestinationError> {
        greet(transport)?;
        self.receive_greeted(transport)
    }

    fn status(&mut self, status: MigrationStatus) {
        self.counters.update(|stats| stats.status = status);
        (self.events)(MigrationEvent::Status(status));
    }

    fn receive_greeted(&mut self, transport: &mut dyn Transport) -> Result<(), DestinationError> {
        self.counters.update(|stats| stats.started = Some(Instant::now()));
        self.status(MigrationStatus::Setup);
        let lost = |error| DestinationError::Wire(WireError::Lost(error));
        self.cancel.on_cancel(transport.stopper().map_err(lost)?);
        let result = self.load(transport).and_then(|running| self.take_over(transport, running));
        let error = result.as_ref().err().map(|error| chain(error));
        self.counters.update(|stats| {
            stats.total_time = stats.started.map(|started| started.elapsed());
            stats.error.clone_from(&error);
        });
        self.status(match error {
            None => MigrationStatus::Completed,
            Some(_) => MigrationStatus::Failed,
        });
        result
    }

    /// Everything up to `Ready`: any failure is told to the source, which then goes on.
    fn load(&mut self, transport: &mut dyn Transport) -> Result<bool, DestinationError> {
        let result = self.load_sections(transport);
        if let Err(error) = &result {
            wire::refuse(transport, &chain(error));
        }
        result
    }

    fn load_sections(&mut self, transport: &mut dyn Transport) -> Result<bool, DestinationError> {
        let machine = wire::expect(transport, Kind::Machine, "the machine description")?;
        let machine: MachineDescription = decode("machine description", &machine)?;
        let ram = self.host.build(&machine).map_err(DestinationError::Guest)?;
        wire::send(transport, Kind::Accepted, &[])?;
        let setup = wire::expect(transport, Kind::RamSetup, "RAM's size")?;
        let mut ram = RamIncoming::start(ram, &setup, self.counters.clone())?;
        self.status(MigrationStatus::Active);
        // Batches, device state once, batches, the end of RAM once, the end.
        let (mut devices_loaded, mut ram_ended) = (false, false);
        loop {
            let header = wire::receive_header(transport)?;
            match header.kind {
                Kind::KeepAlive => {}
                Kind::RamBatch if !ram_ended => ram.batch(header, transport)?,
                Kind::Devices if !devices_loaded && !ram_ended => {
                    let payload = wire::receive_payload(transport, header)?;
                    let records: Vec<DeviceRecord> = decode("device state", &payload)?;
                    self.host.load_records(records).map_err(DestinationError::Guest)?;
                    devices_loaded = true;
                }
                Kind::RamEnd if devices_loaded && !ram_ended => {
                    ram.end(&wire::receive_payload(transport, header)?)?;
                    ram_ended = true;
                }
                Kind::Eof if ram_ended => {
                    let payload = wire::receive_payload(transport, header)?;
                    let running = match payload.as_slice() {
                        [running @ (0 | 1)] => *running == 1,
                        other => {
                            let reason = format!("{other:?}");
                            return Err(WireError::Malformed { what: "end", reason }.into());
                        }
                    };
                    self.host.lock_disks().map_err(DestinationError::Guest)?;
                    return Ok(running);
                }
                found => {
                    let found = format!("{found:?}");
                    let expected = match (devices_loaded, ram_ended) {
                        (false, _) => "pages or device state",
                        (true, false) => "pages or the end of RAM",
                        (true, true) => "the end",
                    };
                    return Err(WireError::Unexpected { found, expected }.into());
                }
            }
        }
    }

    /// Ready, then `Go`, then run. Without `Go` the guest never runs here.
    fn take_over(
        &mut self,
        transport: &mut dyn Transport,
        running: bool,
    ) -> Result<(), DestinationError> {
        wire::send(transport, Kind::Ready, &[])?;
        wire::expect(transport, Kind::Go, "the right to run")?;
        self.cancel.disarm();
        self.host.run(RunPermit::received(), running).map_err(DestinationError::Run)?;
        // If this is lost the source reports the outcome as unknown, and stays stopped.
        if let Err(error) = wire::send(transport, Kind::Running, &[]) {
            log::warn!("the source does not hear that the guest runs here: {error}");
        }
        Ok(())
    }
}

fn greet(transport: &mut dyn Transport) -> Result<(), WireError> {
    match wire::expect_hello(transport) {
        Ok(()) => wire::send_hello(transport),
        Err(error) => {
            if matches!(error, WireError::Version { .. }) {
                // Its Hello has our frame format, so it understands ours, and says which version.
                let _ = wire::send_hello(transport);
            }
            Err(error)
        }
    }
}

fn decode<T: serde::de::DeserializeOwned>(what: &'static str, json: &[u8]) -> Result<T, WireError> {
    serde_json::from_slice(json)
        .map_err(|error| WireError::Malformed { what, reason: error.to_string() })
}
