//! `idle`, and what `dirty` does with `sleep=1`: every CPU sleeps on its own timer, vector registers
//! loaded, and wakes once per heartbeat. The gap is how late it woke.

use crate::clock::{self, ticks, tsc};
use crate::console::{self, println};
use crate::fpu;
use crate::heartbeat::{Heartbeat, PER_CPU, answer, corrupt, note_gap};
use crate::machine::{self, Machine};
use crate::smp;
use core::sync::atomic::{AtomicU64, Ordering::*};

/// Milliseconds between wake-ups, once CPU 0 has set it.
static INTERVAL_MS: AtomicU64 = AtomicU64::new(0);

/// Sleeps without any other work.
pub fn idle(machine: &Machine) -> ! {
    let cpus = smp::wanted(machine);
    INTERVAL_MS.store(machine.number("hb_ms", 100), Relaxed);
    smp::start(cpus, other_cpu);
    println!("READY work=idle cpus={cpus} ram_mb={} pages=0 fill_us=0", machine.ram_mb());
    first_cpu(machine.number("hb_ms", 100), &mut || {
        println!("CHECK pages=0 corrupt={} gen=0 untouched=0", corrupt());
    })
}

/// Heartbeats, and input as it comes.
pub fn first_cpu(interval_ms: u64, check: &mut dyn FnMut()) -> ! {
    console::enable_interrupt();
    console::flush();
    let mut heartbeat = Heartbeat::new(interval_ms, 0);
    let mut inputs = 0;
    loop {
        let due = heartbeat.due();
        while tsc() < due {
            fpu::sleep(0, due);
            let now = machine::interrupts_on(console::VECTOR);
            if now != inputs {
                inputs = now;
                answer(check);
                console::flush();
            }
        }
        let now = tsc();
        note_gap(0, now - due, now);
        PER_CPU[0].progress.fetch_add(1, Relaxed);
        heartbeat.beat(0, 0, format_args!(""));
        // Input that came without an interrupt would wait for ever.
        answer(check);
        console::flush();
    }
}

/// Wakes once per heartbeat.
pub fn other_cpu(cpu: usize) -> ! {
    clock::enable_lapic();
    let interval = ticks(INTERVAL_MS.load(Relaxed).max(1) * 1000);
    let mut due = tsc() + interval;
    loop {
        while tsc() < due {
            fpu::sleep(cpu, due);
        }
        let now = tsc();
        note_gap(cpu, now - due, now);
        PER_CPU[cpu].progress.fetch_add(1, Relaxed);
        due = (due + interval).max(now + interval / 2);
    }
}

/// Lets [`other_cpu`] know how long to sleep.
pub fn set_interval(interval_ms: u64) {
    INTERVAL_MS.store(interval_ms, Relaxed);
}
