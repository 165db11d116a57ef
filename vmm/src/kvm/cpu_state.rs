//! Saves and restores one vCPU's registers as plain data, in the order that KVM needs. Called by
//! `machine::vcpus`.
//!
//! Saving: MP_STATE first (reading it can process a pending INIT and change the LAPIC), VCPU_EVENTS
//! last. Restoring: CPUID2 and TSC_KHZ (when the machine is built), MP_STATE, REGS, SREGS (APIC base), XCRS, XSAVE, DEBUGREGS,
//! LAPIC, MSRs, TSC offset, TSC_DEADLINE (takes effect only with a configured LAPIC), VCPU_EVENTS
//! (SET_REGS would clear them). Any other order of the middle silently kills the timer.

use super::blob::{Blob, Bytes};
use super::ioctls::{KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR};
use super::msrs::{self, MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE};
use super::nested;
use super::vcpu::Vcpu;
use super::vm::Vm;
use super::{Host, KvmError, ioctl};
use devices::state::at_most;
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Xsave, kvm_cpuid_entry2,
    kvm_debugregs, kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};
use std::sync::Once;
use vmm_sys_util::ioctl::ioctl_with_ref;

/// Bytes of the XSAVE image that every host has.
const LEGACY_XSAVE_BYTES: usize = 4096;
/// More than any CPU's XSAVE area; limits what a stream can make us allocate.
const MAX_XSAVE_BYTES: usize = 64 << 10;

/// Restoring a vCPU takes less time: a TSC further ahead is wrong.
const MAX_TSC_LEAD_MS: u64 = 60_000;

/// The complete KVM state of one vCPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// Guest TSC minus host TSC, modulo 2^64, if KVM reports it.
    pub tsc_offset: Option<u64>,
    /// Runnable, halted, waiting for SIPI.
    pub mp_state: u32,
    regs: Blob<kvm_regs>,
    sregs: Blob<kvm_sregs>,
    xcrs: Blob<kvm_xcrs>,
    /// The XSAVE image, without any length prefix.
    xsave: Bytes<MAX_XSAVE_BYTES>,
    debug_regs: Blob<kvm_debugregs>,
    lapic: Blob<[u8; 1024]>,
    /// Pairs of MSR index and value.
    #[serde(deserialize_with = "at_most::<_, _, { msrs::MAX_MSRS }>")]
    msrs: Vec<(u32, u64)>,
    events: Blob<kvm_vcpu_events>,
}

/// Properties of the host's KVM needed to save and restore; probed once, outside the pause.
#[derive(Debug, Clone)]
pub struct CpuStateLayout {
    msr_indices: Vec<u32>,
    xsave_bytes: usize,
    /// Whether KVM reports nested state.
    nested_state: bool,
    /// Whether the guest is offered nested virtualization.
    nested: bool,
}

impl CpuStateLayout {
    /// Queries the MSRs to save and the size of an XSAVE image. `nested`: the guest is offered VMX or SVM.
    pub fn probe(host: &Host, vm: &Vm, nested: bool) -> Result<Self, KvmError> {
        let list = ioctl("KVM_GET_MSR_INDEX_LIST", host.kvm().get_msr_index_list())?;
        // 0 or negative: this KVM has no `KVM_GET_XSAVE2`.
        let xsave_bytes = usize::try_from(vm.fd().check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            msr_indices: list.as_slice().to_vec(),
            xsave_bytes: xsave_bytes.max(LEGACY_XSAVE_BYTES),
            nested_state: vm.fd().check_extension_int(Cap::NestedState) > 0,
            nested,
        })
    }

    /// Adds MSRs that KVM has but does not list, and drops those that cannot be read, so that later saves
    /// need few ioctls.
    pub fn keep_readable(&mut self, vcpu: &Vcpu) -> Result<(), KvmError> {
        self.msr_indices = msrs::readable(vcpu, &self.msr_indices)?;
        Ok(())
    }
}

impl VcpuState {
    /// Reads the state. The vCPU must be stopped with its last access completed.
    ///
    /// # Errors
    /// A failed ioctl, or nested virtualization in use, whose state is not saved.
    pub fn save(vcpu: &Vcpu, layout: &CpuStateLayout) -> Result<Self, KvmError> {
        let fd = vcpu.fd();
        let mp_state = ioctl("KVM_GET_MP_STATE", fd.get_mp_state())?.mp_state;
        let regs = Blob(ioctl("KVM_GET_REGS", fd.get_regs())?);
        let sregs = Blob(ioctl("KVM_GET_SREGS", fd.get_sregs())?);
        let kvm = if layout.nested_state { Some(read_nested_state(vcpu)?) } else { None };
        nested::Use { cr4: sregs.0.cr4, efer: sregs.0.efer, kvm }.check()?;
        let xsave = read_xsave(vcpu, layout.xsave_bytes)?;
        let xcrs = Blob(ioctl("KVM_GET_XCRS", fd.get_xcrs())?);
        let debug_regs = Blob(ioctl("KVM_GET_DEBUGREGS", fd.get_debug_regs())?);
        let lapic = ioctl("KVM_GET_LAPIC", fd.get_lapic())?;
        let tsc_offset = read_tsc_offset(vcpu);
        let mut msrs = msrs::read(vcpu, &layout.msr_indices)?;
        refire_lost_timer(&mut msrs);
        let events = Blob(ioctl("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?);
        Ok(Self {
            tsc_offset,
            mp_state,
            regs,
            sregs,
            xcrs,
            xsave,
            debug_regs,
            lapic: Blob(lapic.regs.map(|byte| byte.cast_unsigned())),
            msrs,
            events,
        })
    }

    /// Validates untrusted state before it is passed to KVM.
    pub fn validate(&self) -> Result<(), KvmError> {
        let invalid = |reason: String| Err(KvmError::State { what: "vCPU state", reason });
        msrs::validate(&self.msrs)?;
        nested::Use { cr4: self.sregs.0.cr4, efer: self.sregs.0.efer, kvm: None }.check()?;
        let bytes = self.xsave.0.len();
        if !(LEGACY_XSAVE_BYTES..=MAX_XSAVE_BYTES).contains(&bytes) || !bytes.is_multiple_of(4) {
            return invalid(format!("XSAVE image of {bytes} bytes"));
        }
        Ok(())
    }

    /// Advances the saved TSC by `ticks`.
    pub fn advance_tsc(&mut self, ticks: u64) {
        for msr in self.msrs.iter_mut().filter(|msr| msr.0 == MSR_IA32_TSC) {
            msr.1 = msr.1.wrapping_add(ticks);
        }
    }

    /// An offset is exact, but not comparable if a host scales the TSC: if it puts the TSC far from the
    /// saved value, restore the value and let KVM compute an offset.
    fn keep_tsc_going(&self, vcpu: &Vcpu) -> Result<(), KvmError> {
        let value =
            |msrs: &[(u32, u64)]| msrs.iter().find(|msr| msr.0 == MSR_IA32_TSC).map(|msr| msr.1);
        let now = value(&msrs::read(vcpu, &[MSR_IA32_TSC])?);
        let (Some(wanted), Some(now)) = (value(&self.msrs), now) else { return Ok(()) };
        if goes_on(wanted, now, vcpu.tsc_khz()?) {
            return Ok(());
        }
        log::debug!("the TSC offset gives {now:#x}, the guest left with {wanted:#x}");
        msrs::write(vcpu, &[(MSR_IA32_TSC, wanted)])
    }

    /// Loads the state into a vCPU that has never run. Call [`Self::advance_tsc`] before; `tsc_offset`
    /// replaces the saved one: see [`super::vm_state`].
    ///
    /// # Errors
    /// A state that [`Self::validate`] refuses, a failed ioctl, or a register whose value the guest would lose.
    pub fn restore(
        &self,
        vcpu: &Vcpu,
        layout: &CpuStateLayout,
        tsc_offset: Option<u64>,
    ) -> Result<(), KvmError> {
        self.validate()?;
        let fd = vcpu.fd();
        ioctl("KVM_SET_MP_STATE", fd.set_mp_state(kvm_mp_state { mp_state: self.mp_state }))?;
        ioctl("KVM_SET_REGS", fd.set_regs(&self.regs.0))?;
        ioctl("KVM_SET_SREGS", fd.set_sregs(&self.sregs.0))?;
        ioctl("KVM_SET_XCRS", fd.set_xcrs(&self.xcrs.0))?;
        write_xsave(vcpu, &self.xsave.0, layout.xsave_bytes)?;
        ioctl("KVM_SET_DEBUGREGS", fd.set_debug_regs(&self.debug_regs.0))?;
        let regs = self.lapic.0.map(|byte| byte.cast_signed());
        ioctl("KVM_SET_LAPIC", fd.set_lapic(&kvm_lapic_state { regs }))?;
        msrs::write(vcpu, &msrs::to_restore(&self.msrs, layout.nested))?;
        if let Some(offset) = tsc_offset {
            write_tsc_offset(vcpu, offset);
            self.keep_tsc_going(vcpu)?;
        }
        let deadline = self.msrs.iter().filter(|msr| msr.0 == MSR_IA32_TSC_DEADLINE);
        msrs::write(vcpu, &deadline.copied().collect::<Vec<_>>())?;
        ioctl("KVM_SET_VCPU_EVENTS", fd.set_vcpu_events(&self.events.0))
    }
}

/// Sets the vCPU's CPUID.
pub fn set_cpuid(vcpu: &Vcpu, entries: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    let cpuid = CpuId::from_entries(entries)
        .map_err(|error| KvmError::State { what: "CPUID", reason: format!("{error:?}") })?;
    ioctl("KVM_SET_CPUID2", vcpu.fd().set_cpuid2(&cpuid))
}

/// CPUID as the guest will see it: some hosts force bits on whatever was set.
pub fn effective_cpuid(vcpu: &Vcpu) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    let cpuid = ioctl("KVM_GET_CPUID2", vcpu.fd().get_cpuid2(KVM_MAX_CPUID_ENTRIES))?;
    Ok(cpuid.as_slice().to_vec())
}

/// Sets the TSC frequency, if the host can scale it.
pub fn set_tsc_khz(vcpu: &Vcpu, khz: u32) -> Result<(), KvmError> {
    if vcpu.tsc_khz()? != khz
        && let Err(error) = vcpu.fd().set_tsc_khz(khz)
    {
        log::warn!("the guest's TSC keeps this host's frequency, not {khz} kHz: {error}");
    }
    Ok(())
}

/// Sets the initial registers of a cold boot.
pub fn set_boot_registers(
    vcpu: &Vcpu,
    regs: &kvm_regs,
    change_sregs: impl FnOnce(&mut kvm_sregs),
) -> Result<(), KvmError> {
    let mut sregs = ioctl("KVM_GET_SREGS", vcpu.fd().get_sregs())?;
    change_sregs(&mut sregs);
    ioctl("KVM_SET_SREGS", vcpu.fd().set_sregs(&sregs))?;
    ioctl("KVM_SET_REGS", vcpu.fd().set_regs(regs))
}

/// A timer that fired just before the save, but was not delivered, reads as a deadline of 0. Setting
/// it to now costs an idle guest at most one early tick; losing it can stop a guest for good.
fn refire_lost_timer(msrs: &mut [(u32, u64)]) {
    let Some(now) = msrs.iter().find(|msr| msr.0 == MSR_IA32_TSC).map(|msr| msr.1) else { return };
    for msr in msrs.iter_mut().filter(|msr| **msr == (MSR_IA32_TSC_DEADLINE, 0)) {
        msr.1 = now;
    }
}

fn read_nested_state(vcpu: &Vcpu) -> Result<nested::KvmView, KvmError> {
    let mut state = KvmNestedStateBuffer::empty();
    ioctl("KVM_GET_NESTED_STATE", vcpu.fd().nested_state(&mut state))?;
    Ok(nested::KvmView::from(&state))
}

fn new_xsave(bytes: usize) -> Result<Xsave, KvmError> {
    Xsave::new((bytes - LEGACY_XSAVE_BYTES).div_ceil(4))
        .map_err(|error| KvmError::State { what: "XSAVE image", reason: format!("{error:?}") })
}

fn read_xsave(vcpu: &Vcpu, bytes: usize) -> Result<Bytes<MAX_XSAVE_BYTES>, KvmError> {
    let words: Vec<u32> = if bytes > LEGACY_XSAVE_BYTES {
        let mut xsave = new_xsave(bytes)?;
        // SAFETY: `xsave` was made for `bytes`, what KVM_CAP_XSAVE2 says that this VM's image takes.
        ioctl("KVM_GET_XSAVE2", unsafe { vcpu.fd().get_xsave2(&mut xsave) })?;
        let legacy = xsave.as_fam_struct_ref().xsave.region;
        legacy.iter().chain(xsave.as_slice()).copied().collect()
    } else {
        ioctl("KVM_GET_XSAVE", vcpu.fd().get_xsave())?.region.to_vec()
    };
    Ok(Bytes(zerocopy::IntoBytes::as_bytes(words.as_slice()).to_vec()))
}

fn write_xsave(vcpu: &Vcpu, image: &[u8], host_bytes: usize) -> Result<(), KvmError> {
    // Never less than what KVM will read: the tail stays zero, which is its initial state.
    let mut xsave = new_xsave(image.len().max(host_bytes))?;
    let (words, _) = image.as_chunks::<4>();
    #[expect(clippy::host_endian_bytes, reason = "the inverse of as_bytes over u32 words")]
    let mut words = words.iter().map(|word| u32::from_ne_bytes(*word));
    // SAFETY: only the fixed-size legacy region is written through this reference.
    let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
    region.iter_mut().zip(&mut words).for_each(|(to, from)| *to = from);
    xsave.as_mut_slice().iter_mut().zip(&mut words).for_each(|(to, from)| *to = from);
    // SAFETY: KVM reads `host_bytes` at most, as KVM_CAP_XSAVE2 of this VM said.
    ioctl("KVM_SET_XSAVE", unsafe { vcpu.fd().set_xsave2(&xsave) })
}

fn tsc_offset_attr(address: u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: address,
    }
}

fn read_tsc_offset(vcpu: &Vcpu) -> Option<u64> {
    let mut offset = 0u64;
    let attr = tsc_offset_attr(std::ptr::from_mut(&mut offset) as u64);
    // SAFETY: KVM writes 8 bytes to `offset`, which outlives the call.
    let result = unsafe { ioctl_with_ref(vcpu.fd(), KVM_GET_DEVICE_ATTR(), &attr) };
    (result == 0).then_some(offset)
}

fn write_tsc_offset(vcpu: &Vcpu, offset: u64) {
    let attr = tsc_offset_attr(std::ptr::from_ref(&offset) as u64);
    // SAFETY: KVM reads 8 bytes of `offset`, which outlives the call.
    let result = unsafe { ioctl_with_ref(vcpu.fd(), KVM_SET_DEVICE_ATTR(), &attr) };
    if result != 0 {
        log::warn!("cannot set the TSC offset: {}", std::io::Error::last_os_error());
        return;
    }
    let Some(now) = read_tsc_offset(vcpu).filter(|now| *now != offset) else { return };
    // A software KVM reports success but still exposes the host's TSC, which is just as continuous for a
    // guest that stays on this host. With an unknown frequency any difference counts.
    let is_noticed = |khz| is_noticed(now.wrapping_sub(offset), khz);
    if vcpu.tsc_khz().map_or(true, is_noticed) {
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            log::warn!(
                "this host's KVM ignores the TSC offset: the guest's TSC jumps on its arrival"
            );
        });
    }
}

/// Whether `now`, read a moment later, continues a TSC from `wanted`.
fn goes_on(wanted: u64, now: u64, khz: u32) -> bool {
    now.wrapping_sub(wanted) <= u64::from(khz) * MAX_TSC_LEAD_MS
}

/// Whether a guest would notice a TSC error of `ticks` (modulo 2^64): hosts' clocks also differ by a few
/// milliseconds.
fn is_noticed(ticks: u64, khz: u32) -> bool {
    ticks.min(ticks.wrapping_neg()) > u64::from(khz) * 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tsc_that_jumps_is_noticed_in_both_directions() {
        let (khz, second) = (2_000_000, 2_000_000_000_u64);
        assert!(is_noticed(second, khz) && is_noticed(second.wrapping_neg(), khz));
        let millisecond = second / 1000;
        assert!(!is_noticed(millisecond, khz) && !is_noticed(millisecond.wrapping_neg(), khz));
    }

    #[test]
    fn an_offset_that_puts_the_tsc_back_or_far_ahead_does_not_count() {
        let (khz, second) = (2_000_000, 2_000_000_000_u64);
        assert!(goes_on(second, second, khz) && goes_on(second, second + 1000, khz));
        assert!(!goes_on(second, second - 1, khz), "never backwards");
        assert!(!goes_on(second, 1000 * second, khz));
        assert!(goes_on(u64::MAX - 5, 5, khz), "a TSC that wraps goes on");
    }

    fn saved_by_version_1() -> VcpuState {
        serde_json::from_str(include_str!("testdata/vcpu-v1.json")).unwrap()
    }

    #[test]
    fn a_state_of_today_without_mtrrs_and_machine_checks_still_loads() {
        let state = saved_by_version_1();
        state.validate().unwrap();
        assert_eq!((state.msrs.len(), state.tsc_offset), (43, Some(0)));
        assert!(state.msrs.contains(&(0x277, 0x0007_0406_0007_0406)), "PAT");
        assert!(state.msrs.iter().all(|msr| msr.0 != 0x2ff), "MTRRs came later");
    }

    #[test]
    fn a_state_that_uses_vmx_or_svm_is_refused() {
        let mut state = saved_by_version_1();
        state.sregs.0.cr4 |= 1 << 13;
        assert!(state.validate().unwrap_err().to_string().contains("CR4.VMXE"));
        let mut state = saved_by_version_1();
        state.sregs.0.efer |= 1 << 12;
        assert!(state.validate().unwrap_err().to_string().contains("EFER.SVME"));
    }

    #[test]
    fn a_state_with_a_register_twice_or_too_many_is_refused() {
        let mut state = saved_by_version_1();
        state.msrs.push((0x277, 0));
        assert!(state.validate().unwrap_err().to_string().contains("IA32_PAT"));
        let mut state = saved_by_version_1();
        state.msrs = (0..).take(msrs::MAX_MSRS + 1).map(|index| (index, 0)).collect();
        assert!(state.validate().unwrap_err().to_string().contains("1024"));
    }

    #[test]
    fn only_the_tsc_advances() {
        let (before, mut after) = (saved_by_version_1(), saved_by_version_1());
        after.advance_tsc(7);
        let changed: Vec<_> = before.msrs.iter().zip(&after.msrs).filter(|(a, b)| a != b).collect();
        assert_eq!(changed, [(&(0x10, 5_978_620_546_604), &(0x10, 5_978_620_546_611))]);
    }
}
