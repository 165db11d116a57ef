//! What Multiboot 1 and 2 have in common: their modules, and the place of the information that a kernel gets.

use super::initrd::{self, Placed};
use super::layout::{GDT_BYTES, HIGH_RAM_START, LOW_RAM_END, MULTIBOOT_INFO, MULTIBOOT_MAX_BYTES};
use super::payload::BootFile;
use super::segments::{Segment, find_gap};
use super::{BootError, BootSource, low_ram_end, write_bytes};
use devices::ram::{GuestRam, RamLayout};
use std::ops::Range;

/// A module and its arguments.
pub(super) struct Module<'a> {
    pub placed: Placed,
    /// Its path and arguments, as in `--initrd`.
    pub string: &'a str,
}

const PAGE_BYTES: u64 = 4096;

/// Loads the modules, each below the previous one and page-aligned: above the kernel, or if it leaves no
/// room there below it, from 1 MiB.
pub(super) fn load<'a>(
    source: &BootSource<'a>,
    kernel: &Range<u64>,
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<Vec<Module<'a>>, BootError> {
    let files = source.payload.beside_kernel();
    let needed = files.iter().fold(0, |sum: u64, module| {
        sum.saturating_add(module.file.len_bytes().next_multiple_of(PAGE_BYTES))
    });
    let above = low_ram_end(layout)?.saturating_sub(kernel.end);
    let below = kernel.start.saturating_sub(HIGH_RAM_START);
    let (floor, mut limit) = match needed > above && needed <= below {
        true => (HIGH_RAM_START, kernel.start),
        false => (kernel.end, u64::MAX),
    };
    let mut modules = Vec::new();
    for module in files {
        let placed = initrd::load(&module.file, ram, layout, floor, limit, source.go_on)?;
        limit = placed.address;
        modules.push(Module { placed, string: &module.arguments });
    }
    Ok(modules)
}

/// Where the information is, and the GDT behind it.
pub(super) struct InfoPlace {
    pub info: u64,
    pub gdt: u64,
}

/// Writes the information that `encode` makes for an address, where neither the kernel nor a module lies:
/// below 1 MiB if there is room, since kernels may take what follows them for free.
pub(super) fn write_info(
    file: &BootFile,
    segments: &[Segment],
    modules: &[Module<'_>],
    ram: &GuestRam,
    layout: &RamLayout,
    encode: impl Fn(u64) -> Result<Vec<u8>, BootError>,
) -> Result<InfoPlace, BootError> {
    let unloadable = |reason: &str| BootError::Unloadable {
        file: file.name().to_owned(),
        reason: reason.into(),
    };
    // Its length is the same at any address.
    let info_bytes = (encode(MULTIBOOT_INFO)?.len() as u64).next_multiple_of(8);
    let len_bytes = info_bytes + GDT_BYTES;
    if len_bytes > MULTIBOOT_MAX_BYTES {
        return Err(unloadable("its command line and modules are too many"));
    }
    let taken_by_module = |module: &Module<'_>| {
        module.placed.address..module.placed.address.saturating_add(module.placed.len_bytes)
    };
    let mut taken: Vec<_> = segments.iter().map(Segment::range).collect();
    taken.extend(modules.iter().map(taken_by_module));
    let rooms = [
        MULTIBOOT_INFO..LOW_RAM_END,
        PAGE_BYTES..MULTIBOOT_INFO,
        HIGH_RAM_START..low_ram_end(layout)?,
    ];
    let info = rooms
        .into_iter()
        .find_map(|room| find_gap(room, len_bytes, &taken))
        .ok_or_else(|| unloadable("there is no room beside it for the Multiboot information"))?;
    write_bytes(ram, info, &encode(info)?)?;
    Ok(InfoPlace { info, gdt: info + info_bytes })
}
