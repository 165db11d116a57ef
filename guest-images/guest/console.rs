//! COM1. Every byte out is an exit of several microseconds, so lines wait in a queue: loops that watch
//! the clock send one byte at a time between two looks at it ([`pump`]), all others send at once
//! ([`flush`]). As any driver does, both write a FIFO's worth of bytes once the line status register has
//! said that the transmitter is ready, and wait for that where need be. Input raises interrupt 4, which wakes a sleeper; loops look now and then ([`read`]).

use crate::apic::ioapic_route;
use crate::cpu::{inb, outb};
use core::arch::asm;
use core::cell::UnsafeCell;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering::*};

const COM1: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = COM1 + 1;
const MODEM_CONTROL: u16 = COM1 + 4;
const LINE_STATUS: u16 = COM1 + 5;
const IRQ: u32 = 4;
pub const VECTOR: u32 = 34;
/// Bytes that the transmitter takes when it says that it is ready.
const FIFO_BYTES: usize = 16;
const READY: u8 = 1 << 5;
const QUEUE_BYTES: usize = 4096;

pub struct Line {
    bytes: [u8; 320],
    len: usize,
}

impl Line {
    pub const fn new() -> Self {
        Self { bytes: [0; 320], len: 0 }
    }

    fn end(&mut self) -> &[u8] {
        let len = self.len.min(self.bytes.len() - 1);
        self.bytes[len] = b'\n';
        &self.bytes[..=len]
    }

    /// Puts the line into the queue.
    pub fn send(mut self) {
        let line = self.end();
        QUEUE.with(|queue| queue.push(line));
    }

    /// Sends the line past the queue: whoever holds that may be the one who fails.
    pub fn send_now(mut self) {
        send(self.end());
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.len < self.bytes.len() - 1 {
                self.bytes[self.len] = byte;
                self.len += 1;
            }
        }
        Ok(())
    }
}

macro_rules! line {
    ($($arg:tt)*) => {{
        let mut line = $crate::console::Line::new();
        let _ = core::fmt::Write::write_fmt(&mut line, format_args!($($arg)*));
        line
    }};
}
macro_rules! println {
    ($($arg:tt)*) => { $crate::console::line!($($arg)*).send() };
}
pub(crate) use {line, println};

fn is_ready() -> bool {
    inb(LINE_STATUS) & READY != 0
}

fn send(bytes: &[u8]) {
    for bytes in bytes.chunks(FIFO_BYTES) {
        while !is_ready() {
            core::hint::spin_loop();
        }
        unsafe {
            asm!("rep outsb", in("dx") COM1, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _)
        };
    }
}

struct Queue {
    bytes: [u8; QUEUE_BYTES],
    first: usize,
    len: usize,
    /// Bytes that the transmitter still takes since it was last looked at.
    credit: usize,
}

impl Queue {
    fn push(&mut self, line: &[u8]) {
        while self.len + line.len() > QUEUE_BYTES {
            self.pump();
        }
        for byte in line {
            self.bytes[(self.first + self.len) % QUEUE_BYTES] = *byte;
            self.len += 1;
        }
    }

    /// Looks at the transmitter or sends a byte: one exit either way.
    fn pump(&mut self) {
        if self.len == 0 {
            return;
        }
        if self.credit == 0 {
            self.credit = if is_ready() { FIFO_BYTES } else { 0 };
            return;
        }
        outb(COM1, self.bytes[self.first]);
        self.first = (self.first + 1) % QUEUE_BYTES;
        self.len -= 1;
        self.credit -= 1;
    }
}

struct Locked {
    taken: AtomicBool,
    queue: UnsafeCell<Queue>,
}

// SAFETY: `with` hands the queue to one CPU at a time.
unsafe impl Sync for Locked {}

static QUEUE: Locked = Locked {
    taken: AtomicBool::new(false),
    queue: UnsafeCell::new(Queue { bytes: [0; QUEUE_BYTES], first: 0, len: 0, credit: 0 }),
};

impl Locked {
    fn with(&self, work: impl FnOnce(&mut Queue)) {
        while self.taken.swap(true, Acquire) {
            core::hint::spin_loop();
        }
        work(unsafe { &mut *self.queue.get() });
        self.taken.store(false, Release);
    }
}

/// Sends one byte, if one waits and the transmitter is ready; says whether more do.
pub fn pump() -> bool {
    let mut more = false;
    QUEUE.with(|queue| {
        queue.pump();
        more = queue.len > 0;
    });
    more
}

/// Sends all that waits.
pub fn flush() {
    QUEUE.with(|queue| {
        queue.credit = 0;
        while queue.len > 0 {
            let len = queue.len.min(QUEUE_BYTES - queue.first);
            send(&queue.bytes[queue.first..queue.first + len]);
            queue.first = (queue.first + len) % QUEUE_BYTES;
            queue.len -= len;
        }
    });
}

/// Lets input interrupt CPU 0.
pub fn enable_interrupt() {
    ioapic_route(IRQ, VECTOR);
    outb(MODEM_CONTROL, 0x0b); // DTR, RTS, OUT2: the last one opens the interrupt line
    outb(INTERRUPT_ENABLE, 1);
}

/// A byte of input, if there is one.
pub fn read() -> Option<u8> {
    (inb(LINE_STATUS) & 1 == 1).then(|| inb(COM1))
}
