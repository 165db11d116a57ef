//! Puts initial ramdisks and modules into RAM: as high as the boot protocol lets them lie, out of the
//! way of a kernel that unpacks itself.

use super::BootError;
use devices::ram::{GuestAddress, GuestRam, RamLayout};
use std::fs::File;
use std::path::Path;
use vm_memory::Bytes;

/// Where a file lies in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// First byte.
    pub address: u64,
    /// Its length.
    pub len_bytes: u64,
}

const ALIGNMENT: u64 = 4096;

/// Puts the file at `path` below `limit` and above `floor`, in the first block of RAM.
pub(super) fn load(
    path: &Path,
    ram: &GuestRam,
    layout: &RamLayout,
    floor: u64,
    limit: u64,
) -> Result<Placed, BootError> {
    let read_error = |source| BootError::ReadInitrd { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(read_error)?;
    let len_bytes = file.metadata().map_err(read_error)?.len();
    let low_end = layout.blocks().first().map_or(0, |block| block.base.0 + block.len_bytes());
    let address = low_end.min(limit).checked_sub(len_bytes).map(|start| start & !(ALIGNMENT - 1));
    let Some(address) = address.filter(|address| *address >= floor) else {
        return Err(BootError::InitrdDoesNotFit {
            path: path.to_owned(),
            len_bytes,
            room_bytes: low_end.min(limit).saturating_sub(floor),
            ram_bytes: layout.size_bytes(),
        });
    };
    let count = usize::try_from(len_bytes).unwrap_or(usize::MAX);
    ram.read_exact_volatile_from(GuestAddress(address), &mut file, count).map_err(|error| {
        BootError::ReadInitrd { path: path.to_owned(), source: std::io::Error::other(error) }
    })?;
    Ok(Placed { address, len_bytes })
}

#[cfg(test)]
mod tests {
    use super::super::test_ram;
    use super::*;
    use std::io::Write;

    #[test]
    fn it_lies_as_high_as_it_may_or_is_refused_with_the_sizes() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let (ram, layout) = test_ram(4 << 20);
        let placed = load(file.path(), &ram, &layout, 1 << 20, u64::MAX).unwrap();
        assert_eq!(placed, Placed { address: (4 << 20) - 8192, len_bytes: 5000 });
        assert_eq!(ram.read_obj::<u8>(GuestAddress(placed.address + 4999)).unwrap(), 7);
        let placed = load(file.path(), &ram, &layout, 1 << 20, 2 << 20).unwrap();
        assert_eq!(placed.address, (2 << 20) - 8192);
        let error = load(file.path(), &ram, &layout, (4 << 20) - 4096, u64::MAX).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("5000") && text.contains("--memory"), "{text}");
        file.as_file().set_len(1 << 40).unwrap();
        assert!(load(file.path(), &ram, &layout, 1 << 20, u64::MAX).is_err());
    }
}
