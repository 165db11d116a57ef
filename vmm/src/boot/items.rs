//! What fw_cfg tells a guest about the files that it was booted from, and about its memory.

use super::payload::{BootFile, BootPayload};
use super::{BootError, EntryPoint, bzimage, usable_ram};
use devices::fw_cfg::{BootContent, BootData, BootFiles, BootSizes, MemoryRange};
use devices::ram::RamLayout;
use std::io;
use std::sync::Arc;

impl BootContent for BootFile {
    fn len_bytes(&self) -> u64 {
        self.len_bytes()
    }

    fn read_at(&self, offset_bytes: u64, into: &mut [u8]) -> io::Result<()> {
        self.read_at(offset_bytes, into)
    }
}

/// The files of a payload: the kernel, and the initrd or the first module. One whose length has no place in fw_cfg
/// is left out.
pub fn boot_files(payload: &BootPayload) -> BootFiles {
    let data = |file: &Arc<BootFile>| -> Option<BootData> {
        u32::try_from(file.len_bytes()).ok().map(|_| file.clone() as BootData)
    };
    BootFiles {
        kernel: payload.kernel().ok().and_then(|kernel| data(&kernel.file)),
        initrd: payload.beside_kernel().first().and_then(|initrd| data(&initrd.file)),
    }
}

/// Their numbers, for a kernel that is entered at `entry`.
///
/// # Errors
/// If the kernel cannot be read.
pub fn boot_sizes(payload: &BootPayload, entry: EntryPoint) -> Result<BootSizes, BootError> {
    let len = |data: Option<BootData>| {
        // Others have been left out.
        data.map_or(0, |data| u32::try_from(data.len_bytes()).unwrap_or_default())
    };
    let files = boot_files(payload);
    let (kernel, initrd_bytes) = (len(files.kernel), len(files.initrd));
    let head = payload.kernel()?.file.head(super::HEAD_BYTES)?;
    let setup_bytes = bzimage::setup_bytes(&head).min(kernel);
    let entry = match entry {
        EntryPoint::Pvh { address }
        | EntryPoint::Multiboot { address, .. }
        | EntryPoint::Linux32 { address, .. }
        | EntryPoint::Linux64 { address } => address,
    };
    // Kernels are loaded below 4 GiB.
    let entry = u32::try_from(entry).unwrap_or_default();
    Ok(BootSizes { entry, kernel_bytes: kernel - setup_bytes, setup_bytes, initrd_bytes })
}

/// The guest's usable memory.
pub fn memory_map(layout: &RamLayout) -> Vec<MemoryRange> {
    let ranges = usable_ram(layout).into_iter();
    ranges.map(|(base, len_bytes)| MemoryRange { base, len_bytes }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let (kernel, initrd) = (folder.path().join("kernel"), folder.path().join("initrd"));
        std::fs::write(&initrd, [7; 1234]).unwrap();
        // A bzImage with two sectors of setup code, then an ELF.
        let mut image = vec![0; 5000];
        image[0x1f1] = 2;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        for (image, setup_bytes) in [(image, 1536), (b"\x7fELF".repeat(1250), 0)] {
            std::fs::write(&kernel, image).unwrap();
            let payload = BootPayload::open(&kernel, Some(&initrd)).unwrap();
            let entry = EntryPoint::Linux64 { address: 0x10_0200 };
            let sizes = boot_sizes(&payload, entry).unwrap();
            let kernel_bytes = 5000 - setup_bytes;
            let expected =
                BootSizes { entry: 0x10_0200, kernel_bytes, setup_bytes, initrd_bytes: 1234 };
            assert_eq!(sizes, expected);
            let mut bytes = [0; 2];
            boot_files(&payload).initrd.unwrap().read_at(1232, &mut bytes).unwrap();
            assert_eq!(bytes, [7; 2]);
        }
    }
}
