//! The machine as migration threads see it: each call becomes a message to the supervisor, which
//! alone touches the machine, and waits for its answer.

use super::messages::{Mailbox, Message};
use crate::error::guest_error;
use crate::images::BackingCheck;
use devices::state::DeviceRecord;
use migration::block::IncomingDisk;
use migration::cancel::CancelToken;
use migration::guest::{
    DestinationHost, GoOn, GuestControl, GuestError, IncomingRam, MachineDescription, PartTime,
    RunPermit, Stopped,
};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

type Reply<T> = Sender<Result<T, GuestError>>;

/// A machine that has been built for a guest to arrive.
pub struct Arrival {
    /// Its RAM.
    pub ram: IncomingRam,
    /// What its disks stand on, if not all of them travels. Comparing takes as long as reading, so it is
    /// left to the thread that migrates.
    pub backings: Vec<BackingCheck>,
}

/// What a migration thread asks of the supervisor.
pub enum GuestRequest {
    /// Source: stop vCPUs and devices.
    Pause(Reply<Stopped>),
    /// Source: all records.
    SaveRecords(Reply<Vec<DeviceRecord>>),
    /// Source: flush and unlock the disks.
    ReleaseDisks(Reply<()>),
    /// Source: undo the pause.
    Resume(Stopped, Reply<()>),
    /// Source: slow the guest down, or let it go.
    Throttle(u8, Reply<()>),
    /// Source: the permit is spent.
    Surrendered(Reply<()>),
    /// Destination: build the machine.
    Build(MachineDescription, Reply<Arrival>),
    /// Destination: the disks that arrive.
    Disks(Reply<Vec<IncomingDisk>>),
    /// Destination: load all records.
    LoadRecords(Vec<DeviceRecord>, Reply<()>),
    /// Destination: lock the disks.
    LockDisks(Reply<()>),
    /// Destination: let go of the disks' locks again.
    UnlockDisks(Reply<()>),
    /// Destination: run, or stay paused.
    Run(RunPermit, bool, Reply<()>),
    /// Destination: the migration failed, let go of the machine and its disks.
    Abandon(Reply<()>),
}

/// Talks to the supervisor on behalf of a migration thread.
pub struct GuestProxy {
    mailbox: Mailbox,
    cancel: CancelToken,
}

impl GuestProxy {
    /// A proxy that posts to `mailbox`, for a migration that `cancel` ends.
    pub fn new(mailbox: Mailbox, cancel: CancelToken) -> Self {
        Self { mailbox, cancel }
    }

    fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> GuestRequest) -> Result<T, GuestError> {
        let (reply, answer) = channel();
        self.mailbox.post(Message::Guest(request(reply)));
        answer.recv().map_err(|_| GuestError::new("the virtual machine is shutting down"))?
    }
}

impl GuestControl for GuestProxy {
    fn flush_ahead(&mut self, _: Instant) -> Result<PartTime, GuestError> {
        Ok(PartTime::new("disks: flush", Duration::ZERO))
    }

    fn pause(&mut self, _: Instant) -> Result<Stopped, GuestError> {
        self.ask(GuestRequest::Pause)
    }

    fn save_records(&mut self) -> Result<Vec<DeviceRecord>, GuestError> {
        self.ask(GuestRequest::SaveRecords)
    }

    fn release_disks(&mut self, _: Instant) -> Result<PartTime, GuestError> {
        let began = Instant::now();
        self.ask(GuestRequest::ReleaseDisks)?;
        Ok(PartTime::new("disks: flush", began.elapsed()))
    }

    fn resume(&mut self, stopped: Stopped) -> Result<(), GuestError> {
        self.ask(|reply| GuestRequest::Resume(stopped, reply))
    }

    fn surrendered(&mut self) {
        if let Err(error) = self.ask(GuestRequest::Surrendered) {
            log::debug!("{error}");
        }
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.ask(|reply| GuestRequest::Throttle(percent, reply))
    }
}

impl DestinationHost for GuestProxy {
    fn build(
        &mut self,
        description: &MachineDescription,
        go_on: GoOn<'_>,
    ) -> Result<IncomingRam, GuestError> {
        let Arrival { ram, backings } =
            self.ask(|reply| GuestRequest::Build(description.clone(), reply))?;
        let go_on = || go_on() && !self.cancel.is_cancelled();
        backings
            .iter()
            .try_for_each(|backing| backing.check(&go_on))
            .map_err(|error| guest_error(&error))?;
        Ok(ram)
    }

    fn disks(&mut self) -> Result<Vec<IncomingDisk>, GuestError> {
        self.ask(GuestRequest::Disks)
    }

    fn load_records(&mut self, records: Vec<DeviceRecord>) -> Result<(), GuestError> {
        self.ask(|reply| GuestRequest::LoadRecords(records, reply))
    }

    fn lock_disks(&mut self) -> Result<(), GuestError> {
        self.ask(GuestRequest::LockDisks)
    }

    fn called_off(&mut self) -> Result<(), GuestError> {
        self.ask(GuestRequest::UnlockDisks)
    }

    fn run(&mut self, permit: RunPermit, running: bool) -> Result<(), GuestError> {
        self.ask(|reply| GuestRequest::Run(permit, running, reply))
    }

    fn abandon(&mut self) {
        if let Err(error) = self.ask(GuestRequest::Abandon) {
            log::debug!("{error}");
        }
    }
}
