//! Model-specific registers: which to save, the order of restoring, and how to treat a refused one. Used by
//! [`super::cpu_state`].
//!
//! `KVM_GET_MSR_INDEX_LIST` omits registers that KVM does have: MTRRs, machine-check banks and, on some
//! hosts, IA32_XSS. They are added here if KVM can read them.
//!
//! Order of restoring: all others, MTRR ranges, the MTRR default type (which enables them), then machine
//! checks. The caller writes TSC_DEADLINE last of all, after the TSC offset. A register that KVM refuses is
//! compared with what the fresh vCPU holds: if that is the same, nothing is lost; if not, the guest cannot
//! run here.

use super::vcpu::Vcpu;
use super::{KvmError, ioctl, nested};
use kvm_bindings::{Msrs, kvm_msr_entry};
use std::collections::BTreeSet;

pub(super) const MSR_IA32_TSC: u32 = 0x10;
pub(super) const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

/// More registers than any KVM has: limits what a stream can make us write.
pub const MAX_MSRS: usize = 1024;
/// Registers of one ioctl; KVM takes fewer than 256.
const MSRS_PER_CALL: usize = 128;

const MTRR_CAP: u32 = 0xfe;
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// Ranges of 64, 16 and 4 KiB below 1 MiB.
const MTRR_FIXED: [u32; 11] =
    [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
const MTRR_PHYS_BASE_0: u32 = 0x200;
/// Variable ranges, a base and a mask each, as KVM has them.
const MTRR_VARIABLE: u32 = 8;

const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const MCG_CTL: u32 = 0x17b;
/// The number of banks in MCG_CAP.
const MCG_CAP_BANKS: u64 = 0xff;
const MC0_CTL: u32 = 0x400;
/// CTL, STATUS, ADDR and MISC.
const MSRS_PER_BANK: u32 = 4;
/// Banks that fit below the VMX MSRs, and what KVM has at most.
const MAX_MCE_BANKS: u32 = 32;

const XSS: u32 = 0xda0;

/// Registers that every guest may rely on: a host without one of them cannot run the guest, even if its
/// value at the source was zero.
const VITAL: [(u32, &str); 25] = [
    (MSR_IA32_TSC, "IA32_TIME_STAMP_COUNTER"),
    (0x11, "MSR_KVM_WALL_CLOCK"),
    (0x12, "MSR_KVM_SYSTEM_TIME"),
    (0x1b, "IA32_APIC_BASE"),
    (0x48, "IA32_SPEC_CTRL"),
    (0x174, "IA32_SYSENTER_CS"),
    (0x175, "IA32_SYSENTER_ESP"),
    (0x176, "IA32_SYSENTER_EIP"),
    (0x1a0, "IA32_MISC_ENABLE"),
    (0x277, "IA32_PAT"),
    (MSR_IA32_TSC_DEADLINE, "IA32_TSC_DEADLINE"),
    (XSS, "IA32_XSS"),
    (0x4b56_4d00, "MSR_KVM_WALL_CLOCK_NEW"),
    (0x4b56_4d01, "MSR_KVM_SYSTEM_TIME_NEW"),
    (0x4b56_4d02, "MSR_KVM_ASYNC_PF_EN"),
    (0x4b56_4d03, "MSR_KVM_STEAL_TIME"),
    (0x4b56_4d06, "MSR_KVM_ASYNC_PF_INT"),
    (0x4b56_4d07, "MSR_KVM_ASYNC_PF_ACK"),
    (0xc000_0080, "IA32_EFER"),
    (0xc000_0081, "IA32_STAR"),
    (0xc000_0082, "IA32_LSTAR"),
    (0xc000_0083, "IA32_CSTAR"),
    (0xc000_0084, "IA32_FMASK"),
    (0xc000_0102, "IA32_KERNEL_GS_BASE"),
    (0xc000_0103, "IA32_TSC_AUX"),
];

/// Further registers by the names that manuals and Linux give them.
const NAMED: [(u32, &str); 19] = [
    (0x34, "MSR_SMI_COUNT"),
    (0x3a, "IA32_FEATURE_CONTROL"),
    (0x3b, "IA32_TSC_ADJUST"),
    (0x8b, "IA32_BIOS_SIGN_ID"),
    (0xce, "MSR_PLATFORM_INFO"),
    (MTRR_CAP, "IA32_MTRRCAP"),
    (0x10a, "IA32_ARCH_CAPABILITIES"),
    (0x122, "IA32_TSX_CTRL"),
    (0x140, "MSR_MISC_FEATURES_ENABLES"),
    (MCG_CAP, "IA32_MCG_CAP"),
    (MCG_STATUS, "IA32_MCG_STATUS"),
    (MCG_CTL, "IA32_MCG_CTL"),
    (0x1d9, "IA32_DEBUGCTL"),
    (MTRR_DEF_TYPE, "IA32_MTRR_DEF_TYPE"),
    (0x345, "IA32_PERF_CAPABILITIES"),
    (0xd90, "IA32_BNDCFGS"),
    (0x4b56_4d04, "MSR_KVM_PV_EOI_EN"),
    (0x4b56_4d05, "MSR_KVM_POLL_CONTROL"),
    (0xc001_0015, "HWCR"),
];

/// The registers of a vCPU that can be read.
///
/// # Errors
/// An ioctl that fails as a whole.
pub(super) fn readable(vcpu: &Vcpu, listed: &[u32]) -> Result<Vec<u32>, KvmError> {
    let bank_count = match read(vcpu, &[MCG_CAP])?.first() {
        Some((_, capabilities)) => capabilities & MCG_CAP_BANKS,
        None => 0,
    };
    let wanted = to_save(listed, bank_count);
    Ok(read(vcpu, &wanted)?.iter().map(|msr| msr.0).collect())
}

/// Registers to save, each once, in the order of restoring.
fn to_save(listed: &[u32], bank_count: u64) -> Vec<u32> {
    // Saturates: the maximum is far below.
    let bank_count = u32::try_from(bank_count).unwrap_or(u32::MAX).min(MAX_MCE_BANKS);
    let variable = MTRR_PHYS_BASE_0..MTRR_PHYS_BASE_0 + 2 * MTRR_VARIABLE;
    let banks = MC0_CTL..MC0_CTL + MSRS_PER_BANK * bank_count;
    let ours = [XSS, MTRR_CAP, MTRR_DEF_TYPE, MCG_CAP, MCG_STATUS, MCG_CTL];
    let ours = ours.into_iter().chain(MTRR_FIXED).chain(variable).chain(banks);
    let all = listed.iter().copied().chain(ours);
    let mut seen = BTreeSet::new();
    let mut all: Vec<_> =
        all.filter(|index| !nested::hides_msr(*index) && seen.insert(*index)).collect();
    all.sort_by_key(|index| phase(*index));
    all
}

/// When a register is restored; those of one phase go in the order of the record.
fn phase(index: u32) -> u8 {
    match index {
        _ if is_mtrr_range(index) => 1,
        MTRR_CAP | MTRR_DEF_TYPE => 2,
        MCG_CAP | MCG_STATUS | MCG_CTL => 3,
        _ if mce_bank(index).is_some() => 3,
        _ => 0,
    }
}

fn is_mtrr_range(index: u32) -> bool {
    MTRR_FIXED.contains(&index)
        || (MTRR_PHYS_BASE_0..MTRR_PHYS_BASE_0 + 2 * MTRR_VARIABLE).contains(&index)
}

/// A register's bank and its index among the bank's four.
fn mce_bank(index: u32) -> Option<(u32, u32)> {
    let at = index.checked_sub(MC0_CTL)?;
    let (bank, member) = (at / MSRS_PER_BANK, at % MSRS_PER_BANK);
    (bank < MAX_MCE_BANKS).then_some((bank, member))
}

/// A register's number, and its name if known.
fn name(index: u32) -> String {
    let number = format!("MSR {index:#x}");
    let known = VITAL.iter().chain(&NAMED).find(|(known, _)| *known == index);
    if let Some((_, name)) = known {
        return format!("{number} ({name})");
    }
    if let Some((bank, member)) = mce_bank(index) {
        let member = ["CTL", "STATUS", "ADDR", "MISC"].into_iter().nth(member as usize);
        return format!("{number} (IA32_MC{bank}_{})", member.unwrap_or("?"));
    }
    if MTRR_FIXED.contains(&index) {
        return format!("{number} (fixed-range MTRR)");
    }
    if is_mtrr_range(index) {
        let at = index - MTRR_PHYS_BASE_0;
        let part = if at.is_multiple_of(2) { "BASE" } else { "MASK" };
        return format!("{number} (IA32_MTRR_PHYS{part}{})", at / 2);
    }
    number
}

/// Validates untrusted registers.
///
/// # Errors
/// Too many registers, or one twice.
pub(super) fn validate(msrs: &[(u32, u64)]) -> Result<(), KvmError> {
    let invalid = |reason| Err(KvmError::State { what: "MSRs", reason });
    if msrs.len() > MAX_MSRS {
        return invalid(format!("{} of them, at most {MAX_MSRS} are possible", msrs.len()));
    }
    let mut seen = BTreeSet::new();
    match msrs.iter().find(|(index, _)| !seen.insert(*index)) {
        Some((index, _)) => invalid(format!("{} is there twice", name(*index))),
        None => Ok(()),
    }
}

/// The registers to write, in order, without TSC_DEADLINE.
/// A guest that is offered VMX (`nested`) keeps what it has locked in IA32_FEATURE_CONTROL.
pub(super) fn to_restore(msrs: &[(u32, u64)], nested: bool) -> Vec<(u32, u64)> {
    let wanted = |msr: &&(u32, u64)| msr.0 != MSR_IA32_TSC_DEADLINE && !nested::hides_msr(msr.0);
    let value = |msr: &(u32, u64)| match nested {
        true => *msr,
        false => (msr.0, nested::without_vmx(msr.0, msr.1)),
    };
    let mut msrs: Vec<_> = msrs.iter().filter(wanted).map(value).collect();
    msrs.sort_by_key(|msr| phase(msr.0));
    msrs
}

fn entries(pairs: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, KvmError> {
    let entries: Vec<_> =
        pairs.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries)
        .map_err(|error| KvmError::State { what: "MSRs", reason: format!("{error:?}") })
}

/// Reads `indices`; KVM stops at the first that it cannot read, which is then skipped.
pub(super) fn read(vcpu: &Vcpu, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let now = rest.get(..MSRS_PER_CALL).unwrap_or(rest);
        let mut msrs = entries(now.iter().map(|index| (*index, 0)))?;
        let read = ioctl("KVM_GET_MSRS", vcpu.fd().get_msrs(&mut msrs))?;
        values.extend(msrs.as_slice().iter().take(read).map(|msr| (msr.index, msr.data)));
        let unreadable = now.get(read);
        if let Some(index) = unreadable {
            log::debug!("{} cannot be read and is not saved", name(*index));
        }
        rest = rest.get(read + usize::from(unreadable.is_some())..).unwrap_or(&[]);
    }
    Ok(values)
}

/// Writes `msrs` in order; KVM stops at the first that it refuses, which is an error if the guest would
/// lose a value.
pub(super) fn write(vcpu: &Vcpu, msrs: &[(u32, u64)]) -> Result<(), KvmError> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let now = rest.get(..MSRS_PER_CALL).unwrap_or(rest);
        let msrs = entries(now.iter().copied())?;
        let written = ioctl("KVM_SET_MSRS", vcpu.fd().set_msrs(&msrs))?;
        let refused = now.get(written);
        if let Some((index, value)) = refused {
            let held = read(vcpu, &[*index])?.first().map(|msr| msr.1);
            judge_refused(*index, *value, held)?;
        }
        rest = rest.get(written + usize::from(refused.is_some())..).unwrap_or(&[]);
    }
    Ok(())
}

/// Whether a guest can run without `value` in a register that this host refuses to write. `held` is the
/// fresh vCPU's value, `None` if the host has no such register.
fn judge_refused(index: u32, value: u64, held: Option<u64>) -> Result<(), KvmError> {
    let vital = VITAL.iter().any(|(vital, _)| *vital == index);
    let register = name(index);
    let instead = match held {
        Some(held) if held == value => {
            log::debug!("this host refuses to write {register}, which has that value already");
            return Ok(());
        }
        Some(held) => format!("it has {held:#x} here"),
        None if value == 0 && !vital => {
            log::debug!("this host has no {register}; the guest did not use it");
            return Ok(());
        }
        None => "this host has no such register".to_owned(),
    };
    let reason = format!("this host refuses {register} = {value:#x}; {instead}");
    Err(KvmError::State { what: "MSRs", reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(index: u32, value: u64, held: Option<u64>) -> Option<String> {
        judge_refused(index, value, held).err().map(|error| error.to_string())
    }

    #[test]
    fn a_refused_value_that_the_fresh_vcpu_lacks_is_an_error_by_name() {
        let error = refusal(0x277, 0x2, Some(0x0007_0406_0007_0406)).unwrap();
        assert!(error.contains("MSR 0x277 (IA32_PAT) = 0x2"), "{error}");
        assert!(error.contains("it has 0x7040600070406 here"), "{error}");
        let error = refusal(0x345, 0x32, Some(0)).unwrap();
        assert!(error.contains("IA32_PERF_CAPABILITIES"), "{error}");
        let error = refusal(0x1234, 1, None).unwrap();
        assert!(error.contains("MSR 0x1234 = 0x1; this host has no such register"), "{error}");
    }

    #[test]
    fn a_refused_value_that_is_there_already_is_fine() {
        assert_eq!(refusal(MTRR_CAP, 0x508, Some(0x508)), None);
        assert_eq!(refusal(XSS, 0, Some(0)), None, "vital, but nothing is lost");
        assert_eq!(refusal(0x1234, 0, None), None, "a register that was not used");
    }

    #[test]
    fn a_host_without_a_vital_register_is_refused_whatever_it_held() {
        for (index, name) in VITAL {
            let error = refusal(index, 0, None).unwrap_or_else(|| panic!("{name} is not vital"));
            assert!(error.contains(name), "{error}");
        }
        for vital in [0x174, 0x175, 0x176, 0x277, 0xc000_0103, 0x12, 0x4b56_4d01] {
            assert!(refusal(vital, 0, None).is_some(), "{vital:#x}");
        }
    }

    #[test]
    fn mtrrs_and_machine_checks_are_saved_once_each_and_vmx_not() {
        let saved = to_save(&[0x10, MCG_STATUS, 0x277, 0x480, 0xc001_0117, 0x10], 10);
        let count = |index| saved.iter().filter(|saved| **saved == index).count();
        let mtrrs = [MTRR_CAP, MTRR_DEF_TYPE, 0x200, 0x20f, 0x250, 0x26f];
        let machine_checks = [MCG_CAP, MCG_STATUS, MCG_CTL, 0x400, 0x403, 0x427];
        for index in [0x10, 0x277, XSS].into_iter().chain(mtrrs).chain(machine_checks) {
            assert_eq!(count(index), 1, "{index:#x}");
        }
        for index in [0x480, 0xc001_0117, 0x210, 0x428] {
            assert_eq!(count(index), 0, "{index:#x}");
        }
        let hostile = to_save(&[], u64::MAX);
        assert!(
            hostile.contains(&0x47f) && !hostile.contains(&0x480),
            "banks end where VMX begins"
        );
    }

    #[test]
    fn the_default_type_switches_mtrrs_on_after_their_ranges_whatever_the_stream_says() {
        let record = [(0x400, 1), (MTRR_DEF_TYPE, 0x806), (MSR_IA32_TSC_DEADLINE, 9), (0x201, 2)];
        let record: Vec<_> = record.into_iter().chain([(0x3a, 5), (0x480, 7), (0x10, 3)]).collect();
        let order = to_restore(&record, false);
        assert_eq!(order, [(0x3a, 1), (0x10, 3), (0x201, 2), (MTRR_DEF_TYPE, 0x806), (0x400, 1)]);
    }

    #[test]
    fn too_many_registers_or_one_twice_is_refused() {
        let many: Vec<_> = (0..u32::try_from(MAX_MSRS).unwrap()).map(|index| (index, 0)).collect();
        assert!(validate(&many).is_ok());
        let more: Vec<_> = many.iter().copied().chain([(0xffff, 0)]).collect();
        assert!(validate(&more).unwrap_err().to_string().contains("1025"));
        let twice = validate(&[(0x277, 1), (0x10, 1), (0x277, 1)]).unwrap_err().to_string();
        assert!(twice.contains("IA32_PAT") && twice.contains("twice"), "{twice}");
    }

    #[test]
    fn names_tell_banks_and_ranges_apart() {
        assert_eq!(name(0x415), "MSR 0x415 (IA32_MC5_STATUS)");
        assert_eq!(name(0x207), "MSR 0x207 (IA32_MTRR_PHYSMASK3)");
        assert_eq!(name(0x20e), "MSR 0x20e (IA32_MTRR_PHYSBASE7)");
        assert_eq!(name(0x258), "MSR 0x258 (fixed-range MTRR)");
        assert_eq!(name(0x4711_0815), "MSR 0x47110815");
    }
}
