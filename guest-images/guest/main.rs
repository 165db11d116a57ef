//! The guest's ring 3: reads its command line and does the work named there.
#![no_std]
#![no_main]

mod apic;
mod beside;
mod clock;
mod console;
mod cpu;
mod disk;
mod diskread;
mod fpu;
mod heartbeat;
mod latency;
mod machine;
mod paced;
mod pages;
mod runtime;
mod selftest;
mod sleeper;
mod smp;
mod steps;
mod virtio;

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
    let work = machine.text("work").unwrap_or("hello");
    // Ring 0 has sent the F of FERRY.
    if work == "hello" {
        let (cpus, ram_mb) = (smp::wanted(&machine), machine.ram_mb());
        println!("ERRY hello from the guest cpus={cpus} ram_mb={ram_mb}");
    } else {
        println!("ERRY guest work={work}");
        console::flush();
        clock::start();
        clock::choose_timer(machine.text("timer"));
        clock::enable_lapic();
        fpu::start();
        if machine.page_count() == 0 {
            println!("ERROR no memory map, and no ram_mb= on the command line");
            machine::debug_exit(0x7a);
        }
        match work {
            "idle" => sleeper::idle(&machine),
            "spin" | "dirty" => paced::run(&machine),
            "disk" => disk::run(&machine),
            "diskread" => diskread::run(&machine),
            "selftest" => selftest::run(&machine),
            "fault" => machine::fault(),
            other => println!("ERROR unknown work={other}"),
        }
    }
    match machine.text("code") {
        Some("reset") => machine::reset(),
        Some(_) => machine::debug_exit(machine.number("code", 0) as u32),
        None => machine::power_off(),
    }
}

/// Ring 0 comes here after an exception.
#[unsafe(no_mangle)]
extern "C" fn guest_fault() -> ! {
    machine::report_fault()
}
