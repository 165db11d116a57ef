//! Nested virtualization: hidden from every guest, unless `--cpu` has `+vmx` or `+svm`; a vCPU that uses it
//! cannot be migrated.
//!
//! Its state (`KVM_GET_NESTED_STATE`, the VMX capability MSRs, the pages that a VMCS or VMCB points to) is
//! not migrated: a guest that is offered it moves while it does not use it. This is the only place that hides it:
//!
//! * CPUID: VMX (leaf 1), SVM (leaf 0x8000_0001) and SVM's own leaf 0x8000_000A. KVM then refuses what
//!   follows from them: VMXE in CR4, SVME in EFER, the VMX bits of IA32_FEATURE_CONTROL.
//! * MSRs: those of VMX and SVM are neither saved nor restored.
//! * Some hosts show a guest their own CPUID whatever was set: there [`Use::check`] stops the save.

use super::KvmError;
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GIF_SET,
    kvm_cpuid_entry2, kvm_nested_state,
};

/// VMX in ECX of CPUID leaf 1.
pub const CPUID_VMX: u32 = 1 << 5;
/// SVM in ECX of CPUID leaf 0x8000_0001.
pub const CPUID_SVM: u32 = 1 << 2;
/// SVM's revision and features.
const SVM_LEAF: u32 = 0x8000_000a;

const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;

const MSR_FEATURE_CONTROL: u32 = 0x3a;
/// VMXON inside and outside SMX operation.
const FEATURE_CONTROL_VMX: u64 = 1 << 1 | 1 << 2;
/// IA32_VMX_BASIC to IA32_VMX_EXIT_CTLS2.
const VMX_MSRS: std::ops::RangeInclusive<u32> = 0x480..=0x493;
/// VM_CR and VM_HSAVE_PA.
const SVM_MSRS: [u32; 2] = [0xc001_0114, 0xc001_0117];

/// `vmxon_pa` of a vCPU that is not in VMX operation.
const NO_VMXON_REGION: u64 = u64::MAX;

/// Removes VMX from a guest's CPUID.
pub fn hide_vmx(entries: &mut [kvm_cpuid_entry2]) {
    for entry in entries.iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx &= !CPUID_VMX;
    }
}

/// Removes SVM from a guest's CPUID.
pub fn hide_svm(entries: &mut [kvm_cpuid_entry2]) {
    for entry in entries {
        match entry.function {
            0x8000_0001 => entry.ecx &= !CPUID_SVM,
            SVM_LEAF => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
}

/// Whether an MSR means nothing to a guest without VMX and SVM.
pub(super) fn hides_msr(index: u32) -> bool {
    VMX_MSRS.contains(&index) || SVM_MSRS.contains(&index)
}

/// `value` of an MSR without VMX bits: a guest of an earlier version, which offered VMX, may have enabled
/// VMXON in IA32_FEATURE_CONTROL.
pub(super) fn without_vmx(index: u32, value: u64) -> u64 {
    if index == MSR_FEATURE_CONTROL { value & !FEATURE_CONTROL_VMX } else { value }
}

/// The header of a vCPU's nested state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmView {
    flags: u32,
    format: u32,
    size_bytes: u32,
    /// Of [`KVM_STATE_NESTED_FORMAT_VMX`] only.
    vmxon_address: u64,
    /// As above: VMX operation that an SMI interrupted.
    smm_flags: u16,
}

impl From<&KvmNestedStateBuffer> for KvmView {
    fn from(state: &KvmNestedStateBuffer) -> Self {
        // SAFETY: KVM filled the header, and every bit pattern of this member is valid; what it
        // says is used for the format that has it.
        let vmx = unsafe { state.hdr.vmx };
        Self {
            flags: state.flags.into(),
            format: state.format.into(),
            size_bytes: state.size,
            vmxon_address: vmx.vmxon_pa,
            smm_flags: vmx.smm.flags,
        }
    }
}

/// A vCPU's use of nested virtualization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// KVM's nested state, if it has `KVM_CAP_NESTED_STATE`.
    pub kvm: Option<KvmView>,
}

impl Use {
    /// Fails if the vCPU has nested state, which would be lost.
    ///
    /// # Errors
    /// [`KvmError::State`], which says what the guest has switched on.
    pub fn check(&self) -> Result<(), KvmError> {
        let Some(what) = self.found() else { return Ok(()) };
        let reason = format!(
            "{what}: the state of nested virtualization does not travel; unload KVM or other \
             hypervisors in the guest, then try again"
        );
        Err(KvmError::State { what: "nested virtualization", reason })
    }

    fn found(&self) -> Option<String> {
        if let Some(kvm) = self.kvm.and_then(KvmView::in_use) {
            return Some(kvm);
        }
        if self.cr4 & CR4_VMXE != 0 {
            return Some("the guest has switched on VMX (CR4.VMXE)".into());
        }
        (self.efer & EFER_SVME != 0).then(|| "the guest has switched on SVM (EFER.SVME)".to_owned())
    }
}

impl KvmView {
    fn in_use(self) -> Option<String> {
        let in_operation = match self.format {
            KVM_STATE_NESTED_FORMAT_VMX => {
                self.vmxon_address != NO_VMXON_REGION || self.smm_flags != 0
            }
            // The global interrupt flag is set on any vCPU outside an SVM hypervisor's own code.
            KVM_STATE_NESTED_FORMAT_SVM => self.flags & KVM_STATE_NESTED_GIF_SET == 0,
            other => return Some(format!("KVM has nested state of unknown format {other}")),
        };
        let flags = self.flags & !KVM_STATE_NESTED_GIF_SET;
        let beyond_header = usize::try_from(self.size_bytes).is_ok_and(|size| size > HEADER_BYTES);
        (in_operation || flags != 0 || beyond_header)
            .then(|| "the guest runs virtual machines of its own".to_owned())
    }
}

const HEADER_BYTES: usize = size_of::<kvm_nested_state>();

#[cfg(test)]
mod tests {
    use super::*;

    fn idle(format: u32) -> KvmView {
        let svm = format == KVM_STATE_NESTED_FORMAT_SVM;
        KvmView {
            flags: if svm { KVM_STATE_NESTED_GIF_SET } else { 0 },
            format,
            size_bytes: u32::try_from(HEADER_BYTES).unwrap(),
            vmxon_address: if svm { 0 } else { NO_VMXON_REGION },
            smm_flags: 0,
        }
    }

    fn said(cr4: u64, efer: u64, kvm: Option<KvmView>) -> Option<String> {
        Use { cr4, efer, kvm }.check().err().map(|error| error.to_string())
    }

    #[test]
    fn a_vcpu_that_never_touched_it_is_saved() {
        let (cr4, efer) = (0x20 | 1 << 18, 0xd01);
        let (vmx, svm) = (idle(KVM_STATE_NESTED_FORMAT_VMX), idle(KVM_STATE_NESTED_FORMAT_SVM));
        for kvm in [None, Some(vmx), Some(svm)] {
            assert_eq!(said(cr4, efer, kvm), None, "{kvm:?}");
        }
    }

    #[test]
    fn each_sign_of_use_stops_the_save_and_says_why() {
        let (vmx, svm) = (idle(KVM_STATE_NESTED_FORMAT_VMX), idle(KVM_STATE_NESTED_FORMAT_SVM));
        let views = [
            KvmView { vmxon_address: 0x1000, ..vmx },
            KvmView { smm_flags: 2, ..vmx },
            KvmView { size_bytes: vmx.size_bytes + 4096, ..vmx },
            KvmView { flags: 1, ..vmx },
            KvmView { flags: svm.flags | 1, ..svm },
            KvmView { flags: svm.flags | 2, ..svm },
            KvmView { flags: 0, ..svm },
            KvmView { size_bytes: svm.size_bytes + 4096, ..svm },
        ];
        for view in views {
            let error = said(0, 0, Some(view)).unwrap_or_else(|| panic!("{view:?} is let through"));
            assert!(error.contains("virtual machines of its own"), "{error}");
        }
        let unknown = said(0, 0, Some(KvmView { format: 9, ..vmx })).unwrap();
        assert!(unknown.contains("unknown format 9"), "{unknown}");
        assert!(said(CR4_VMXE, 0, Some(vmx)).unwrap().contains("CR4.VMXE"));
        assert!(said(0, EFER_SVME, None).unwrap().contains("EFER.SVME"));
    }

    #[test]
    fn msrs_of_vmx_and_svm_stay_behind() {
        assert!(hides_msr(0x480) && hides_msr(0x491) && hides_msr(0xc001_0117));
        assert!(!hides_msr(0x3a) && !hides_msr(0x47f) && !hides_msr(0x10));
        assert_eq!(without_vmx(0x3a, 0b101), 1, "locked, without VMX");
        assert_eq!(without_vmx(0x10, 0b101), 0b101);
    }
}
