//! The PVH start info and memory map (Xen, `docs/misc/pvh.pandoc`).

use super::layout::{CMDLINE, PVH_MEMMAP, PVH_START_INFO};
use super::{BootError, usable_ram};
use devices::ram::{GuestAddress, GuestRam, RamLayout};
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info};

const START_MAGIC: u32 = 0x336e_c578;
const MEMMAP_RAM: u32 = 1;

pub(super) fn write_start_info(ram: &GuestRam, layout: &RamLayout) -> Result<(), BootError> {
    let memmap: Vec<_> = usable_ram(layout)
        .into_iter()
        .map(|(addr, size)| hvm_memmap_table_entry { addr, size, type_: MEMMAP_RAM, reserved: 0 })
        .collect();
    let start_info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: CMDLINE,
        memmap_paddr: PVH_MEMMAP,
        memmap_entries: u32::try_from(memmap.len()).unwrap_or(0),
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, GuestAddress(PVH_START_INFO));
    params.set_sections(&memmap, GuestAddress(PVH_MEMMAP));
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
        write_start_info(&ram, &layout).unwrap();
        let word = |at: u64| ram.read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!(word(PVH_START_INFO) & 0xffff_ffff, 0x336e_c578);
        assert_eq!((word(PVH_MEMMAP), word(PVH_MEMMAP + 8)), (0, 0x9_fc00));
        assert_eq!((word(PVH_MEMMAP + 24), word(PVH_MEMMAP + 32)), (1 << 20, 15 << 20));
    }
}
