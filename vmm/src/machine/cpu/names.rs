//! Features in CPUID by name: QEMU's names, and Linux' (`/proc/cpuinfo`) where they differ by more than
//! punctuation. Used by `--cpu`, by the checks of an incoming guest, and in messages.
//!
//! Sources: Intel SDM volume 2 (CPUID), AMD APM volume 3 appendix E, Linux
//! `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// A register of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// 32 bits of CPUID that stand for features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word {
    /// The leaf.
    pub leaf: u32,
    /// Its subleaf; 0 where it has none.
    pub subleaf: u32,
    /// The register.
    pub register: Register,
}

impl Word {
    /// The word of this leaf, subleaf and register.
    pub const fn new(leaf: u32, subleaf: u32, register: Register) -> Self {
        Self { leaf, subleaf, register }
    }

    fn is_in(self, entry: &kvm_cpuid_entry2) -> bool {
        (entry.function, entry.index) == (self.leaf, self.subleaf)
    }

    /// Its bits; 0 if `entries` lack the leaf.
    pub fn read(self, entries: &[kvm_cpuid_entry2]) -> u32 {
        let entry = entries.iter().find(|entry| self.is_in(entry));
        entry.map_or(0, |entry| match self.register {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        })
    }

    /// Replaces its bits; adds the leaf if `entries` lack it and any bit is set.
    pub fn write(self, entries: &mut Vec<kvm_cpuid_entry2>, bits: u32) {
        let at = entries.iter().position(|entry| self.is_in(entry));
        let entry = match at {
            Some(at) => &mut entries[at],
            None if bits == 0 => return,
            None => {
                let flags = if self.subleaf == 0 { 0 } else { KVM_CPUID_FLAG_SIGNIFCANT_INDEX };
                let (function, index) = (self.leaf, self.subleaf);
                let last = entries.len();
                entries.push(kvm_cpuid_entry2 { function, index, flags, ..Default::default() });
                &mut entries[last]
            }
        };
        *match self.register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        } = bits;
    }

    /// The name of one of its bits; where it has none, its place.
    pub fn name_of(self, bit: u32) -> String {
        let names = NAMED.iter().find(|(word, _)| *word == self).map(|(_, names)| names);
        let name =
            names.and_then(|names| names.split_ascii_whitespace().nth(usize::try_from(bit).ok()?));
        match name {
            Some(name) if name != UNNAMED => name.to_owned(),
            _ => {
                let register = match self.register {
                    Register::Eax => "eax",
                    Register::Ebx => "ebx",
                    Register::Ecx => "ecx",
                    Register::Edx => "edx",
                };
                format!("CPUID {:#x}.{} {register} bit {bit}", self.leaf, self.subleaf)
            }
        }
    }
}

const UNNAMED: &str = "-";

use Register::{Eax, Ebx, Ecx, Edx};

/// All words with named features, each with the names of its bits from bit 0.
const NAMED: [(Word, &str); 16] = [
    (
        Word::new(1, 0, Edx),
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds \
         acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    (
        Word::new(1, 0, Ecx),
        "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm - pcid \
         dca sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand hypervisor",
    ),
    (Word::new(6, 0, Eax), "- - arat"),
    (
        Word::new(7, 0, Ebx),
        "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid rtm - \
         zero-fcs-fds mpx - avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb \
         intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl",
    ),
    (
        Word::new(7, 0, Ecx),
        "prefetchwt1 avx512vbmi umip pku - waitpkg avx512vbmi2 cet-ss gfni vaes vpclmulqdq \
         avx512vnni avx512bitalg - avx512-vpopcntdq - la57 - - - - - rdpid - bus-lock-detect \
         cldemote - movdiri movdir64b - sgxlc pks",
    ),
    (
        Word::new(7, 0, Edx),
        "- - avx512-4vnniw avx512-4fmaps fsrm uintr - - avx512-vp2intersect - md-clear - - - \
         serialize - tsx-ldtrk - - arch-lbr cet-ibt - amx-bf16 avx512-fp16 amx-tile amx-int8 \
         spec-ctrl stibp flush-l1d arch-capabilities core-capability ssbd",
    ),
    (
        Word::new(7, 1, Eax),
        "sha512 sm3 sm4 - avx-vnni avx512-bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs \
         wrmsrns - amx-fp16 - avx-ifma - - lam",
    ),
    (
        Word::new(7, 1, Edx),
        "- - - - avx-vnni-int8 avx-ne-convert - - amx-complex - avx-vnni-int16 - - - prefetchiti - \
         - - - avx10",
    ),
    (Word::new(7, 2, Edx), "intel-psfd ipred-ctrl rrsba-ctrl ddpd-u bhi-ctrl mcdt-no"),
    (Word::new(0xd, 1, Eax), "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        Word::new(0x4000_0001, 0, Eax),
        "kvmclock kvm-nopiodelay kvm-mmu kvmclock kvm-asyncpf kvm-steal-time kvm-pv-eoi \
         kvm-pv-unhalt - kvm-pv-tlb-flush kvm-asyncpf-vmexit kvm-pv-ipi kvm-poll-control \
         kvm-pv-sched-yield kvm-asyncpf-int kvm-msi-ext-dest-id kvm-hc-map-gpa-range \
         kvm-migration-control - - - - - - kvmclock-stable-bit",
    ),
    (
        Word::new(0x8000_0001, 0, Edx),
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr-opt pdpe1gb rdtscp - \
         lm 3dnowext 3dnow",
    ),
    (
        Word::new(0x8000_0001, 0, Ecx),
        "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop \
         skinit wdt - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb - - - - mwaitx",
    ),
    (Word::new(0x8000_0007, 0, Edx), "- - - - - - - - invtsc"),
    (
        Word::new(0x8000_0008, 0, Ebx),
        "clzero - xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs amd-stibp - stibp-always-on - \
         - - - - - amd-ssbd virt-ssbd amd-no-ssb - amd-psfd",
    ),
    (
        Word::new(0x8000_0021, 0, Eax),
        "no-nested-data-bp - lfence-always-serializing - - - null-sel-clr-base - auto-ibrs",
    ),
];

/// Other names of features; the keys without punctuation, as [`Feature::find`] compares.
const ALIASES: [(&str, &str); 8] = [
    ("sse3", "pni"),
    ("lzcnt", "abm"),
    ("tscdeadlinetimer", "tsc-deadline"),
    ("i64", "lm"),
    ("xd", "nx"),
    ("ffxsr", "fxsr-opt"),
    ("nonstoptsc", "invtsc"),
    ("ibt", "cet-ibt"),
];

/// A named feature: a bit of CPUID, or for `kvmclock` two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Feature(&'static str);

fn without_punctuation(name: &str) -> String {
    let kept = name.chars().filter(|character| !matches!(character, '-' | '_' | '.'));
    kept.collect::<String>().to_ascii_lowercase()
}

/// The most names that [`Feature::similar`] offers.
pub const MAX_SIMILAR: usize = 4;

/// How many letters have to be inserted, left out or exchanged to make one word of the other (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (index, letter) in one.bytes().enumerate() {
        let mut diagonal = index;
        row[0] = index + 1;
        for (at, byte) in (1..).zip(other.bytes()) {
            let exchanged = diagonal + usize::from(byte != letter);
            diagonal = row[at];
            row[at] = exchanged.min(diagonal + 1).min(row[at - 1] + 1);
        }
    }
    row[other.len()]
}

/// Every named bit.
fn named_bits() -> impl Iterator<Item = (Word, u32, &'static str)> {
    NAMED.iter().flat_map(|(word, names)| {
        let names = (0..).zip(names.split_ascii_whitespace());
        names.filter(|(_, name)| *name != UNNAMED).map(|(bit, name)| (*word, bit, name))
    })
}

impl Feature {
    /// Finds a feature by QEMU's or Linux' name, whatever its case and punctuation.
    pub fn find(name: &str) -> Option<Self> {
        let wanted = without_punctuation(name);
        let alias = ALIASES.iter().find(|(alias, _)| *alias == wanted);
        let wanted = alias.map_or(wanted, |(_, name)| without_punctuation(name));
        named_bits().find(|(.., name)| without_punctuation(name) == wanted).map(|it| Self(it.2))
    }

    /// Names that `name` may be a slip of the pen for, the most similar first; at most [`MAX_SIMILAR`].
    pub fn similar(name: &str) -> Vec<&'static str> {
        let wanted = without_punctuation(name);
        let mut near: Vec<_> = Self::all()
            .into_iter()
            .map(|feature| {
                let other = without_punctuation(feature.name());
                (distance(&wanted, &other), feature.name())
            })
            // Of two letters each shares one with many.
            .filter(|(distance, name)| distance * 3 <= name.len().max(3))
            .collect();
        near.sort_by_key(|(distance, _)| *distance);
        near.into_iter().map(|(_, name)| name).take(MAX_SIMILAR).collect()
    }

    /// All features, in the order of their leaves.
    pub fn all() -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for (.., name) in named_bits() {
            if !all.contains(&Self(name)) {
                all.push(Self(name));
            }
        }
        all
    }

    /// QEMU's name.
    pub fn name(self) -> &'static str {
        self.0
    }

    fn bits(self) -> impl Iterator<Item = (Word, u32)> {
        named_bits().filter(move |bit| bit.2 == self.0).map(|(word, bit, _)| (word, bit))
    }

    /// Whether CPUID has it, or any of its bits.
    pub fn is_in(self, entries: &[kvm_cpuid_entry2]) -> bool {
        self.bits().any(|(word, bit)| word.read(entries) >> bit & 1 == 1)
    }

    /// Adds it: the bits that `available` has of it.
    pub fn add(self, entries: &mut Vec<kvm_cpuid_entry2>, available: &[kvm_cpuid_entry2]) {
        for (word, bit) in self.bits() {
            let bits = word.read(entries) | word.read(available) & 1 << bit;
            word.write(entries, bits);
        }
    }

    /// Removes it.
    pub fn remove(self, entries: &mut Vec<kvm_cpuid_entry2>) {
        for (word, bit) in self.bits() {
            let bits = word.read(entries) & !(1 << bit);
            word.write(entries, bits);
        }
    }
}

/// All words that hold named features.
pub fn words() -> impl Iterator<Item = Word> {
    NAMED.iter().map(|(word, _)| *word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_the_names_of_qemu_and_of_linux() {
        for (name, expected) in [
            ("avx2", "avx2"),
            ("AVX512F", "avx512f"),
            ("sse4_1", "sse4.1"),
            ("sse4-2", "sse4.2"),
            ("sse3", "pni"),
            ("lzcnt", "abm"),
            ("avx512_vnni", "avx512vnni"),
            ("tsc_deadline_timer", "tsc-deadline"),
            ("la57", "la57"),
        ] {
            assert_eq!(Feature::find(name).map(Feature::name), Some(expected), "{name}");
        }
        assert_eq!(Feature::find("avx1024"), None);
        assert_eq!(Feature::find("-"), None);
        assert_eq!(Feature::find(""), None);
    }

    #[test]
    fn a_slip_of_the_pen_is_noticed() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "vmx"), 3);
        assert_eq!(Feature::similar("avx512vmbi")[0], "avx512vbmi");
        assert_eq!(Feature::similar("rdrnd")[0], "rdrand");
        assert!(Feature::similar("multithreading").is_empty());
        assert!(Feature::similar("vmy").contains(&"vmx"));
    }

    #[test]
    fn the_names_stand_at_their_bits() {
        for (name, leaf, register, bit) in [
            ("pbe", 1, Edx, 31),
            ("vmx", 1, Ecx, 5),
            ("hypervisor", 1, Ecx, 31),
            ("avx512vl", 7, Ebx, 31),
            ("la57", 7, Ecx, 16),
            ("pks", 7, Ecx, 31),
            ("ssbd", 7, Edx, 31),
            ("kvmclock-stable-bit", 0x4000_0001, Eax, 24),
            ("3dnow", 0x8000_0001, Edx, 31),
            ("svm", 0x8000_0001, Ecx, 2),
            ("mwaitx", 0x8000_0001, Ecx, 29),
            ("invtsc", 0x8000_0007, Edx, 8),
            ("amd-psfd", 0x8000_0008, Ebx, 28),
        ] {
            let word = Word::new(leaf, 0, register);
            assert_eq!(Feature::find(name).unwrap().bits().last(), Some((word, bit)), "{name}");
            assert_eq!(word.name_of(bit), name);
        }
        assert_eq!(Word::new(1, 0, Ecx).name_of(27), "CPUID 0x1.0 ecx bit 27");
        assert_eq!(Word::new(7, 1, Eax).name_of(26), "lam");
        assert_eq!(Word::new(7, 1, Edx).name_of(19), "avx10");
    }

    #[test]
    fn a_feature_of_two_bits_comes_and_goes_as_one() {
        let leaf =
            |eax| vec![kvm_cpuid_entry2 { function: 0x4000_0001, eax, ..Default::default() }];
        let clock = Feature::find("kvmclock").unwrap();
        let mut entries = leaf(0b1011);
        assert!(clock.is_in(&entries));
        clock.remove(&mut entries);
        assert_eq!(entries, leaf(0b0010));
        clock.add(&mut entries, &leaf(0b1000));
        assert_eq!(entries, leaf(0b1010), "what is available of it");
        let mut none = Vec::new();
        clock.remove(&mut none);
        assert!(none.is_empty());
        clock.add(&mut none, &leaf(0b1001));
        assert_eq!(none, leaf(0b1001));
    }
}
