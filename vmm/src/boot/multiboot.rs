//! Multiboot 1 (Multiboot Specification 0.6.96): test kernels, flat or ELF, with modules and a memory map.
//! There is no graphics mode; as with `qemu -kernel`, a kernel that asks for one starts without.

use super::initrd::Placed;
use super::layout::{HIGH_RAM_START, LOW_RAM_END};
use super::modules::{self, Module};
use super::payload::BootFile;
use super::segments::{self, Room, Segment};
use super::{BootError, BootSource, EntryPoint, bios_area, elf, low_ram_end, narrow, usable_ram};
use devices::ram::{GuestRam, RamLayout};

/// What `eax` holds at the entry.
const BOOTLOADER_MAGIC: u32 = 0x2bad_b002;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header lies within this many bytes.
const SEARCHED_BYTES: usize = 8192;
/// Flag bits that a loader must support. We support the first two, page-aligned modules and memory
/// information, for every kernel.
const MUST_UNDERSTAND: u32 = 0xffff;
const WANTS_VIDEO: u32 = 1 << 2;
const UNDERSTOOD: u32 = 3 | WANTS_VIDEO;
const HAS_ADDRESSES: u32 = 1 << 16;

const INFO_MEMORY: u32 = 1;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const INFO_BYTES: usize = 116;
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

/// Loads the kernel and its modules and writes the info structure.
pub(super) fn load(
    source: &BootSource<'_>,
    header: &Header,
    cmdline: &str,
    rsdp: u64,
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
    if header.flags & WANTS_VIDEO != 0 {
        log::warn!(
            "{}: its Multiboot header asks for a video mode; there is no display, it starts without",
            file.name()
        );
    }
    let is_flat = header.flags & HAS_ADDRESSES != 0;
    let (entry, segments) = if is_flat { flat(file, header)? } else { of_elf(file)? };
    let end = segments::check(file, &segments, layout, Room::Below4Gib, &[bios_area(rsdp)])?;
    segments::load(file, &segments, ram, source.go_on)?;
    let kind = if is_flat { "flat" } else { "ELF" };
    log::info!("{}: Multiboot kernel ({kind}), entry {entry:#x}", file.name());
    let modules = modules::load(source, &(HIGH_RAM_START..end), ram, layout)?;
    let encode = |base| encode_info(base, &kernel.arguments, cmdline, &modules, layout);
    let place = modules::write_info(file, &segments, &modules, ram, layout, encode)?;
    Ok(EntryPoint::Multiboot {
        address: entry,
        magic: BOOTLOADER_MAGIC,
        info: place.info,
        gdt: place.gdt,
    })
}

fn unloadable(file: &BootFile, reason: impl Into<String>) -> BootError {
    BootError::Unloadable { file: file.name().to_owned(), reason: reason.into() }
}

/// By the header's own addresses ("a.out kludge").
fn flat(file: &BootFile, header: &Header) -> Result<(u64, Vec<Segment>), BootError> {
    let [header_address, load, load_end, bss_end, entry] = header.addresses.map(u64::from);
    let segment =
        Segment::flat(file.len_bytes(), header.at, header_address, load, load_end, bss_end)
            .map_err(|reason| unloadable(file, format!("its Multiboot {reason}")))?;
    Ok((entry, vec![segment]))
}

/// By the program headers of an ELF; as with GRUB, a 64-bit one is entered in 32-bit mode, too.
fn of_elf(file: &BootFile) -> Result<(u64, Vec<Segment>), BootError> {
    if !elf::is_elf(&file.head(4)?) {
        return Err(unloadable(file, "its Multiboot header has no addresses, and it is no ELF"));
    }
    let kernel = elf::read(file)?;
    if u32::try_from(kernel.entry).is_err() {
        let entry = kernel.entry;
        return Err(unloadable(file, format!("its entry {entry:#x} lies above 4 GiB")));
    }
    Ok((kernel.entry, kernel.segments))
}

/// The info structure and what it points to, from its address.
struct Area {
    base: u64,
    bytes: Vec<u8>,
}

impl Area {
    fn put(&mut self, bytes: &[u8]) -> Result<u32, BootError> {
        let address = self.base + self.bytes.len() as u64;
        self.bytes.extend(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
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
fn encode_info(
    base: u64,
    first_word: &str,
    cmdline: &str,
    modules: &[Module<'_>],
    layout: &RamLayout,
) -> Result<Vec<u8>, BootError> {
    let mut area = Area { base, bytes: vec![0; INFO_BYTES.next_multiple_of(8)] };
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
    let mut info = [0; INFO_BYTES / 4];
    info[0] = INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    info[1] = narrow("low memory", LOW_RAM_END >> 10)?;
    info[2] = narrow("upper memory", upper_end.saturating_sub(HIGH_RAM_START) >> 10)?;
    info[4] = command_line;
    info[5] = narrow("the number of modules", modules.len())?;
    info[6] = list;
    info[11] = map_bytes;
    info[12] = map;
    info[16] = loader_name;
    area.bytes[..INFO_BYTES].copy_from_slice(&words(&info));
    Ok(area.bytes)
}

#[cfg(test)]
mod tests {
    use super::super::layout::MULTIBOOT_INFO;
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
        assert_eq!(address_of(entry), 0x10_0020);
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

    fn address_of(entry: EntryPoint) -> u64 {
        let EntryPoint::Multiboot { address, magic, .. } = entry else { panic!("{entry:?}") };
        assert_eq!(magic, 0x2bad_b002);
        address
    }

    #[test]
    fn a_kernel_below_1_mib_is_loaded_and_its_information_lies_beside_it() {
        for (start, end, expected) in [
            (0x7c00u32, 0, MULTIBOOT_INFO),
            (0x8000, 0, MULTIBOOT_INFO),
            (0x500, 0, MULTIBOOT_INFO),
            // Nothing is left of the usual place.
            (0x2_0000, 0x3_2000, 0x3_2000),
            (0x3_0000, 0x9_f000, 0x9_f000),
            (0x3_0000, 0x9_fc00, 0x1000),
            // Nothing is left below 1 MiB.
            (0x0, 0xa_0000, 0x10_0000),
        ] {
            let kernel = flat_kernel(4, |header| {
                header[3..8].copy_from_slice(&[start + 4, start, 0, end, start + 0x20]);
            });
            let (entry, ram) = boot(kernel.path(), None).unwrap();
            assert_eq!(address_of(entry), u64::from(start) + 0x20);
            let EntryPoint::Multiboot { info, gdt, .. } = entry else { unreachable!() };
            assert_eq!(info, expected, "{start:#x} to {end:#x}");
            let word = |at: u64| ram.read_obj::<u32>(GuestAddress(at)).unwrap();
            assert_eq!(word(u64::from(start) + 4), HEADER_MAGIC, "not written over");
            assert!(text(&ram, word(info + 16)).contains(" one two"));
            assert!(gdt > info && gdt + 40 < info + 0x1000, "{gdt:#x}");
        }
    }

    #[test]
    fn a_kernel_that_wants_a_video_mode_starts_without() {
        let kernel = flat_kernel(4, |header| {
            header[1] |= WANTS_VIDEO;
            header[2] = 0u32.wrapping_sub(HEADER_MAGIC + header[1]);
        });
        let (entry, ram) = boot(kernel.path(), None).unwrap();
        let EntryPoint::Multiboot { info, .. } = entry else { unreachable!() };
        let flags = ram.read_obj::<u32>(GuestAddress(info)).unwrap();
        assert_eq!(flags & (1 << 11 | 1 << 12), 0, "neither VBE nor framebuffer");
    }

    #[test]
    fn an_elf_kernel_is_loaded_by_its_segments() {
        let mut image = vec![0u8; 256];
        let mut put = |at: usize, values: &[u32]| {
            image[at..at + 4 * values.len()].copy_from_slice(&words(values));
        };
        put(0, &[0x464c_457f, 0x0001_0101]);
        put(16, &[3 << 16 | 2, 1, 0x10_1000, 52]);
        put(40, &[0x0020_0000, 0x0000_0001]);
        put(52, &[1, 128, 0x10_1000, 0x10_1000, 64, 0x1000, 5, 4096]);
        let checksum = 0u32.wrapping_sub(HEADER_MAGIC);
        put(128, &[HEADER_MAGIC, 0, checksum]);
        let write = |image: &[u8]| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(image).unwrap();
            file
        };
        let (entry, ram) = boot(write(&image).path(), None).unwrap();
        assert_eq!(address_of(entry), 0x10_1000);
        assert_eq!(ram.read_obj::<u32>(GuestAddress(0x10_1000)).unwrap(), HEADER_MAGIC);
        let not_elf = boot(
            flat_kernel(4, |header| {
                header[1] &= !HAS_ADDRESSES;
                header[2] = 0u32.wrapping_sub(HEADER_MAGIC + header[1]);
            })
            .path(),
            None,
        );
        assert!(not_elf.unwrap_err().contains("it is no ELF"));
    }

    #[test]
    fn what_is_wrong_with_a_header_is_said() {
        type Change = fn(&mut Vec<u32>);
        let sum = |header: &mut Vec<u32>| {
            header[2] = 0u32.wrapping_sub(header[0].wrapping_add(header[1]));
        };
        let cases: [(Change, &str); 6] = [
            (|header| header[1] |= 12, "unknown features 0x8"),
            (|header| header[4] = 0x20_0000, "before the start"),
            (|header| header[5] = 0x1000, "before its start"),
            (|header| header[5] = 0x20_0000, "truncated"),
            (|header| (header[3], header[4], header[6]) = (0xf_0004, 0xf_0000, 0), "ACPI tables"),
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
