//! ELF kernels, 32- and 64-bit: entry point, segments, the PVH note and the section headers. What a kernel
//! is entered by is decided by the caller.

use super::BootError;
use super::payload::BootFile;
use super::segments::Segment;

/// Whether `head`, the start of a file, is an ELF's.
pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(MAGIC)
}

const MAGIC: &[u8; 4] = b"\x7fELF";
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
const PF_X: u64 = 1;
const EM_386: u64 = 3;
const EM_X86_64: u64 = 62;
/// Largest note segment that is searched for an entry point. Real kernels have some hundred bytes of notes.
const MAX_NOTE_BYTES: u64 = 64 << 10;
/// Bytes read for the program headers, which closely follow the ELF header.
const MAX_HEADERS_BYTES: u64 = 64 << 10;
/// The note with the PVH entry (Xen, `xen/include/public/elfnote.h`).
const XEN_NOTE_NAME: &[u8] = b"Xen\0";
const XEN_PHYS32_ENTRY: u64 = 18;

/// An ELF kernel's headers.
#[derive(Debug)]
pub(super) struct Elf {
    /// Whether it is a 64-bit one.
    pub is_64_bit: bool,
    /// Physical address of the entry point.
    pub entry: u64,
    /// Entry point of the PVH note, if there is one.
    pub pvh_entry: Option<u64>,
    /// The loadable segments that are not empty.
    pub segments: Vec<Segment>,
    /// The section header table.
    pub sections: Sections,
}

/// Where the section headers are in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sections {
    pub offset: u64,
    /// Number of headers; 0 for none.
    pub count: u64,
    pub entry_bytes: u64,
    /// The header of the sections' names.
    pub names_index: u64,
}

/// A little-endian number of `len` bytes at `at`.
pub(super) fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(len)?)?;
    Some(field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// Positions in the headers of one ELF class: `(offset, length)` of each field (System V ABI).
struct Shape {
    header_bytes: usize,
    entry: (usize, usize),
    program_headers: (usize, usize),
    section_headers: (usize, usize),
    /// `e_phentsize`; `e_phnum`, `e_shentsize`, `e_shnum` and `e_shstrndx` follow.
    counts: usize,
    program_header_bytes: usize,
    flags: (usize, usize),
    offset: (usize, usize),
    virtual_address: (usize, usize),
    physical_address: (usize, usize),
    file_bytes: (usize, usize),
    mem_bytes: (usize, usize),
    alignment: (usize, usize),
}

const ELF_32: Shape = Shape {
    header_bytes: 52,
    entry: (24, 4),
    program_headers: (28, 4),
    section_headers: (32, 4),
    counts: 42,
    program_header_bytes: 32,
    flags: (24, 4),
    offset: (4, 4),
    virtual_address: (8, 4),
    physical_address: (12, 4),
    file_bytes: (16, 4),
    mem_bytes: (20, 4),
    alignment: (28, 4),
};
const ELF_64: Shape = Shape {
    header_bytes: 64,
    entry: (24, 8),
    program_headers: (32, 8),
    section_headers: (40, 8),
    counts: 54,
    program_header_bytes: 56,
    flags: (4, 4),
    offset: (8, 8),
    virtual_address: (16, 8),
    physical_address: (24, 8),
    file_bytes: (32, 8),
    mem_bytes: (40, 8),
    alignment: (48, 8),
};

/// Reads and checks the headers.
pub(super) fn read(file: &BootFile) -> Result<Elf, BootError> {
    let name = || file.name().to_owned();
    let truncated = |what: &str| BootError::Truncated { file: name(), what: what.into() };
    let unloadable = |reason: String| BootError::Unloadable { file: name(), reason };
    let head = file.head(MAX_HEADERS_BYTES)?;
    let (shape, is_64_bit) = match head.get(4..6) {
        _ if !is_elf(&head) => return Err(BootError::NotAKernel { file: name() }),
        None => return Err(truncated("the ELF header")),
        Some(&[1, 1]) => (ELF_32, false),
        Some(&[2, 1]) => (ELF_64, true),
        Some(_) => return Err(BootError::NotAKernel { file: name() }),
    };
    if head.len() < shape.header_bytes {
        return Err(truncated("the ELF header"));
    }
    let header = |(at, len): (usize, usize)| {
        number(&head, at, len).ok_or_else(|| truncated("the ELF header"))
    };
    let machine = header((18, 2))?;
    if machine != EM_X86_64 && (is_64_bit || machine != EM_386) {
        return Err(BootError::NotAKernel { file: name() });
    }
    let table = header(shape.program_headers)?;
    let count = |index: usize| header((shape.counts + 2 * index, 2));
    if count(0)? != shape.program_header_bytes as u64 || count(1)? == 0 {
        return Err(unloadable("it has no program headers".into()));
    }
    let sections = Sections {
        offset: header(shape.section_headers)?,
        count: count(3)?,
        entry_bytes: count(2)?,
        names_index: count(4)?,
    };
    let linked_entry = header(shape.entry)?;
    let mut elf =
        Elf { is_64_bit, entry: linked_entry, pvh_entry: None, segments: Vec::new(), sections };
    for index in 0..count(1)? {
        let at = index
            .checked_mul(shape.program_header_bytes as u64)
            .and_then(|distance| usize::try_from(table.checked_add(distance)?).ok());
        let field = |(distance, len): (usize, usize)| {
            at.and_then(|at| number(&head, at.checked_add(distance)?, len))
                .ok_or_else(|| truncated("the program header table"))
        };
        let kind = field((0, 4))?;
        let alignment = field(shape.alignment)?;
        let (offset, file_bytes) = (field(shape.offset)?, field(shape.file_bytes)?);
        if offset.checked_add(file_bytes).is_none_or(|end| end > file.len_bytes()) {
            return Err(truncated(&format!("segment {index}")));
        }
        if kind == PT_NOTE && elf.pvh_entry.is_none() {
            if file_bytes > MAX_NOTE_BYTES {
                return Err(unloadable(format!(
                    "segment {index} has {file_bytes} bytes of notes, at most {MAX_NOTE_BYTES} are possible"
                )));
            }
            let notes = file.bytes(offset, file_bytes)?;
            elf.pvh_entry = pvh_entry(&notes, if alignment == 8 { 8 } else { 4 });
        }
        let mem_bytes = field(shape.mem_bytes)?.max(file_bytes);
        if kind != PT_LOAD || mem_bytes == 0 {
            continue;
        }
        let (linked, address) = (field(shape.virtual_address)?, field(shape.physical_address)?);
        // The entry is a virtual address if it lies in a segment's, as with QEMU and GRUB.
        let executable = field(shape.flags)? & PF_X != 0;
        let within = linked_entry.checked_sub(linked).filter(|distance| *distance < mem_bytes);
        if let Some(distance) = within.filter(|_| executable && linked != address) {
            elf.entry = address.saturating_add(distance);
        }
        elf.segments.push(Segment { offset, file_bytes, address, mem_bytes });
    }
    Ok(elf)
}

/// Finds the PVH entry in a note segment.
fn pvh_entry(notes: &[u8], alignment: usize) -> Option<u64> {
    let mut at: usize = 0;
    loop {
        let field = |index: usize| number(notes, at.checked_add(4 * index)?, 4);
        let size = |index| usize::try_from(field(index)?).ok();
        let (name_bytes, value_bytes, kind) = (size(0)?, size(1)?, field(2)?);
        let name_at = at.checked_add(12)?;
        let value_at = name_at.checked_add(name_bytes)?.checked_next_multiple_of(alignment)?;
        let name = notes.get(name_at..name_at.checked_add(name_bytes)?)?;
        if name == XEN_NOTE_NAME && kind == XEN_PHYS32_ENTRY {
            return number(notes, value_at, value_bytes.min(8));
        }
        at = value_at.checked_add(value_bytes)?.checked_next_multiple_of(alignment)?;
    }
}

#[cfg(test)]
#[allow(clippy::little_endian_bytes, reason = "makes ELF headers")]
pub(super) mod tests {
    use super::super::layout::CMDLINE_MAX_BYTES;
    use super::super::payload::Role;
    use super::super::segments::{self, Room};
    use super::super::{EntryPoint, test_load, test_ram, write_cmdline};
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    const EHDR_BYTES: usize = ELF_64.header_bytes;
    const PHDR_BYTES: usize = ELF_64.program_header_bytes;

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
            (elf(0x9000, 16), "overlaps the page tables at 0x9000"),
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
        let (_, layout) = test_ram(4 << 20);
        let file = BootFile::open(Role::Kernel, file.path()).unwrap();
        let elf = read(&file).unwrap();
        let end = segments::check(&file, &elf.segments, &layout, Room::AllRam, &[]);
        assert_eq!(end.unwrap(), 0x30_0000);
    }

    #[test]
    fn command_lines_that_do_not_fit_are_refused() {
        let (ram, _) = test_ram(4 << 20);
        assert!(write_cmdline(&"x".repeat(CMDLINE_MAX_BYTES - 1), &ram).is_ok());
        assert!(write_cmdline(&"x".repeat(CMDLINE_MAX_BYTES), &ram).is_err());
        assert!(write_cmdline("a\0b", &ram).is_err());
    }

    #[test]
    fn a_segment_below_1_mib_is_loaded_where_its_protocol_needs_nothing() {
        assert!(load_bytes(&elf(0x1_0000, 16), 4 << 20).is_ok());
        let error = load_bytes(&elf(0xe_0000, 16), 4 << 20).unwrap_err().to_string();
        assert!(error.contains("overlaps the ACPI tables"), "{error}");
    }

    /// A note of the ELF class's alignment.
    fn note(name: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
        let lengths = [name.len(), value.len()].map(|len| u32::try_from(len).unwrap());
        let mut note: Vec<u8> =
            [lengths[0], lengths[1], kind].iter().flat_map(|n| n.to_le_bytes()).collect();
        for part in [name, value] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    /// A 32-bit kernel for 1 MiB with these notes.
    fn elf_32(notes: &[u8]) -> Vec<u8> {
        let mut image = vec![0u8; 52 + 2 * 32];
        let mut put = |at: usize, values: &[u32]| {
            for (at, value) in (at..).step_by(4).zip(values) {
                image[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
        };
        put(0, &[0x464c_457f, 0x0001_0101]);
        put(16, &[3 << 16 | 2, 1, 0xc010_0010, 52]);
        put(40, &[0x0020_0000, 0x0000_0002]);
        // Linked to the higher half, as a kernel's code is.
        put(52, &[1, 0, 0xc010_0000, 0x10_0000, 116, 0x1000, 5, 4096]);
        put(84, &[4, 116, 0, 0, u32::try_from(notes.len()).unwrap(), 0, 4, 4]);
        image.extend(notes);
        image
    }

    #[test]
    fn a_32_bit_kernel_is_entered_by_its_pvh_note_or_refused() {
        let notes = [note(b"GNU\0", 18, b"12345"), note(b"Xen\0", 18, &[4, 0, 0x10, 0])].concat();
        let entry = load_bytes(&elf_32(&notes), 4 << 20).unwrap();
        assert_eq!(entry, EntryPoint::Pvh { address: 0x10_0004 });
        let error =
            load_bytes(&elf_32(&note(b"GNU\0", 3, b"id")), 4 << 20).unwrap_err().to_string();
        assert!(error.contains("neither a PVH note nor a Multiboot header"), "{error}");
    }

    #[test]
    fn the_entry_of_a_kernel_in_the_higher_half_is_a_physical_address() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&elf_32(&[])).unwrap();
        let elf = read(&BootFile::open(Role::Kernel, file.path()).unwrap()).unwrap();
        assert_eq!(elf.entry, 0x10_0010);
    }

    proptest! {
        #[test]
        fn arbitrary_notes_never_panic(notes in prop::collection::vec(any::<u8>(), 0..100), wide in any::<bool>()) {
            let _ = pvh_entry(&notes, if wide { 8 } else { 4 });
        }

        #[test]
        fn a_kernel_with_arbitrary_bytes_never_panics(
            changes in prop::collection::vec((0usize..220, any::<u8>()), 0..12),
            wide in any::<bool>(),
        ) {
            let mut image = if wide { elf(0x10_0000, 16) } else { elf_32(&note(b"Xen\0", 18, &[0; 4])) };
            for (at, byte) in changes {
                if let Some(changed) = image.get_mut(at) {
                    *changed = byte;
                }
            }
            let _ = load_bytes(&image, 4 << 20);
        }
    }
}
