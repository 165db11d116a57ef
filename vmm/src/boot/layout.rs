//! The guest-physical memory map: addresses of boot structures and devices. A pure function of the machine
//! description, so that both sides of a migration agree on it.

/// Global descriptor table of the first vCPU.
pub const GDT: u64 = 0x500;
/// Its size.
pub const GDT_BYTES: u64 = 5 * 8;
/// `hvm_start_info` (PVH).
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux' zero page (`boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// PVH module list.
pub const PVH_MODLIST: u64 = 0x6800;
/// Strings of PVH modules, where Multiboot's information is with other kernels.
pub const PVH_STRINGS: u64 = MULTIBOOT_INFO;
/// PVH memory map.
pub const PVH_MEMMAP: u64 = 0x8000;
/// First of the page tables that a 64-bit entry needs: PML4, PDPT and four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The stack that a 64-bit entry starts with.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// End of the page tables.
pub const PAGE_TABLES_END: u64 = PAGE_TABLES + 6 * 0x1000;
/// Longest command line with its NUL: the limit of x86 Linux.
pub const CMDLINE_MAX_BYTES: usize = 2048;
/// Where Multiboot's information goes, with memory map, module list, strings and GDT, unless the kernel lies
/// there.
pub const MULTIBOOT_INFO: u64 = 0x3_0000;
/// The most that it may take.
pub const MULTIBOOT_MAX_BYTES: u64 = 64 << 10;
/// The ACPI root pointer; the other tables follow it. This is the BIOS area, which no kernel uses as free
/// RAM.
pub const ACPI_RSDP: u64 = 0xe_0000;
/// End of what ACPI tables may use.
pub const ACPI_END: u64 = RESET_VECTOR;
/// The real-mode reset vector.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// End of conventional memory in the guest's memory map; a BIOS would use what lies above.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Lowest load address of a kernel.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// First virtio-mmio device; the others follow at [`devices::virtio::mmio::MMIO_LEN`] each.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Interrupt lines of the virtio devices: IOAPIC pins without a legacy device.
pub const VIRTIO_GSIS: [u32; 8] = [16, 17, 18, 19, 20, 21, 22, 23];

/// Interrupt line of the power button.
pub const POWER_BUTTON_GSI: u32 = 9;

/// Address and interrupt of a virtio-mmio device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioSlot {
    /// First register.
    pub base: u64,
    /// Interrupt line.
    pub gsi: u32,
}

/// The slot of virtio device `index`; `None` past the last.
pub fn virtio_slot(index: usize) -> Option<MmioSlot> {
    let gsi = *VIRTIO_GSIS.get(index)?;
    Some(MmioSlot { base: VIRTIO_MMIO_BASE + index as u64 * devices::virtio::mmio::MMIO_LEN, gsi })
}

/// A device's I/O ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// What has them, in words.
    pub of: &'static str,
    /// The first.
    pub base: u16,
    /// How many.
    pub len: u16,
}

const fn ports(of: &'static str, base: u16, len: u16) -> Ports {
    Ports { of, base, len }
}

/// The ports that every machine has beside the debug-exit device's, those in KVM first.
pub const PORTS: [Ports; 12] = [
    ports("first interrupt controller", 0x20, 2),
    ports("timer", 0x40, 4),
    ports("keyboard controller", I8042_PORT, 5),
    ports("fast reset", FAST_RESET_PORT, 1),
    ports("second interrupt controller", 0xa0, 2),
    ports("debug console", DEBUG_CONSOLE_PORT, 1),
    ports("serial port", COM1_PORT, 8),
    ports("interrupt controllers' mode registers", 0x4d0, 2),
    ports("pvpanic device", PVPANIC_PORT, 1),
    ports("fw_cfg device", FW_CFG_PORT, 12),
    ports("power management", POWER_PORT, 2),
    ports("power management", SLEEP_CONTROL_PORT, 2),
];
/// Those of a pc-testdev: a 32-bit register and its page flush, and the interrupt lines.
pub const PORTS_OF_TESTDEV: [Ports; 2] =
    [ports("test device", TESTDEV_PORT, 8), ports("test device", TESTDEV_IRQ_PORT, 24)];

/// COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// COM1's interrupt line.
pub const COM1_GSI: u32 = 4;
/// Keyboard controller, for its reset line.
pub const I8042_PORT: u16 = 0x60;
/// The keyboard controller's command register.
pub const I8042_COMMAND_PORT: u64 = 0x64;
/// System control port A: fast reset and the A20 gate.
pub const FAST_RESET_PORT: u16 = 0x92;
/// Bochs' debug console.
pub const DEBUG_CONSOLE_PORT: u16 = 0xe9;
/// isa-debug-exit, as QEMU users configure it.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;
/// Ports of isa-debug-exit there.
pub const DEBUG_EXIT_PORTS: u16 = 4;
/// The guest says that it has panicked.
pub const PVPANIC_PORT: u16 = 0x505;
/// Selector, data and DMA address of fw_cfg.
pub const FW_CFG_PORT: u16 = 0x510;
/// PM1a control register.
pub const POWER_PORT: u16 = 0x604;
/// Sleep control register; the sleep status register follows it.
pub const SLEEP_CONTROL_PORT: u16 = 0x608;
/// Sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x609;
/// The test device's register.
pub const TESTDEV_PORT: u16 = 0xe0;
/// The test device's interrupt lines.
pub const TESTDEV_IRQ_PORT: u16 = 0x2000;
/// The test device's memory, in the hole below 4 GiB.
pub const TESTDEV_MEMORY: u64 = 0xff00_0000;
