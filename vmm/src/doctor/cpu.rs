//! `ferry doctor --cpu-model` and `--baseline`: what this host's CPU and those of others have in common, as a `--cpu`
//! with which a guest can move between them.

use crate::error::chain;
use crate::exit_code;
use crate::kvm::Host;
use crate::machine::MachineError;
use crate::machine::build::available_cpuid;
use crate::machine::cpu::config::{CpuConfig, CpuModel};
use crate::machine::cpu::model::{features_of, highest_level, host_cpuid, names_of};
use crate::machine::cpu::names::Feature;
use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::{Path, PathBuf};

/// One host's CPU, as `--cpu-model` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct HostCpu {
    /// CPUID's vendor.
    vendor: String,
    /// The highest level of the psABI, if any.
    level: Option<String>,
    /// Every named feature that KVM can give to a guest.
    features: Vec<String>,
}

/// Largest file of a host's CPU.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why there is no baseline.
#[derive(Debug, thiserror::Error)]
enum BaselineError {
    #[error(transparent)]
    ThisHost(#[from] MachineError),
    #[error("cannot read {file}")]
    Read {
        file: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{file} is not what `ferry doctor --cpu-model` prints")]
    Malformed {
        file: String,
        #[source]
        source: serde_json::Error,
    },
    #[error(
        "{file} has more than {MAX_FILE_BYTES} bytes: it is not what `ferry doctor --cpu-model` prints"
    )]
    TooLarge { file: String },
    /// Kernels treat CPUs of other vendors otherwise.
    #[error("the hosts have CPUs of different vendors, {}: no guest moves between them", .0.join(" and "))]
    Vendors(Vec<String>),
    #[error("the hosts have not even {} in common", .0.name())]
    NoLevel(CpuModel),
}

/// Prints this host's CPU model as JSON.
pub fn print_model() -> u8 {
    let printed = this_host().map(|cpu| {
        // A structure of strings can always be encoded.
        let text = serde_json::to_string_pretty(&cpu).unwrap_or_default();
        println!("{text}");
    });
    ended(printed)
}

/// Prints the `--cpu` that runs on this host and on those of all `files`.
pub fn print_baseline(files: &[PathBuf]) -> u8 {
    let here = this_host().map_err(BaselineError::from);
    let hosts = std::iter::once(here).chain(files.iter().map(|file| read(file)));
    let common = hosts.collect::<Result<Vec<_>, _>>().and_then(|hosts| baseline(&hosts));
    ended(common.map(|cpu| println!("--cpu {cpu}")))
}

fn ended<E: std::error::Error>(result: Result<(), E>) -> u8 {
    match result {
        Ok(()) => exit_code::OK,
        Err(error) => {
            eprintln!("ferry: {}", chain(&error));
            exit_code::CANNOT_RUN
        }
    }
}

fn this_host() -> Result<HostCpu, MachineError> {
    Ok(HostCpu::of(&available_cpuid(&Host::open()?)?))
}

impl HostCpu {
    fn of(supported: &[kvm_cpuid_entry2]) -> Self {
        let host = host_cpuid(supported);
        let level = highest_level(|feature| feature.is_in(&host));
        let features = features_of(CpuModel::Host, &host);
        let first = host.iter().find(|entry| entry.function == 0).copied().unwrap_or_default();
        Self {
            vendor: vendor([first.ebx, first.edx, first.ecx]),
            level: level.map(|level| level.name().to_owned()),
            features: features.into_iter().map(|feature| feature.name().to_owned()).collect(),
        }
    }
}

/// The 12 letters of leaf 0's EBX, EDX and ECX.
fn vendor(registers: [u32; 3]) -> String {
    let letter =
        |word: u32, index: u32| char::from(u8::try_from(word >> (8 * index) & 0xff).unwrap_or(0));
    let letters = registers.iter().flat_map(|word| (0..4).map(move |index| letter(*word, index)));
    letters.filter(char::is_ascii_graphic).collect()
}

fn read(file: &Path) -> Result<HostCpu, BaselineError> {
    let name = || file.display().to_string();
    let read = |source| BaselineError::Read { file: name(), source };
    let mut text = String::new();
    let opened = std::fs::File::open(file).map_err(read)?;
    opened.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(read)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(BaselineError::TooLarge { file: name() });
    }
    serde_json::from_str(&text).map_err(|source| BaselineError::Malformed { file: name(), source })
}

/// Features that are not for guests which move: their meaning is in registers that differ between hosts.
const STAY: [&str; 9] = [
    "arch-capabilities",
    "core-capability",
    "invtsc",
    "intel-pt",
    "arch-lbr",
    "sgx",
    "sgxlc",
    "vmx",
    "svm",
];

/// What all hosts have: the highest common level, and the features that differ from it.
fn baseline(hosts: &[HostCpu]) -> Result<CpuConfig, BaselineError> {
    let mut vendors: Vec<_> = hosts.iter().map(|host| host.vendor.clone()).collect();
    vendors.sort();
    vendors.dedup();
    if vendors.len() > 1 {
        return Err(BaselineError::Vendors(vendors));
    }
    // A newer Ferry may name features that this one does not know.
    let features = |host: &HostCpu| -> Vec<Feature> {
        host.features.iter().filter_map(|name| Feature::find(name)).collect()
    };
    let all: Vec<_> = hosts.iter().map(features).collect();
    let everywhere = |feature: Feature| all.iter().all(|host| host.contains(&feature));
    let model = highest_level(everywhere).ok_or(BaselineError::NoLevel(CpuModel::V1))?;
    let of_model = names_of(model);
    let mut cpu = CpuConfig { model, switches: Vec::new() };
    for feature in Feature::all() {
        let somewhere = all.iter().any(|host| host.contains(&feature));
        match (of_model.contains(&feature), everywhere(feature)) {
            (true, false) if somewhere => cpu.switch(feature, false),
            (false, true) if !STAY.contains(&feature.name()) => cpu.switch(feature, true),
            _ => {}
        }
    }
    Ok(cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(vendor: &str, model: CpuModel, more: &[&str]) -> HostCpu {
        let mut features: Vec<String> =
            names_of(model).into_iter().map(|feature| feature.name().to_owned()).collect();
        features.extend(more.iter().map(|name| (*name).to_owned()));
        HostCpu { vendor: vendor.into(), level: None, features }
    }

    #[test]
    fn hosts_have_their_lower_level_and_common_features() {
        let older = host("GenuineIntel", CpuModel::V3, &["aes", "erms", "invtsc"]);
        let newer =
            host("GenuineIntel", CpuModel::V4, &["aes", "la57", "invtsc", "from-the-future"]);
        assert_eq!(
            baseline(&[older.clone(), newer.clone()]).unwrap().to_string(),
            "x86-64-v3,+aes"
        );
        let alone = baseline(std::slice::from_ref(&newer)).unwrap();
        assert_eq!(alone.to_string(), "x86-64-v4,+aes,+la57");
        let mut without = older.clone();
        without.features.retain(|name| name != "x2apic");
        let common = baseline(&[newer, without]).unwrap();
        assert_eq!(common.to_string(), "x86-64-v3,-x2apic,+aes");
        let error = baseline(&[older, host("AuthenticAMD", CpuModel::V3, &[])]).unwrap_err();
        assert!(error.to_string().contains("AuthenticAMD and GenuineIntel"), "{error}");
        let nothing = HostCpu { vendor: "GenuineIntel".into(), level: None, features: vec![] };
        assert!(baseline(&[nothing]).unwrap_err().to_string().contains("not even x86-64-v1"));
    }

    #[test]
    fn the_vendor_is_read_from_leaf_0() {
        let leaf = kvm_cpuid_entry2 {
            ebx: 0x756e_6547,
            edx: 0x4965_6e69,
            ecx: 0x6c65_746e,
            ..Default::default()
        };
        let cpu = HostCpu::of(&[leaf]);
        assert_eq!((cpu.vendor.as_str(), cpu.level), ("GenuineIntel", None));
    }

    #[test]
    fn a_file_that_is_something_else_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = read(file.path()).unwrap_err().to_string();
        assert!(error.contains("ferry doctor --cpu-model"), "{error}");
        file.as_file().set_len(2 << 20).unwrap();
        assert!(matches!(read(file.path()), Err(BaselineError::TooLarge { .. })));
        assert!(matches!(read(Path::new("/nonexistent")), Err(BaselineError::Read { .. })));
    }
}
