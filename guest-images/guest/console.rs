//! COM1. A line is formatted first and written in one go: `rep outsb` costs one exit where `out` costs one a byte.

use crate::machine::inb;
use core::arch::asm;
use core::fmt::{self, Write};

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;

pub struct Line {
    bytes: [u8; 320],
    len: usize,
}

impl Line {
    pub const fn new() -> Self {
        Self { bytes: [0; 320], len: 0 }
    }

    pub fn send(&self) {
        unsafe {
            asm!("rep outsb", in("dx") COM1, inout("rsi") self.bytes.as_ptr() => _, inout("rcx") self.len => _)
        };
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.len < self.bytes.len() {
                self.bytes[self.len] = byte;
                self.len += 1;
            }
        }
        Ok(())
    }
}

macro_rules! println {
    ($($arg:tt)*) => {{
        let mut line = $crate::console::Line::new();
        let _ = core::fmt::Write::write_fmt(&mut line, format_args!($($arg)*));
        let _ = core::fmt::Write::write_str(&mut line, "\n");
        line.send();
    }};
}
pub(crate) use println;

/// A byte of input, if there is one.
pub fn read() -> Option<u8> {
    (inb(LINE_STATUS) & 1 == 1).then(|| inb(COM1))
}
