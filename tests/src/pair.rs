//! A guest that runs, a process that waits for it, and what has to hold wherever a migration between
//! the two ends. Used by tests that disturb one.

use crate::ferry::{self, Destination, Guest};
use crate::process::Vmm;
use crate::qmp::Qmp;
use crate::verdict::Transcript;
use anyhow::{Result, ensure};
use serde_json::json;

/// Both sides, and a control connection to the source that hears everything.
pub struct Pair {
    /// Where the guest runs.
    pub source: Vmm,
    /// Where it goes.
    pub destination: Destination,
    /// The source's control socket.
    pub qmp: Qmp,
}

impl Pair {
    /// Boots `guest`; nothing moves yet.
    pub fn new(guest: &Guest) -> Result<Self> {
        let source = ferry::run(guest)?;
        let destination = ferry::receive()?;
        source.wait_line("^HB n=1 ")?;
        let mut qmp = source.qmp()?;
        qmp.want_migration_events()?;
        Ok(Self { source, destination, qmp })
    }

    /// Starts to move the guest.
    pub fn start(&mut self) -> Result<()> {
        let address = self.destination.address.clone();
        self.start_by(&address)
    }

    /// Starts to move it over a link that leads to the destination.
    pub fn start_by(&mut self, address: &str) -> Result<()> {
        self.qmp.execute("migrate", json!({"uri": address})).map(drop)
    }

    /// The guest runs on at the source, whole, and has never run at the destination.
    pub fn check_stayed(&mut self) -> Result<()> {
        let state = self.qmp.run_state()?;
        ensure!(state == "running", "the guest is {state} at the source");
        self.source.wait_next_line("^HB ")?;
        let check = self.source.check()?;
        ensure!(check.corrupt == 0, "the guest found corruption: {check:?}");
        let said = self.destination.vmm.serial().text();
        ensure!(said.is_empty(), "it ran at the destination too: {said}");
        Transcript::of([self.source.serial()]).judge().map(drop)
    }

    /// The guest runs on at the destination, whole, and has stopped at the source.
    pub fn check_moved(&mut self) -> Result<()> {
        ferry::verify_at(&mut self.destination.vmm, &[self.source.serial()])?;
        // All that the source has ever said has been collected by now.
        let said = self.source.serial().text();
        self.destination.vmm.wait_next_line("^HB ")?;
        ensure!(self.source.serial().text() == said, "it runs at the source too");
        Ok(())
    }

    /// After a failure: the guest moves to a destination of its own.
    pub fn move_after_all(&mut self) -> Result<()> {
        self.destination = ferry::receive()?;
        // Whether it would converge under the limits of the test depends on the host's load.
        let freely = json!({"max-bandwidth": 0, "downtime-limit": 300});
        self.qmp.execute("migrate-set-parameters", freely)?;
        self.start()?;
        let info = self.qmp.migration_end()?;
        ensure!(info["status"] == "completed", "{info}");
        self.check_moved()
    }
}
