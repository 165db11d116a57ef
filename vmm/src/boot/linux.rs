//! Linux' zero page for the 64-bit entry (Linux, `Documentation/arch/x86/boot.rst`).

use super::initrd::Placed;
use super::layout::{CMDLINE, CMDLINE_MAX_BYTES, ZERO_PAGE};
use super::{BootError, narrow, usable_ram};
use devices::ram::{GuestAddress, GuestRam, RamLayout};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;

/// Longest command line, without its NUL.
const CMDLINE_SIZE: u32 = 2047;
const _: () = assert!(CMDLINE_SIZE as usize == CMDLINE_MAX_BYTES - 1);

/// A setup header for a vmlinux, which has none.
pub(super) fn header_of_vmlinux() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        cmdline_size: CMDLINE_SIZE,
        kernel_alignment: 0x0100_0000,
        ..Default::default()
    }
}

/// Writes the zero page of a kernel with this `header`, whose `cmdline_size` stays: kernels such as memtest86+ read so
/// many bytes, and need the NUL behind a shorter line.
pub(super) fn write_zero_page(
    ram: &GuestRam,
    layout: &RamLayout,
    header: setup_header,
    initrd: Option<Placed>,
    rsdp: u64,
) -> Result<(), BootError> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = narrow("the command line's address", CMDLINE)?;
    if let Some(initrd) = initrd {
        // In the first block of RAM, so below 4 GiB.
        params.hdr.ramdisk_image = narrow("the initrd's address", initrd.address)?;
        params.hdr.ramdisk_size = narrow("the initrd's length", initrd.len_bytes)?;
    }
    let ranges = usable_ram(layout);
    params.e820_entries = narrow("the number of memory ranges", ranges.len())?;
    for (entry, (addr, size)) in params.e820_table.iter_mut().zip(ranges) {
        *entry = boot_e820_entry { addr, size, r#type: E820_RAM };
    }
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(ZERO_PAGE)), ram)
        .map_err(|error| BootError::Ram(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::test_ram;
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn the_zero_page_names_command_line_and_memory() {
        let (ram, layout) = test_ram(8 << 20);
        let initrd = Some(Placed { address: 0x30_0000, len_bytes: 99 });
        let header = header_of_vmlinux();
        write_zero_page(&ram, &layout, header, initrd, 0xe_0000).unwrap();
        let byte = |at: u64| ram.read_obj::<u8>(GuestAddress(ZERO_PAGE + at)).unwrap();
        assert_eq!(byte(0x1e8), 2, "two e820 entries");
        let word = |at: u64| ram.read_obj::<u32>(GuestAddress(ZERO_PAGE + at)).unwrap();
        assert_eq!((word(0x202), word(0x228)), (HEADER_MAGIC, 0x2_0000));
        assert_eq!((word(0x218), word(0x21c)), (0x30_0000, 99), "ramdisk");
        assert_eq!(word(0x238), 2047, "longest command line");
        assert_eq!(word(0x70), 0xe_0000, "ACPI root pointer");
    }
}
