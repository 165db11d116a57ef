//! From `--cpu` and the host's CPUID to the guest's: levels of the psABI, switches, and what has to fit to the
//! features that are left (XSAVE's components, leaves of whole features).
//!
//! A model never gives what the host lacks. A baseline whose level the host does not reach, and a switched-on
//! feature that it lacks, are errors by name, as with QEMU's `enforce`.

use super::config::{CpuConfig, CpuModel};
use super::names::{Feature, Register, Word, words};
use crate::kvm::nested;
use kvm_bindings::kvm_cpuid_entry2;

/// A `--cpu` that this host cannot fulfil.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuModelError {
    /// The model or the switches want what the host's CPU or KVM does not have.
    #[error("--cpu {cpu}: this host lacks {}", .features.join(", "))]
    HostLacks { cpu: String, features: Vec<&'static str> },
    /// A feature is switched on and another one that it builds on is not there.
    #[error("--cpu {cpu}: {feature} does not work without {needs}")]
    Needs { cpu: String, feature: &'static str, needs: &'static str },
}

/// Levels of the psABI ("x86-64 psABI", 3.1.1), each with what it adds to those before. `osxsave` follows CR4,
/// which the guest sets; XSAVE has to be there for it.
const LEVELS: [(CpuModel, &str); 4] = [
    (CpuModel::V1, "cmov cx8 fpu fxsr mmx syscall sse sse2 lm"),
    (CpuModel::V2, "cx16 lahf-lm popcnt pni sse4.1 sse4.2 ssse3"),
    (CpuModel::V3, "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"),
    (CpuModel::V4, "avx512f avx512bw avx512cd avx512dq avx512vl"),
];

/// What a guest of any baseline gets if the host has it: what hosts of the last fifteen years have in common
/// and kernels expect, and KVM's own.
const COMMON: &str = "vme de pse tsc msr pae mce apic sep mtrr pge mca pat pse36 clflush ht nx rdtscp \
                      x2apic tsc-deadline hypervisor arat kvmclock kvmclock-stable-bit \
                      kvm-nopiodelay kvm-steal-time kvm-pv-eoi";

/// Features that do not work without another one: if that is switched off, they go, too.
const NEEDS: [(&str, &str); 13] = [
    ("fxsr", "sse"),
    ("sse", "sse2"),
    ("sse2", "pni sse4a"),
    ("pni", "ssse3"),
    ("ssse3", "sse4.1"),
    ("sse4.1", "sse4.2"),
    ("sse4.2", "avx"),
    ("xsave", "xsaveopt xsavec xgetbv1 xsaves xfd avx mpx pku amx-tile fma4 xop lwp"),
    (
        "avx",
        "f16c fma avx2 vaes vpclmulqdq avx-vnni avx-ifma avx-vnni-int8 avx-ne-convert xop fma4 avx512f",
    ),
    ("avx2", "avx512f"),
    (
        "avx512f",
        "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512vbmi2 \
         avx512vnni avx512bitalg avx512-vpopcntdq avx512-4vnniw avx512-4fmaps avx512-vp2intersect \
         avx512-fp16 avx512-bf16 avx10",
    ),
    ("avx512bw", "avx512vbmi avx512vbmi2 avx512bitalg avx512-fp16"),
    ("amx-tile", "amx-bf16 amx-int8 amx-fp16 amx-complex"),
];

fn features(names: &str) -> impl Iterator<Item = Feature> {
    names.split_ascii_whitespace().filter_map(Feature::find)
}

/// The features of a baseline that its level demands.
fn demanded(model: CpuModel) -> impl Iterator<Item = Feature> {
    let levels =
        LEVELS.into_iter().filter(move |(level, _)| model != CpuModel::Host && *level <= model);
    levels.flat_map(|(_, names)| features(names))
}

/// The features of a baseline, on a host that has them all.
pub fn names_of(model: CpuModel) -> Vec<Feature> {
    demanded(model).chain(features(COMMON)).collect()
}

/// The features that a model without switches has on this host; `host` is [`host_cpuid`]'s.
pub fn features_of(model: CpuModel, host: &[kvm_cpuid_entry2]) -> Vec<Feature> {
    let available = Feature::all().into_iter().filter(|feature| feature.is_in(host));
    match model {
        CpuModel::Host => {
            available.filter(|feature| !matches!(feature.name(), "vmx" | "svm")).collect()
        }
        _ => {
            let wanted = names_of(model);
            available.filter(|feature| wanted.contains(feature)).collect()
        }
    }
}

/// The highest level that this host reaches.
pub fn highest_level(has: impl Fn(Feature) -> bool) -> Option<CpuModel> {
    let reached = |model: &CpuModel| demanded(*model).all(&has);
    LEVELS.into_iter().map(|(model, _)| model).rfind(reached)
}

/// The CPUID of a new guest's vCPU, still without topology. `supported` is what KVM can give.
pub fn guest_cpuid(
    cpu: &CpuConfig,
    supported: &[kvm_cpuid_entry2],
) -> Result<Vec<kvm_cpuid_entry2>, CpuModelError> {
    let host = host_cpuid(supported);
    let switched_on = cpu.switches.iter().filter(|(_, on)| *on).map(|(feature, _)| *feature);
    let kept = |feature: &Feature| cpu.switched(*feature).is_none();
    let must = demanded(cpu.model).filter(kept).chain(switched_on);
    let lacking: Vec<_> = must.filter(|feature| !feature.is_in(&host)).map(Feature::name).collect();
    if !lacking.is_empty() {
        return Err(CpuModelError::HostLacks { cpu: cpu.to_string(), features: lacking });
    }
    let mut guest = host.clone();
    if cpu.model != CpuModel::Host {
        keep_common_leaves(&mut guest);
        for word in words() {
            let repeated =
                if word == AMD_REPEATED.0 { AMD_REPEATED.1 & word.read(&host) } else { 0 };
            word.write(&mut guest, repeated);
        }
        features_of(cpu.model, &host).iter().for_each(|feature| feature.add(&mut guest, &host));
    }
    hide_nested(cpu, &mut guest);
    for (feature, on) in &cpu.switches {
        match on {
            true => feature.add(&mut guest, &host),
            false => feature.remove(&mut guest),
        }
    }
    drop_dependents(cpu, &mut guest)?;
    fit_xsave(&mut guest);
    Ok(guest)
}

/// Hides nested virtualization that `cpu` does not offer.
pub fn hide_nested(cpu: &CpuConfig, guest: &mut [kvm_cpuid_entry2]) {
    let offers = |name: &str| cpu.nested_features().any(|feature| feature.name() == name);
    if !offers("vmx") {
        nested::hide_vmx(guest);
    }
    if !offers("svm") {
        nested::hide_svm(guest);
    }
}

/// All that a guest can have on a host: what KVM reports, and what it has besides because its local APIC is in the
/// kernel and the topology is ours.
pub fn host_cpuid(supported: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let mut host = supported.to_vec();
    for entry in host.iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx |= LEAF_1_ECX_HYPERVISOR | LEAF_1_ECX_TSC_DEADLINE;
        entry.edx |= LEAF_1_EDX_HTT;
    }
    host
}

/// What KVM can give: `supported`, as it says, and the features of `shown`, which a vCPU has whatever was set. Some hosts
/// cannot hide their own CPU from a guest, and do not list it.
pub fn with_shown(
    supported: &[kvm_cpuid_entry2],
    shown: &[kvm_cpuid_entry2],
) -> Vec<kvm_cpuid_entry2> {
    let mut all = supported.to_vec();
    Feature::all().into_iter().for_each(|feature| feature.add(&mut all, shown));
    all
}

/// AMD repeats features of leaf 1 in bits that have no name here; all of them are in every baseline.
const AMD_REPEATED: (Word, u32) = (Word::new(0x8000_0001, 0, Register::Edx), 0x0183_f3ff);
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_HTT: u32 = 1 << 28;

/// Leaves of a baseline: identity, caches, topology, and those whose features it may have. Others describe
/// what hosts do not have in common, such as the performance counters.
fn keep_common_leaves(guest: &mut Vec<kvm_cpuid_entry2>) {
    guest.retain(|entry| {
        matches!(
            entry.function,
            0..=2
                | 4
                | 6
                | 7
                | 0xb
                | 0xd
                | 0x1f
                | 0x4000_0000
                | 0x4000_0001
                | 0x8000_0000..=0x8000_0008
                | 0x8000_000a
                | 0x8000_001d
                | 0x8000_001e
                | 0x8000_0021
        )
    });
}

/// Removes features that have lost what they build on, unless they were asked for.
fn drop_dependents(
    cpu: &CpuConfig,
    guest: &mut Vec<kvm_cpuid_entry2>,
) -> Result<(), CpuModelError> {
    // A row comes before those of the features that it removes.
    for (name, dependents) in NEEDS {
        let Some(base) = Feature::find(name).filter(|base| !base.is_in(guest)) else { continue };
        for dependent in features(dependents) {
            if !dependent.is_in(guest) {
                continue;
            }
            if cpu.switched(dependent) == Some(true) {
                let (feature, needs) = (dependent.name(), base.name());
                return Err(CpuModelError::Needs { cpu: cpu.to_string(), feature, needs });
            }
            dependent.remove(guest);
        }
    }
    Ok(())
}

const XSAVE_LEAF: u32 = 0xd;
/// An XSAVE image with x87 and SSE state only (SDM volume 1, 13.4).
const XSAVE_LEGACY_BYTES: u32 = 576;
/// Components of XCR0 by the feature that they belong to.
const COMPONENTS: [(&str, u32); 5] =
    [("avx", 1 << 2), ("mpx", 3 << 3), ("avx512f", 7 << 5), ("pku", 1 << 9), ("amx-tile", 3 << 17)];

/// Leaves XSAVE's leaf with the components of the features that are there, and with their size.
fn fit_xsave(guest: &mut [kvm_cpuid_entry2]) {
    let has = |name: &str| Feature::find(name).is_some_and(|feature| feature.is_in(guest));
    let is_on = has("xsave");
    let gone: u32 =
        COMPONENTS.iter().filter(|(name, _)| !has(name)).map(|(_, components)| components).sum();
    let first = |entry: &kvm_cpuid_entry2| entry.function == XSAVE_LEAF && entry.index == 0;
    let Some(components) = guest.iter().find(|entry| first(entry)).map(|entry| entry.eax) else {
        return;
    };
    let components = if is_on { components & !gone } else { 0 };
    let holds = |index: u32| index < 32 && components >> index & 1 == 1;
    let mut size = if is_on { XSAVE_LEGACY_BYTES } else { 0 };
    for entry in guest.iter_mut().filter(|entry| entry.function == XSAVE_LEAF && entry.index >= 2) {
        // Bit 0 of ECX: a supervisor component, which XCR0 does not have.
        let of_xcr0 = entry.ecx & 1 == 0;
        if !is_on || of_xcr0 && !holds(entry.index) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        } else if of_xcr0 {
            size = size.max(entry.eax.saturating_add(entry.ebx));
        }
    }
    for entry in guest.iter_mut().filter(|entry| entry.function == XSAVE_LEAF) {
        match entry.index {
            // EBX is what XCR0 has now; KVM keeps it.
            0 => (entry.eax, entry.ebx, entry.ecx) = (components, size, size),
            1 if !is_on => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// A host with every feature, known or not, and components up to AMX.
    fn host() -> Vec<kvm_cpuid_entry2> {
        const ALL: [u32; 4] = [u32::MAX; 4];
        let mut entries =
            vec![leaf(0, 0, [0x1f, 1, 2, 3]), leaf(0xa, 0, ALL), leaf(0xd, 0, [0x602e7, 0, 0, 0])];
        for word in words() {
            if !entries.iter().any(|it| (it.function, it.index) == (word.leaf, word.subleaf)) {
                entries.push(leaf(word.leaf, word.subleaf, ALL));
            }
        }
        for (index, size, offset) in [
            (2, 256, 576),
            (5, 64, 1088),
            (6, 512, 1152),
            (7, 1024, 1664),
            (9, 8, 2688),
            (17, 64, 2752),
            (18, 8192, 2816),
        ] {
            entries.push(leaf(0xd, index, [size, offset, 0, 0]));
        }
        entries
    }

    fn model(cpu: &str) -> Vec<kvm_cpuid_entry2> {
        guest_cpuid(&cpu.parse().unwrap(), &host()).unwrap()
    }

    fn has(entries: &[kvm_cpuid_entry2], name: &str) -> bool {
        Feature::find(name).unwrap().is_in(entries)
    }

    fn entry(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let is_it = |it: &&kvm_cpuid_entry2| (it.function, it.index) == (function, index);
        entries.iter().find(is_it).copied().unwrap_or_default()
    }

    #[test]
    fn what_a_host_shows_whatever_was_set_is_no_lack() {
        let supported = [leaf(1, 0, [0, 0, 0, 1])];
        let shown = [leaf(1, 0, [0, 0, 1 << 27 | 1, 0]), leaf(7, 0, [0, 1 << 5, 0, 0])];
        let all = with_shown(&supported, &shown);
        assert!(["fpu", "pni", "avx2"].iter().all(|name| has(&all, name)));
        assert_eq!(entry(&all, 1, 0).ecx, 1, "OSXSAVE is no feature, but follows CR4");
    }

    #[test]
    fn every_name_in_the_tables_is_a_feature() {
        let levels = LEVELS.iter().flat_map(|(_, names)| names.split_ascii_whitespace());
        let needs = NEEDS
            .iter()
            .flat_map(|(name, names)| std::iter::once(*name).chain(names.split_ascii_whitespace()));
        let components = COMPONENTS.iter().map(|(name, _)| *name);
        for name in levels.chain(COMMON.split_ascii_whitespace()).chain(needs).chain(components) {
            assert!(Feature::find(name).is_some(), "{name}");
        }
    }

    #[test]
    fn the_host_is_given_whole_but_without_nested_virtualization() {
        let guest = model("host");
        assert!(has(&guest, "avx512vl") && has(&guest, "la57") && has(&guest, "kvmclock"));
        assert!(!has(&guest, "vmx") && !has(&guest, "svm"));
        assert_eq!(entry(&guest, 7, 0).edx, u32::MAX, "what has no name, too");
        let guest = model("host,+vmx,-la57");
        assert!(has(&guest, "vmx") && !has(&guest, "svm") && !has(&guest, "la57"));
    }

    #[test]
    fn no_leaf_of_nested_virtualization_is_left() {
        let mut host = host();
        host.push(leaf(0x8000_000a, 0, [u32::MAX; 4]));
        let guest = |cpu: &str| guest_cpuid(&cpu.parse().unwrap(), &host).unwrap();
        let svm = |guest: &[kvm_cpuid_entry2]| entry(guest, 0x8000_000a, 0);
        for cpu in ["host", "host,-svm", "x86-64-v3"] {
            let svm = svm(&guest(cpu));
            assert_eq!((svm.eax, svm.ebx, svm.ecx, svm.edx), (0, 0, 0, 0), "{cpu}");
        }
        assert_eq!(svm(&guest("x86-64-v3,+svm")).edx, u32::MAX);
    }

    #[test]
    fn a_baseline_has_its_level_and_no_more() {
        let [v1, v2, v3, v4] = ["x86-64-v1", "x86-64-v2", "x86-64-v3", "x86-64-v4"].map(model);
        for (name, levels) in [
            ("sse2", [true; 4]),
            ("nx", [true; 4]),
            ("kvmclock", [true; 4]),
            ("sse4.2", [false, true, true, true]),
            ("cx16", [false, true, true, true]),
            ("avx2", [false, false, true, true]),
            ("xsave", [false, false, true, true]),
            ("movbe", [false, false, true, true]),
            ("avx512vl", [false, false, false, true]),
            ("erms", [false; 4]),
            ("aes", [false; 4]),
            ("vmx", [false; 4]),
        ] {
            assert_eq!([&v1, &v2, &v3, &v4].map(|guest| has(guest, name)), levels, "{name}");
        }
        assert_eq!(entry(&v3, 7, 0).edx, 0, "nor what has no name");
        assert_eq!(entry(&v3, 0xa, 0).eax, 0, "performance counters differ");
        assert!(has(&model("x86-64-v2,+aes,+erms"), "erms"));
        assert!(!has(&model("x86-64-v2,-popcnt"), "popcnt"));
    }

    #[test]
    fn xsave_has_the_components_of_what_is_there() {
        for (cpu, components, size) in [
            ("host", 0x602e7, 2816 + 8192),
            ("x86-64-v4", 0xe7, 1664 + 1024),
            ("x86-64-v3", 7, 832),
            ("x86-64-v2", 0, 0),
            ("x86-64-v2,+xsave", 3, 576),
            ("host,-avx", 0x60203, 2816 + 8192),
            ("host,-xsave", 0, 0),
        ] {
            let leaf = entry(&model(cpu), 0xd, 0);
            assert_eq!((leaf.eax, leaf.ecx), (components, size), "{cpu}");
        }
        let guest = model("x86-64-v3");
        assert_eq!((entry(&guest, 0xd, 2).eax, entry(&guest, 0xd, 5).eax), (256, 0));
    }

    #[test]
    fn what_builds_on_a_feature_goes_with_it_unless_it_was_asked_for() {
        let guest = model("host,-avx");
        for name in ["avx2", "fma", "avx512f", "avx512vbmi2", "vaes"] {
            assert!(!has(&guest, name), "{name}");
        }
        assert!(!has(&model("host,-sse4.2"), "avx2"));
        let error = guest_cpuid(&"host,-avx,+avx512vnni".parse().unwrap(), &host()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--cpu host,-avx,+avx512vnni: avx512vnni does not work without avx512f"
        );
    }

    #[test]
    fn what_the_host_lacks_is_named() {
        let mut host = host();
        Feature::find("avx2").unwrap().remove(&mut host);
        let error = |cpu: &str| guest_cpuid(&cpu.parse().unwrap(), &host).unwrap_err().to_string();
        assert_eq!(error("x86-64-v3"), "--cpu x86-64-v3: this host lacks avx2");
        assert_eq!(error("host,+avx2"), "--cpu host,+avx2: this host lacks avx2");
        assert!(guest_cpuid(&"x86-64-v2,-avx2".parse().unwrap(), &host).is_ok());
        assert!(guest_cpuid(&"x86-64-v3,-avx2".parse().unwrap(), &host).is_ok());
        assert_eq!(highest_level(|feature| feature.is_in(&host)), Some(CpuModel::V2));
        assert_eq!(highest_level(|_| true), Some(CpuModel::V4));
    }

    proptest! {
        #[test]
        fn arbitrary_cpuid_never_panics(
            leaves in prop::collection::vec((0u32..16, 0u32..3, any::<[u32; 4]>()), 0..12),
            cpu in prop_oneof![Just("host"), Just("x86-64-v3,+vmx"), Just("host,-xsave,-avx")],
        ) {
            let host: Vec<_> = leaves.iter().map(|(function, index, words)| leaf(*function, *index, *words)).collect();
            let _ = guest_cpuid(&cpu.parse().unwrap(), &host);
        }
    }
}
