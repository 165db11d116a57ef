//! The Multiboot 2 boot information (section 3.6): its tags, byte by byte.
//!
//! ```text
//! total_size u32, reserved u32, then tags on 8-byte boundaries: type u32, size u32 (without padding), content
//! ```

use super::super::elf::{Sections, number};
use super::super::layout::{HIGH_RAM_START, LOW_RAM_END};
use super::super::modules::Module;
use super::super::segments::Segment;
use super::super::{BootError, low_ram_end, narrow, usable_ram};
use devices::ram::RamLayout;
use std::ops::Range;

const END: u32 = 0;
const CMDLINE: u32 = 1;
const LOADER_NAME: u32 = 2;
const MODULE: u32 = 3;
const BASIC_MEMORY: u32 = 4;
const MEMORY_MAP: u32 = 6;
const ELF_SYMBOLS: u32 = 9;
const ACPI_OLD_RSDP: u32 = 14;
const ACPI_NEW_RSDP: u32 = 15;
const LOAD_BASE: u32 = 21;

const MEMORY_RAM: u32 = 1;
const MAP_ENTRY_BYTES: u32 = 24;
/// The RSDP of ACPI 2.0 and later.
pub(super) const RSDP_BYTES: usize = 36;
/// That of ACPI 1.0, which is its start.
const OLD_RSDP_BYTES: usize = 20;
const RSDT_ADDRESS_AT: usize = 16;

/// What a kernel is told.
pub(super) struct Known<'a> {
    /// The first word is the kernel, as with GRUB.
    pub cmdline: String,
    pub modules: &'a [Module<'a>],
    pub layout: &'a RamLayout,
    pub symbols: Option<&'a ElfSymbols>,
    /// Empty if there is none.
    pub rsdp: &'a [u8],
    /// Of a relocatable kernel.
    pub load_base: Option<u32>,
}

#[derive(Default)]
struct Tags(Vec<u8>);

#[expect(clippy::little_endian_bytes, reason = "encodes the tags")]
impl Tags {
    fn put(&mut self, kind: u32, content: &[&[u8]]) -> Result<(), BootError> {
        let content = content.concat();
        let size: u32 = narrow("a Multiboot 2 tag's size", 8 + content.len())?;
        self.0.extend(kind.to_le_bytes());
        self.0.extend(size.to_le_bytes());
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        Ok(())
    }

    fn string(&mut self, kind: u32, before: &[u8], text: &str) -> Result<(), BootError> {
        if text.contains('\0') {
            return Err(BootError::Cmdline { reason: "contains a NUL character".into() });
        }
        self.put(kind, &[before, text.as_bytes(), b"\0"])
    }
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

impl Known<'_> {
    /// The whole information; the same wherever it lies.
    #[expect(clippy::little_endian_bytes, reason = "encodes the tags")]
    pub fn encode(&self) -> Result<Vec<u8>, BootError> {
        let mut tags = Tags::default();
        tags.string(CMDLINE, &[], &self.cmdline)?;
        tags.string(LOADER_NAME, &[], "ferry")?;
        for module in self.modules {
            let placed = module.placed;
            let what = "a module's address";
            let start: u32 = narrow(what, placed.address)?;
            let end: u32 = narrow(what, placed.address.saturating_add(placed.len_bytes))?;
            tags.string(MODULE, &words(&[start, end]), module.string)?;
        }
        let upper = low_ram_end(self.layout)?.saturating_sub(HIGH_RAM_START) >> 10;
        let upper = narrow("upper memory", upper)?;
        tags.put(BASIC_MEMORY, &[&words(&[narrow("low memory", LOW_RAM_END >> 10)?, upper])])?;
        let map: Vec<u8> = usable_ram(self.layout)
            .into_iter()
            .flat_map(|(start, len)| {
                [&start.to_le_bytes()[..], &len.to_le_bytes(), &words(&[MEMORY_RAM, 0])].concat()
            })
            .collect();
        tags.put(MEMORY_MAP, &[&words(&[MAP_ENTRY_BYTES, 0]), &map])?;
        if let Some(symbols) = self.symbols {
            let Sections { count, entry_bytes, names_index, .. } = symbols.sections;
            let what = "a number of section headers";
            let shape = words(&[
                narrow(what, count)?,
                narrow(what, entry_bytes)?,
                narrow(what, names_index)?,
            ]);
            tags.put(ELF_SYMBOLS, &[&shape, &symbols.headers])?;
        }
        if let Some(old) = self.rsdp.get(..OLD_RSDP_BYTES) {
            // ACPI 1.0 has only what the RSDT points to.
            if number(old, RSDT_ADDRESS_AT, 4).is_some_and(|rsdt| rsdt != 0) {
                tags.put(ACPI_OLD_RSDP, &[old])?;
            }
            tags.put(ACPI_NEW_RSDP, &[self.rsdp])?;
        }
        if let Some(base) = self.load_base {
            tags.put(LOAD_BASE, &[&words(&[base])])?;
        }
        tags.put(END, &[])?;
        let total = narrow("the Multiboot 2 information's size", 8 + tags.0.len())?;
        Ok([words(&[total, 0]), tags.0].concat())
    }
}

/// An ELF kernel's section headers, with the addresses at which its symbols lie.
#[derive(Debug)]
pub(super) struct ElfSymbols {
    headers: Vec<u8>,
    sections: Sections,
    /// Length of an address in them.
    address_bytes: usize,
}

const SECTION_HEADER_BYTES_32: u64 = 40;
const SECTION_HEADER_BYTES_64: u64 = 64;
const SHT_NULL: u64 = 0;
const SHT_NOBITS: u64 = 8;

impl ElfSymbols {
    /// `None` for headers of an unknown shape.
    pub fn new(headers: Vec<u8>, sections: Sections) -> Option<Self> {
        let address_bytes = match sections.entry_bytes {
            SECTION_HEADER_BYTES_32 => 4,
            SECTION_HEADER_BYTES_64 => 8,
            _ => return None,
        };
        Some(Self { headers, sections, address_bytes })
    }

    /// Gives the sections that have no address one in `room`; returns what is to be loaded, or `None` if that
    /// does not fit, or is not in a file of `file_len` bytes.
    pub fn place(&mut self, room: Range<u64>, file_len: u64) -> Option<Vec<Segment>> {
        let word = self.address_bytes;
        let entry_bytes = usize::try_from(self.sections.entry_bytes).ok()?;
        let mut next = room.start;
        let mut loads = Vec::new();
        for header in self.headers.chunks_exact_mut(entry_bytes) {
            // name u32, type u32, then words: flags, address, offset, size; link u32, info u32; alignment.
            let field = |index: usize| number(header, 8 + index * word, word);
            let kind = number(header, 4, 4)?;
            let (address, offset, size) = (field(1)?, field(2)?, field(3)?);
            let alignment = number(header, 16 + 4 * word, word)?.max(1);
            if kind == SHT_NULL || kind == SHT_NOBITS || address != 0 || size == 0 {
                continue;
            }
            let start = next.checked_next_multiple_of(alignment)?;
            next = start.checked_add(size).filter(|end| *end <= room.end)?;
            offset.checked_add(size).filter(|end| *end <= file_len)?;
            loads.push(Segment { offset, file_bytes: size, address: start, mem_bytes: size });
            let field = header.get_mut(8 + word..8 + 2 * word)?;
            for (byte, shift) in field.iter_mut().zip((0..).step_by(8)) {
                *byte = u8::try_from(start >> shift & 0xff).ok()?;
            }
        }
        Some(loads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_section_headers_never_panic_and_stay_in_their_room(
            words in prop::collection::vec(prop_oneof![any::<u64>(), 0u64..100], 0..40),
            entry_bytes in prop_oneof![Just(40u64), Just(64)],
        ) {
            let headers: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let count = headers.len() as u64 / entry_bytes;
            let sections = Sections { offset: 0, count, entry_bytes, names_index: 0 };
            let mut symbols = ElfSymbols::new(headers, sections).unwrap();
            for section in symbols.place(0x1000..0x2000, 1000).unwrap_or_default() {
                prop_assert!(section.address >= 0x1000 && section.range().end <= 0x2000);
                prop_assert!(section.offset + section.file_bytes <= 1000);
            }
        }
    }
}
