#![allow(clippy::little_endian_bytes, reason = "makes headers")]

use super::super::{test_load, test_ram};
use super::tags::tests::tag;
use super::*;
use devices::ram::GuestAddress;
use proptest::prelude::*;
use std::io::Write;
use vm_memory::Bytes;

const KERNEL_AT: u32 = 0x20_0000;

/// A header with these tags and the end tag.
fn header(tags: &[Vec<u8>]) -> Vec<u8> {
    let tags = [tags.concat(), tag(0, 0, &[])].concat();
    let len = u32::try_from(FIXED_BYTES + tags.len()).unwrap();
    let checksum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(len);
    let fixed = [HEADER_MAGIC, ARCHITECTURE_I386, len, checksum];
    let mut bytes: Vec<u8> = fixed.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(tags);
    bytes
}

/// A flat kernel for [`KERNEL_AT`], its header behind 8 bytes, entered at 0x100 of 0x200.
fn flat_kernel(tags: &[Vec<u8>]) -> Vec<u8> {
    let addresses = tag(2, 0, &[KERNEL_AT + 8, KERNEL_AT, 0, KERNEL_AT + 0x3000]);
    let tags = [&[addresses, tag(3, 0, &[KERNEL_AT + 0x100])][..], tags].concat();
    let mut bytes = vec![0x90; 8];
    bytes.extend(header(&tags));
    bytes.resize(0x200, 0xf4);
    bytes
}

fn boot(kernel: &[u8], modules: Option<&str>) -> Result<(EntryPoint, GuestRam), String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(kernel).unwrap();
    let (ram, layout) = test_ram(8 << 20);
    let entry = test_load(file.path(), modules, "one two", &ram, &layout);
    entry.map(|entry| (entry, ram)).map_err(|error| error.to_string())
}

/// The entry's address, and the information's tags as `(type, content)`.
fn parts(entry: EntryPoint, ram: &GuestRam) -> (u64, Vec<(u32, Vec<u8>)>) {
    let EntryPoint::Multiboot { address, magic, info, gdt } = entry else { panic!("{entry:?}") };
    assert_eq!(magic, 0x36d7_6289);
    let word = |at: u64| ram.read_obj::<u32>(GuestAddress(at)).unwrap();
    let end = info + u64::from(word(info));
    assert!(end <= gdt && info.is_multiple_of(8), "{info:#x} to {end:#x}, GDT at {gdt:#x}");
    let mut tags = Vec::new();
    let mut at = info + 8;
    while at < end {
        let (kind, size) = (word(at), word(at + 4));
        let mut content = vec![0; usize::try_from(size).unwrap() - 8];
        ram.read_slice(&mut content, GuestAddress(at + 8)).unwrap();
        tags.push((kind, content));
        at += u64::from(size).next_multiple_of(8);
    }
    assert_eq!((at, tags.last()), (end, Some(&(0, vec![]))), "the end tag is the last");
    (address, tags)
}

/// The words of the only tag of this type.
fn words_of(tags: &[(u32, Vec<u8>)], kind: u32) -> Vec<u32> {
    let mut found = tags.iter().filter(|tag| tag.0 == kind);
    let content = &found.next().unwrap_or_else(|| panic!("no tag {kind}")).1;
    assert!(found.next().is_none(), "tag {kind} is there twice");
    content.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

#[test]
fn a_flat_kernel_gets_everything_that_there_is() {
    let mut module = tempfile::NamedTempFile::new().unwrap();
    module.write_all(b"module bytes").unwrap();
    let name = module.path().display().to_string();
    let list = format!("{name} with arguments,{name}");
    let (entry, ram) = boot(&flat_kernel(&[]), Some(&list)).unwrap();
    let (address, tags) = parts(entry, &ram);
    assert_eq!(address, u64::from(KERNEL_AT) + 0x100);
    let kinds: Vec<_> = tags.iter().map(|tag| tag.0).collect();
    assert_eq!(kinds, [1, 2, 3, 3, 4, 6, 15, 0], "no RSDT, so no RSDP of ACPI 1.0");
    let cmdline = String::from_utf8_lossy(&tags[0].1);
    assert!(cmdline.ends_with(" one two virtio_mmio.device=4K@0xd0000000:16\0"), "{cmdline}");
    let (start, end) = (word(&tags[2].1, 0).unwrap(), word(&tags[2].1, 4).unwrap());
    assert_eq!((start % 4096, end - start), (0, 12));
    assert_eq!(&tags[2].1[8..], format!("{name} with arguments\0").as_bytes());
    let mut bytes = [0; 12];
    ram.read_slice(&mut bytes, GuestAddress(start.into())).unwrap();
    assert_eq!(&bytes, b"module bytes");
    assert_eq!(words_of(&tags, 4), [639, 7 << 10], "KiB below and above 1 MiB");
    let map = words_of(&tags, 6);
    assert_eq!((map[0], map[1], map.len()), (24, 0, 2 + 2 * 6));
    assert_eq!(map[8..14], [1 << 20, 0, 7 << 20, 0, 1, 0]);
    assert!(tags[6].1.starts_with(b"RSD PTR "));
}

#[test]
fn an_elf_of_either_class_is_loaded_by_its_segments() {
    let mut image = elf::tests::elf(0x10_0000, 16);
    image.resize(image.len().next_multiple_of(8), 0);
    image.extend(header(&[]));
    let (entry, ram) = boot(&image, None).unwrap();
    assert_eq!(parts(entry, &ram).0, 0x10_0000, "64-bit, entered in 32-bit mode");
    let mut image = elf::tests::elf(0x10_0000, 16);
    image.resize(image.len().next_multiple_of(8), 0);
    image.extend(header(&[tag(3, 0, &[0x10_0008])]));
    assert_eq!(boot(&image, None).unwrap().0, {
        let EntryPoint::Multiboot { magic, info, gdt, .. } = entry else { unreachable!() };
        EntryPoint::Multiboot { address: 0x10_0008, magic, info, gdt }
    });
}

#[test]
fn symbols_are_loaded_behind_the_kernel() {
    let mut image = elf::tests::elf(0x10_0000, 16);
    image.resize(image.len().next_multiple_of(8), 0);
    image.extend(header(&[]));
    // A table of no section and of a string table with 5 bytes.
    let (strings, table) = (image.len() as u64, image.len() as u64 + 8);
    image.extend(b"\0name\0\0\0");
    image.extend([0; 64]);
    let section = [3u64 << 32, 0, 0, strings, 5, 0, 16, 0];
    image.extend(section.iter().flat_map(|word| word.to_le_bytes()));
    image[40..48].copy_from_slice(&table.to_le_bytes());
    (image[58], image[60], image[62]) = (64, 2, 1);
    let (entry, ram) = boot(&image, None).unwrap();
    let (_, tags) = parts(entry, &ram);
    let symbols = words_of(&tags, 9);
    assert_eq!((&symbols[..3], symbols.len()), (&[2, 64, 1][..], 3 + 32));
    let address = symbols[3 + 16 + 4];
    assert_eq!(address, 0x10_0010, "the kernel's end");
    let mut name = [0; 5];
    ram.read_slice(&mut name, GuestAddress(address.into())).unwrap();
    assert_eq!(&name, b"\0name");
}

#[test]
fn a_relocatable_kernel_goes_where_it_prefers() {
    for (words, expected) in [
        ([0, 0x80_0000, 0x1000, 0], 0x20_0000),
        ([0x30_0000, 0x80_0000, 0x1000, 0], 0x30_0000),
        ([0, 0x80_0000, 0x1000, 1], 0x10_0000),
        ([0x12_0001, 0xffff_ffff, 0x20_0000, 1], 0x20_0000),
        ([0, 0xffff_ffff, 0x1000, 2], 0x7f_d000),
        ([0, 0x50_0000, 0x10_0000, 2], 0x40_0000),
        // Only below 1 MiB is room.
        ([0x8000, 0x2_0000, 0x1000, 2], 0x8000),
    ] {
        let (entry, ram) = boot(&flat_kernel(&[tag(10, 0, &words)]), None).unwrap();
        let (address, tags) = parts(entry, &ram);
        assert_eq!(address, expected + 0x100, "{words:x?}");
        assert_eq!(words_of(&tags, 21), [u32::try_from(expected).unwrap()]);
        let magic = ram.read_obj::<u32>(GuestAddress(expected + 8)).unwrap();
        assert_eq!(magic, HEADER_MAGIC, "it lies there");
    }
    let error = boot(&flat_kernel(&[tag(10, 0, &[0x70_0000, 0x70_1000, 1, 0])]), None).unwrap_err();
    assert!(error.contains("no room for its 12288 bytes"), "{error}");
}

#[test]
fn modules_of_a_kernel_at_the_top_lie_below_it() {
    let mut module = tempfile::NamedTempFile::new().unwrap();
    module.write_all(&[7; 10_000]).unwrap();
    let list = module.path().display().to_string();
    let kernel = flat_kernel(&[tag(10, 0, &[0, u32::MAX, 0x1000, 2])]);
    let (entry, ram) = boot(&kernel, Some(&list)).unwrap();
    let (address, tags) = parts(entry, &ram);
    let module = &tags.iter().find(|tag| tag.0 == 3).unwrap().1;
    assert!(u64::from(word(module, 4).unwrap()) <= address - 0x100);
}

#[test]
fn what_cannot_be_booted_is_named() {
    let mut no_entry = vec![0; 8];
    no_entry.extend(header(&[tag(2, 0, &[KERNEL_AT + 8, KERNEL_AT, 0, 0])]));
    for (kernel, expected) in [
        (flat_kernel(&[tag(7, 0, &[])]), "requires EFI boot services (tag 7)"),
        (flat_kernel(&[tag(99, 0, &[])]), "requires tag 99"),
        (no_entry, "no entry address"),
        (header(&[]), "it is no ELF"),
        (flat_kernel(&[tag(2, 0, &[8, 0x1000, 0, 0])]), "before the start of the file"),
        (flat_kernel(&[tag(2, 0, &[0xe_0008, 0xe_0000, 0, 0])]), "overlaps the ACPI tables"),
    ] {
        let error = boot(&kernel, None).unwrap_err();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
    assert!(boot(&flat_kernel(&[tag(7, 1, &[])]), None).is_ok());
    // All ones: the file from its beginning.
    let from_start = flat_kernel(&[tag(2, 0, &[KERNEL_AT + 8, u32::MAX, 0, 0])]);
    assert!(boot(&from_start, None).is_ok());
}

#[test]
fn the_header_is_searched_on_8_byte_boundaries_of_the_first_32_kib() {
    let found = |before: usize, header: &[u8]| {
        find_header(&[&vec![0; before][..], header].concat()).map(|header| header.at)
    };
    let good = header(&[]);
    assert_eq!((found(0, &good), found(32, &good)), (Some(0), Some(32)));
    assert_eq!(found(SEARCHED_BYTES - good.len(), &good), Some(SEARCHED_BYTES - good.len()));
    assert_eq!((found(4, &good), found(SEARCHED_BYTES - 16, &good)), (None, None));
    let mut bad = good;
    bad[12] ^= 1;
    assert_eq!(found(0, &bad), None, "its checksum is wrong");
}

proptest! {
    #[test]
    fn arbitrary_heads_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = find_header(&bytes);
    }

    #[test]
    fn a_kernel_with_arbitrary_bytes_never_panics(
        changes in prop::collection::vec((8usize..0x80, any::<u8>()), 0..8),
        room in any::<[u32; 4]>(),
    ) {
        let mut kernel = flat_kernel(&[tag(10, 0, &room)]);
        changes.iter().for_each(|(at, byte)| kernel[*at] = *byte);
        let _ = boot(&kernel, None);
    }
}
