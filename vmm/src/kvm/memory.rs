//! Maps guest RAM: anonymous, private, advised to use huge pages.

use super::KvmError;
use devices::ram::{GuestRam, RamLayout};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Maps RAM for `layout`. Nothing is touched: every page reads as zero and costs nothing until then.
pub fn allocate(layout: &RamLayout) -> Result<GuestRam, KvmError> {
    let ram = GuestRam::from_ranges(&layout.ranges()).map_err(|error| KvmError::Map {
        bytes: layout.size_bytes(),
        source: std::io::Error::other(error.to_string()),
    })?;
    for region in ram.iter() {
        let (start, len) = (region.get_mmap().as_ptr(), region.len());
        let Ok(len) = usize::try_from(len) else { continue };
        // SAFETY: the range is exactly one live mapping of `ram`; MADV_HUGEPAGE changes neither its
        // content nor its protection.
        let advised = unsafe { libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE) };
        if advised != 0 {
            let error = std::io::Error::last_os_error();
            log::debug!("no transparent huge pages for guest RAM: {error}");
        }
        // SAFETY: as above; guest RAM does not belong into a core dump of the VMM.
        unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTDUMP) };
    }
    Ok(ram)
}
