//! Ways to end, faults, the command line and the memory map.

use crate::clock::{ticks, tsc};
use crate::console::{self, line, println};
use crate::cpu::{SERVICE_TRIPLE_FAULT, outb, outl, sleep_until_interrupt};
use core::arch::asm;
use core::cell::UnsafeCell;

/// How long a reset may take before we try the next way.
const RESET_US: u64 = 500_000;

pub fn debug_exit(code: u32) -> ! {
    console::flush();
    exit_now(code)
}

/// Leaves without the console's queue.
pub fn exit_now(code: u32) -> ! {
    outl(0xf4, code);
    stop()
}

/// Pulses the CPU's reset line through the keyboard controller.
pub fn reset() -> ! {
    console::flush();
    outb(0x64, 0xfe);
    stop()
}

pub fn power_off() -> ! {
    console::flush();
    unsafe { asm!("out dx, ax", in("dx") 0x604u16, in("ax") 0x2000u16) };
    outb(0x64, 0xfe);
    let deadline = tsc() + ticks(RESET_US);
    while tsc() < deadline {
        core::hint::spin_loop();
    }
    unsafe { asm!("int3", in("rdi") SERVICE_TRIPLE_FAULT, options(noreturn)) }
}

/// Sleeps for ever.
pub fn stop() -> ! {
    loop {
        sleep_until_interrupt();
    }
}

unsafe extern "C" {
    static fault_vector: u64;
    static fault_address: u64;
    static fault_words: [u64; 2];
    static interrupt_counts: [u64; 64];
    static image_end: u8;
}

/// Interrupts that came on `vector` so far.
pub fn interrupts_on(vector: u32) -> u64 {
    unsafe { (&raw const interrupt_counts).cast::<u64>().add(vector as usize).read_volatile() }
}

/// Reads where no memory is mapped.
pub fn fault() {
    unsafe { ((MAPPED_BYTES + 8) as *const u64).read_volatile() };
}

pub fn report_fault() -> ! {
    let (vector, address, words) = unsafe { (fault_vector, fault_address, fault_words) };
    let pushes_error = matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30);
    let (error, rip) = if pushes_error { (words[0], words[1]) } else { (0, words[0]) };
    line!("FAULT vector={vector} error={error:#x} rip={rip:#x} cr2={address:#x}").send_now();
    exit_now(0x7f)
}

#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    cmdline: u64,
    rsdp: u64,
    memmap: u64,
    memmap_entries: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MapEntry {
    start: u64,
    len: u64,
    kind: u32,
    reserved: u32,
}

const KIND_RAM: u32 = 1;
/// Most pieces of RAM above the image.
const MAX_REGIONS: usize = 4;
/// What ring 0 has mapped.
const MAPPED_BYTES: usize = 16 << 30;
const MAX_CMDLINE: usize = 4096;

struct CommandLine(UnsafeCell<[u8; MAX_CMDLINE]>);
// SAFETY: written once, by CPU 0 before any other runs.
unsafe impl Sync for CommandLine {}
/// Our copy: the original may lie where we put something else.
static CMDLINE: CommandLine = CommandLine(UnsafeCell::new([0; MAX_CMDLINE]));

#[derive(Clone)]
pub struct Machine {
    cmdline: &'static str,
    /// Start and end of free RAM, page-aligned.
    regions: [(usize, usize); MAX_REGIONS],
    ram_bytes: u64,
    page_count: usize,
}

impl Machine {
    pub fn from_start_info(address: usize) -> Self {
        let info = unsafe { &*(address as *const StartInfo) };
        let cmdline = copy_cmdline(info.cmdline as *const u8);
        let mut machine =
            Self { cmdline, regions: [(0, 0); MAX_REGIONS], ram_bytes: 0, page_count: 0 };
        let has_map = info.version > 0 && info.memmap != 0;
        let entries = if has_map { info.memmap_entries as usize } else { 0 };
        if entries == 0 {
            machine.add(0, machine.number("ram_mb", 0) << 20);
        } else {
            let map = info.memmap as *const MapEntry;
            for at in 0..entries {
                let entry = unsafe { map.add(at).read_unaligned() };
                if entry.kind == KIND_RAM {
                    machine.add(entry.start, entry.len);
                }
            }
        }
        let pages = machine.regions.iter().map(|(start, end)| (end - start) / 4096).sum();
        machine.page_count = match machine.text("ram") {
            Some(text) if text != "all" => (machine.number("ram", 0) as usize * 256).min(pages),
            _ => pages,
        };
        machine
    }

    fn add(&mut self, start: u64, len: u64) {
        self.ram_bytes += len;
        let floor = (&raw const image_end as usize).next_multiple_of(2 << 20);
        let from = (start as usize).next_multiple_of(4096).max(floor);
        let to = (start.saturating_add(len) as usize & !4095).min(MAPPED_BYTES);
        if from < to
            && let Some(free) = self.regions.iter_mut().find(|region| region.1 == 0)
        {
            *free = (from, to);
        }
    }

    pub fn words(&self) -> impl Iterator<Item = &'static str> {
        self.cmdline.split(' ')
    }

    pub fn text(&self, key: &str) -> Option<&'static str> {
        self.words().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    pub fn number(&self, key: &str, default: u64) -> u64 {
        self.text(key).and_then(|text| text.parse().ok()).unwrap_or(default)
    }

    pub fn ram_mb(&self) -> u64 {
        (self.ram_bytes + (1 << 19)) >> 20
    }

    /// Free pages.
    pub fn page_count(&self) -> usize {
        self.page_count
    }

    /// Address of free page `index`.
    pub fn page(&self, mut index: usize) -> *mut u64 {
        for (start, end) in self.regions {
            let count = (end - start) / 4096;
            if index < count {
                return (start + index * 4096) as *mut u64;
            }
            index -= count;
        }
        println!("ERROR no page {index}");
        debug_exit(0x7c)
    }
}

fn copy_cmdline(from: *const u8) -> &'static str {
    if from.is_null() {
        return "";
    }
    let copy = unsafe { &mut *CMDLINE.0.get() };
    let mut len = 0;
    while len < copy.len() {
        let byte = unsafe { from.add(len).read_volatile() };
        if byte == 0 {
            break;
        }
        copy[len] = byte;
        len += 1;
    }
    core::str::from_utf8(&copy[..len]).unwrap_or("")
}
