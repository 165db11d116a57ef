//! The PVH start info and memory map (Xen, `docs/misc/pvh.pandoc`).

use super::initrd::Placed;
use super::layout::{CMDLINE, PVH_MEMMAP, PVH_MODLIST, PVH_START_INFO};
use super::{BootError, narrow, usable_ram};
use devices::ram::{GuestAddress, GuestRam, RamLayout};
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};

const START_MAGIC: u32 = 0x336e_c578;
const MEMMAP_RAM: u32 = 1;

/// A module in RAM, or the ramdisk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Module {
    pub placed: Placed,
    /// Address of its string; 0 if it has none.
    pub string: u64,
}

/// Writes the start info, with the memory map and the list of `modules`, of which there is room for
/// [`MAX_FILES`](super::payload::MAX_FILES).
pub(super) fn write_start_info(
    ram: &GuestRam,
    layout: &RamLayout,
    modules: &[Module],
    rsdp: u64,
) -> Result<(), BootError> {
    let memmap: Vec<_> = usable_ram(layout)
        .into_iter()
        .map(|(addr, size)| hvm_memmap_table_entry { addr, size, type_: MEMMAP_RAM, reserved: 0 })
        .collect();
    let modules: Vec<_> = modules
        .iter()
        .map(|module| hvm_modlist_entry {
            paddr: module.placed.address,
            size: module.placed.len_bytes,
            cmdline_paddr: module.string,
            ..Default::default()
        })
        .collect();
    let start_info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        rsdp_paddr: rsdp,
        nr_modules: narrow("the number of modules", modules.len())?,
        modlist_paddr: if modules.is_empty() { 0 } else { PVH_MODLIST },
        cmdline_paddr: CMDLINE,
        memmap_paddr: PVH_MEMMAP,
        memmap_entries: narrow("the number of memory ranges", memmap.len())?,
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, GuestAddress(PVH_START_INFO));
    params.set_sections(&memmap, GuestAddress(PVH_MEMMAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(PVH_MODLIST));
    }
    PvhBootConfigurator::write_bootparams(&params, ram)
        .map_err(|error| BootError::Ram(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::test_ram;
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn the_guest_is_told_of_ram_on_both_sides_of_the_bios_area() {
        let (ram, layout) = test_ram(16 << 20);
        let placed = Placed { address: 0x20_0000, len_bytes: 77 };
        let modules = [Module { placed, string: 0x3_0000 }];
        write_start_info(&ram, &layout, &modules, 0xe_0000).unwrap();
        let word = |at: u64| ram.read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!(word(PVH_START_INFO) & 0xffff_ffff, 0x336e_c578);
        assert_eq!((word(PVH_MEMMAP), word(PVH_MEMMAP + 8)), (0, 0x9_fc00));
        assert_eq!((word(PVH_MODLIST), word(PVH_MODLIST + 8)), (0x20_0000, 77));
        assert_eq!(word(PVH_MODLIST + 16), 0x3_0000);
        assert_eq!((word(PVH_START_INFO + 16), word(PVH_START_INFO + 32)), (PVH_MODLIST, 0xe_0000));
        assert_eq!((word(PVH_MEMMAP + 24), word(PVH_MEMMAP + 32)), (1 << 20, 15 << 20));
    }
}
