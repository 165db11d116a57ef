//! 64-bit ELF kernels, entered through a PVH note or like Linux's vmlinux.

use super::BootError;
use super::layout::HIGH_RAM_START;
use super::payload::{BootFile, MAX_KERNEL_BYTES};
use devices::ram::{GuestRam, RamLayout};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};

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
    file: &BootFile,
    ram: &GuestRam,
    layout: &RamLayout,
    go_on: &dyn Fn() -> bool,
) -> Result<Loaded, BootError> {
    let end = check_elf(file, layout)?;
    let mut reader = file.reader(go_on);
    let loaded =
        Elf::load(ram, None, &mut reader, None).map_err(|error| match reader.into_failure() {
            Some(failure) => failure.into(),
            None => {
                let file = file.name().to_owned();
                BootError::Unloadable { file, reason: error.to_string() }
            }
        })?;
    let (pvh, entry) = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => (true, address.0),
        _ => (false, loaded.kernel_load.0),
    };
    let kind = if pvh { "PVH" } else { "64-bit" };
    log::info!("{}: {kind} ELF kernel, entry {entry:#x}", file.name());
    Ok(Loaded { entry, pvh, end })
}

const MAGIC: &[u8; 4] = b"\x7fELF";
const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
/// Largest note segment that is searched for an entry point: each note costs two reads. Real kernels have
/// some hundred bytes of notes.
const MAX_NOTE_BYTES: u64 = 64 << 10;
/// Bytes read for the program headers, which closely follow the ELF header.
const MAX_HEADERS_BYTES: u64 = 64 << 10;
const EM_X86_64: u16 = 62;

/// Checks the headers before linux-loader reads them, because its errors do not say what is wrong with the
/// file. Returns the end of the memory that the kernel occupies.
#[expect(clippy::little_endian_bytes, reason = "a codec of the ELF headers")]
fn check_elf(boot_file: &BootFile, layout: &RamLayout) -> Result<u64, BootError> {
    let file_len = boot_file.len_bytes();
    let head = boot_file.head(MAX_HEADERS_BYTES)?;
    let file = boot_file.name().to_owned();
    if !is_elf(&head) {
        return Err(BootError::NotAKernel { file });
    }
    let truncated = |what: &str| BootError::Truncated { file: file.clone(), what: what.into() };
    let header = head.get(..EHDR_BYTES).ok_or_else(|| truncated("the ELF header"))?;
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    if header[4] != 2 || header[5] != 1 || u16_at(18) != EM_X86_64 {
        return Err(BootError::NotAKernel { file });
    }
    let field = |at: usize| {
        let bytes = head.get(at..at.checked_add(8)?)?.try_into().ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    let table = field(32).and_then(|table| usize::try_from(table).ok());
    let (entry_bytes, count) = (usize::from(u16_at(54)), usize::from(u16_at(56)));
    if entry_bytes != PHDR_BYTES || count == 0 {
        let reason = "it has no program headers".into();
        return Err(BootError::Unloadable { file, reason });
    }
    let mut loaded_bytes: u64 = 0;
    let mut kernel_end = None;
    for index in 0..count {
        let at = table.and_then(|table| table.checked_add(index * PHDR_BYTES));
        let header_field = |distance: usize| {
            at.and_then(|at| field(at.checked_add(distance)?))
                .ok_or_else(|| truncated("the program header table"))
        };
        // Its first half; flags are the other.
        let kind = header_field(0)? & 0xffff_ffff;
        let (offset, address) = (header_field(8)?, header_field(24)?);
        let (file_bytes, mem_bytes) = (header_field(32)?, header_field(40)?);
        // Alignment, its last field: linux-loader reads all of it.
        header_field(48)?;
        if offset.checked_add(file_bytes).is_none_or(|end| end > file_len) {
            return Err(truncated(&format!("segment {index}")));
        }
        if kind == PT_NOTE && file_bytes > MAX_NOTE_BYTES {
            let reason = format!(
                "segment {index} has {file_bytes} bytes of notes, at most {MAX_NOTE_BYTES} are possible"
            );
            return Err(BootError::Unloadable { file, reason });
        }
        if kind != PT_LOAD || mem_bytes.max(file_bytes) == 0 {
            continue;
        }
        // Several headers may refer to the same bytes.
        loaded_bytes = loaded_bytes.saturating_add(file_bytes);
        if loaded_bytes > MAX_KERNEL_BYTES {
            let reason = format!(
                "its segments have more than the {MAX_KERNEL_BYTES} bytes that are possible"
            );
            return Err(BootError::Unloadable { file, reason });
        }
        if address < HIGH_RAM_START {
            let reason = format!("segment {index} lies at {address:#x}, below 1 MiB");
            return Err(BootError::Unloadable { file, reason });
        }
        let end = address.saturating_add(mem_bytes.max(file_bytes));
        let fits = layout.blocks().iter().any(|block| {
            address >= block.base.0 && end <= block.base.0.saturating_add(block.len_bytes())
        });
        if !fits {
            let ram_bytes = layout.size_bytes();
            return Err(BootError::DoesNotFit { file, start: address, end, ram_bytes });
        }
        kernel_end = kernel_end.max(Some(end));
    }
    kernel_end.ok_or_else(|| {
        let reason = "it has no loadable segment".into();
        BootError::Unloadable { file, reason }
    })
}

#[cfg(test)]
#[allow(clippy::little_endian_bytes, reason = "makes ELF headers")]
pub(super) mod tests {
    use super::super::layout::CMDLINE_MAX_BYTES;
    use super::super::payload::Role;
    use super::super::{EntryPoint, test_load, test_ram, write_cmdline};
    use super::*;
    use std::io::Write;

    fn load_bytes(bytes: &[u8], ram_bytes: u64) -> Result<EntryPoint, BootError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let (ram, layout) = test_ram(ram_bytes);
        test_load(file.path(), None, "", &ram, &layout)
    }

    /// A kernel with one segment of 16 bytes at `address`, its entry.
    pub(in crate::boot) fn elf(address: u64, mem_bytes: u64) -> Vec<u8> {
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

    /// An ELF with these program headers, `(kind, address, bytes in the file, bytes in memory)`, all for
    /// the start of the file, which has `len` bytes.
    fn elf_of(headers: &[(u64, u64, u64, u64)], len: usize) -> Vec<u8> {
        let mut image = elf(0x10_0000, 16);
        image[56..58].copy_from_slice(&u16::try_from(headers.len()).unwrap().to_le_bytes());
        image.truncate(EHDR_BYTES);
        for (kind, address, file_bytes, mem_bytes) in headers {
            let mut header = [0; PHDR_BYTES];
            header[..4].copy_from_slice(&kind.to_le_bytes()[..4]);
            header[24..32].copy_from_slice(&address.to_le_bytes());
            header[32..40].copy_from_slice(&file_bytes.to_le_bytes());
            header[40..48].copy_from_slice(&mem_bytes.to_le_bytes());
            image.extend(header);
        }
        image.resize(len.max(image.len()), 0);
        image
    }

    #[test]
    fn headers_that_would_keep_the_loader_busy_are_refused() {
        let code = (PT_LOAD, 0x10_0000, 16, 16);
        let notes = |bytes| (PT_NOTE, 0, bytes, 0);
        let reason = |headers: &[_], len| {
            load_bytes(&elf_of(headers, len), 4 << 20).unwrap_err().to_string()
        };
        assert!(reason(&[code, notes(u64::MAX)], 256).contains("truncated: segment 1"));
        let text = reason(&[code, notes(MAX_NOTE_BYTES + 1)], 1 << 20);
        assert!(text.contains("65537 bytes of notes"), "{text}");
        load_bytes(&elf_of(&[code, notes(MAX_NOTE_BYTES)], 1 << 20), 4 << 20).unwrap();
        // The same 3 MiB a thousand times over.
        let again = vec![(PT_LOAD, 0x10_0000, 3 << 20, 3 << 20); 1000];
        let text = reason(&again, 3 << 20);
        assert!(text.contains("more than the 2147483648 bytes"), "{text}");
    }

    #[test]
    fn the_kernel_ends_with_memory_that_is_not_in_the_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let headers = [(PT_LOAD, 0x10_0000, 16, 16), (PT_LOAD, 0x20_0000, 0, 0x10_0000)];
        file.write_all(&elf_of(&headers, 256)).unwrap();
        let (ram, layout) = test_ram(4 << 20);
        let file = BootFile::open(Role::Kernel, file.path()).unwrap();
        assert_eq!(load(&file, &ram, &layout, &|| true).unwrap().end, 0x30_0000);
    }

    #[test]
    fn command_lines_that_do_not_fit_are_refused() {
        let (ram, _) = test_ram(4 << 20);
        assert!(write_cmdline(&"x".repeat(CMDLINE_MAX_BYTES - 1), &ram).is_ok());
        assert!(write_cmdline(&"x".repeat(CMDLINE_MAX_BYTES), &ram).is_err());
        assert!(write_cmdline("a\0b", &ram).is_err());
    }
}
