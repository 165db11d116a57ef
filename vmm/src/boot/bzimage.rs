//! bzImage (Linux, `Documentation/arch/x86/boot.rst`): a real-mode setup header, of which we only read,
//! and the protected-mode kernel behind it, entered in 64-bit mode.

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
/// Version 2.12 introduced `xloadflags`, which announces the 64-bit entry.
const OLDEST_PROTOCOL: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry, from the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;
/// `syssize` counts in these.
const PARAGRAPH: u64 = 16;

/// A loaded bzImage.
pub(super) struct Loaded {
    /// 64-bit entry.
    pub entry: u64,
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
    check(file, &header, file_len, cmdline)?;
    let unpacked_end = { header.pref_address }.saturating_add({ header.init_size }.into());
    let end = unpacked_end.max(loaded.kernel_end);
    if end > low_end {
        return Err(does_not_fit(end));
    }
    log::info!(
        "{}: bzImage, boot protocol {}.{}",
        file.name(),
        header.version >> 8,
        header.version & 0xff
    );
    Ok(Loaded { entry: HIGH_RAM_START + ENTRY_64, header, end })
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
        return Err(unloadable(format!("boot protocol {version:#x} is older than 2.12")));
    }
    if header.loadflags & LOADED_HIGH == 0 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(unloadable("it has no 64-bit entry point".into()));
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
    fn a_corrupt_header_is_named() {
        type Change = fn(&mut Vec<u8>);
        let cases: [(Change, &str); 7] = [
            (|bytes| bytes[0x206] = 0x0b, "older than 2.12"),
            (|bytes| bytes[0x236] = 0, "64-bit entry"),
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
