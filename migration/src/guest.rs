//! What a migration needs from the machine on either side, and the right to run it.
//!
//! The right to run a guest is a value, [`RunPermit`]: born at cold boot or when `Go` arrives, spent
//! when `Go` is sent. `vmm` starts no vCPU without one. [`PausedGuest`] holds it between the pause
//! and the handover and gives it back, by resuming the guest, on every way out but [`surrender`].
//!
//! [`surrender`]: PausedGuest::surrender

use devices::ram::{GuestRam, PageIndex, RamLayout};
use devices::state::DeviceRecord;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::{Duration, Instant};

/// The right to run one guest. Neither `Clone` nor `Default`: it is moved, and dropping it is final.
#[derive(Debug)]
#[must_use = "dropping the permit takes away the right to run the guest"]
pub struct RunPermit(());

impl RunPermit {
    /// For a guest that is booted here for the first time.
    pub fn cold_boot() -> Self {
        Self(())
    }

    /// For a guest whose migration ended as unknown and whose operator has made sure, by looking,
    /// that the other side does not run it.
    pub fn claimed_by_operator() -> Self {
        Self(())
    }

    /// `Go` arrived, or a destination that never ran the guest declined it.
    pub(crate) fn received() -> Self {
        Self(())
    }
}

/// A machine-side failure, already in words for the user.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// It cannot be done.
    #[error("{0}")]
    Failed(String),
    /// It was not done by its deadline. Nothing has failed, and another try may succeed.
    #[error("{0}")]
    Overdue(PartTime),
}

/// How long a part of a pause took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartTime {
    /// A part of the pause, as it is named to users: "draining disk `root`".
    pub part: String,
    /// How long it took, or if it has not ended, how long it was waited for.
    pub took: Duration,
    /// Whether it has ended, so that `took` is all of it.
    pub ended: bool,
}

impl PartTime {
    /// A part that has ended.
    pub fn new(part: impl Into<String>, took: Duration) -> Self {
        Self { part: part.into(), took, ended: true }
    }

    /// A part that was waited for and has not ended.
    pub fn not_ended(part: impl Into<String>, waited: Duration) -> Self {
        Self { part: part.into(), took: waited, ended: false }
    }
}

impl fmt::Display for PartTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { part, took, ended } = self;
        let least = if *ended { "" } else { "more than " };
        write!(f, "{part} takes {least}{} ms", took.as_millis())
    }
}

impl GuestError {
    /// An error from any displayable cause; nested sources are joined with `: `.
    pub fn new(message: impl Into<String>) -> Self {
        Self::Failed(message.into())
    }
}

/// What a pause found.
#[derive(Debug)]
pub struct Stopped {
    /// The right to run, out of the machine's hands from now on.
    pub permit: RunPermit,
    /// False if the user had paused the guest: it then arrives paused, or stays paused.
    pub was_running: bool,
    /// How long vCPUs took to stop and devices to drain, the longest first.
    pub drains: Vec<PartTime>,
}

/// The source's machine, as its migration sees it. Served by the supervisor, faked in tests.
pub trait GuestControl: Send {
    /// The guest runs, and is about to be stopped: starts to make durable what the disks that stay
    /// behind hold, so that [`GuestControl::release_disks`] finds little left. Waits until `deadline` at
    /// the longest; returns how long it took, with the name of the disk that took longest.
    fn flush_ahead(&mut self, deadline: Instant) -> Result<PartTime, GuestError>;
    /// Stops every vCPU and drains every device, so that nothing writes guest RAM or a disk. If that is
    /// not done by `deadline` the guest runs again, and the error is [`GuestError::Overdue`].
    fn pause(&mut self, deadline: Instant) -> Result<Stopped, GuestError>;
    /// All vCPU and device records, in one fixed order. Only while paused.
    fn save_records(&mut self) -> Result<Vec<DeviceRecord>, GuestError>;
    /// Flushes the disks and lets go of their locks, so that the destination can take them. If they are
    /// not flushed by `deadline` the locks are kept, and the error is [`GuestError::Overdue`]. Returns how
    /// long the flush took, with the name of the disk that took longest.
    fn release_disks(&mut self, deadline: Instant) -> Result<PartTime, GuestError>;
    /// Undoes a pause: retakes disk locks, then runs the guest if `stopped.was_running`. After a lost
    /// link the destination may hold a lock for some moments more, so try for a few seconds; if a
    /// lock cannot be retaken the guest stays paused with the permit kept by the machine, and this
    /// says why. Also called after [`GuestControl::surrendered`], if the destination declines.
    fn resume(&mut self, stopped: Stopped) -> Result<(), GuestError>;
    /// The permit has been spent: the guest must not run here again by itself.
    fn surrendered(&mut self);
    /// Slows the running guest down: its vCPUs sleep `percent` of the time that they would use; 0 lets
    /// them run freely. Whoever slows a guest down lets it go again, however a migration ends.
    fn throttle(&mut self, percent: u8) -> Result<(), GuestError>;
}

/// Guest RAM that a destination has set up, untouched: every page reads as zero.
#[derive(Debug, Clone)]
pub struct IncomingRam {
    pub ram: GuestRam,
    /// How it is numbered.
    pub layout: RamLayout,
}

/// The machine, as the source describes it. Opaque here; `vmm` writes and validates it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineDescription {
    /// Version of the layout of `machine`.
    pub version: u16,
    /// RAM in bytes; must agree with `machine`.
    pub ram_bytes: u64,
    /// vCPUs, disks, CPU features and all that makes guest-visible hardware.
    pub machine: serde_json::Value,
}

/// Which pages were written. Merges KVM's log with the marks of device writes; hides whether the
/// host clears the log by hand or at each reading.
pub trait DirtySource: Send {
    /// Starts tracking.
    fn start(&mut self) -> Result<(), GuestError>;
    /// Adds every page written since it was last cleared. `bitmap` holds one bit per page of RAM,
    /// bit `n % 64` of word `n / 64` for page `n`.
    fn drain_into(&mut self, bitmap: &mut [u64]) -> Result<(), GuestError>;
    /// Forgets earlier writes to the pages whose bits are set in `mask` (for pages `first.0` on, a
    /// multiple of 64), write-protecting them again: call just before copying them.
    fn clear(&mut self, first: PageIndex, mask: &[u64]) -> Result<(), GuestError>;
    /// Stops tracking. May take tens of milliseconds; never called while the guest is paused for us.
    fn stop(&mut self);
}

/// A stopped guest plus the right to run it. Dropping this resumes the guest.
pub struct PausedGuest<'g> {
    /// `None` once surrendered.
    guest: Option<&'g mut dyn GuestControl>,
    stopped: Option<Stopped>,
}

impl<'g> PausedGuest<'g> {
    /// Pauses `guest`.
    pub fn pause(guest: &'g mut dyn GuestControl, deadline: Instant) -> Result<Self, GuestError> {
        let stopped = guest.pause(deadline)?;
        Ok(Self { guest: Some(guest), stopped: Some(stopped) })
    }

    /// All vCPU and device records.
    pub fn save_records(&mut self) -> Result<Vec<DeviceRecord>, GuestError> {
        self.guest.as_mut().map_or(Ok(Vec::new()), |guest| guest.save_records())
    }

    /// Flushes the disks and lets go of their locks.
    pub fn release_disks(&mut self, deadline: Instant) -> Result<PartTime, GuestError> {
        let none = PartTime::new("flushing disks", Duration::ZERO);
        self.guest.as_mut().map_or(Ok(none), |guest| guest.release_disks(deadline))
    }

    /// How long vCPUs took to stop and devices to drain, the longest first.
    pub fn drains(&self) -> &[PartTime] {
        self.stopped.as_ref().map_or(&[], |stopped| &stopped.drains)
    }

    /// Whether the guest ran before the pause.
    pub fn was_running(&self) -> bool {
        self.stopped.as_ref().is_some_and(|stopped| stopped.was_running)
    }

    /// Spends the permit. From here on this side never runs the guest by itself. Returns what is
    /// needed to take a declined guest back.
    pub(crate) fn surrender(mut self) -> Surrendered<'g> {
        let was_running = self.was_running();
        self.stopped = None;
        if let Some(guest) = &mut self.guest {
            guest.surrendered();
        }
        Surrendered { guest: self.guest.take(), was_running }
    }

    /// Resumes and reports how that went; dropping does the same but can only log.
    pub fn resume(mut self) -> Result<(), GuestError> {
        match (self.stopped.take(), &mut self.guest) {
            (Some(stopped), Some(guest)) => guest.resume(stopped),
            _ => Ok(()),
        }
    }
}

impl Drop for PausedGuest<'_> {
    fn drop(&mut self) {
        if let (Some(stopped), Some(guest)) = (self.stopped.take(), &mut self.guest)
            && let Err(error) = guest.resume(stopped)
        {
            log::error!("the guest stays paused after a failed migration: {error}");
        }
    }
}

/// A guest whose permit was spent.
pub(crate) struct Surrendered<'g> {
    guest: Option<&'g mut dyn GuestControl>,
    was_running: bool,
}

impl Surrendered<'_> {
    /// A destination that never ran the guest has given the right to run back.
    pub(crate) fn take_back(self) -> Result<(), GuestError> {
        let (permit, was_running) = (RunPermit::received(), self.was_running);
        let stopped = Stopped { permit, was_running, drains: Vec::new() };
        self.guest.map_or(Ok(()), |guest| guest.resume(stopped))
    }
}
