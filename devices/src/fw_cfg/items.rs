//! The items of fw_cfg by number: facts about the machine, the boot files, and the directory of named files.
//! Small ones are kept as bytes; the boot files are read from where they are.

use super::item::{E820_FILE, MAX_NAME_BYTES, UserItem};
use crate::log_limit::LogLimit;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;

// Numbers of items (QEMU, `include/standard-headers/linux/qemu_fw_cfg.h`).
const SIGNATURE: u16 = 0x00;
const INTERFACE: u16 = 0x01;
const UUID: u16 = 0x02;
const RAM_SIZE: u16 = 0x03;
const NO_GRAPHIC: u16 = 0x04;
const CPUS: u16 = 0x05;
const KERNEL_SIZE: u16 = 0x08;
const INITRD_SIZE: u16 = 0x0b;
const BOOT_MENU: u16 = 0x0e;
const MAX_CPUS: u16 = 0x0f;
const KERNEL_ENTRY: u16 = 0x10;
const KERNEL_DATA: u16 = 0x11;
const INITRD_DATA: u16 = 0x12;
const CMDLINE_SIZE: u16 = 0x14;
const CMDLINE_DATA: u16 = 0x15;
const SETUP_SIZE: u16 = 0x17;
const SETUP_DATA: u16 = 0x18;
const DIRECTORY: u16 = 0x19;
/// Of the named files.
const FIRST_FILE: u16 = 0x20;

/// Bits of a selector that number an item; above them are the write channel, which is ignored, and items of an
/// architecture, of which there are none.
const NUMBER_MASK: u16 = 0x3fff;
const OF_ARCHITECTURE: u16 = 0x8000;
/// The traditional interface, and DMA.
const INTERFACES: u32 = 1 | 1 << 1;
/// Bytes of a boot file that are read at a time: most guests read byte by byte.
const WINDOW_BYTES: usize = 4096;

static FAILED: LogLimit = LogLimit::new();

/// A range of the guest's memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// Guest address.
    pub base: u64,
    /// Length.
    pub len_bytes: u64,
}

/// What the items say about the machine.
#[derive(Debug, Clone)]
pub struct Facts<'a> {
    /// RAM.
    pub ram_bytes: u64,
    /// vCPUs: none can be added, so that is their maximum, too.
    pub cpus: u8,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Usable memory.
    pub usable: &'a [MemoryRange],
    /// The user's files.
    pub user: &'a [UserItem],
}

/// Numbers of the files that a guest was booted from. They stay with it when it moves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSizes {
    /// Where the kernel was entered.
    pub entry: u32,
    /// Bytes of the kernel behind its setup code.
    pub kernel_bytes: u32,
    /// Bytes of a bzImage's setup code.
    pub setup_bytes: u32,
    /// Bytes of the initrd, or of the first module.
    pub initrd_bytes: u32,
}

/// A file that can be read at any offset.
pub trait BootContent: Send + Sync {
    /// Its length.
    fn len_bytes(&self) -> u64;
    /// Fills `into` from `offset_bytes`, which is in the file.
    ///
    /// # Errors
    /// If it cannot be read.
    fn read_at(&self, offset_bytes: u64, into: &mut [u8]) -> io::Result<()>;
}

/// A boot file.
pub type BootData = Arc<dyn BootContent>;

/// The files that a guest was booted from.
#[derive(Clone, Default)]
pub struct BootFiles {
    /// The kernel, with its setup code.
    pub kernel: Option<BootData>,
    /// The initrd, or the first module.
    pub initrd: Option<BootData>,
}

impl fmt::Debug for BootFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = |file: &Option<BootData>| file.as_ref().map(|file| file.len_bytes());
        write!(f, "BootFiles of {:?} and {:?} bytes", len(&self.kernel), len(&self.initrd))
    }
}

/// All items.
#[derive(Debug)]
pub struct Items {
    small: BTreeMap<u16, Arc<[u8]>>,
    boot: BootSizes,
    files: BootFiles,
    window: Window,
}

/// The part of a boot file that was read last.
#[derive(Debug, Default)]
struct Window {
    item: u16,
    start: u32,
    bytes: Vec<u8>,
}

#[expect(clippy::little_endian_bytes, reason = "numbers in items are little-endian")]
fn number<const N: usize>(number: u64) -> Arc<[u8]> {
    number.to_le_bytes()[..N].into()
}

impl Items {
    /// The items of a machine, without boot files.
    pub fn new(facts: &Facts<'_>) -> Self {
        let mut cmdline = facts.cmdline.as_bytes().to_vec();
        cmdline.push(0);
        let mut small: BTreeMap<u16, Arc<[u8]>> = BTreeMap::from([
            (SIGNATURE, Arc::from(*b"QEMU")),
            (INTERFACE, number::<4>(INTERFACES.into())),
            (UUID, Arc::from([0; 16])),
            (RAM_SIZE, number::<8>(facts.ram_bytes)),
            (NO_GRAPHIC, number::<2>(1)),
            (CPUS, number::<2>(facts.cpus.into())),
            (BOOT_MENU, number::<2>(0)),
            (MAX_CPUS, number::<2>(facts.cpus.into())),
            (CMDLINE_SIZE, number::<4>(cmdline.len() as u64)),
            (CMDLINE_DATA, cmdline.into()),
        ]);
        let e820 = (E820_FILE, e820(facts.usable));
        let user = facts.user.iter().map(|item| (item.name.as_str(), item.content.clone()));
        // As in QEMU, the directory is sorted by name.
        let files: BTreeMap<_, _> = user.chain([e820]).collect();
        small.insert(DIRECTORY, directory(&files));
        small.extend((FIRST_FILE..).zip(files.into_values()));
        let (files, window) = (BootFiles::default(), Window::default());
        Self { small, boot: BootSizes::default(), files, window }
    }

    pub(super) fn boot_sizes(&self) -> BootSizes {
        self.boot
    }

    pub(super) fn set_boot_sizes(&mut self, boot: BootSizes) {
        let BootSizes { entry, kernel_bytes, setup_bytes, initrd_bytes } = boot;
        let numbers = [
            (KERNEL_ENTRY, entry),
            (KERNEL_SIZE, kernel_bytes),
            (SETUP_SIZE, setup_bytes),
            (INITRD_SIZE, initrd_bytes),
        ];
        self.small.extend(numbers.map(|(key, value)| (key, number::<4>(value.into()))));
        self.boot = boot;
        self.window = Window::default();
    }

    pub(super) fn set_boot_files(&mut self, files: BootFiles) {
        let of = |file: &Option<BootData>| file.as_ref().map_or(0, |file| file.len_bytes());
        let BootSizes { entry: _, kernel_bytes, setup_bytes, initrd_bytes } = self.boot;
        let kernel_bytes = u64::from(kernel_bytes) + u64::from(setup_bytes);
        if (of(&files.kernel), of(&files.initrd)) == (kernel_bytes, initrd_bytes.into()) {
            self.files = files;
            self.window = Window::default();
        }
    }

    /// Copies the bytes of an item from `offset` on; zeroes behind its end, and of one that is not there.
    pub(super) fn read(&mut self, selector: u16, offset: u32, into: &mut [u8]) {
        into.fill(0);
        if selector & OF_ARCHITECTURE != 0 {
            return;
        }
        let item = selector & NUMBER_MASK;
        if let Some(bytes) = self.small.get(&item) {
            let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
            let from = from.unwrap_or_default();
            let count = from.len().min(into.len());
            into[..count].copy_from_slice(&from[..count]);
            return;
        }
        if let Err(error) = self.read_boot_file(item, offset, into)
            && let Some(suppressed) = FAILED.allow()
        {
            log::warn!("fw_cfg: a boot file cannot be read: {error}{suppressed}");
        }
    }

    /// The part of a boot file that is an item: the file, the part's start and length.
    fn boot_part(&self, item: u16) -> Option<(BootData, u64, u32)> {
        let BootSizes { entry: _, kernel_bytes, setup_bytes, initrd_bytes } = self.boot;
        let (file, start, len) = match item {
            KERNEL_DATA => (&self.files.kernel, setup_bytes.into(), kernel_bytes),
            SETUP_DATA => (&self.files.kernel, 0, setup_bytes),
            INITRD_DATA => (&self.files.initrd, 0, initrd_bytes),
            _ => return None,
        };
        Some((file.clone()?, start, len))
    }

    fn read_boot_file(&mut self, item: u16, offset: u32, into: &mut [u8]) -> io::Result<()> {
        let Some((file, start, len)) = self.boot_part(item) else { return Ok(()) };
        let Some(left) = len.checked_sub(offset).filter(|left| *left > 0) else { return Ok(()) };
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        let count = left.min(into.len());
        let into = &mut into[..count];
        if count >= WINDOW_BYTES {
            return file.read_at(start + u64::from(offset), into);
        }
        let has = |window: &Window| {
            let at = usize::try_from(offset.checked_sub(window.start)?).ok()?;
            (window.item == item && at + count <= window.bytes.len()).then_some(at)
        };
        if has(&self.window).is_none() {
            let mut bytes = std::mem::take(&mut self.window).bytes;
            bytes.resize(left.min(WINDOW_BYTES), 0);
            file.read_at(start + u64::from(offset), &mut bytes)?;
            self.window = Window { item, start: offset, bytes };
        }
        if let Some(at) = has(&self.window) {
            into.copy_from_slice(&self.window.bytes[at..at + count]);
        }
        Ok(())
    }
}

/// Entries of 20 bytes: address, length, type.
#[expect(clippy::little_endian_bytes, reason = "as a BIOS reports memory")]
fn e820(usable: &[MemoryRange]) -> Arc<[u8]> {
    const RAM: u32 = 1;
    let entry = |range: &MemoryRange| {
        let (base, len) = (range.base.to_le_bytes(), range.len_bytes.to_le_bytes());
        [&base[..], &len, &RAM.to_le_bytes()].concat()
    };
    usable.iter().flat_map(entry).collect()
}

/// The count, then entries of 64 bytes: length, number, 2 reserved bytes, and the name with zeroes.
#[expect(clippy::big_endian_bytes, reason = "the directory is big-endian")]
fn directory(files: &BTreeMap<&str, Arc<[u8]>>) -> Arc<[u8]> {
    // Both are bounded far below these types.
    let count = u32::try_from(files.len()).unwrap_or(u32::MAX);
    let mut bytes = count.to_be_bytes().to_vec();
    for (number, (name, content)) in (FIRST_FILE..).zip(files) {
        bytes.extend(u32::try_from(content.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(number.to_be_bytes());
        bytes.extend([0; 2]);
        let mut field = [0; MAX_NAME_BYTES + 1];
        field.iter_mut().zip(name.bytes().take(MAX_NAME_BYTES)).for_each(|(to, from)| *to = from);
        bytes.extend(field);
    }
    bytes.into()
}
