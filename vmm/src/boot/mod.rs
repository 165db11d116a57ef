//! From a kernel file to an entry point: [`load`] puts kernel and command line into RAM, the
//! protocol's module ([`pvh`], [`linux`]) adds what the kernel expects to find, and [`cpu`] turns
//! the entry point into first registers.

pub mod cpu;
pub mod layout;
mod linux;
mod pvh;

use devices::ram::{GuestAddress, GuestRam, RamLayout};
use layout::{CMDLINE, CMDLINE_MAX_BYTES, HIGH_RAM_START, LOW_RAM_END};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader, KernelLoaderResult};
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
    #[error("{path} is not a kernel Ferry can boot: expected a 64-bit x86 ELF (PVH or vmlinux)")]
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
    /// 64-bit mode with identity-mapped low memory, `rsi` at the zero page.
    Linux64 {
        /// Entry address.
        address: u64,
    },
}

/// Puts the kernel at `path` and its command line into RAM.
pub fn load(
    path: &Path,
    cmdline: &str,
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<EntryPoint, BootError> {
    let read_error = |source| BootError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(read_error)?;
    check_elf(path, &mut file, layout)?;
    let loaded: KernelLoaderResult = Elf::load(ram, None, &mut file, None).map_err(|error| {
        BootError::Unloadable { path: path.to_owned(), reason: error.to_string() }
    })?;
    write_cmdline(cmdline, ram)?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => {
            log::info!("{}: PVH ELF kernel, entry {:#x}", path.display(), address.0);
            pvh::write_start_info(ram, layout)?;
            Ok(EntryPoint::Pvh { address: address.0 })
        }
        _ => {
            let address = loaded.kernel_load.0;
            log::info!("{}: 64-bit ELF kernel, entry {address:#x}", path.display());
            linux::write_zero_page(ram, layout, cmdline)?;
            cpu::write_page_tables(ram)?;
            Ok(EntryPoint::Linux64 { address })
        }
    }
}

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

const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;
const PT_LOAD: u32 = 1;
const EM_X86_64: u16 = 62;

/// Looks at the headers before the loader does, so that the user hears what is wrong with the file
/// and where; the loader's own errors do not say.
#[expect(clippy::little_endian_bytes, reason = "a codec of the ELF headers")]
fn check_elf(path: &Path, file: &mut File, layout: &RamLayout) -> Result<(), BootError> {
    let path = path.to_owned();
    let read_error = |source| BootError::Read { path: path.clone(), source };
    let file_len = file.metadata().map_err(read_error)?.len();
    let mut head = Vec::new();
    // Program headers of real kernels follow the ELF header closely; 64 KiB hold the most there are.
    file.by_ref().take(64 << 10).read_to_end(&mut head).map_err(read_error)?;
    file.rewind().map_err(read_error)?;
    if !head.starts_with(b"\x7fELF") {
        return Err(BootError::NotAKernel { path });
    }
    let truncated = |what: &str| BootError::Truncated { path: path.clone(), what: what.into() };
    let header = head.get(..EHDR_BYTES).ok_or_else(|| truncated("the ELF header"))?;
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    if header[4] != 2 || header[5] != 1 || u16_at(18) != EM_X86_64 {
        return Err(BootError::NotAKernel { path });
    }
    let field = |bytes: &[u8], at: usize| -> u64 {
        bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
    };
    let table = usize::try_from(field(header, 32)).unwrap_or(usize::MAX);
    let (entry_bytes, count) = (usize::from(u16_at(54)), usize::from(u16_at(56)));
    if entry_bytes != PHDR_BYTES || count == 0 {
        let reason = "it has no program headers".into();
        return Err(BootError::Unloadable { path, reason });
    }
    let mut loadable = 0;
    for index in 0..count {
        let header = table
            .checked_add(index * PHDR_BYTES)
            .and_then(|start| head.get(start..start.checked_add(PHDR_BYTES)?))
            .ok_or_else(|| truncated("the program header table"))?;
        let kind = header[..4].try_into().map_or(0, u32::from_le_bytes);
        let (offset, address) = (field(header, 8), field(header, 24));
        let (file_bytes, mem_bytes) = (field(header, 32), field(header, 40));
        if offset.checked_add(file_bytes).is_none_or(|end| end > file_len) {
            return Err(truncated(&format!("segment {index}")));
        }
        if kind != PT_LOAD || mem_bytes == 0 {
            continue;
        }
        loadable += 1;
        if address < HIGH_RAM_START {
            let reason = format!("segment {index} lies at {address:#x}, below 1 MiB");
            return Err(BootError::Unloadable { path, reason });
        }
        let end = address.saturating_add(mem_bytes.max(file_bytes));
        let fits = layout.blocks().iter().any(|block| {
            address >= block.base.0 && end <= block.base.0.saturating_add(block.len_bytes())
        });
        if !fits {
            let ram_bytes = layout.size_bytes();
            return Err(BootError::DoesNotFit { path, start: address, end, ram_bytes });
        }
    }
    if loadable == 0 {
        let reason = "it has no loadable segment".into();
        return Err(BootError::Unloadable { path, reason });
    }
    Ok(())
}

/// Reads guest memory in tests of the protocols.
#[cfg(test)]
fn test_ram(bytes: u64) -> (GuestRam, RamLayout) {
    let layout = RamLayout::for_size(bytes).unwrap();
    (GuestRam::from_ranges(&layout.ranges()).unwrap(), layout)
}

#[cfg(test)]
#[allow(clippy::little_endian_bytes, reason = "makes ELF headers")]
mod tests {
    use super::*;
    use std::io::Write;

    fn load_bytes(bytes: &[u8], ram_bytes: u64) -> Result<EntryPoint, BootError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let (ram, layout) = test_ram(ram_bytes);
        load(file.path(), "", &ram, &layout)
    }

    fn elf(address: u64, mem_bytes: u64) -> Vec<u8> {
        let mut image = vec![0u8; EHDR_BYTES + PHDR_BYTES + 16];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[18] = 62;
        image[24..32].copy_from_slice(&address.to_le_bytes());
        image[32] = 64;
        image[54] = 56;
        image[56] = 1;
        let header = &mut image[EHDR_BYTES..];
        header[0] = 1;
        header[8] = 120;
        header[24..32].copy_from_slice(&address.to_le_bytes());
        header[32] = 16;
        header[40..48].copy_from_slice(&mem_bytes.to_le_bytes());
        image
    }

    #[test]
    fn an_elf_without_note_is_entered_in_64_bit_mode() {
        let entry = load_bytes(&elf(0x10_0000, 16), 4 << 20).unwrap();
        assert_eq!(entry, EntryPoint::Linux64 { address: 0x10_0000 });
    }

    #[test]
    fn what_is_wrong_with_a_kernel_is_said() {
        let cases: [(Vec<u8>, &str); 7] = [
            (b"#!/bin/sh\n".to_vec(), "is not a kernel Ferry can boot"),
            (vec![], "is not a kernel Ferry can boot"),
            (b"\x7fELF\x02\x01".to_vec(), "is truncated: the ELF header"),
            (elf(0x10_0000, 16)[..100].to_vec(), "is truncated: the program header table"),
            (elf(0x10_0000, 16)[..125].to_vec(), "is truncated: segment 0"),
            (elf(0x10_0000, 64 << 20), "does not fit"),
            (elf(0x8000, 16), "below 1 MiB"),
        ];
        for (image, expected) in cases {
            let error = load_bytes(&image, 4 << 20).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
        assert!(load_bytes(&elf(u64::MAX - 8, 64), 4 << 20).is_err());
    }

    #[test]
    fn command_lines_that_do_not_fit_are_refused() {
        let (ram, _) = test_ram(4 << 20);
        assert!(write_cmdline(&"x".repeat(CMDLINE_MAX_BYTES - 1), &ram).is_ok());
        assert!(write_cmdline(&"x".repeat(CMDLINE_MAX_BYTES), &ram).is_err());
        assert!(write_cmdline("a\0b", &ram).is_err());
    }
}
