//! From the machine description to the last page: an explicit order of frames, any other refused by
//! name.

use super::disks::DisksReceiver;
use super::receiver::Receivers;
use super::{Destination, DestinationError};
use crate::block::frame::{BlockSetup, BlockTotals};
use crate::block::incoming::DisksIncoming;
use crate::guest::MachineDescription;
use crate::ram::incoming::RamIncoming;
use crate::stats::MigrationStatus;
use crate::transport::channels::payload_of;
use crate::transport::{Channel, Main};
use crate::wire::section::{BODY_VERSION, Eof, RamSetup, RamTotals, Section, Stage};
use crate::wire::{Frame, Kind, WireError};
use devices::state::DeviceRecord;
use std::sync::Arc;

impl Destination<'_> {
    /// Loads everything; what it returns says whether the guest ran at the source.
    pub(super) fn load(
        &mut self,
        main: &Arc<Main>,
        data: Vec<Channel>,
        disks: Option<Channel>,
    ) -> Result<bool, DestinationError> {
        let frame = main.receive()?;
        let machine = payload_of(frame, Kind::Machine, "the machine description")?;
        let machine: MachineDescription = from_json("machine description", &machine)?;
        // The source may go while the machine is built, which takes long if files have to be compared.
        let built = self.host.build(&machine, &|| !main.is_lost());
        let ram = built.map_err(|error| match main.is_lost() {
            true => WireError::Lost(std::io::ErrorKind::BrokenPipe.into()).into(),
            false => DestinationError::Guest(error),
        })?;
        let total_bytes = ram.layout.size_bytes();
        let multifd = data.len() > 1;
        self.counters.update(|stats| (stats.total_bytes, stats.multifd) = (total_bytes, multifd));
        main.send(Kind::Accepted, &[])?;
        let disks = self.start_disks(main, disks)?;
        let frame = main.receive()?;
        let setup = RamSetup::decode(section(&frame, "ram", Stage::Setup, "the setup of RAM")?)?;
        if usize::from(setup.data_channels) != data.len() {
            let reason = format!("{} data channels, {} exist", setup.data_channels, data.len());
            return Err(WireError::Malformed { what: "RAM setup", reason }.into());
        }
        let channels = data
            .into_iter()
            .map(|data| Ok((RamIncoming::start(ram.clone(), setup, self.counters.clone())?, data)));
        let receivers = Receivers::start(channels.collect::<Result<_, WireError>>()?, main)?;
        self.counters.update(|stats| stats.setup_time = stats.started.map(|at| at.elapsed()));
        self.status(MigrationStatus::Active);
        self.load_rest(main, &receivers, disks.as_ref()).map_err(|error| {
            let woken = matches!(error, DestinationError::Wire(WireError::Interrupted));
            if !woken && !matches!(error, DestinationError::Wire(WireError::Aborted(_))) {
                return error;
            }
            // Woken because the pages or the disks have failed; or the source has met the connection
            // that closed because of it. One of them may have been lost only because of the other.
            let (disks, pages) = (
                disks.as_ref().and_then(DisksReceiver::take_error),
                receivers.take_error().map(DestinationError::Wire),
            );
            let is_lost =
                |error: &DestinationError| matches!(error, DestinationError::Wire(e) if e.is_lost());
            let (lost, own): (Vec<_>, Vec<_>) = disks.into_iter().chain(pages).partition(is_lost);
            match (own.into_iter().next(), lost.into_iter().next()) {
                (Some(own), _) => own,
                (None, Some(DestinationError::Wire(lost))) if woken => why_lost(main, lost).into(),
                _ => error,
            }
        })
    }

    /// Has the machine's disks filled from their connection, if they travel.
    fn start_disks(
        &mut self,
        main: &Arc<Main>,
        channel: Option<Channel>,
    ) -> Result<Option<DisksReceiver>, DestinationError> {
        let disks = self.host.disks().map_err(DestinationError::Guest)?;
        let Some(channel) = channel else {
            if disks.is_empty() {
                return Ok(None);
            }
            let reason = "its disks travel, but there is no connection for them".to_owned();
            return Err(WireError::Malformed { what: "machine description", reason }.into());
        };
        let frame = main.receive()?;
        let body = section(&frame, "block", Stage::Setup, "the setup of the disks")?;
        let disks = DisksIncoming::start(disks, &BlockSetup::decode(body)?, self.counters.clone())?;
        DisksReceiver::start(disks, channel, main.clone()).map(Some)
    }

    /// Everything on the main connection while pages come on the other.
    fn load_rest(
        &mut self,
        main: &Main,
        receivers: &Receivers,
        disks: Option<&DisksReceiver>,
    ) -> Result<bool, DestinationError> {
        let frame = main.receive()?;
        let body = section(&frame, "device", Stage::Full, "the state of the devices")?;
        let records: Vec<DeviceRecord> = from_json("device state", body)?;
        drop(frame);
        self.host.load_records(records).map_err(DestinationError::Guest)?;
        let their_disks = match disks {
            None => None,
            Some(_) => {
                let frame = main.receive()?;
                let body = section(&frame, "block", Stage::End, "the end of the disks")?;
                Some(BlockTotals::decode(body)?)
            }
        };
        let frame = main.receive()?;
        let theirs = RamTotals::decode(section(&frame, "ram", Stage::End, "the end of RAM")?)?;
        let frame = main.receive()?;
        let eof = Eof::decode(&payload_of(frame, Kind::Eof, "the end of the stream")?)?;
        let tallies = receivers.finish()?;
        let frames: Vec<_> = tallies.iter().map(|tally| tally.frames).collect();
        let ours: RamTotals = tallies.iter().map(|tally| tally.pages).sum();
        if (&frames, ours) != (&eof.frames, theirs) {
            let reason = format!(
                "the source has sent {theirs:?} in {:?} frames, {ours:?} in {frames:?} have arrived",
                eof.frames
            );
            return Err(WireError::Malformed { what: "end of the stream", reason }.into());
        }
        if let Some(disks) = disks {
            let (ours, theirs) = (disks.finish()?, their_disks);
            if Some(&ours) != theirs.as_ref() {
                let reason = format!("the source has sent {theirs:?}, {ours:?} have arrived");
                return Err(WireError::Malformed { what: "end of the disks", reason }.into());
            }
        }
        self.host.lock_disks().map_err(DestinationError::Guest)?;
        Ok(eof.running)
    }
}

/// A source that gives up says so on the main connection, and then ends the other.
fn why_lost(main: &Main, lost: WireError) -> WireError {
    match main.hear_farewell() {
        Some(last) if last.kind == Kind::Abort => WireError::Aborted(last.reason()),
        _ => lost,
    }
}

/// The body of the section that has to come now.
fn section<'f>(
    frame: &'f Frame,
    name: &str,
    stage: Stage,
    expected: &'static str,
) -> Result<&'f [u8], WireError> {
    if frame.kind != Kind::Section {
        return Err(WireError::Unexpected { found: format!("{:?}", frame.kind), expected });
    }
    let section = Section::decode(&frame.payload)?;
    if (section.name, section.stage) != (name, stage) {
        let found = match section.name {
            "ram" | "device" | "block" => {
                format!("{:?} of section {:?}", section.stage, section.name)
            }
            unknown => format!("unknown section {unknown:?}"),
        };
        return Err(WireError::Unexpected { found, expected });
    }
    if section.version != BODY_VERSION {
        let reason = format!("version {}, known is {BODY_VERSION}", section.version);
        return Err(WireError::Malformed { what: expected, reason });
    }
    Ok(section.body)
}

fn from_json<T: serde::de::DeserializeOwned>(
    what: &'static str,
    json: &[u8],
) -> Result<T, WireError> {
    serde_json::from_slice(json)
        .map_err(|error| WireError::Malformed { what, reason: error.to_string() })
}
