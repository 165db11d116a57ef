//! What a destination needs from the machine to be. Served by the VMM, faked in tests.

use crate::guest::{GuestError, MachineDescription, RunPermit};
use crate::participant::Incoming;
pub use devices::block::backend::GoOn;
use devices::state::DeviceRecord;

/// The destination's machine, from the machine description to the first instruction.
pub trait DestinationHost: Send {
    /// Builds the machine paused: RAM, vCPUs, devices. Checks the description, CPU features and
    /// local policy (which disks may be opened) and refuses here, before any page has travelled.
    /// What takes long asks `go_on` now and then, and gives up if it says no. Returns what arrives, in the
    /// order in which the source sets it up.
    fn build(
        &mut self,
        description: &MachineDescription,
        go_on: GoOn<'_>,
    ) -> Result<Vec<Box<dyn Incoming>>, GuestError>;
    /// Loads every record; each device of the description must be named exactly once. Called again if the
    /// source has called a stop off since.
    fn load_records(&mut self, records: Vec<DeviceRecord>) -> Result<(), GuestError>;
    /// Takes the disk locks. After it nothing may fail before `run`.
    fn lock_disks(&mut self) -> Result<(), GuestError>;
    /// The source has called the stop off, and its guest runs on: lets go of the disk locks. Records will
    /// come again, and the disks will be locked again.
    fn called_off(&mut self) -> Result<(), GuestError>;
    /// Runs the guest (or leaves it paused, if it was paused at the source). After an error not one
    /// instruction of the guest has run here: the right to run then goes back to the source.
    fn run(&mut self, permit: RunPermit, running: bool) -> Result<(), GuestError>;
    /// The migration has failed and the guest will not run here: drops the machine if there is one
    /// and lets go of its disks. The source is told only afterwards, so it finds the locks free.
    fn abandon(&mut self);
}
