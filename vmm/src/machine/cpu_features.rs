//! Checks that this host's CPU has all features in a guest's CPUID. The destination checks before the first
//! page is sent: a guest that lost a feature would crash much later and less clearly.

use super::cpu::names::{Register, Word};
use crate::kvm::nested::{CPUID_SVM, CPUID_VMX};
use kvm_bindings::kvm_cpuid_entry2;

/// A word of features, and the bits to ignore: dynamic state, or synthesized by the VMM.
struct FeatureWord {
    word: Word,
    ignored: u32,
}

const fn word(leaf: u32, subleaf: u32, register: Register, ignored: u32) -> FeatureWord {
    FeatureWord { word: Word::new(leaf, subleaf, register), ignored }
}

/// Intel SDM volume 2 (CPUID), AMD APM volume 3 appendix E, Linux `Documentation/virt/kvm/x86/cpuid.rst`.
const WORDS: [FeatureWord; 13] = [
    // OSXSAVE follows CR4; TSC_DEADLINE and HYPERVISOR are KVM's own to give. VMX, and SVM below, are
    // hidden from guests, but were not always: a guest that uses them is refused by its registers.
    word(1, 0, Register::Ecx, 1 << 27 | 1 << 24 | 1 << 31 | CPUID_VMX),
    // HTT is topology.
    word(1, 0, Register::Edx, 1 << 28),
    word(7, 0, Register::Ebx, 0),
    // OSPKE follows CR4.
    word(7, 0, Register::Ecx, 1 << 4),
    word(7, 0, Register::Edx, 0),
    word(7, 1, Register::Eax, 0),
    word(7, 1, Register::Edx, 0),
    word(0xd, 0, Register::Eax, 0),
    word(0xd, 1, Register::Eax, 0),
    // CMP_LEGACY is topology.
    word(0x8000_0001, 0, Register::Ecx, 1 << 1 | CPUID_SVM),
    word(0x8000_0001, 0, Register::Edx, 0),
    word(0x8000_0008, 0, Register::Ebx, 0),
    word(0x4000_0001, 0, Register::Eax, 0),
];

/// Names of all features in `guest` that are in neither view of the host: what KVM reports as supported,
/// and what it exposes regardless of the setting.
pub fn missing(guest: &[kvm_cpuid_entry2], hosts: [&[kvm_cpuid_entry2]; 2]) -> Vec<String> {
    let mut names = Vec::new();
    for FeatureWord { word, ignored } in &WORDS {
        let host = hosts.iter().fold(0, |bits, host| bits | word.read(host));
        let gone = word.read(guest) & !ignored & !host;
        names.extend((0..32).filter(|bit| gone >> bit & 1 == 1).map(|bit| word.name_of(bit)));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf7(ebx: u32) -> Vec<kvm_cpuid_entry2> {
        vec![kvm_cpuid_entry2 { function: 7, ebx, ..Default::default() }]
    }

    #[test]
    fn a_missing_feature_is_named() {
        let guest = leaf7(1 << 16 | 1 << 5 | 1 << 1);
        assert_eq!(missing(&guest, [&leaf7(1 << 5), &[]]), ["tsc-adjust", "avx512f"]);
    }

    #[test]
    fn either_view_of_the_host_is_enough() {
        let guest = leaf7(3);
        assert!(missing(&guest, [&leaf7(1), &leaf7(2)]).is_empty());
        assert!(missing(&leaf7(1), [&leaf7(u32::MAX), &[]]).is_empty(), "more is no obstacle");
    }

    #[test]
    fn bits_of_the_moment_are_no_features() {
        let guest = vec![kvm_cpuid_entry2 { function: 1, ecx: 1 << 27, ..Default::default() }];
        assert!(missing(&guest, [&[], &[]]).is_empty());
    }

    #[test]
    fn a_guest_that_was_once_offered_nested_virtualization_is_taken() {
        let leaf = |function, ecx| kvm_cpuid_entry2 { function, ecx, ..Default::default() };
        let guest = vec![leaf(1, 1 << 5), leaf(0x8000_0001, 1 << 2)];
        assert!(missing(&guest, [&[], &[]]).is_empty());
    }
}
