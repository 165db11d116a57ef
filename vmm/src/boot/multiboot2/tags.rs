//! The tags of a kernel's Multiboot 2 header (section 3.1): what it wants from its loader.

use super::super::elf::number;

/// The header's tags, read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Wishes {
    /// `header_addr load_addr load_end_addr bss_end_addr`.
    pub addresses: Option<[u32; 4]>,
    pub entry: Option<u32>,
    pub relocatable: Option<Relocatable>,
    /// Optional things that there are not.
    pub ignored: Vec<&'static str>,
}

/// Where an image may be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Relocatable {
    pub lowest: u32,
    /// The highest address at which it may end.
    pub highest: u32,
    pub alignment: u32,
    pub preference: Preference,
}

/// Where in that room it wants to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Preference {
    None,
    Lowest,
    Highest,
}

const END: u64 = 0;
const INFORMATION_REQUEST: u64 = 1;
const ADDRESS: u64 = 2;
const ENTRY_ADDRESS: u64 = 3;
const CONSOLE_FLAGS: u64 = 4;
const FRAMEBUFFER: u64 = 5;
const MODULE_ALIGNMENT: u64 = 6;
const EFI_BOOT_SERVICES: u64 = 7;
const EFI_I386_ENTRY: u64 = 8;
const EFI_AMD64_ENTRY: u64 = 9;
const RELOCATABLE: u64 = 10;

const OPTIONAL: u64 = 1;
const CONSOLE_REQUIRED: u32 = 1;
const TAG_HEADER_BYTES: usize = 8;

/// The newest kind of information that the specification has: the load base address. What of them there is
/// not, a kernel has to live without, even if it asks for it (section 3.1.4).
const NEWEST_INFORMATION: u32 = 21;

impl Wishes {
    /// Reads tags; says by number or name which of them cannot be fulfilled.
    pub fn parse(tags: &[u8]) -> Result<Self, String> {
        let mut wishes = Self::default();
        let mut at: usize = 0;
        loop {
            let field = |distance, len| number(tags, at + distance, len);
            let (Some(kind), Some(flags), Some(size)) = (field(0, 2), field(2, 2), field(4, 4))
            else {
                return Err("has no end tag".into());
            };
            let malformed = || format!("has a malformed tag {kind}, of {size} bytes");
            let size_bytes = usize::try_from(size).map_err(|_| malformed())?;
            let end = at.checked_add(size_bytes).filter(|_| size_bytes >= TAG_HEADER_BYTES);
            let content =
                end.and_then(|end| tags.get(at + TAG_HEADER_BYTES..end)).ok_or_else(malformed)?;
            if kind == END {
                return Ok(wishes);
            }
            wishes.read(kind, flags & OPTIONAL != 0, content)?.ok_or_else(malformed)?;
            at = at.saturating_add(size_bytes.next_multiple_of(8));
        }
    }

    /// Reads one tag; `None` if it is too short.
    fn read(&mut self, kind: u64, optional: bool, content: &[u8]) -> Result<Option<()>, String> {
        let word =
            |index: usize| number(content, 4 * index, 4).and_then(|word| u32::try_from(word).ok());
        let words =
            |first| Some([word(first)?, word(first + 1)?, word(first + 2)?, word(first + 3)?]);
        let mut lacking = |what: &'static str, why: &str| {
            if !optional {
                return Err(format!("requires {what} (tag {kind}): {why}"));
            }
            self.ignored.push(what);
            Ok(Some(()))
        };
        const NO_EFI: &str = "this is no EFI platform";
        const NO_DISPLAY: &str = "there is no display, only a serial line";
        Ok(match kind {
            INFORMATION_REQUEST => {
                let unknown =
                    (0..content.len() / 4).filter_map(word).find(|it| *it > NEWEST_INFORMATION);
                match unknown {
                    Some(unknown) if !optional => {
                        return Err(format!("requires information of unknown kind {unknown}"));
                    }
                    _ => Some(()),
                }
            }
            ADDRESS => words(0).map(|addresses| self.addresses = Some(addresses)),
            ENTRY_ADDRESS => word(0).map(|entry| self.entry = Some(entry)),
            CONSOLE_FLAGS => match word(0) {
                Some(flags) if flags & CONSOLE_REQUIRED != 0 => lacking("a console", NO_DISPLAY)?,
                flags => flags.map(drop),
            },
            FRAMEBUFFER => lacking("a framebuffer", NO_DISPLAY)?,
            // They are, always.
            MODULE_ALIGNMENT => Some(()),
            EFI_BOOT_SERVICES => lacking("EFI boot services", NO_EFI)?,
            EFI_I386_ENTRY => lacking("an EFI i386 entry", NO_EFI)?,
            EFI_AMD64_ENTRY => lacking("an EFI amd64 entry", NO_EFI)?,
            RELOCATABLE => match words(0) {
                None => None,
                Some([lowest, highest, alignment, preference]) => {
                    let preference = match preference {
                        1 => Preference::Lowest,
                        2 => Preference::Highest,
                        _ => Preference::None,
                    };
                    self.relocatable = Some(Relocatable { lowest, highest, alignment, preference });
                    Some(())
                }
            },
            _ if optional => Some(()),
            _ => return Err(format!("requires tag {kind}, which is unknown here")),
        })
    }
}

#[cfg(test)]
#[allow(clippy::little_endian_bytes, reason = "makes tags")]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A tag, padded.
    pub(in super::super) fn tag(kind: u16, flags: u16, words: &[u32]) -> Vec<u8> {
        let size = u32::try_from(TAG_HEADER_BYTES + 4 * words.len()).unwrap();
        let mut bytes = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
        bytes.extend(size.to_le_bytes());
        words.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    fn parse(tags: &[Vec<u8>]) -> Result<Wishes, String> {
        Wishes::parse(&[tags.concat(), tag(0, 0, &[])].concat())
    }

    #[test]
    fn addresses_entry_and_room_are_read() {
        let wishes = parse(&[
            tag(1, 0, &[1, 5, 8, 21]),
            tag(2, 0, &[1, 2, 3, 4]),
            tag(3, 0, &[5]),
            tag(4, 0, &[2]),
            tag(6, 0, &[]),
            tag(10, 0, &[6, 7, 8, 2]),
        ]);
        let preference = Preference::Highest;
        let relocatable = Relocatable { lowest: 6, highest: 7, alignment: 8, preference };
        assert_eq!(
            wishes.unwrap(),
            Wishes {
                addresses: Some([1, 2, 3, 4]),
                entry: Some(5),
                relocatable: Some(relocatable),
                ignored: Vec::new(),
            }
        );
    }

    #[test]
    fn what_is_required_and_not_there_is_named_and_what_is_optional_ignored() {
        for (kind, words, name) in [
            (1u16, &[1u32, 22][..], "unknown kind 22"),
            (4, &[1], "a console (tag 4)"),
            (5, &[1024, 768, 32], "a framebuffer (tag 5)"),
            (7, &[], "EFI boot services (tag 7)"),
            (8, &[0x10_0000], "an EFI i386 entry (tag 8)"),
            (9, &[0x10_0000], "an EFI amd64 entry (tag 9)"),
            (11, &[], "tag 11, which is unknown"),
        ] {
            let error = parse(&[tag(kind, 0, words)]).unwrap_err();
            assert!(error.contains(name), "{error:?} lacks {name:?}");
            let ignored = parse(&[tag(kind, 1, words)]).unwrap().ignored;
            assert!(ignored.iter().all(|what| name.starts_with(what)), "{ignored:?}");
        }
    }

    #[test]
    fn malformed_tags_are_named() {
        assert!(Wishes::parse(&[]).unwrap_err().contains("no end tag"));
        assert!(Wishes::parse(&tag(6, 0, &[])).unwrap_err().contains("no end tag"));
        assert!(parse(&[tag(2, 0, &[1, 2, 3])]).unwrap_err().contains("malformed tag 2"));
        assert!(Wishes::parse(&[6, 0, 0, 0, 4, 0, 0, 0]).unwrap_err().contains("malformed tag 6"));
        assert!(Wishes::parse(&[6, 0, 0, 0, 255, 255, 255, 255]).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_tags_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = Wishes::parse(&bytes);
        }

        #[test]
        fn arbitrary_contents_never_panic(
            tags in prop::collection::vec((0u16..12, 0u16..2, prop::collection::vec(any::<u32>(), 0..6)), 0..6),
        ) {
            let tags: Vec<_> = tags.iter().map(|(kind, flags, words)| tag(*kind, *flags, words)).collect();
            let _ = parse(&tags);
        }
    }
}
