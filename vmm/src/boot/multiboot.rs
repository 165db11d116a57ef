//! Multiboot 1 (Multiboot Specification 0.6.96): test kernels, flat or ELF, with modules and a memory map.
//! The same subset as `qemu -kernel`; no graphics mode.

use super::initrd::{self, Placed};
use super::layout::{HIGH_RAM_START, LOW_RAM_END, MULTIBOOT_END, MULTIBOOT_INFO};
use super::payload::{BootFile, MAX_KERNEL_BYTES};
use super::{
    BootError, BootSource, EntryPoint, low_ram_end, narrow, usable_ram, write_bytes, write_file,
};
use devices::ram::{GuestRam, RamLayout};

/// What `eax` holds at the entry.
pub(super) const BOOTLOADER_MAGIC: u64 = 0x2bad_b002;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header lies within this many bytes.
const SEARCHED_BYTES: usize = 8192;
/// Flag bits that a loader must support. We support the first two: page-aligned modules and memory
/// information.
const MUST_UNDERSTAND: u32 = 0xffff;
const UNDERSTOOD: u32 = 3;
const HAS_ADDRESSES: u32 = 1 << 16;

const INFO_MEMORY: u32 = 1;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const INFO_BYTES: u64 = 116;
const MEMORY_RAM: u32 = 1;

/// A kernel's Multiboot header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Where it is in the file.
    at: u64,
    flags: u32,
    /// `header_addr load_addr load_end_addr bss_end_addr entry_addr`, if [`HAS_ADDRESSES`].
    addresses: [u32; 5],
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

/// Finds the header in `head`, the start of a file.
pub(super) fn find_header(head: &[u8]) -> Option<Header> {
    let end = head.len().min(SEARCHED_BYTES);
    (0..end).step_by(4).find_map(|at| {
        let (magic, flags, checksum) = (word(head, at)?, word(head, at + 4)?, word(head, at + 8)?);
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            return None;
        }
        let mut addresses = [0; 5];
        if flags & HAS_ADDRESSES != 0 {
            for (index, address) in addresses.iter_mut().enumerate() {
                *address = word(head, at + 12 + 4 * index)?;
            }
        }
        Some(Header { at: u64::try_from(at).ok()?, flags, addresses })
    })
}

/// A part of the file and its load address; the memory after it, up to `mem_bytes`, is zero.
struct Segment {
    offset: u64,
    file_bytes: u64,
    address: u64,
    mem_bytes: u64,
}

/// Loads the kernel and its modules and writes the info structure.
pub(super) fn load(
    source: &BootSource<'_>,
    header: &Header,
    cmdline: &str,
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<EntryPoint, BootError> {
    let kernel = source.payload.kernel()?;
    let file = &*kernel.file;
    let unknown = header.flags & MUST_UNDERSTAND & !UNDERSTOOD;
    if unknown != 0 {
        let reason = format!("its Multiboot header asks for unknown features {unknown:#x}");
        return Err(unloadable(file, reason));
    }
    let (entry, segments) =
        if header.flags & HAS_ADDRESSES != 0 { flat(file, header)? } else { elf32(file)? };
    // Several headers may refer to the same bytes.
    let file_bytes = segments.iter().fold(0, |sum: u64, one| sum.saturating_add(one.file_bytes));
    if file_bytes > MAX_KERNEL_BYTES {
        let reason =
            format!("its segments have more than the {MAX_KERNEL_BYTES} bytes that are possible");
        return Err(unloadable(file, reason));
    }
    let mut end = HIGH_RAM_START;
    for (index, segment) in segments.iter().enumerate() {
        end = end.max(place(source, file, index, segment, ram, layout)?);
    }
    let kind = if header.flags & HAS_ADDRESSES != 0 { "flat" } else { "ELF" };
    log::info!("{}: Multiboot kernel ({kind}), entry {entry:#x}", file.name());
    let modules = load_modules(source, end, ram, layout)?;
    write_info(file, &kernel.arguments, cmdline, &modules, ram, layout)?;
    Ok(EntryPoint::Multiboot { address: entry })
}

fn unloadable(file: &BootFile, reason: impl Into<String>) -> BootError {
    BootError::Unloadable { file: file.name().to_owned(), reason: reason.into() }
}

/// By the header's own addresses ("a.out kludge").
fn flat(file: &BootFile, header: &Header) -> Result<(u64, Vec<Segment>), BootError> {
    let [header_address, load, load_end, bss_end, entry] = header.addresses.map(u64::from);
    let before = header_address.checked_sub(load);
    let offset = before.and_then(|before| header.at.checked_sub(before)).ok_or_else(|| {
        unloadable(file, "its Multiboot load address lies before the start of the file")
    })?;
    let file_bytes = match load_end {
        0 => file.len_bytes() - offset,
        end => end
            .checked_sub(load)
            .ok_or_else(|| unloadable(file, "its Multiboot load end lies before its start"))?,
    };
    let mem_bytes = bss_end.saturating_sub(load).max(file_bytes);
    Ok((entry, vec![Segment { offset, file_bytes, address: load, mem_bytes }]))
}

const ELF_MAGIC: &[u8; 4] = b"\x7fELF";
/// Most of a file that is read for its program headers.
const MAX_HEADERS_BYTES: u64 = 64 << 10;
const EHDR_BYTES: usize = 52;
const PHDR_BYTES: usize = 32;
const EM_386: u32 = 3;
const PT_LOAD: u32 = 1;

/// By the program headers of a 32-bit ELF (System V ABI, Intel386 supplement).
fn elf32(file: &BootFile) -> Result<(u64, Vec<Segment>), BootError> {
    let truncated =
        || BootError::Truncated { file: file.name().to_owned(), what: "the ELF header".into() };
    let head = file.head(MAX_HEADERS_BYTES)?;
    if !head.starts_with(ELF_MAGIC) {
        return Err(unloadable(file, "its Multiboot header has no addresses, and it is no ELF"));
    }
    let header = head.get(..EHDR_BYTES).ok_or_else(truncated)?;
    let machine = word(header, 16).ok_or_else(truncated)? >> 16;
    if header.get(4..6) != Some(&[1, 1]) || machine != EM_386 {
        return Err(unloadable(file, "a Multiboot ELF kernel must be a 32-bit x86 one"));
    }
    let entry = word(header, 24).ok_or_else(truncated)?;
    let table = word(header, 28).ok_or_else(truncated)?;
    let shape = word(header, 42).ok_or_else(truncated)?;
    let (entry_bytes, count) = (shape & 0xffff, shape >> 16);
    if usize::try_from(entry_bytes).ok() != Some(PHDR_BYTES) || count == 0 {
        return Err(unloadable(file, "it has no program headers"));
    }
    let mut segments = Vec::new();
    for index in 0..count {
        let at = u64::from(table) + u64::from(index * entry_bytes);
        let at: usize = narrow("the program header table's offset", at)?;
        let field = |distance: usize| {
            word(&head, at.saturating_add(distance)).map(u64::from).ok_or_else(truncated)
        };
        let (kind, offset, address) = (field(0)?, field(4)?, field(12)?);
        let (file_bytes, mem_bytes) = (field(16)?, field(20)?);
        if kind == u64::from(PT_LOAD) && mem_bytes != 0 {
            let mem_bytes = mem_bytes.max(file_bytes);
            segments.push(Segment { offset, file_bytes, address, mem_bytes });
        }
    }
    if segments.is_empty() {
        return Err(unloadable(file, "it has no loadable segment"));
    }
    Ok((entry.into(), segments))
}

/// Loads one segment into RAM; returns its end.
fn place(
    source: &BootSource<'_>,
    file: &BootFile,
    index: usize,
    segment: &Segment,
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<u64, BootError> {
    let Segment { offset, file_bytes, address, mem_bytes } = *segment;
    if offset.checked_add(file_bytes).is_none_or(|end| end > file.len_bytes()) {
        let what = format!("segment {index}");
        return Err(BootError::Truncated { file: file.name().to_owned(), what });
    }
    if address < HIGH_RAM_START {
        return Err(unloadable(file, format!("segment {index} lies at {address:#x}, below 1 MiB")));
    }
    // Multiboot addresses have 32 bits: load into the first block of RAM.
    let low_end = low_ram_end(layout)?;
    let end = address.saturating_add(mem_bytes);
    if end > low_end {
        let ram_bytes = layout.size_bytes();
        return Err(BootError::DoesNotFit {
            file: file.name().to_owned(),
            start: address,
            end,
            ram_bytes,
        });
    }
    // RAM is zeroed already: the rest of the segment needs no clearing.
    write_file(file, offset, file_bytes, ram, address, source.go_on)?;
    Ok(end)
}

/// A module and its arguments.
struct Module<'a> {
    placed: Placed,
    string: &'a str,
}

/// Places each module below the previous one, page-aligned.
fn load_modules<'a>(
    source: &BootSource<'a>,
    kernel_end: u64,
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<Vec<Module<'a>>, BootError> {
    let mut modules = Vec::new();
    let mut limit = u64::MAX;
    for module in source.payload.beside_kernel() {
        let placed = initrd::load(&module.file, ram, layout, kernel_end, limit, source.go_on)?;
        limit = placed.address;
        modules.push(Module { placed, string: &module.arguments });
    }
    Ok(modules)
}

/// Fills the Multiboot area from its start.
struct Area<'a> {
    next: u64,
    ram: &'a GuestRam,
    file: &'a BootFile,
}

impl Area<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<u32, BootError> {
        let address = self.next;
        self.next = (address + bytes.len() as u64).next_multiple_of(8);
        if self.next > MULTIBOOT_END {
            return Err(unloadable(self.file, "its command line and modules are too many"));
        }
        write_bytes(self.ram, address, bytes)?;
        narrow("an address", address)
    }

    fn string(&mut self, text: &str) -> Result<u32, BootError> {
        if text.contains('\0') {
            return Err(BootError::Cmdline { reason: "contains a NUL character".into() });
        }
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.put(&bytes)
    }
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[expect(clippy::little_endian_bytes, reason = "encodes the memory map")]
fn write_info(
    file: &BootFile,
    first_word: &str,
    cmdline: &str,
    modules: &[Module<'_>],
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<(), BootError> {
    let mut area = Area { next: MULTIBOOT_INFO + INFO_BYTES.next_multiple_of(8), ram, file };
    // As with GRUB and QEMU, the first word is the kernel.
    let whole = format!("{first_word} {cmdline}");
    let command_line = area.string(whole.trim_end())?;
    let loader_name = area.string("ferry")?;
    let mut list = Vec::new();
    for module in modules {
        let string = area.string(module.string)?;
        let Placed { address, len_bytes } = module.placed;
        let what = "a module's address";
        list.extend([narrow(what, address)?, narrow(what, address + len_bytes)?, string, 0]);
    }
    let list = area.put(&words(&list))?;
    let ranges = usable_ram(layout);
    let mut map = Vec::new();
    for (start, len) in ranges {
        // The size of an entry does not count itself.
        map.extend(20u32.to_le_bytes());
        map.extend(start.to_le_bytes());
        map.extend(len.to_le_bytes());
        map.extend(MEMORY_RAM.to_le_bytes());
    }
    let map_bytes = narrow("the memory map's length", map.len())?;
    let map = area.put(&map)?;
    let upper_end = low_ram_end(layout)?;
    let mut info = [0; (INFO_BYTES / 4) as usize];
    info[0] = INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    info[1] = narrow("low memory", LOW_RAM_END >> 10)?;
    info[2] = narrow("upper memory", upper_end.saturating_sub(HIGH_RAM_START) >> 10)?;
    info[4] = command_line;
    info[5] = narrow("the number of modules", modules.len())?;
    info[6] = list;
    info[11] = map_bytes;
    info[12] = map;
    info[16] = loader_name;
    write_bytes(ram, MULTIBOOT_INFO, &words(&info))
}

#[cfg(test)]
mod tests {
    use super::super::{test_load, test_ram};
    use super::*;
    use devices::ram::GuestAddress;
    use proptest::prelude::*;
    use std::io::Write;
    use std::path::Path;
    use vm_memory::Bytes;

    /// A flat kernel of 64 bytes for 1 MiB, its header at `at`.
    fn flat_kernel(at: u32, change: impl FnOnce(&mut Vec<u32>)) -> tempfile::NamedTempFile {
        let flags = HAS_ADDRESSES | 3;
        let checksum = 0u32.wrapping_sub(HEADER_MAGIC.wrapping_add(flags));
        let mut header = vec![HEADER_MAGIC, flags, checksum];
        header.extend([0x10_0000 + at, 0x10_0000, 0, 0x10_2000, 0x10_0020]);
        change(&mut header);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![0x90; usize::try_from(at).unwrap()]).unwrap();
        file.write_all(&words(&header)).unwrap();
        file.write_all(&[0xf4; 32]).unwrap();
        file
    }

    fn boot(kernel: &Path, initrd: Option<&str>) -> Result<(EntryPoint, GuestRam), String> {
        let (ram, layout) = test_ram(8 << 20);
        let entry = test_load(kernel, initrd, "one two", &ram, &layout);
        entry.map(|entry| (entry, ram)).map_err(|error| error.to_string())
    }

    fn text(ram: &GuestRam, address: u32) -> String {
        let byte = |at: u64| ram.read_obj::<u8>(GuestAddress(at)).unwrap();
        let bytes = (u64::from(address)..).map(byte).take_while(|byte| *byte != 0);
        String::from_utf8(bytes.collect()).unwrap()
    }

    #[test]
    fn a_flat_kernel_gets_its_command_line_modules_and_memory_map() {
        let kernel = flat_kernel(4, |_| {});
        let mut module = tempfile::NamedTempFile::new().unwrap();
        module.write_all(b"module bytes").unwrap();
        let name = module.path().display().to_string();
        let list = format!("{name} with arguments,{name}");
        let (entry, ram) = boot(kernel.path(), Some(&list)).unwrap();
        assert_eq!(entry, EntryPoint::Multiboot { address: 0x10_0020 });
        let word = |at: u64| ram.read_obj::<u32>(GuestAddress(at)).unwrap();
        assert_eq!(word(0x10_0004), HEADER_MAGIC, "the image lies where it asked to");
        let info = |index: u64| word(MULTIBOOT_INFO + 4 * index);
        assert_eq!((info(1), info(2)), (639, 7 << 10), "KiB below and above 1 MiB");
        assert!(text(&ram, info(4)).ends_with(" one two virtio_mmio.device=4K@0xd0000000:16"));
        assert_eq!(info(5), 2, "modules");
        let module_at = |index: u64| [0, 4, 8].map(|at| word(u64::from(info(6)) + 16 * index + at));
        let [start, end, string] = module_at(0);
        assert_eq!((end - start, text(&ram, string)), (12, format!("{name} with arguments")));
        let mut bytes = [0; 12];
        ram.read_slice(&mut bytes, GuestAddress(start.into())).unwrap();
        assert_eq!(&bytes, b"module bytes");
        assert!(module_at(1)[1] <= start, "modules do not overlap");
        assert_eq!((info(11), word(u64::from(info(12)) + 24 + 4)), (48, 1 << 20), "memory map");
    }

    #[test]
    fn an_elf_kernel_is_loaded_by_its_segments() {
        let mut image = vec![0u8; 256];
        let mut put = |at: usize, values: &[u32]| {
            image[at..at + 4 * values.len()].copy_from_slice(&words(values));
        };
        put(0, &[0x464c_457f, 0x0001_0101]);
        put(16, &[EM_386 << 16 | 2, 1, 0x10_1000, 52]);
        put(40, &[0x0020_0000, 0x0000_0001]);
        put(52, &[PT_LOAD, 128, 0x10_1000, 0x10_1000, 64, 0x1000, 5, 4096]);
        let checksum = 0u32.wrapping_sub(HEADER_MAGIC);
        put(128, &[HEADER_MAGIC, 0, checksum]);
        let write = |image: &[u8]| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(image).unwrap();
            file
        };
        let (entry, ram) = boot(write(&image).path(), None).unwrap();
        assert_eq!(entry, EntryPoint::Multiboot { address: 0x10_1000 });
        assert_eq!(ram.read_obj::<u32>(GuestAddress(0x10_1000)).unwrap(), HEADER_MAGIC);
        image[4] = 2;
        let error = boot(write(&image).path(), None).unwrap_err();
        assert!(error.contains("32-bit"), "{error}");
    }

    #[test]
    fn what_is_wrong_with_a_header_is_said() {
        type Change = fn(&mut Vec<u32>);
        let sum = |header: &mut Vec<u32>| {
            header[2] = 0u32.wrapping_sub(header[0].wrapping_add(header[1]));
        };
        let cases: [(Change, &str); 6] = [
            (|header| header[1] |= 4, "unknown features 0x4"),
            (|header| header[4] = 0x20_0000, "before the start"),
            (|header| header[5] = 0x1000, "before its start"),
            (|header| header[5] = 0x20_0000, "truncated"),
            (|header| (header[3], header[4]) = (0x8004, 0x8000), "below 1 MiB"),
            (|header| header[6] = 0x1000_0000, "does not fit"),
        ];
        for (change, expected) in cases {
            let kernel = flat_kernel(4, |header| {
                change(header);
                sum(header);
            });
            let error = boot(kernel.path(), None).unwrap_err();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
        let error = boot(flat_kernel(4, |_| {}).path(), Some("/nonexistent")).unwrap_err();
        assert!(error.contains("/nonexistent"), "{error}");
    }

    proptest! {
        #[test]
        fn arbitrary_heads_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = find_header(&bytes);
        }
    }
}
