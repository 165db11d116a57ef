//! Checks that this host's CPU has all features in a guest's CPUID. The destination checks before the first
//! page is sent: a guest that lost a feature would crash much later and less clearly.

use crate::kvm::nested::{CPUID_SVM, CPUID_VMX};
use kvm_bindings::kvm_cpuid_entry2;

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

/// A CPUID register of feature bits: leaf, subleaf, register, and bits to ignore (dynamic state, or
/// synthesized by the VMM).
struct FeatureWord {
    leaf: u32,
    subleaf: u32,
    register: Register,
    ignored: u32,
}

const fn word(leaf: u32, subleaf: u32, register: Register, ignored: u32) -> FeatureWord {
    FeatureWord { leaf, subleaf, register, ignored }
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

/// Features by the names that `/proc/cpuinfo` uses; the rest are reported by leaf and bit.
const NAMES: [(u32, u32, char, u32, &str); 33] = [
    (1, 0, 'c', 0, "sse3"),
    (1, 0, 'c', 9, "ssse3"),
    (1, 0, 'c', 12, "fma"),
    (1, 0, 'c', 13, "cx16"),
    (1, 0, 'c', 19, "sse4_1"),
    (1, 0, 'c', 20, "sse4_2"),
    (1, 0, 'c', 21, "x2apic"),
    (1, 0, 'c', 22, "movbe"),
    (1, 0, 'c', 23, "popcnt"),
    (1, 0, 'c', 25, "aes"),
    (1, 0, 'c', 26, "xsave"),
    (1, 0, 'c', 28, "avx"),
    (1, 0, 'c', 29, "f16c"),
    (1, 0, 'c', 30, "rdrand"),
    (7, 0, 'b', 3, "bmi1"),
    (7, 0, 'b', 5, "avx2"),
    (7, 0, 'b', 7, "smep"),
    (7, 0, 'b', 8, "bmi2"),
    (7, 0, 'b', 9, "erms"),
    (7, 0, 'b', 16, "avx512f"),
    (7, 0, 'b', 17, "avx512dq"),
    (7, 0, 'b', 18, "rdseed"),
    (7, 0, 'b', 20, "smap"),
    (7, 0, 'b', 26, "avx512pf"),
    (7, 0, 'b', 27, "avx512er"),
    (7, 0, 'b', 28, "avx512cd"),
    (7, 0, 'b', 29, "sha_ni"),
    (7, 0, 'b', 30, "avx512bw"),
    (7, 0, 'b', 31, "avx512vl"),
    (7, 0, 'c', 3, "pku"),
    (7, 0, 'c', 8, "gfni"),
    (7, 0, 'd', 24, "amx_tile"),
    (0x8000_0001, 0, 'c', 5, "abm"),
];

fn find(entries: &[kvm_cpuid_entry2], word: &FeatureWord) -> u32 {
    let matches =
        |entry: &&kvm_cpuid_entry2| entry.function == word.leaf && entry.index == word.subleaf;
    entries.iter().find(matches).map_or(0, |entry| word.register.of(entry))
}

/// Names of all features in `guest` that are in neither view of the host: what KVM reports as supported,
/// and what it exposes regardless of the setting.
pub fn missing(guest: &[kvm_cpuid_entry2], hosts: [&[kvm_cpuid_entry2]; 2]) -> Vec<String> {
    let mut names = Vec::new();
    for word in &WORDS {
        let host = hosts.iter().fold(0, |bits, host| bits | find(host, word));
        let gone = find(guest, word) & !word.ignored & !host;
        names.extend((0..32).filter(|bit| gone >> bit & 1 == 1).map(|bit| name(word, bit)));
    }
    names
}

fn name(word: &FeatureWord, bit: u32) -> String {
    let register = word.register.name();
    let known = NAMES.iter().find(|(leaf, subleaf, letter, known_bit, _)| {
        (*leaf, *subleaf, *known_bit) == (word.leaf, word.subleaf, bit)
            && register.chars().nth(1) == Some(*letter)
    });
    match known {
        Some((.., name)) => (*name).to_owned(),
        None => format!("CPUID {:#x}.{} {register} bit {bit}", word.leaf, word.subleaf),
    }
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
        assert_eq!(missing(&guest, [&leaf7(1 << 5), &[]]), ["CPUID 0x7.0 ebx bit 1", "avx512f"]);
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
