//! `diskread`: how fast the disk reads, by the guest's clock. Nothing is checked: `disk` does that.

use crate::clock::{ticks, tsc, us};
use crate::console::println;
use crate::machine::{self, Machine};
use crate::pages::next_random;
use crate::virtio::{Disk, MAX_SLOTS, T_IN};

const SECTOR_BYTES: u64 = 512;

pub fn run(machine: &Machine) -> ! {
    let block_bytes = machine.number("bs", 4096) as usize;
    let depth = (machine.number("qd", 1) as usize).clamp(1, MAX_SLOTS);
    let sequential = machine.text("pattern") == Some("seq");
    let mut disk = Disk::start_with(machine, depth, block_bytes).unwrap_or_else(|error| {
        println!("ERROR {error}");
        machine::debug_exit(0x77)
    });
    let block_sectors = block_bytes as u64 / SECTOR_BYTES;
    // A block smaller than a sector is refused below, too.
    let blocks = disk.capacity().checked_div(block_sectors).unwrap_or(0);
    if blocks == 0 {
        println!("ERROR the disk holds no block of that size");
        machine::debug_exit(0x77);
    }
    println!("READY work=diskread bs={block_bytes} qd={depth} blocks={blocks}");
    let (mut random, mut next, mut requests) = (1u64, 0u64, 0u64);
    let started = tsc();
    let end = started + ticks(machine.number("run_ms", 1000) * 1000);
    while tsc() < end {
        let mut sectors = [0; MAX_SLOTS];
        for sector in &mut sectors[..depth] {
            random = next_random(random);
            let block = if sequential { next } else { random >> 20 };
            *sector = block % blocks * block_sectors;
            next += 1;
        }
        if let Err(status) = disk.execute(T_IN, &sectors[..depth], block_bytes) {
            println!("DISK-ERROR read sector={} status={status}", sectors[0]);
            machine::debug_exit(0x78);
        }
        requests += depth as u64;
    }
    let took = us(tsc() - started).max(1);
    let kbps = requests * block_bytes as u64 * 1000 / took;
    println!(
        "DISKREAD requests={requests} us={took} kbps={kbps} iops={}",
        requests * 1_000_000 / took
    );
    machine::debug_exit(0)
}
