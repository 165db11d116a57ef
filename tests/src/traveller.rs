//! A guest that moves from process to process, and its whole life over all of them. What a test looks at
//! between two moves, it finds at the process that has the guest.

use crate::ferry::{self, Destination, Ended, Guest};
use crate::lines::Lines;
use crate::process::Vmm;
use crate::verdict::{Check, Heartbeat, Transcript};
use anyhow::{Context, Result};

/// How a guest moves once.
#[derive(Debug, Clone, Copy)]
pub struct Way<'a> {
    /// Where the destination listens.
    pub address: &'a str,
    /// More options of `ferry receive`.
    pub receive: &'a [&'a str],
    /// Options of `ferry migrate`.
    pub migrate: &'a [&'a str],
}

impl Default for Way<'_> {
    fn default() -> Self {
        Self { address: "tcp:127.0.0.1:0", receive: &[], migrate: &[] }
    }
}

/// A move that succeeded.
pub struct Hop {
    /// The process that had the guest; killed when dropped, unless it has ended.
    pub source: Vmm,
    /// What `ferry migrate` said.
    pub ended: Ended,
}

/// The guest. The process that has it is killed when it is dropped.
pub struct Traveller {
    /// The process that has it.
    pub vmm: Vmm,
    /// What it said in those that had it.
    earlier: Vec<Lines>,
}

impl From<Vmm> for Traveller {
    /// A guest that has not moved yet.
    fn from(vmm: Vmm) -> Self {
        Self { vmm, earlier: Vec::new() }
    }
}

impl Traveller {
    /// Boots one of our guests and waits until it works.
    pub fn start(guest: &Guest) -> Result<Self> {
        let vmm = ferry::run(guest)?;
        vmm.wait_line("^HB n=2 ")?;
        Ok(vmm.into())
    }

    /// Moves it to a fresh process.
    pub fn hop(&mut self, way: Way<'_>) -> Result<Hop> {
        let destination = ferry::receive_at(way.address, way.receive)?;
        let address = destination.address.clone();
        self.hop_to(destination, &address, way.migrate)
    }

    /// Moves it to `destination` over a link whose near end is at `address`.
    pub fn hop_to(
        &mut self,
        destination: Destination,
        address: &str,
        migrate: &[&str],
    ) -> Result<Hop> {
        let ended = ferry::migrate_well(&self.vmm, address, migrate)
            .with_context(|| format!("move {}", self.earlier.len() + 1))?;
        let source = std::mem::replace(&mut self.vmm, destination.vmm);
        self.earlier.push(source.serial().clone());
        Ok(Hop { source, ended })
    }

    /// Moves it `count` times in the same way.
    pub fn hop_often(&mut self, count: usize, way: Way<'_>) -> Result<()> {
        (0..count).try_for_each(|_| self.hop(way).map(drop))
    }

    /// All that it has said.
    pub fn transcript(&self) -> Transcript {
        Transcript::of(self.earlier.iter().chain([self.vmm.serial()]))
    }

    /// Waits until it has gone on here, has it look at its memory or disk, and judges its whole life.
    pub fn verify(&mut self) -> Result<(Check, Vec<Heartbeat>)> {
        let earlier: Vec<&Lines> = self.earlier.iter().collect();
        ferry::verify_at(&mut self.vmm, &earlier)
    }
}
