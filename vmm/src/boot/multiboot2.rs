//! Multiboot 2 (Multiboot2 Specification 2.0): kernels for GRUB and Limine, ELF or with addresses in their
//! header, perhaps relocatable. [`tags`] reads the header, [`info`] encodes what the kernel gets.
//!
//! There is neither EFI nor a display: tags that need them are ignored if they are optional, else the kernel
//! is refused by name.

mod info;
mod tags;

use super::layout::{ACPI_RSDP, HIGH_RAM_START, LOW_RAM_END};
use super::payload::BootFile;
use super::segments::{self, Room, Segment};
use super::{BootError, BootSource, EntryPoint, bios_area, elf, low_ram_end, modules, narrow};
use super::{read_bytes, write_file};
use devices::ram::{GuestRam, RamLayout};
use elf::Sections;
use info::ElfSymbols;
use std::ops::Range;
use tags::{Preference, Relocatable, Wishes};

/// What `eax` holds at the entry.
const BOOTLOADER_MAGIC: u32 = 0x36d7_6289;
const HEADER_MAGIC: u32 = 0xe852_50d6;
/// The only architecture here: i386, whose kernels are entered in 32-bit mode.
const ARCHITECTURE_I386: u32 = 0;
/// The header lies within this many bytes.
const SEARCHED_BYTES: usize = 32 << 10;
const FIXED_BYTES: usize = 16;

/// Where a kernel's Multiboot 2 header is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// In the file.
    at: usize,
    /// With its tags.
    len: usize,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    elf::number(bytes, at, 4).and_then(|word| u32::try_from(word).ok())
}

/// Finds the header in `head`, the start of a file.
pub(super) fn find_header(head: &[u8]) -> Option<Header> {
    let head = &head[..head.len().min(SEARCHED_BYTES)];
    (0..head.len()).step_by(8).find_map(|at| {
        let field = |index: usize| word(head, at + 4 * index);
        let (magic, architecture, len, checksum) = (field(0)?, field(1)?, field(2)?, field(3)?);
        let sum = magic.wrapping_add(architecture).wrapping_add(len).wrapping_add(checksum);
        if magic != HEADER_MAGIC || architecture != ARCHITECTURE_I386 || sum != 0 {
            return None;
        }
        let len = usize::try_from(len).ok()?;
        (len >= FIXED_BYTES && len <= head.len() - at).then_some(Header { at, len })
    })
}

/// A kernel's image, as the file has it or moved.
struct Image {
    entry: u64,
    segments: Vec<Segment>,
    sections: Option<Sections>,
}

/// Loads the kernel and its modules and writes the information.
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
    let head = file.head(SEARCHED_BYTES as u64)?;
    let tags = head.get(header.at + FIXED_BYTES..header.at + header.len);
    let wishes = Wishes::parse(tags.unwrap_or_default())
        .map_err(|reason| unloadable(file, format!("its Multiboot 2 header {reason}")))?;
    for ignored in &wishes.ignored {
        log::warn!("{}: its Multiboot 2 header asks for {ignored}; it starts without", file.name());
    }
    let mut image = image(file, header, &wishes)?;
    let mut load_base = None;
    if let Some(wanted) = wishes.relocatable {
        load_base = Some(relocate(file, &mut image, wanted, layout)?);
    }
    let reserved = [bios_area(rsdp)];
    let end = segments::check(file, &image.segments, layout, Room::Below4Gib, &reserved)?;
    segments::load(file, &image.segments, ram, source.go_on)?;
    log::info!("{}: Multiboot 2 kernel, entry {:#x}", file.name(), image.entry);
    let mut kernel_range = extent(&image.segments);
    (kernel_range.start, kernel_range.end) = (kernel_range.start.max(HIGH_RAM_START), end);
    let symbols = match image.sections {
        Some(sections) => {
            load_symbols(source, file, sections, &mut kernel_range, &image.segments, ram, layout)?
        }
        None => None,
    };
    let modules = modules::load(source, &kernel_range, ram, layout)?;
    // The symbols lie between the kernel and `kernel_range.end`.
    let mut taken = image.segments.clone();
    taken.push(Segment {
        offset: 0,
        file_bytes: 0,
        address: end,
        mem_bytes: kernel_range.end.saturating_sub(end),
    });
    let mut rsdp_bytes = Vec::new();
    if rsdp != 0 {
        rsdp_bytes = read_bytes(ram, ACPI_RSDP, info::RSDP_BYTES)?;
    }
    let known = info::Known {
        cmdline: [kernel.arguments.as_str(), cmdline].join(" ").trim_end().to_owned(),
        modules: &modules,
        layout,
        symbols: symbols.as_ref(),
        rsdp: &rsdp_bytes,
        load_base,
    };
    let place = modules::write_info(file, &taken, &modules, ram, layout, |_| known.encode())?;
    Ok(EntryPoint::Multiboot {
        address: image.entry,
        magic: BOOTLOADER_MAGIC,
        info: place.info,
        gdt: place.gdt,
    })
}

fn unloadable(file: &BootFile, reason: impl Into<String>) -> BootError {
    BootError::Unloadable { file: file.name().to_owned(), reason: reason.into() }
}

/// The image by the header's addresses, or else by an ELF's program headers.
fn image(file: &BootFile, header: &Header, wishes: &Wishes) -> Result<Image, BootError> {
    let entry = wishes.entry.map(u64::from);
    let image = match wishes.addresses {
        Some(addresses) => {
            let entry = entry.ok_or_else(|| {
                unloadable(file, "its Multiboot 2 header has addresses, but no entry address")
            })?;
            let [header_address, load, load_end, bss_end] = addresses.map(u64::from);
            let at = header.at as u64;
            // All ones: from the file's beginning.
            let load =
                if load == u64::from(u32::MAX) { header_address.wrapping_sub(at) } else { load };
            let len = file.len_bytes();
            let segment = Segment::flat(len, at, header_address, load, load_end, bss_end)
                .map_err(|reason| unloadable(file, format!("its Multiboot 2 {reason}")))?;
            Image { entry, segments: vec![segment], sections: None }
        }
        None if !elf::is_elf(&file.head(4)?) => {
            let reason = "its Multiboot 2 header has no addresses, and it is no ELF";
            return Err(unloadable(file, reason));
        }
        None => {
            let kernel = elf::read(file)?;
            Image {
                entry: entry.unwrap_or(kernel.entry),
                segments: kernel.segments,
                sections: (kernel.sections.count > 0).then_some(kernel.sections),
            }
        }
    };
    if image.entry > u64::from(u32::MAX) {
        return Err(unloadable(file, format!("its entry {:#x} lies above 4 GiB", image.entry)));
    }
    Ok(image)
}

/// From the first to the last byte of segments.
fn extent(segments: &[Segment]) -> Range<u64> {
    let start = segments.iter().map(|segment| segment.address).min();
    let end = segments.iter().map(|segment| segment.range().end).max();
    start.unwrap_or_default()..end.unwrap_or_default()
}

/// Moves a relocatable image to where it wants to be; returns its load base.
fn relocate(
    file: &BootFile,
    image: &mut Image,
    wanted: Relocatable,
    layout: &RamLayout,
) -> Result<u32, BootError> {
    let linked = extent(&image.segments);
    let len = linked.end - linked.start;
    let base = place(wanted, linked.start, len, low_ram_end(layout)?).ok_or_else(|| {
        let Relocatable { lowest, highest, alignment, .. } = wanted;
        unloadable(
            file,
            format!(
                "there is no room for its {len} bytes between {lowest:#x} and {highest:#x} at multiples \
                 of {alignment:#x}; {} bytes of memory are there",
                layout.size_bytes()
            ),
        )
    })?;
    let moved = |address: u64| (address - linked.start).saturating_add(base);
    for segment in &mut image.segments {
        segment.address = moved(segment.address);
    }
    if !linked.contains(&image.entry) {
        return Err(unloadable(file, "its entry lies outside its image, which is relocatable"));
    }
    image.entry = moved(image.entry);
    narrow("the load base", base)
}

/// Chooses the address of an image of `len` bytes that was linked to `linked`.
fn place(wanted: Relocatable, linked: u64, len: u64, ram_end: u64) -> Option<u64> {
    let Relocatable { lowest, highest, alignment, preference } = wanted;
    let alignment = u64::from(alignment).max(1);
    let (lowest, highest) = (u64::from(lowest), u64::from(highest));
    let high = lowest.max(HIGH_RAM_START)..highest.min(ram_end);
    let low = lowest..highest.min(LOW_RAM_END);
    let fits = |room: &Range<u64>, start: u64| {
        start >= room.start && start.checked_add(len).is_some_and(|end| end <= room.end)
    };
    let lowest_in = |room: &Range<u64>| {
        room.start.checked_next_multiple_of(alignment).filter(|start| fits(room, *start))
    };
    let highest_in = |room: &Range<u64>| {
        let start = room.end.checked_sub(len)?;
        Some(start - start % alignment).filter(|start| fits(room, *start))
    };
    let as_linked = || {
        let aligned = linked.is_multiple_of(alignment);
        (aligned && (fits(&high, linked) || fits(&low, linked))).then_some(linked)
    };
    let chosen = match preference {
        Preference::None => as_linked(),
        Preference::Lowest => lowest_in(&high),
        Preference::Highest => highest_in(&high),
    };
    chosen.or_else(|| lowest_in(&high)).or_else(|| lowest_in(&low))
}

/// The most section headers, and bytes of symbols, strings and debugging sections, that are loaded. Larger
/// ones are left out: no kernel needs them to run.
const MAX_SECTION_HEADERS_BYTES: u64 = 32 << 10;
const MAX_SYMBOLS_BYTES: u64 = 64 << 20;

/// Loads the sections that no segment has, such as symbols, behind the kernel, and extends its `range`.
fn load_symbols(
    source: &BootSource<'_>,
    file: &BootFile,
    sections: Sections,
    range: &mut Range<u64>,
    segments: &[Segment],
    ram: &GuestRam,
    layout: &RamLayout,
) -> Result<Option<ElfSymbols>, BootError> {
    let bytes = sections.count.saturating_mul(sections.entry_bytes);
    let in_file = sections.offset.checked_add(bytes).is_some_and(|end| end <= file.len_bytes());
    if !in_file || bytes > MAX_SECTION_HEADERS_BYTES {
        log::info!("{}: its section headers are left out", file.name());
        return Ok(None);
    }
    let headers = file.bytes(sections.offset, bytes)?;
    let Some(mut symbols) = ElfSymbols::new(headers, sections) else { return Ok(None) };
    let room = range.end..low_ram_end(layout)?;
    let room = room.start..room.end.min(room.start.saturating_add(MAX_SYMBOLS_BYTES));
    let Some(loads) = symbols.place(room, file.len_bytes()) else {
        log::info!("{}: its symbols do not fit beside it and are left out", file.name());
        return Ok(None);
    };
    for section in loads {
        debug_assert!(segments.iter().all(|it| !segments::overlap(&it.range(), &section.range())));
        let Segment { offset, file_bytes, address, .. } = section;
        write_file(file, offset, file_bytes, ram, address, source.go_on)?;
        range.end = range.end.max(section.range().end);
    }
    Ok(Some(symbols))
}

#[cfg(test)]
mod tests;
