//! What a migration needs from the machine on either side, and the right to run it.
//!
//! The right to run a guest is a value, [`RunPermit`]: created at cold boot or when `Go` arrives, spent
//! when `Go` is sent. `vmm` starts no vCPU without one. [`PausedGuest`] holds it between pause and
//! handover; every exit but [`surrender`] resumes the guest.
//!
//! [`surrender`]: PausedGuest::surrender

use devices::ram::{GuestRam, PageIndex, RamLayout};
use devices::state::{DeviceRecord, JsonText};
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

    /// For a guest whose migration ended as unknown, after the operator has verified that the other side
    /// does not run it.
    pub fn claimed_by_operator() -> Self {
        Self(())
    }

    /// On `Go`, or when a destination that never ran the guest declines.
    pub(crate) fn received() -> Self {
        Self(())
    }
}

/// A failure of the machine, as a message to the user.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error("{0}")]
    Failed(String),
    /// The deadline passed. Nothing has failed, and a retry may succeed.
    #[error("{0}")]
    Overdue(PartTime),
}

/// How long a part of a pause took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartTime {
    /// Name of the part, for users: "draining disk `root`".
    pub part: String,
    /// How long it took, or how long it was waited for if it has not ended.
    pub took: Duration,
    /// Whether it has ended.
    pub ended: bool,
}

impl PartTime {
    /// A part that has ended.
    pub fn new(part: impl Into<String>, took: Duration) -> Self {
        Self { part: part.into(), took, ended: true }
    }

    /// A part that has not ended after `waited`.
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
    /// A failure with this message.
    pub fn new(message: impl Into<String>) -> Self {
        Self::Failed(message.into())
    }
}

/// The result of a pause.
#[derive(Debug)]
pub struct Stopped {
    /// The right to run, taken from the machine.
    pub permit: RunPermit,
    /// False if the user had paused the guest: it then stays paused on either side.
    pub was_running: bool,
    /// How long vCPUs took to stop and devices to drain, the longest first.
    pub drains: Vec<PartTime>,
}

/// What a source needs of the machine. Implemented by the supervisor, faked in tests.
pub trait GuestControl: Send {
    /// Flushes the disks that are not migrated while the guest still runs, so that
    /// [`GuestControl::release_disks`] has little left to flush. Waits until `deadline` at most. Returns how
    /// long it took, naming the slowest disk.
    fn flush_ahead(&mut self, deadline: Instant) -> Result<PartTime, GuestError>;
    /// Stops every vCPU and drains every device, so that nothing writes guest RAM or a disk. If that is
    /// not done by `deadline` the guest runs again, and the error is [`GuestError::Overdue`].
    fn pause(&mut self, deadline: Instant) -> Result<Stopped, GuestError>;
    /// All vCPU and device records, in one fixed order. Only while paused.
    fn save_records(&mut self) -> Result<Vec<DeviceRecord>, GuestError>;
    /// Flushes the disks and releases their locks, so that the destination can take them. If they are not
    /// flushed by `deadline` the locks are kept, and the error is [`GuestError::Overdue`]. Returns how long
    /// the flush took, naming the slowest disk.
    fn release_disks(&mut self, deadline: Instant) -> Result<PartTime, GuestError>;
    /// Undoes a pause: retakes disk locks, then runs the guest if `stopped.was_running`. After a lost link
    /// the destination may hold a lock a little longer, so retries for a few seconds; if a lock cannot be
    /// retaken, the guest stays paused, the machine keeps the permit, and the error says why. Also called
    /// after [`GuestControl::surrendered`], if the destination declines.
    fn resume(&mut self, stopped: Stopped) -> Result<(), GuestError>;
    /// The permit has been spent: the guest must not run here again by itself.
    fn surrendered(&mut self);
    /// Throttles the running guest: its vCPUs sleep `percent` of the time; 0 ends throttling. The caller
    /// ends it however the migration ends.
    fn throttle(&mut self, percent: u8) -> Result<(), GuestError>;
}

/// The destination's guest RAM, untouched: every page reads as zero.
#[derive(Debug, Clone)]
pub struct IncomingRam {
    pub ram: GuestRam,
    /// Maps page indices to guest addresses.
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
    pub machine: JsonText,
}

/// The dirty log of guest RAM: KVM's log merged with the marks of device writes. Hides whether the host
/// clears the log explicitly or on each read.
pub trait DirtySource: Send {
    /// Starts tracking.
    fn start(&mut self) -> Result<(), GuestError>;
    /// Adds every page written since it was last cleared. `bitmap` holds one bit per page of RAM,
    /// bit `n % 64` of word `n / 64` for page `n`.
    fn drain_into(&mut self, bitmap: &mut [u64]) -> Result<(), GuestError>;
    /// Clears and write-protects the pages whose bits are set in `mask`, whose bit 0 is page `first`, a
    /// multiple of 64. Call just before copying them.
    fn clear(&mut self, first: PageIndex, mask: &[u64]) -> Result<(), GuestError>;
    /// Stops tracking. May take tens of milliseconds; never called during our pause.
    fn stop(&mut self);
}

/// Never seen while the types are used as they are meant: a surrendered guest is no longer a paused one.
fn handed_over() -> GuestError {
    GuestError::new("the guest was handed over")
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
        self.guest.as_mut().ok_or_else(handed_over)?.save_records()
    }

    /// Flushes the disks and releases their locks.
    pub fn release_disks(&mut self, deadline: Instant) -> Result<PartTime, GuestError> {
        self.guest.as_mut().ok_or_else(handed_over)?.release_disks(deadline)
    }

    /// How long vCPUs took to stop and devices to drain, the longest first.
    pub fn drains(&self) -> &[PartTime] {
        self.stopped.as_ref().map_or(&[], |stopped| &stopped.drains)
    }

    /// Whether the guest ran before the pause.
    pub fn was_running(&self) -> bool {
        self.stopped.as_ref().is_some_and(|stopped| stopped.was_running)
    }

    /// Spends the permit. From here on this side does not run the guest on its own. The result can take a
    /// declined guest back.
    pub(crate) fn surrender(mut self) -> Surrendered<'g> {
        let was_running = self.was_running();
        self.stopped = None;
        if let Some(guest) = &mut self.guest {
            guest.surrendered();
        }
        Surrendered { guest: self.guest.take(), was_running }
    }

    /// Resumes the guest. Dropping does the same, but can only log an error.
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
    /// Resumes the guest after a destination that never ran it has declined.
    pub(crate) fn take_back(self) -> Result<(), GuestError> {
        let (permit, was_running) = (RunPermit::received(), self.was_running);
        let stopped = Stopped { permit, was_running, drains: Vec::new() };
        self.guest.ok_or_else(handed_over)?.resume(stopped)
    }
}
