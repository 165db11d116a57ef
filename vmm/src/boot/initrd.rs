//! Places initial ramdisks and modules in RAM, as high as the boot protocol allows, so that a kernel can
//! unpack itself below.

use super::payload::BootFile;
use super::{BootError, low_ram_end, write_file};
use devices::ram::{GuestRam, RamLayout};

/// Where a file lies in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// First byte.
    pub address: u64,
    /// Its length.
    pub len_bytes: u64,
}

const ALIGNMENT: u64 = 4096;

/// Loads `file` below `limit` and above `floor`, in the first block of RAM.
pub(super) fn load(
    file: &BootFile,
    ram: &GuestRam,
    layout: &RamLayout,
    floor: u64,
    limit: u64,
    go_on: &dyn Fn() -> bool,
) -> Result<Placed, BootError> {
    let len_bytes = file.len_bytes();
    let low_end = low_ram_end(layout)?;
    let address = low_end.min(limit).checked_sub(len_bytes).map(|start| start & !(ALIGNMENT - 1));
    let Some(address) = address.filter(|address| *address >= floor) else {
        return Err(BootError::InitrdDoesNotFit {
            file: file.name().to_owned(),
            len_bytes,
            room_bytes: low_end.min(limit).saturating_sub(floor),
            ram_bytes: layout.size_bytes(),
        });
    };
    write_file(file, 0, len_bytes, ram, address, go_on)?;
    Ok(Placed { address, len_bytes })
}

#[cfg(test)]
mod tests {
    use super::super::payload::Role;
    use super::super::test_ram;
    use super::*;
    use devices::ram::GuestAddress;
    use std::io::Write;
    use std::path::Path;
    use vm_memory::Bytes;

    fn open(path: &Path) -> BootFile {
        BootFile::open(Role::Initrd, path).unwrap()
    }

    #[test]
    fn it_lies_as_high_as_it_may_or_is_refused_with_the_sizes() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let (ram, layout) = test_ram(4 << 20);
        let placed = load(&open(file.path()), &ram, &layout, 1 << 20, u64::MAX, &|| true).unwrap();
        assert_eq!(placed, Placed { address: (4 << 20) - 8192, len_bytes: 5000 });
        assert_eq!(ram.read_obj::<u8>(GuestAddress(placed.address + 4999)).unwrap(), 7);
        let placed = load(&open(file.path()), &ram, &layout, 1 << 20, 2 << 20, &|| true).unwrap();
        assert_eq!(placed.address, (2 << 20) - 8192);
        let error = load(&open(file.path()), &ram, &layout, (4 << 20) - 4096, u64::MAX, &|| true)
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("5000") && text.contains("--memory"), "{text}");
        file.as_file().set_len(1 << 40).unwrap();
        assert!(load(&open(file.path()), &ram, &layout, 1 << 20, u64::MAX, &|| true).is_err());
    }
}
