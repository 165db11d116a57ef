//! What a destination needs of the machine. Implemented by the VMM, faked in tests.

use crate::guest::{GuestError, MachineDescription, RunPermit};
use crate::participant::Incoming;
pub use devices::block::backend::GoOn;
use devices::state::DeviceRecord;

/// The destination's machine, from the machine description to the first instruction.
pub trait DestinationHost: Send {
    /// Builds the machine paused: RAM, vCPUs, devices. Checks the description, CPU features and
    /// local policy (which disks may be opened); refuses here, before any page is sent.
    /// Long work polls `go_on` and gives up once it returns false. Returns the participants in the source's
    /// setup order.
    fn build(
        &mut self,
        description: &MachineDescription,
        go_on: GoOn<'_>,
    ) -> Result<Vec<Box<dyn Incoming>>, GuestError>;
    /// Loads all records. Each device of the description must have exactly one. Called again after a
    /// called-off stop.
    fn load_records(&mut self, records: Vec<DeviceRecord>) -> Result<(), GuestError>;
    /// Takes the disk locks. Nothing may fail between this and `run`.
    fn lock_disks(&mut self) -> Result<(), GuestError>;
    /// The source called its stop off and runs on: releases the disk locks. Records and locking follow
    /// again.
    fn called_off(&mut self) -> Result<(), GuestError>;
    /// Runs the guest (or leaves it paused, if it was paused at the source). After an error not one
    /// instruction of the guest has run here: the right to run then goes back to the source.
    fn run(&mut self, permit: RunPermit, running: bool) -> Result<(), GuestError>;
    /// The migration has failed and the guest will not run here: drops the machine if there is one
    /// and releases its disks. The source is told only afterwards, so that it finds the locks free.
    fn abandon(&mut self);
}
