//! Keeps the VMM's own memory small. Called by `main` before the first thread starts, and by the
//! supervisor once the guest runs.

use std::ffi::{c_int, c_void};

/// Has all threads allocate from one heap. Each would otherwise get one of its own, of which it touches
/// some 100 KiB; threads here allocate rarely, and never per page or per request.
pub fn use_one_heap() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: sets a parameter of the allocator; no other thread exists yet.
        let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
        if set == 0 {
            log::debug!("the allocator keeps a heap for each thread");
        }
    }
}

/// Returns what reading the command line and building the machine needed: free heap pages, and pages of
/// the program's code, most of which runs once. Code that is needed again is mapped again from the page
/// cache.
pub fn return_start_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: releases pages that the allocator holds free; nothing refers to them.
    unsafe {
        libc::malloc_trim(0);
    }
    // SAFETY: `unmap_code` follows the signature that the C library expects, and ignores its data.
    unsafe { libc::dl_iterate_phdr(Some(unmap_code), std::ptr::null_mut()) };
}

/// Drops the mapped code pages of the program, the first object of the list.
unsafe extern "C" fn unmap_code(
    object: *mut libc::dl_phdr_info,
    _: libc::size_t,
    _: *mut c_void,
) -> c_int {
    // SAFETY: the C library passes a valid object with `dlpi_phnum` headers at `dlpi_phdr`.
    let (base, headers) = unsafe {
        let object = &*object;
        let count = usize::from(object.dlpi_phnum);
        (object.dlpi_addr, std::slice::from_raw_parts(object.dlpi_phdr, count))
    };
    const PAGE: u64 = 4096;
    for header in headers {
        let code = header.p_type == libc::PT_LOAD
            && header.p_flags & libc::PF_X != 0
            && header.p_flags & libc::PF_W == 0;
        if !code {
            continue;
        }
        let start = (base + header.p_vaddr).next_multiple_of(PAGE);
        let end = (base + header.p_vaddr + header.p_memsz) / PAGE * PAGE;
        if let (Ok(start), Ok(len)) =
            (usize::try_from(start), usize::try_from(end.saturating_sub(start)))
        {
            // SAFETY: a read-only mapping of the program's file, whose pages are the file's: dropping
            // them loses nothing, the next access maps them again.
            let result = unsafe {
                libc::madvise(
                    std::ptr::with_exposed_provenance_mut(start),
                    len,
                    libc::MADV_DONTNEED,
                )
            };
            if result != 0 {
                log::debug!("code pages stay: {}", std::io::Error::last_os_error());
            }
        }
    }
    // Only the first object: it is the program itself.
    1
}
