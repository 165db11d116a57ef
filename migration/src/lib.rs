//! Moves a running machine to another process or host. Knows no KVM.
//!
//! ```text
//! source                                         destination
//! Hello ──────────────────────────────────────▶  ◀── Hello
//! Machine ────────────────────────────────────▶  build it, paused ◀── Accepted | Refused
//! Disks once, if they travel (guest runs) ────▶  into images, flushed
//! RamSetup, RamBatch… (rounds, guest runs) ───▶  straight into guest RAM
//!   pause
//! Devices ────────────────────────────────────▶  load while the last pages travel
//! RamBatch…, RamEnd, Eof ─────────────────────▶  check counts, lock disks ◀── Ready | Refused
//!   give up the right to run
//! Go ─────────────────────────────────────────▶  run ◀── Running
//! ```
//! [`source`] and [`destination`] drive it; [`guest`] is what they need of a machine; [`wire`] is the
//! grammar, [`transport`] the connection, [`ram`] the way of a page, [`block`] the way
//! of a disk's bytes, [`policy`] the decisions.
#![deny(unsafe_code)]

pub mod block;
pub mod boot;
pub mod bytes;
pub mod cancel;
pub mod control;
pub mod destination;
pub mod error;
pub mod guest;
pub mod pace;
pub mod params;
pub mod participant;
pub mod policy;
pub mod ram;
pub mod source;
pub mod stats;
pub mod transport;
pub mod units;
pub mod wire;

#[cfg(test)]
mod tests;
