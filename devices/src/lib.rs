//! What a guest sees, without KVM and without migration: RAM's vocabulary, buses, interrupt lines,
//! the serial console, reset ports, virtio devices and the disks behind them.
//!
//! Start at [`ram`] (pages and blocks), then [`bus`] (how an access finds its device), [`state`]
//! (how a device is saved) and [`virtio`]. Unsafe code is denied but for `block/ofd_lock.rs` and
//! `block/write_back.rs`, which wrap one system call each, and `block/uring.rs`, which hands guest RAM to the kernel.
#![deny(unsafe_code)]

pub mod block;
pub mod bus;
#[cfg(test)]
mod hostile;
pub mod irq;
pub mod log_limit;
pub mod ram;
pub mod reset;
pub mod segments;
pub mod serial;
pub mod state;
pub mod transmitter;
pub mod virtio;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, also a poisoned one: a device panicked, which is a bug, but its state is the best that we
/// have.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
