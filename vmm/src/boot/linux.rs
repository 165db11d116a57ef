//! Linux' zero page for the 64-bit entry (Linux, `Documentation/arch/x86/boot.rst`).

use super::layout::{CMDLINE, ZERO_PAGE};
use super::{BootError, usable_ram};
use devices::ram::{GuestAddress, GuestRam, RamLayout};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;

pub(super) fn write_zero_page(
    ram: &GuestRam,
    layout: &RamLayout,
    cmdline: &str,
) -> Result<(), BootError> {
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.kernel_alignment = 0x0100_0000;
    params.hdr.cmd_line_ptr = u32::try_from(CMDLINE).unwrap_or(0);
    params.hdr.cmdline_size = u32::try_from(cmdline.len()).unwrap_or(0);
    let ranges = usable_ram(layout);
    params.e820_entries = u8::try_from(ranges.len()).unwrap_or(0);
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
        write_zero_page(&ram, &layout, "quiet").unwrap();
        let byte = |at: u64| ram.read_obj::<u8>(GuestAddress(ZERO_PAGE + at)).unwrap();
        assert_eq!(byte(0x1e8), 2, "two e820 entries");
        assert_eq!(ram.read_obj::<u32>(GuestAddress(ZERO_PAGE + 0x228)).unwrap(), 0x2_0000);
        assert_eq!(ram.read_obj::<u32>(GuestAddress(ZERO_PAGE + 0x202)).unwrap(), HEADER_MAGIC);
    }
}
