//! bzImage (Linux, `Documentation/arch/x86/boot.rst`): a real-mode setup header, of which we only read,
//! and the protected-mode kernel behind it, entered in 64-bit mode, or in 32-bit mode if it has no other entry.

use super::elf::number;
use super::layout::{CMDLINE_MAX_BYTES, HIGH_RAM_START};
use super::payload::BootFile;
use super::{BootError, low_ram_end, narrow};
use devices::ram::{GuestAddress, GuestRam, RamLayout};
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};

const BOOT_FLAG: [u8; 2] = [0x55, 0xaa];
const MAGIC: &[u8; 4] = b"HdrS";
const BOOT_FLAG_AT: usize = 0x1fe;
const MAGIC_AT: usize = 0x202;
const VERSION_AT: usize = 0x206;
const CODE32_START_AT: usize = 0x214;
const XLOADFLAGS_AT: usize = 0x236;
const HEADER_END: u64 = 0x268;
/// Version 2.02 introduced the pointer to the command line that the zero page has.
const OLDEST_PROTOCOL: u16 = 0x0202;
/// Versions from which fields that we read are there, each with what held before.
const HAS_INITRD_ADDR_MAX: u16 = 0x0203;
const HAS_CMDLINE_SIZE: u16 = 0x0206;
const HAS_INIT_SIZE: u16 = 0x020a;
const HAS_XLOADFLAGS: u16 = 0x020c;
const OLD_INITRD_ADDR_MAX: u32 = 0x37ff_ffff;
const OLD_CMDLINE_SIZE: u32 = 255;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry, from the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;
/// `syssize` counts in these.
const PARAGRAPH: u64 = 16;

/// A loaded bzImage.
pub(super) struct Loaded {
    /// Entry point.
    pub entry: u64,
    /// Whether it is the 32-bit one.
    pub is_32_bit: bool,
    /// The header, to be completed for the zero page.
    pub header: setup_header,
    /// End of the memory that the kernel needs before it has read its memory map.
    pub end: u64,
}

/// Whether `head`, the start of a file, is a bzImage's.
pub(super) fn is_bzimage(head: &[u8]) -> bool {
    let at = |at: usize, bytes: &[u8]| head.get(at..at + bytes.len()) == Some(bytes);
    at(MAGIC_AT, MAGIC) && at(BOOT_FLAG_AT, &BOOT_FLAG)
}

/// Bytes of setup code in front of the protected-mode kernel; 0 of a file that is no bzImage.
pub(super) fn setup_bytes(head: &[u8]) -> u32 {
    const SETUP_SECTORS_AT: usize = 0x1f1;
    /// What 0 means, as before Linux 1.3.
    const OLD_SECTORS: u8 = 4;
    match head.get(SETUP_SECTORS_AT).filter(|_| is_bzimage(head)) {
        None => 0,
        Some(sectors) => {
            let sectors = if *sectors == 0 { OLD_SECTORS } else { *sectors };
            // The boot sector is one more.
            (u32::from(sectors) + 1) * 512
        }
    }
}

/// Checks the header, then loads the kernel.
pub(super) fn load(
    file: &BootFile,
    cmdline: &str,
    ram: &GuestRam,
    layout: &RamLayout,
    go_on: &dyn Fn() -> bool,
) -> Result<Loaded, BootError> {
    check_entry(file)?;
    let file_len = file.len_bytes();
    let low_end = low_ram_end(layout)?;
    let does_not_fit = |end| BootError::DoesNotFit {
        file: file.name().to_owned(),
        start: HIGH_RAM_START,
        end,
        ram_bytes: layout.size_bytes(),
    };
    if HIGH_RAM_START + file_len > low_end {
        return Err(does_not_fit(HIGH_RAM_START + file_len));
    }
    let start = GuestAddress(HIGH_RAM_START);
    let mut reader = file.reader(go_on);
    let loaded = BzImage::load(ram, Some(start), &mut reader, Some(start));
    let corrupt = |reason: String| BootError::Unloadable { file: file.name().to_owned(), reason };
    let loaded = loaded.map_err(|error| match reader.into_failure() {
        Some(failure) => failure.into(),
        None => corrupt(format!("corrupt setup header: {error}")),
    })?;
    let header = loaded.setup_header.ok_or_else(|| corrupt("it has no setup header".into()))?;
    let header = with_old_defaults(header);
    check(file, &header, file_len, cmdline)?;
    let is_32_bit = header.xloadflags & XLF_KERNEL_64 == 0;
    // The 32-bit entry is the start of the protected-mode kernel.
    let entry = if is_32_bit { HIGH_RAM_START } else { HIGH_RAM_START + ENTRY_64 };
    let unpacked_end = { header.pref_address }.saturating_add({ header.init_size }.into());
    let end = unpacked_end.max(loaded.kernel_end);
    if end > low_end {
        return Err(does_not_fit(end));
    }
    log::info!(
        "{}: bzImage, boot protocol {}.{}, {}-bit entry",
        file.name(),
        header.version >> 8,
        header.version & 0xff,
        if is_32_bit { 32 } else { 64 }
    );
    Ok(Loaded { entry, is_32_bit, header, end })
}

/// The header with what held before its version in place of fields that it does not have.
fn with_old_defaults(mut header: setup_header) -> setup_header {
    if header.version < HAS_INITRD_ADDR_MAX {
        header.initrd_addr_max = OLD_INITRD_ADDR_MAX;
    }
    if header.version < HAS_CMDLINE_SIZE {
        header.cmdline_size = OLD_CMDLINE_SIZE;
    }
    if header.version < HAS_INIT_SIZE {
        (header.pref_address, header.init_size) = (0, 0);
    }
    if header.version < HAS_XLOADFLAGS {
        header.xloadflags = 0;
    }
    header
}

/// Checks that a kernel without 64-bit entry has a 32-bit one ("32-bit Boot Protocol"): `code32_start`, which is
/// 1 MiB where the kernel can be loaded there.
fn check_entry(file: &BootFile) -> Result<(), BootError> {
    let head = file.head(HEADER_END)?;
    let field = |at, len| number(&head, at, len).unwrap_or_default();
    let version = field(VERSION_AT, 2);
    let has_64_bit_entry =
        version >= HAS_XLOADFLAGS.into() && field(XLOADFLAGS_AT, 2) & u64::from(XLF_KERNEL_64) != 0;
    let start = field(CODE32_START_AT, 4);
    if has_64_bit_entry || start == HIGH_RAM_START {
        return Ok(());
    }
    let reason = match start {
        0 => "its only entry is the 16-bit one, which needs a BIOS; Ferry has none".to_owned(),
        _ => format!("its 32-bit entry is at {start:#x}, not at 1 MiB"),
    };
    Err(BootError::Unloadable { file: file.name().to_owned(), reason })
}

fn check(
    file: &BootFile,
    header: &setup_header,
    file_len: u64,
    cmdline: &str,
) -> Result<(), BootError> {
    let unloadable =
        |reason: String| BootError::Unloadable { file: file.name().to_owned(), reason };
    if header.version < OLDEST_PROTOCOL {
        let version = header.version;
        return Err(unloadable(format!("boot protocol {version:#x} is older than 2.2")));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(unloadable(
            "it is a zImage, which is loaded below 1 MiB by a BIOS's loader".into(),
        ));
    }
    let setup_sectors = match header.setup_sects {
        0 => 4,
        sectors => sectors,
    };
    let needed = (u64::from(setup_sectors) + 1) * SECTOR + u64::from(header.syssize) * PARAGRAPH;
    // `syssize` is rounded up to whole paragraphs.
    if needed >= file_len + PARAGRAPH {
        return Err(BootError::Truncated {
            file: file.name().to_owned(),
            what: "the kernel behind its setup header".into(),
        });
    }
    let most = narrow::<u32, usize>("the longest command line", header.cmdline_size)?
        .min(CMDLINE_MAX_BYTES - 1);
    if cmdline.len() > most {
        let len = cmdline.len();
        let reason = format!("is {len} bytes long; this kernel takes at most {most}");
        return Err(BootError::Cmdline { reason });
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::little_endian_bytes, reason = "makes setup headers")]
mod tests {
    use super::super::{EntryPoint, test_load, test_ram};
    use super::*;
    use std::io::Write;

    /// A kernel of 1000 bytes behind one setup sector, with `change`d bytes.
    fn image(change: impl FnOnce(&mut Vec<u8>)) -> tempfile::NamedTempFile {
        let mut bytes = vec![0u8; 1024 + 1000];
        bytes[0x1f1] = 1;
        bytes[0x1f4..0x1f8].copy_from_slice(&63u32.to_le_bytes());
        bytes[0x1fe..0x200].copy_from_slice(&BOOT_FLAG);
        bytes[0x202..0x206].copy_from_slice(MAGIC);
        bytes[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        bytes[0x211] = 1;
        bytes[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        bytes[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        bytes[0x236..0x238].copy_from_slice(&1u16.to_le_bytes());
        bytes[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
        bytes[0x258..0x260].copy_from_slice(&0x10_0000u64.to_le_bytes());
        bytes[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
        change(&mut bytes);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    fn boot(file: &tempfile::NamedTempFile, cmdline: &str) -> Result<EntryPoint, String> {
        let (ram, layout) = test_ram(8 << 20);
        test_load(file.path(), None, cmdline, &ram, &layout).map_err(|error| error.to_string())
    }

    #[test]
    fn a_whole_image_is_entered_in_64_bit_mode() {
        let entry = boot(&image(|_| {}), "quiet").unwrap();
        assert_eq!(entry, EntryPoint::Linux64 { address: 0x10_0200 });
    }

    #[test]
    fn an_image_without_64_bit_code_is_entered_in_32_bit_mode() {
        let entry = boot(&image(|bytes| bytes[0x236] = 0), "quiet").unwrap();
        assert_eq!(entry, EntryPoint::Linux32 { address: 0x10_0000 });
        // The field of a later version is code in this one.
        let old = |bytes: &mut Vec<u8>| {
            bytes[0x206] = 7;
            bytes[0x258..0x264].fill(0xff);
        };
        let entry = boot(&image(old), "quiet").unwrap();
        assert_eq!(entry, EntryPoint::Linux32 { address: 0x10_0000 });
        let error = boot(&image(|bytes| bytes[0x206] = 5), &"x".repeat(256)).unwrap_err();
        assert!(error.contains("at most 255"), "{error}");
    }

    #[test]
    fn a_corrupt_header_is_named() {
        type Change = fn(&mut Vec<u8>);
        let cases: [(Change, &str); 7] = [
            (|bytes| bytes[0x206] = 1, "older than 2.2"),
            (|bytes| (bytes[0x236], bytes[0x216]) = (0, 0), "only entry is the 16-bit one"),
            (|bytes| bytes[0x211] = 0, "corrupt setup header"),
            (|bytes| bytes[0x1f1] = 200, "corrupt setup header"),
            (|bytes| bytes[0x1f4..0x1f8].fill(0xff), "truncated"),
            (|bytes| bytes[0x25f] = 0x80, "does not fit"),
            (|bytes| bytes[0x263] = 0x70, "does not fit"),
        ];
        for (change, expected) in cases {
            let error = boot(&image(change), "").unwrap_err();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
        let short = image(|bytes| bytes.truncate(0x210));
        assert!(boot(&short, "").is_err());
        let error = boot(&image(|bytes| bytes[0x239] = 0), &"x".repeat(300)).unwrap_err();
        assert!(error.contains("at most 255"), "{error}");
    }
}
