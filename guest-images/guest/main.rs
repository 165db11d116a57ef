//! The guest's ring 3: reads its command line and does the work named there.
#![no_std]
#![no_main]

mod clock;
mod console;
mod disk;
mod fpu;
mod machine;
mod pages;
mod paced;
mod runtime;
mod smp;

core::arch::global_asm!(include_str!("ring0.s"), options(raw));

use console::println;
use machine::Machine;

/// Every CPU enters here, on its own stack. CPU 0 brings `hvm_start_info`.
#[unsafe(no_mangle)]
extern "C" fn guest_main(cpu: usize, start_info: u32) -> ! {
    if cpu > 0 {
        smp::application_processor(cpu);
    }
    let machine = Machine::from_start_info(start_info as usize);
    clock::calibrate();
    match machine.text("work").unwrap_or("hello") {
        "hello" => {
            let megabytes = machine.ram_bytes() >> 20;
            println!("ERRY hello from the guest: cpus={} ram_mb={}", machine.number("cpus", 1), megabytes);
        }
        "idle" => paced::idle(&machine),
        "spin" | "dirty" => paced::dirty(&machine),
        "disk" => disk::run(&machine),
        "selftest" => pages::self_test(&machine),
        other => println!("ERROR unknown work={other}"),
    }
    match machine.text("code") {
        Some(_) => machine::debug_exit(machine.number("code", 0) as u32),
        None => machine::power_off(),
    }
}

/// Ring 0 comes here after an exception.
#[unsafe(no_mangle)]
extern "C" fn guest_fault() -> ! {
    machine::report_fault()
}
