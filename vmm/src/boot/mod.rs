//! From a kernel file to an entry point: [`load`] tells by its content what the kernel is and puts it,
//! its ramdisk and its command line into RAM; the protocol's module adds what the kernel expects to
//! find; [`cpu`] turns the entry point into first registers.
//!
//! ```text
//! bzimage     -> linux (zero page)       64-bit entry      distributions' kernels
//! multiboot   -> multiboot info          32-bit entry      test kernels
//! elf         -> pvh (start info)        32-bit entry      a note says so
//!             -> linux (zero page)       64-bit entry      vmlinux
//! ```

mod acpi;
mod bzimage;
pub mod cpu;
mod elf;
mod initrd;
pub mod layout;
mod linux;
mod multiboot;
mod pvh;

pub use acpi::Hardware;

use devices::ram::{GuestAddress, GuestRam, RamLayout};
use devices::reset::I8042;
use initrd::Placed;
use layout::{CMDLINE, CMDLINE_MAX_BYTES, HIGH_RAM_START, LOW_RAM_END, MmioSlot, RESET_VECTOR};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use vm_memory::Bytes;

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file cannot be opened or read.
    #[error("cannot read kernel {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Not a format that we boot.
    #[error(
        "{path} is not a kernel Ferry can boot: expected a bzImage, a 64-bit x86 ELF (PVH or vmlinux) \
         or a Multiboot kernel"
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },
    /// The file ends before its headers say so.
    #[error("kernel {path} is truncated: {what} reaches past the end of the file")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Which part.
        what: String,
    },
    /// A segment lies outside RAM.
    #[error(
        "kernel {path} does not fit: it needs guest memory {start:#x} to {end:#x}, \
         raise --memory ({ram_bytes} bytes now)"
    )]
    DoesNotFit {
        /// The file.
        path: PathBuf,
        /// First byte needed.
        start: u64,
        /// End of what is needed.
        end: u64,
        /// RAM size.
        ram_bytes: u64,
    },
    /// The ramdisk or a module cannot be read.
    #[error("cannot read --initrd {path}")]
    ReadInitrd {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The ramdisk does not fit beside the kernel.
    #[error(
        "--initrd {path} does not fit: it has {len_bytes} bytes, beside the kernel there is room for \
         {room_bytes}; raise --memory ({ram_bytes} bytes now)"
    )]
    InitrdDoesNotFit {
        /// The file.
        path: PathBuf,
        /// Its size.
        len_bytes: u64,
        /// What would fit.
        room_bytes: u64,
        /// RAM size.
        ram_bytes: u64,
    },
    /// The segments would overwrite what the VMM puts below 1 MiB, or nothing can be entered.
    #[error("kernel {path} cannot be loaded: {reason}")]
    Unloadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The command line is too long or holds a NUL.
    #[error("--cmdline {reason}")]
    Cmdline {
        /// What is wrong with it.
        reason: String,
    },
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
    /// 32-bit protected mode, `eax` the magic number, `ebx` at the Multiboot info.
    Multiboot {
        /// Entry address.
        address: u64,
    },
    /// 64-bit mode with identity-mapped low memory, `rsi` at the zero page.
    Linux64 {
        /// Entry address.
        address: u64,
    },
}

/// What a machine boots.
#[derive(Debug, Clone, Copy)]
pub struct BootSource<'a> {
    /// Kernel file.
    pub kernel: &'a Path,
    /// Initial ramdisk; for Multiboot the modules, as for QEMU: `PATH [ARGUMENTS],…`.
    pub initrd: Option<&'a Path>,
    /// Command line, without what Ferry adds.
    pub cmdline: &'a str,
}

/// What a BIOS has at the reset vector: the keyboard controller's reset, in real mode. With
/// hardware-reduced ACPI but no EFI, Linux reboots by a jump there.
///
/// ```text
/// mov al, 0xfe; out 0x64, al; l: hlt; jmp l
/// ```
const RESET_CODE: [u8; 7] = [0xb0, I8042::COMMAND_RESET_CPU, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// Puts the kernel, its ramdisk, its command line and the tables that tell of `hardware` into RAM.
pub fn load(
    source: &BootSource<'_>,
    hardware: &Hardware,
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<EntryPoint, BootError> {
    let path = source.kernel;
    let read_error = |source| BootError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(read_error)?;
    let mut head = Vec::new();
    file.by_ref().take(HEAD_BYTES).read_to_end(&mut head).map_err(read_error)?;
    file.rewind().map_err(read_error)?;
    write_bytes(ram, RESET_VECTOR, &RESET_CODE)?;
    let rsdp = if hardware.acpi { acpi::write_tables(hardware, ram)? } else { 0 };
    if bzimage::is_bzimage(&head) {
        // A kernel that a distribution packs knows ACPI.
        let cmdline = source.cmdline_for(hardware, !hardware.acpi);
        let kernel = bzimage::load(path, &mut file, &cmdline, ram, layout)?;
        write_cmdline(&cmdline, ram)?;
        let limit = u64::from(kernel.header.initrd_addr_max).saturating_add(1);
        let initrd = source.load_initrd(ram, layout, kernel.end, limit)?;
        linux::write_zero_page(ram, layout, kernel.header, &cmdline, initrd, rsdp)?;
        cpu::write_page_tables(ram)?;
        return Ok(EntryPoint::Linux64 { address: kernel.entry });
    }
    let cmdline = source.cmdline_for(hardware, true);
    if let Some(header) = multiboot::find_header(&head) {
        return multiboot::load(source, &mut file, &header, &cmdline, ram, layout);
    }
    if !elf::is_elf(&head) {
        return Err(BootError::NotAKernel { path: path.to_owned() });
    }
    let kernel = elf::load(path, &mut file, ram, layout)?;
    write_cmdline(&cmdline, ram)?;
    let initrd = source.load_initrd(ram, layout, kernel.end, u64::MAX)?;
    if kernel.pvh {
        pvh::write_start_info(ram, layout, initrd, rsdp)?;
        return Ok(EntryPoint::Pvh { address: kernel.entry });
    }
    linux::write_zero_page(ram, layout, linux::header_of_vmlinux(), &cmdline, initrd, rsdp)?;
    cpu::write_page_tables(ram)?;
    Ok(EntryPoint::Linux64 { address: kernel.entry })
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
        self.initrd.map(|path| initrd::load(path, ram, layout, floor, limit)).transpose()
    }
}

/// What is looked at to tell what a file is; a Multiboot header lies in the first 8 KiB.
const HEAD_BYTES: u64 = 8 << 10;

/// Memory that the guest is told it may use: `(start, length)`.
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

fn write_bytes(ram: &GuestRam, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    ram.write_slice(bytes, GuestAddress(address)).map_err(|error| BootError::Ram(error.to_string()))
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
    Hardware { acpi, cpus: 2, virtio: layout::virtio_slot(0).into_iter().collect() }
}
