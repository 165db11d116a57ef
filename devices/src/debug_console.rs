//! Bochs' debug console at port 0xe9, as QEMU's isa-debugcon: bytes that a guest writes go to the host, without
//! interrupts and without a way to tell that there is no room.
//!
//! Output shares the serial console's [`Transmitter`], to come in the order in which it was written, or has one of
//! its own. In the latter case what is unsent moves with the guest, as there.

use crate::bus::BusDevice;
use crate::state::{Persist, at_most};
use crate::transmitter::{BUFFER_BYTES, Transmitter};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What the port reads as: how a guest finds it.
const PRESENT: u8 = 0xe9;

/// Where the bytes go.
#[derive(Clone, Default)]
pub enum DebugOutput {
    /// Nowhere.
    #[default]
    Null,
    /// Between those of the serial console.
    Shared(Arc<Transmitter>),
    /// To a transmitter of its own.
    Own(Arc<Transmitter>),
}

/// The device.
pub struct DebugConsole(DebugOutput);

/// What it saves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DebugConsoleState {
    /// Bytes that its own transmitter has not sent.
    #[serde(deserialize_with = "at_most::<_, _, BUFFER_BYTES>")]
    pub unsent: Vec<u8>,
}

impl DebugConsole {
    /// A console that writes to `output`.
    pub fn new(output: DebugOutput) -> Self {
        Self(output)
    }

    /// Holds unsent output, which will be saved and sent by another machine.
    pub fn hold_output(&self) {
        if let DebugOutput::Own(transmitter) = &self.0 {
            transmitter.hold();
        }
    }

    /// Releases unsent output: this process runs the guest.
    pub fn release_output(&self) {
        if let DebugOutput::Own(transmitter) = &self.0 {
            transmitter.release();
        }
    }
}

impl BusDevice for DebugConsole {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        if let (DebugOutput::Shared(transmitter) | DebugOutput::Own(transmitter), [byte]) =
            (&self.0, data)
        {
            transmitter.push_beside(*byte);
        }
    }
}

impl Persist for DebugConsole {
    const KIND: &'static str = "debug-console";
    const VERSION: u16 = 1;
    type State = DebugConsoleState;

    fn save(&self) -> DebugConsoleState {
        match &self.0 {
            DebugOutput::Own(transmitter) => DebugConsoleState { unsent: transmitter.unsent() },
            DebugOutput::Null | DebugOutput::Shared(_) => DebugConsoleState::default(),
        }
    }

    fn restore(&mut self, state: DebugConsoleState) -> Result<(), String> {
        match &self.0 {
            // The right to send it comes with the right to run.
            DebugOutput::Own(transmitter) => {
                transmitter.hold();
                transmitter.restore(state.unsent, false, false)
            }
            // This host has another place for it, or none.
            DebugOutput::Null | DebugOutput::Shared(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(transmitter: &Transmitter) -> Vec<u8> {
        let mut bytes = Vec::new();
        if transmitter.begin_write(&mut bytes) {
            transmitter.end_write(bytes.len());
        }
        bytes
    }

    #[test]
    fn a_guest_finds_the_port_and_writes_bytes() {
        let transmitter = Arc::new(Transmitter::new(None).unwrap());
        let mut console = DebugConsole::new(DebugOutput::Own(transmitter.clone()));
        let mut byte = [0];
        console.read(0, &mut byte);
        assert_eq!(byte, [0xe9]);
        for data in [&b"a"[..], b"", b"xy", b"b"] {
            console.write(0, data);
        }
        assert_eq!(taken(&transmitter), b"ab");
        DebugConsole::new(DebugOutput::Null).write(0, b"c");
    }

    #[test]
    fn unsent_output_moves_and_is_sent_once() {
        let there = Arc::new(Transmitter::new(None).unwrap());
        let mut source = DebugConsole::new(DebugOutput::Own(there.clone()));
        source.write(0, b"a");
        source.hold_output();
        let here = Arc::new(Transmitter::new(None).unwrap());
        let mut destination = DebugConsole::new(DebugOutput::Own(here.clone()));
        destination.restore_record(source.save_record("")).unwrap();
        assert_eq!((taken(&there), taken(&here)), (vec![], vec![]), "nobody has the right yet");
        destination.release_output();
        assert_eq!((taken(&there), taken(&here)), (vec![], b"a".to_vec()));
        let mut nowhere = DebugConsole::new(DebugOutput::Null);
        nowhere.restore_record(source.save_record("")).unwrap();
    }
}
