//! A device's interrupt line: an irqfd, or a counter in tests.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An edge-triggered interrupt line.
pub trait IrqLine: Send + Sync {
    /// Raises the interrupt once.
    fn raise(&self) -> io::Result<()>;
}

/// An interrupt line backed by an irqfd.
#[derive(Debug)]
pub struct EventIrq(EventFd);

impl EventIrq {
    /// A line that is not connected yet.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    /// The eventfd to register with KVM.
    pub fn event(&self) -> &EventFd {
        &self.0
    }
}

impl IrqLine for EventIrq {
    fn raise(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// A line that counts its interrupts, for tests.
#[derive(Debug, Default)]
pub struct CountingIrq(AtomicUsize);

impl CountingIrq {
    /// How often the line was raised.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl IrqLine for CountingIrq {
    fn raise(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
