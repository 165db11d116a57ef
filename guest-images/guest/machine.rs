//! Ports, system calls to ring 0, the command line and the memory map.

use crate::console::println;
use core::arch::asm;

pub fn outb(port: u16, value: u8) {
    unsafe { asm!("out dx, al", in("dx") port, in("al") value) };
}

pub fn outl(port: u16, value: u32) {
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value) };
}

pub fn inb(port: u16) -> u8 {
    let value;
    unsafe { asm!("in al, dx", in("dx") port, out("al") value) };
    value
}

/// Sleeps until an interrupt; one that is pending already counts.
pub fn sleep_until_interrupt() {
    unsafe { asm!("int3") };
}

pub fn debug_exit(code: u32) -> ! {
    outl(0xf4, code);
    stop()
}

pub fn power_off() -> ! {
    unsafe { asm!("out dx, ax", in("dx") 0x604u16, in("ax") 0x2000u16) };
    outb(0x64, 0xfe);
    stop()
}

fn stop() -> ! {
    loop {
        sleep_until_interrupt();
    }
}

unsafe extern "C" {
    static fault_vector: u64;
    static fault_address: u64;
    static fault_words: [u64; 2];
    static image_end: u8;
}

pub fn report_fault() -> ! {
    let (vector, address, words) = unsafe { (fault_vector, fault_address, fault_words) };
    println!("FAULT vector={vector} cr2={address:#x} words={:#x},{:#x}", words[0], words[1]);
    debug_exit(0x7f)
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

/// Most pieces of RAM above the image.
const MAX_REGIONS: usize = 4;

#[derive(Clone)]
pub struct Machine {
    cmdline: &'static str,
    /// Start and end of free RAM, page-aligned.
    regions: [(usize, usize); MAX_REGIONS],
    ram_bytes: u64,
}

impl Machine {
    pub fn from_start_info(address: usize) -> Self {
        let info = unsafe { &*(address as *const StartInfo) };
        let start = info.cmdline as *const u8;
        let len = (0..4096).take_while(|at| unsafe { *start.add(*at) } != 0).count();
        let bytes = unsafe { core::slice::from_raw_parts(start, len) };
        let mut machine = Self {
            cmdline: core::str::from_utf8(bytes).unwrap_or(""),
            regions: [(0, 0); MAX_REGIONS],
            ram_bytes: 0,
        };
        let image = &raw const image_end as usize;
        // The image, and boot data that a VMM may have put behind it, stay out of the way.
        let floor = (image + (4 << 20)).next_multiple_of(2 << 20);
        let entries = if info.version > 0 { info.memmap_entries as usize } else { 0 };
        let map = unsafe { core::slice::from_raw_parts(info.memmap as *const MapEntry, entries) };
        let mut found = 0;
        for entry in map.iter().filter(|entry| entry.kind == 1) {
            machine.ram_bytes += entry.len;
            let start = (entry.start as usize).next_multiple_of(4096).max(floor);
            let end = ((entry.start + entry.len) as usize & !4095).min(16 << 30);
            if start < end && found < MAX_REGIONS {
                machine.regions[found] = (start, end);
                found += 1;
            }
        }
        machine
    }

    pub fn text(&self, key: &str) -> Option<&'static str> {
        let value = |word: &'static str| word.strip_prefix(key)?.strip_prefix('=');
        self.cmdline.split(' ').find_map(value)
    }

    pub fn number(&self, key: &str, default: u64) -> u64 {
        self.text(key).and_then(|text| text.parse().ok()).unwrap_or(default)
    }

    pub fn words(&self) -> impl Iterator<Item = &'static str> {
        self.cmdline.split(' ')
    }

    pub fn ram_bytes(&self) -> u64 {
        self.ram_bytes
    }

    /// Free pages.
    pub fn page_count(&self) -> usize {
        self.regions.iter().map(|(start, end)| (end - start) / 4096).sum()
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
