//! QEMU's pvpanic (QEMU, `docs/specs/pvpanic.rst`): a port through which a guest says that it has panicked. It has no
//! state.

use crate::bus::BusDevice;
use crate::reset::{ExitSink, GuestExit};

/// The guest has panicked.
const PANICKED: u8 = 1;
/// It has panicked and goes on in a kernel that saves the crash.
const CRASH_LOADED: u8 = 1 << 1;

/// The device at port 0x505.
pub struct PvPanic {
    panicked: ExitSink,
    crash_loaded: Box<dyn Fn() + Send>,
    /// A guest can repeat that at will: the first time is enough.
    told_of_crash: bool,
}

impl PvPanic {
    /// A device that reports to these, on the vCPU's thread.
    pub fn new(panicked: ExitSink, crash_loaded: Box<dyn Fn() + Send>) -> Self {
        Self { panicked, crash_loaded, told_of_crash: false }
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        // The events that it takes.
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        let [events] = *data else { return };
        if events & PANICKED != 0 {
            (self.panicked)(GuestExit::Panicked);
        } else if events & CRASH_LOADED != 0 && !self.told_of_crash {
            self.told_of_crash = true;
            (self.crash_loaded)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_guest_can_ask_for_the_events_and_report_them() {
        let (sender, exits) = channel();
        let (crashed, crashes) = channel();
        let mut device = PvPanic::new(
            Box::new(move |exit| sender.send(exit).unwrap()),
            Box::new(move || crashed.send(()).unwrap()),
        );
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [3]);
        for ignored in [&[0][..], &[4], &[0xfc], &[1, 0], &[]] {
            device.write(0, ignored);
        }
        assert!(exits.try_recv().is_err() && crashes.try_recv().is_err());
        device.write(0, &[2]);
        device.write(0, &[2]);
        assert_eq!(crashes.try_iter().count(), 1, "told once");
        device.write(0, &[3]);
        assert_eq!(exits.try_recv(), Ok(GuestExit::Panicked));
        assert_eq!(exits.try_iter().count(), 0);
    }
}
