//! One KVM virtual machine: memory slots, in-kernel interrupt controllers and PIT, eventfds and the
//! dirty log. vCPUs are created here and handed to their threads.

use super::ioctls::{KVM_CLEAR_DIRTY_LOG, KVM_GET_DIRTY_LOG};
use super::vcpu::{Vcpu, install_kick_handler};
use super::{Host, KvmError, ioctl};
use devices::ram::{GuestRam, PAGE_SIZE, PageIndex, RamBlock, RamLayout};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, VmFd};
use std::os::fd::AsRawFd;
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

/// Where KVM keeps three pages of its own on Intel hosts; inside the hole below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// How the dirty log is cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyLogMode {
    /// `KVM_CLEAR_DIRTY_LOG` clears given pages, just before the copy; all pages start dirty, so enabling
    /// the log is free.
    ManualInitiallySet,
    /// As above, but enabling the log write-protects every page.
    Manual,
    /// Reading the log clears it.
    ClearOnRead,
}

/// A virtual machine with its RAM.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    ram: GuestRam,
    layout: RamLayout,
    dirty_log_mode: DirtyLogMode,
}

impl Vm {
    /// Creates a VM: memory slots first, because adding one after the irqchip takes 10 ms, then irqchip and
    /// PIT, which must exist before any vCPU.
    pub fn create(host: &Host, ram: GuestRam, layout: RamLayout) -> Result<Self, KvmError> {
        let fd = ioctl("KVM_CREATE_VM", host.kvm().create_vm())?;
        let dirty_log_mode = enable_manual_dirty_log(&fd);
        let vm = Self { fd, ram, layout, dirty_log_mode };
        vm.set_slots(0)?;
        ioctl("KVM_SET_IDENTITY_MAP_ADDR", vm.fd.set_identity_map_address(IDENTITY_MAP_ADDRESS))?;
        ioctl("KVM_SET_TSS_ADDR", vm.fd.set_tss_address(TSS_ADDRESS))?;
        ioctl("KVM_CREATE_IRQCHIP", vm.fd.create_irq_chip())?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        ioctl("KVM_CREATE_PIT2", vm.fd.create_pit2(pit))?;
        Ok(vm)
    }

    /// The VM's file, for state ioctls in this folder.
    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Guest RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The layout of RAM.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// How the dirty log is cleared on this host.
    pub fn dirty_log_mode(&self) -> DirtyLogMode {
        self.dirty_log_mode
    }

    /// Creates vCPU `index`.
    pub fn create_vcpu(&self, index: u8) -> Result<Vcpu, KvmError> {
        // Before its thread exists: a kick without a handler would kill the process.
        install_kick_handler()?;
        Ok(Vcpu::new(ioctl("KVM_CREATE_VCPU", self.fd.create_vcpu(u64::from(index)))?, index))
    }

    /// Raises `gsi` as an edge whenever `event` is signalled.
    pub fn route_irq(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        ioctl("KVM_IRQFD", self.fd.register_irqfd(event, gsi))
    }

    /// Raises or lowers the level of `gsi`, for devices that hold their line.
    pub fn set_line(&self, gsi: u32, high: bool) -> Result<(), KvmError> {
        ioctl("KVM_IRQ_LINE", self.fd.set_irq_line(gsi, high))
    }

    /// Signals `event` when the guest writes the 32-bit value `value` to MMIO address `address`.
    pub fn route_notify(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(address);
        ioctl("KVM_IOEVENTFD", self.fd.register_ioevent(event, &address, value))
    }

    /// Starts logging writes to RAM.
    pub fn start_dirty_log(&self) -> Result<(), KvmError> {
        self.set_slots(KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Stops logging. Takes tens of milliseconds on a large guest.
    pub fn stop_dirty_log(&self) -> Result<(), KvmError> {
        self.set_slots(0)
    }

    fn set_slots(&self, flags: u32) -> Result<(), KvmError> {
        for (slot, block) in (0..).zip(self.layout.blocks()) {
            let host = self.ram.get_host_address(block.base).map_err(|error| KvmError::State {
                what: "memory slot",
                reason: error.to_string(),
            })?;
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: block.base.0,
                memory_size: block.len_bytes(),
                userspace_addr: host as u64,
            };
            // SAFETY: the region is a live mapping of `self.ram`, one per slot and disjoint; field
            // order drops `self.fd` before `self.ram`, and vCPUs hold the VM by `Arc`.
            let result = unsafe { self.fd.set_user_memory_region(region) };
            ioctl("KVM_SET_USER_MEMORY_REGION", result)?;
        }
        Ok(())
    }

    /// ORs the dirty log of all slots into `bitmap`, one bit per page of RAM. `scratch` is reused
    /// between calls, so that the pause allocates nothing.
    pub fn read_dirty_log(
        &self,
        bitmap: &mut [u64],
        scratch: &mut Vec<u64>,
    ) -> Result<(), KvmError> {
        for (slot, block) in (0..).zip(self.layout.blocks()) {
            let words = word_range(block);
            let target = bitmap.get_mut(words.clone()).ok_or_else(|| KvmError::State {
                what: "dirty log",
                reason: format!("bitmap is too short for slot {slot}"),
            })?;
            scratch.clear();
            scratch.resize(words.len(), 0);
            let log = kvm_dirty_log {
                slot,
                padding1: 0,
                __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
                    dirty_bitmap: scratch.as_mut_ptr().cast(),
                },
            };
            // SAFETY: `scratch` holds one bit for each page of the slot, and a slot's size is a
            // multiple of 64 pages, so that KVM writes exactly `words.len()` words.
            let result = unsafe { ioctl_with_ref(&self.fd, KVM_GET_DIRTY_LOG(), &log) };
            check("KVM_GET_DIRTY_LOG", result)?;
            for (word, logged) in target.iter_mut().zip(&*scratch) {
                *word |= logged;
            }
        }
        Ok(())
    }

    /// Clears the log of the pages set in `mask`, for pages `first` on, and write-protects them
    /// again. `first` must be a multiple of 64 and the range lie in one block.
    pub fn clear_dirty_log(&self, first: PageIndex, mask: &[u64]) -> Result<(), KvmError> {
        if self.dirty_log_mode == DirtyLogMode::ClearOnRead {
            return Ok(());
        }
        let mut mask = mask;
        let mut first = first.0;
        for (slot, block) in (0u32..).zip(self.layout.blocks()) {
            let end = block.first_page.0 + block.page_count;
            if mask.is_empty() || first >= end {
                continue;
            }
            let left_in_block = usize::try_from((end - first) / 64).expect("64-bit host");
            let words = left_in_block.min(mask.len());
            let (now, rest) = mask.split_at(words);
            let page_count = words as u64 * 64;
            let mut log = kvm_clear_dirty_log {
                slot,
                num_pages: u32::try_from(page_count).map_err(|_| KvmError::State {
                    what: "dirty log",
                    reason: format!("cannot clear {page_count} pages at once"),
                })?,
                first_page: first - block.first_page.0,
                __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                    dirty_bitmap: now.as_ptr().cast_mut().cast(),
                },
            };
            // SAFETY: KVM reads `num_pages` bits of `now`, which has exactly that many, and writes
            // none of them.
            let result = unsafe { ioctl_with_mut_ref(&self.fd, KVM_CLEAR_DIRTY_LOG(), &mut log) };
            check("KVM_CLEAR_DIRTY_LOG", result)?;
            first += page_count;
            mask = rest;
        }
        Ok(())
    }
}

impl AsRawFd for Vm {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

/// The words of an all-RAM bitmap that belong to `block`.
pub(crate) fn word_range(block: &RamBlock) -> std::ops::Range<usize> {
    const { assert!(devices::ram::RAM_ALIGNMENT.is_multiple_of(PAGE_SIZE * 64)) };
    let word = |page: u64| usize::try_from(page / 64).expect("64-bit host");
    word(block.first_page.0)..word(block.first_page.0 + block.page_count)
}

fn check(what: &'static str, result: i32) -> Result<(), KvmError> {
    if result == 0 {
        return Ok(());
    }
    Err(KvmError::Ioctl { what, source: std::io::Error::last_os_error() })
}

/// Enables the best dirty log mode that this KVM supports.
fn enable_manual_dirty_log(fd: &VmFd) -> DirtyLogMode {
    let cap = std::ffi::c_ulong::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
    // Negative or absent: no mode is offered.
    let offered = u32::try_from(fd.check_extension_raw(cap)).unwrap_or(0);
    let manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
    let both = manual | KVM_DIRTY_LOG_INITIALLY_SET;
    let modes =
        [(both, DirtyLogMode::ManualInitiallySet), (manual, DirtyLogMode::Manual)].into_iter();
    for (flags, mode) in modes.filter(|(flags, _)| offered & flags == *flags) {
        let mut cap =
            kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        cap.args[0] = u64::from(flags);
        match fd.enable_cap(&cap) {
            Ok(()) => return mode,
            Err(error) => log::debug!("dirty log mode {mode:?} refused: {error}"),
        }
    }
    DirtyLogMode::ClearOnRead
}
