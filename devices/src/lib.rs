//! What a guest sees, without KVM and without migration: RAM's vocabulary, buses, interrupt lines,
//! the serial console, reset ports, virtio devices and the disks behind them.
//!
//! Start at [`ram`] (pages and blocks), then [`bus`] (how an access finds its device), [`state`]
//! (how a device is saved) and [`virtio`].
#![deny(unsafe_code)]

pub mod ram;
pub mod state;
