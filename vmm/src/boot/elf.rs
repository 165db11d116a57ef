//! ELF kernels: 64-bit, with a PVH note or entered as Linux' own vmlinux is.

use super::BootError;
use super::layout::HIGH_RAM_START;
use devices::ram::{GuestRam, RamLayout};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

/// A loaded ELF kernel.
pub(super) struct Loaded {
    /// Entry point.
    pub entry: u64,
    /// Whether it is the PVH one.
    pub pvh: bool,
    /// End of the kernel.
    pub end: u64,
}

/// Whether `head`, the start of a file, is an ELF's.
pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(MAGIC)
}

/// Checks the headers, then loads the segments.
pub(super) fn load(
    path: &Path,
    file: &mut File,
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<Loaded, BootError> {
    check_elf(path, file, layout)?;
    let loaded = Elf::load(ram, None, file, None).map_err(|error| BootError::Unloadable {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    let (pvh, entry) = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => (true, address.0),
        _ => (false, loaded.kernel_load.0),
    };
    let kind = if pvh { "PVH" } else { "64-bit" };
    log::info!("{}: {kind} ELF kernel, entry {entry:#x}", path.display());
    Ok(Loaded { entry, pvh, end: loaded.kernel_end })
}

const MAGIC: &[u8; 4] = b"\x7fELF";
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
    if !is_elf(&head) {
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

#[cfg(test)]
#[allow(clippy::little_endian_bytes, reason = "makes ELF headers")]
mod tests {
    use super::super::layout::CMDLINE_MAX_BYTES;
    use super::super::{
        BootSource, EntryPoint, load as boot_load, test_hardware, test_ram, write_cmdline,
    };
    use super::*;
    use std::io::Write;

    fn load_bytes(bytes: &[u8], ram_bytes: u64) -> Result<EntryPoint, BootError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let (ram, layout) = test_ram(ram_bytes);
        let source = BootSource { kernel: file.path(), initrd: None, cmdline: "" };
        boot_load(&source, &test_hardware(true), &ram, &layout)
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
