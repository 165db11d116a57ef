//! Boots a kernel file: [`load`] detects its format and loads it, its ramdisk and its command line into
//! RAM; the module of the boot protocol adds the structures that the kernel expects; [`cpu`] turns the
//! entry point into initial registers. Called by `machine::build`.
//!
//! ```text
//! bzimage     -> linux (zero page)       64-bit entry      distributions' kernels
//!             -> linux (zero page)       32-bit entry      if that is all they have
//! multiboot   -> multiboot info          32-bit entry      test kernels
//! multiboot2  -> multiboot 2 info        32-bit entry      kernels for GRUB
//! elf         -> pvh (start info)        32-bit entry      a note says so
//!             -> linux (zero page)       64-bit entry      vmlinux
//! ```

mod acpi;
mod bzimage;
pub mod cpu;
mod elf;
mod initrd;
pub mod items;
pub mod layout;
mod linux;
mod modules;
mod multiboot;
mod multiboot2;
pub mod payload;
mod pvh;
mod segments;
pub mod transfer;

pub use acpi::Hardware;

use devices::ram::{GuestAddress, GuestRam, RamLayout};
use devices::reset::I8042;
use initrd::Placed;
use layout::{
    ACPI_RSDP, CMDLINE, CMDLINE_MAX_BYTES, GDT, GDT_BYTES, HIGH_RAM_START, LOW_RAM_END, MmioSlot,
    PAGE_TABLES, PAGE_TABLES_END, PVH_MEMMAP, PVH_START_INFO, PVH_STRINGS, RESET_VECTOR, ZERO_PAGE,
};
use payload::{BootFile, BootPayload, MAX_ARGUMENTS_BYTES, PayloadError, Role};
use segments::{Reserved, Room};
use std::path::Path;
use vm_memory::Bytes;

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error(transparent)]
    Payload(#[from] PayloadError),
    #[error(
        "{file} is not a kernel Ferry can boot: expected a bzImage, an x86 ELF (PVH or vmlinux) \
         or a Multiboot 1 or 2 kernel"
    )]
    NotAKernel { file: String },
    #[error("{file} is truncated: {what} reaches past the end of the file")]
    Truncated { file: String, what: String },
    /// A segment lies outside RAM.
    #[error(
        "{file} does not fit: it needs guest memory {start:#x} to {end:#x}, \
         raise --memory ({ram_bytes} bytes now)"
    )]
    DoesNotFit { file: String, start: u64, end: u64, ram_bytes: u64 },
    /// The ramdisk does not fit beside the kernel.
    #[error(
        "{file} does not fit: it has {len_bytes} bytes, beside the kernel there is room for \
         {room_bytes}; raise --memory ({ram_bytes} bytes now)"
    )]
    InitrdDoesNotFit { file: String, len_bytes: u64, room_bytes: u64, ram_bytes: u64 },
    /// The segments overlap the boot structures below 1 MiB, or there is no entry point.
    #[error("{file} cannot be loaded: {reason}")]
    Unloadable { file: String, reason: String },
    /// The command line is too long or holds a NUL.
    #[error("--cmdline {reason}")]
    Cmdline { reason: String },
    /// Writing boot structures into RAM failed.
    #[error("cannot write boot data into guest memory: {0}")]
    Ram(String),
}

/// How the first vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryPoint {
    /// 32-bit protected mode, `ebx` at the start info.
    Pvh {
        /// Entry address.
        address: u64,
    },
    /// 32-bit protected mode, `eax` the magic number, `ebx` at the Multiboot information.
    Multiboot {
        /// Entry address.
        address: u64,
        /// Multiboot 1's or 2's.
        magic: u32,
        /// The information.
        info: u64,
        /// Where the GDT goes.
        gdt: u64,
    },
    /// 32-bit protected mode, `esi` at the zero page.
    Linux32 {
        /// Entry address.
        address: u64,
    },
    /// 64-bit mode with identity-mapped low memory, `rsi` at the zero page.
    Linux64 {
        /// Entry address.
        address: u64,
    },
}

/// The boot parameters of a machine.
#[derive(Clone, Copy)]
pub struct BootSource<'a> {
    /// The kernel with its initrd or modules.
    pub payload: &'a BootPayload,
    /// Command line, without what Ferry adds.
    pub cmdline: &'a str,
    /// Polled between pieces of a file; `false` cancels loading.
    pub go_on: &'a dyn Fn() -> bool,
}

/// Kernel file formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    BzImage,
    Multiboot(multiboot::Header),
    Multiboot2(multiboot2::Header),
    Elf,
}

impl Format {
    /// Detects the format from `head`, the start of a file; `None` if it is not bootable.
    fn of(head: &[u8]) -> Option<Self> {
        if bzimage::is_bzimage(head) {
            return Some(Self::BzImage);
        }
        // A kernel with both headers is entered as QEMU enters it.
        let multiboot = multiboot::find_header(head).map(Self::Multiboot);
        let multiboot2 = || multiboot2::find_header(head).map(Self::Multiboot2);
        multiboot.or_else(multiboot2).or_else(|| elf::is_elf(head).then_some(Self::Elf))
    }

    /// Whether `initrd` is a list of modules for `kernel`: for a Multiboot kernel always, for a PVH kernel if no file has
    /// this path.
    fn takes_modules(kernel: &BootFile, initrd: &Path) -> Result<bool, PayloadError> {
        Ok(match Self::of(&kernel.head(HEAD_BYTES)?) {
            Some(Self::Multiboot(_) | Self::Multiboot2(_)) => true,
            Some(Self::Elf) if !initrd.exists() => {
                elf::read(kernel).is_ok_and(|headers| headers.pvh_entry.is_some())
            }
            Some(Self::Elf | Self::BzImage) | None => false,
        })
    }
}

/// Code at the reset vector: a keyboard controller reset, in real mode. With hardware-reduced ACPI but no
/// EFI, Linux reboots by jumping there.
///
/// ```text
/// mov al, 0xfe; out 0x64, al; l: hlt; jmp l
/// ```
const RESET_CODE: [u8; 7] = [0xb0, I8042::COMMAND_RESET_CPU, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// Loads the kernel, its ramdisk, its command line and the tables that describe `hardware` into RAM. The
/// files must not have changed since they were opened.
pub fn load(
    source: &BootSource<'_>,
    hardware: &Hardware,
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<EntryPoint, BootError> {
    source.payload.check_unchanged()?;
    let entry = load_files(source, hardware, ram, layout);
    // A file written meanwhile may be half old and half new in RAM. If it was truncated, that is a better
    // error than the loader's.
    source.payload.check_unchanged()?;
    entry
}

fn load_files(
    source: &BootSource<'_>,
    hardware: &Hardware,
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<EntryPoint, BootError> {
    let file = &*source.payload.kernel()?.file;
    let format = Format::of(&file.head(HEAD_BYTES)?)
        .ok_or_else(|| BootError::NotAKernel { file: file.name().to_owned() })?;
    write_bytes(ram, RESET_VECTOR, &RESET_CODE)?;
    let rsdp = if hardware.acpi { acpi::write_tables(hardware, ram)? } else { 0 };
    // Distributions' kernels support ACPI.
    let with_devices = format != Format::BzImage || !hardware.acpi;
    let cmdline = source.cmdline_for(hardware, with_devices);
    match format {
        Format::BzImage => {
            let kernel = bzimage::load(file, &cmdline, ram, layout, source.go_on)?;
            write_cmdline(&cmdline, ram)?;
            let limit = u64::from(kernel.header.initrd_addr_max).saturating_add(1);
            let initrd = source.load_initrd(ram, layout, kernel.end, limit)?;
            linux::write_zero_page(ram, layout, kernel.header, initrd, rsdp)?;
            if kernel.is_32_bit {
                return Ok(EntryPoint::Linux32 { address: kernel.entry });
            }
            cpu::write_page_tables(ram)?;
            Ok(EntryPoint::Linux64 { address: kernel.entry })
        }
        Format::Multiboot(header) => multiboot::load(source, &header, &cmdline, rsdp, ram, layout),
        Format::Multiboot2(header) => {
            multiboot2::load(source, &header, &cmdline, rsdp, ram, layout)
        }
        Format::Elf => load_elf(source, &cmdline, rsdp, ram, layout),
    }
}

/// Loads an ELF kernel without a Multiboot header.
fn load_elf(
    source: &BootSource<'_>,
    cmdline: &str,
    rsdp: u64,
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<EntryPoint, BootError> {
    let file = &*source.payload.kernel()?.file;
    let kernel = elf::read(file)?;
    let reserved = |what, range| Reserved { what, range };
    let mut needed = vec![
        reserved("the GDT", GDT..GDT + GDT_BYTES),
        reserved("the command line", CMDLINE..CMDLINE + CMDLINE_MAX_BYTES as u64),
        bios_area(rsdp),
    ];
    needed.extend(match kernel.pvh_entry {
        Some(_) => vec![
            reserved("the PVH start info", PVH_START_INFO..ZERO_PAGE),
            reserved("the PVH memory map", PVH_MEMMAP..PAGE_TABLES),
            reserved("the modules' strings", PVH_STRINGS..PVH_STRINGS + MAX_ARGUMENTS_BYTES),
        ],
        None => vec![
            reserved("the zero page", ZERO_PAGE..PVH_MEMMAP),
            reserved("the stack", PVH_MEMMAP..PAGE_TABLES),
            reserved("the page tables", PAGE_TABLES..PAGE_TABLES_END),
        ],
    });
    if kernel.pvh_entry.is_none() && !kernel.is_64_bit {
        let reason = "a 32-bit ELF kernel with neither a PVH note nor a Multiboot header does not say how \
                      it is entered";
        return Err(BootError::Unloadable { file: file.name().to_owned(), reason: reason.into() });
    }
    let end = segments::check(file, &kernel.segments, layout, Room::AllRam, &needed)?;
    segments::load(file, &kernel.segments, ram, source.go_on)?;
    write_cmdline(cmdline, ram)?;
    let bits = if kernel.is_64_bit { 64 } else { 32 };
    if let Some(address) = kernel.pvh_entry {
        log::info!("{}: PVH ELF kernel ({bits}-bit), entry {address:#x}", file.name());
        let modules = load_pvh_modules(source, end, ram, layout)?;
        pvh::write_start_info(ram, layout, &modules, rsdp)?;
        return Ok(EntryPoint::Pvh { address });
    }
    let initrd = source.load_initrd(ram, layout, end, u64::MAX)?;
    log::info!("{}: {bits}-bit ELF kernel, entry {:#x}", file.name(), kernel.entry);
    let header = linux::header_of_vmlinux();
    linux::write_zero_page(ram, layout, header, initrd, rsdp)?;
    cpu::write_page_tables(ram)?;
    Ok(EntryPoint::Linux64 { address: kernel.entry })
}

/// Loads what is beside a PVH kernel: its ramdisk, or modules with their strings.
fn load_pvh_modules(
    source: &BootSource<'_>,
    kernel_end: u64,
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<Vec<pvh::Module>, BootError> {
    if source.payload.beside_kernel().iter().all(|file| file.role == Role::Initrd) {
        let initrd = source.load_initrd(ram, layout, kernel_end, u64::MAX)?;
        return Ok(initrd.into_iter().map(|placed| pvh::Module { placed, string: 0 }).collect());
    }
    let mut string = PVH_STRINGS;
    let mut place = |module: modules::Module<'_>| {
        let mut text = module.string.as_bytes().to_vec();
        text.push(0);
        write_bytes(ram, string, &text)?;
        let placed = pvh::Module { placed: module.placed, string };
        string += text.len() as u64;
        Ok(placed)
    };
    let kernel = HIGH_RAM_START..kernel_end;
    modules::load(source, &kernel, ram, layout)?.into_iter().map(&mut place).collect()
}

/// What lies in the BIOS area: the ACPI tables, if there are any, and the reset vector's code.
fn bios_area(rsdp: u64) -> Reserved {
    match rsdp {
        0 => Reserved { what: "the reset vector", range: RESET_VECTOR..HIGH_RAM_START },
        _ => Reserved {
            what: "the ACPI tables and the reset vector",
            range: ACPI_RSDP..HIGH_RAM_START,
        },
    }
}

impl BootSource<'_> {
    /// The command line, with `virtio_mmio.device=SIZE@BASE:IRQ` for kernels that find devices there.
    fn cmdline_for(&self, hardware: &Hardware, with_devices: bool) -> String {
        let mut words = vec![self.cmdline.to_owned()];
        words.retain(|word| !word.is_empty());
        if with_devices {
            let word =
                |slot: &MmioSlot| format!("virtio_mmio.device=4K@{:#x}:{}", slot.base, slot.gsi);
            words.extend(hardware.virtio.iter().map(word));
        }
        words.join(" ")
    }

    fn load_initrd(
        &self,
        ram: &GuestRam,
        layout: &RamLayout,
        floor: u64,
        limit: u64,
    ) -> Result<Option<Placed>, BootError> {
        let initrd = self.payload.beside_kernel().first();
        let load = |file| initrd::load(file, ram, layout, floor, limit, self.go_on);
        initrd.map(|initrd| load(&initrd.file)).transpose()
    }
}

/// Bytes read to detect the format; a Multiboot 2 header lies in the first 32 KiB.
const HEAD_BYTES: u64 = 32 << 10;

/// Usable memory as reported to the guest: `(start, length)`.
fn usable_ram(layout: &RamLayout) -> Vec<(u64, u64)> {
    let mut ranges = vec![(0, LOW_RAM_END)];
    for block in layout.blocks() {
        let start = block.base.0.max(HIGH_RAM_START);
        let end = block.base.0 + block.len_bytes();
        ranges.push((start, end.saturating_sub(start)));
    }
    ranges.retain(|(_, len)| *len > 0);
    ranges
}

/// End of the first block of RAM, which lies below 4 GiB.
fn low_ram_end(layout: &RamLayout) -> Result<u64, BootError> {
    let first = layout.blocks().first().ok_or_else(|| BootError::Ram("there is none".into()))?;
    Ok(first.base.0 + first.len_bytes())
}

/// `value` as a narrower field of a boot structure, which `what` names.
fn narrow<T, N: TryFrom<T>>(what: &str, value: T) -> Result<N, BootError> {
    N::try_from(value).map_err(|_| BootError::Ram(format!("{what} is too large for its field")))
}

fn write_cmdline(cmdline: &str, ram: &GuestRam) -> Result<(), BootError> {
    if cmdline.len() >= CMDLINE_MAX_BYTES {
        let (len, most) = (cmdline.len(), CMDLINE_MAX_BYTES - 1);
        let reason = format!("is {len} bytes long with what Ferry adds; at most {most} fit");
        return Err(BootError::Cmdline { reason });
    }
    if cmdline.contains('\0') {
        return Err(BootError::Cmdline { reason: "contains a NUL character".into() });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write_bytes(ram, CMDLINE, &bytes)
}

/// Copies `len_bytes` of a file, from `offset_bytes`, to guest address `address`.
fn write_file(
    file: &BootFile,
    offset_bytes: u64,
    len_bytes: u64,
    ram: &GuestRam,
    address: u64,
    go_on: &dyn Fn() -> bool,
) -> Result<(), BootError> {
    let write = |at, piece: &[u8]| write_bytes(ram, address.saturating_add(at), piece);
    file.in_pieces(offset_bytes, len_bytes, go_on, write)
}

fn write_bytes(ram: &GuestRam, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    ram.write_slice(bytes, GuestAddress(address)).map_err(|error| BootError::Ram(error.to_string()))
}

fn read_bytes(ram: &GuestRam, address: u64, len: usize) -> Result<Vec<u8>, BootError> {
    let mut bytes = vec![0; len];
    ram.read_slice(&mut bytes, GuestAddress(address))
        .map_err(|error| BootError::Ram(error.to_string()))?;
    Ok(bytes)
}

/// Loads the files at these paths, in tests of the protocols.
#[cfg(test)]
fn test_load(
    kernel: &std::path::Path,
    initrd: Option<&str>,
    cmdline: &str,
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<EntryPoint, BootError> {
    let payload = BootPayload::open(kernel, initrd.map(std::path::Path::new))?;
    let source = BootSource { payload: &payload, cmdline, go_on: &|| true };
    load(&source, &test_hardware(true), ram, layout)
}

/// Reads guest memory in tests of the protocols.
#[cfg(test)]
fn test_ram(bytes: u64) -> (GuestRam, RamLayout) {
    let layout = RamLayout::for_size(bytes).unwrap();
    (GuestRam::from_ranges(&layout.ranges()).unwrap(), layout)
}

/// Two vCPUs and one virtio device, for tests of the protocols.
#[cfg(test)]
fn test_hardware(acpi: bool) -> Hardware {
    Hardware { acpi, cpus: 2, fw_cfg: true, virtio: layout::virtio_slot(0).into_iter().collect() }
}
