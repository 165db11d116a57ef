//! The machine description: all guest-visible hardware. Written by the source, sent in the stream,
//! validated at the destination like any other untrusted input.

mod platform;

pub use platform::{FwCfgFile, Platform, PortRange, check_debug_exit};

use super::cpu::config::CpuConfig;
use crate::kvm::blob::Blob;
use devices::block::SECTOR_BYTES;
use devices::ram::RamLayout;
use devices::state::{JsonText, at_most};
use devices::virtio::blk::MAX_QUEUES;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use migration::guest::MachineDescription;
use serde::{Deserialize, Serialize};

/// Version of [`Description`] that this build writes.
const VERSION: u16 = 1;
/// Maximum number of vCPUs, if KVM offers them: APIC ids from 0 on, of which 255 means all CPUs. A guest needs neither
/// 32-bit ids nor interrupt remapping for these.
pub const MAX_CPUS: u8 = 254;
/// Maximum number of disks: each virtio device needs an interrupt line.
pub const MAX_DISKS: usize = crate::boot::layout::VIRTIO_GSIS.len();

/// Largest disk that can be migrated: its bitmaps take memory, and a sparse file can have any size.
pub const MAX_MIGRATED_DISK_BYTES: u64 = 16 << 40;

/// One guest's hardware.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// The guest's name, if it has one.
    pub name: Option<String>,
    /// RAM size.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Their model and features, for a reset at the destination. Older guests have the host's.
    #[serde(default, skip_serializing_if = "CpuConfig::is_default")]
    pub cpu: CpuConfig,
    /// Command line as the user gave it, for a reset at the destination.
    pub cmdline: String,
    /// Whether the guest finds ACPI tables; for a reset at the destination.
    #[serde(default)]
    pub acpi: bool,
    /// Disks in the order of their devices.
    #[serde(deserialize_with = "at_most::<_, _, MAX_DISKS>")]
    pub disks: Vec<DiskDescription>,
    /// Whether a virtio-rng follows the disks. Older guests have none.
    #[serde(default)]
    pub rng: bool,
    /// What test kernels look at. Older guests have none of it, but a debug-exit device at port 0xf4.
    #[serde(default)]
    pub platform: Option<Platform>,
    /// Dirty bitmaps follow the guest. Set only in a description that is sent, like [`DiskDescription::travels`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bitmaps: bool,
    /// CPUID as vCPU 0 sees it; the others differ by their APIC id.
    #[serde(deserialize_with = "at_most::<_, _, KVM_MAX_CPUID_ENTRIES>")]
    pub cpuid: Vec<Blob<kvm_cpuid_entry2>>,
    /// Frequency of the guest's TSC in kHz.
    pub tsc_khz: u32,
}

/// A disk as the guest sees it. The destination chooses its image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskDescription {
    /// The disk's id on both sides.
    pub id: String,
    /// Size.
    pub len_bytes: u64,
    /// Whether the guest may write it.
    pub read_only: bool,
    /// Number of its queues. Older guests have one.
    #[serde(default = "one")]
    pub queues: u16,
    /// How the disk is migrated, if it is. Set only in a description that is sent, never in a machine's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub travels: Option<Travels>,
}

/// How a disk is migrated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Travels {
    /// Its backing file, if only the data above that is migrated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<BackingDescription>,
    /// Estimated bytes of data, for the destination's check of free space.
    pub data_bytes: u64,
}

/// Identity of a backing file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackingDescription {
    /// Its path at the source.
    pub name: String,
    /// Its size as a disk.
    pub len_bytes: u64,
    /// The SHA-256 of all its bytes, in hexadecimal digits.
    pub sha256: String,
}

fn one() -> u16 {
    1
}

/// A description that no machine can be built from.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    #[error("machine description version {found} is newer than {VERSION}, the newest known here")]
    NewerVersion { found: u16 },
    /// Does not match its version's layout.
    #[error("malformed machine description")]
    Malformed(#[source] serde_json::Error),
    #[error("machine description: {0}")]
    Invalid(String),
}

impl Description {
    /// Encodes it for the stream.
    pub fn to_stream(&self) -> MachineDescription {
        MachineDescription {
            version: VERSION,
            ram_bytes: self.memory_bytes,
            machine: JsonText::of(self),
        }
    }

    /// Decodes and validates it.
    pub fn from_stream(stream: &MachineDescription) -> Result<Self, DescriptionError> {
        if stream.version > VERSION {
            return Err(DescriptionError::NewerVersion { found: stream.version });
        }
        let description: Self = stream.machine.decode().map_err(DescriptionError::Malformed)?;
        if description.memory_bytes != stream.ram_bytes {
            let (machine, ram) = (description.memory_bytes, stream.ram_bytes);
            let reason = format!("memory is {machine} bytes here and {ram} bytes there");
            return Err(DescriptionError::Invalid(reason));
        }
        description.validate()?;
        Ok(description)
    }

    fn validate(&self) -> Result<(), DescriptionError> {
        let invalid = |reason: String| Err(DescriptionError::Invalid(reason));
        if let Err(error) = RamLayout::for_size(self.memory_bytes) {
            return invalid(error.to_string());
        }
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return invalid(format!("{} vCPUs (1 to {MAX_CPUS} are possible)", self.cpus));
        }
        if self.disks.len() > MAX_DISKS {
            return invalid(format!("{} disks (at most {MAX_DISKS})", self.disks.len()));
        }
        if self.cpuid.is_empty() || self.cpuid.len() > KVM_MAX_CPUID_ENTRIES {
            return invalid(format!("{} CPUID entries", self.cpuid.len()));
        }
        check_rng(self.rng, self.disks.iter().map(|disk| disk.id.as_str()))
            .map_err(DescriptionError::Invalid)?;
        self.platform.iter().try_for_each(Platform::validate).map_err(DescriptionError::Invalid)?;
        for (index, disk) in self.disks.iter().enumerate() {
            if disk.len_bytes == 0 || !disk.len_bytes.is_multiple_of(SECTOR_BYTES) {
                return invalid(format!("disk {:?} of {} bytes", disk.id, disk.len_bytes));
            }
            if disk.travels.is_some() && disk.len_bytes > MAX_MIGRATED_DISK_BYTES {
                let (id, len, most) = (&disk.id, disk.len_bytes, MAX_MIGRATED_DISK_BYTES);
                return invalid(format!("disk {id:?} of {len} bytes travels, at most {most} may"));
            }
            if !(1..=MAX_QUEUES).contains(&disk.queues) {
                let (id, queues) = (&disk.id, disk.queues);
                return invalid(format!("disk {id:?} with {queues} queues (1 to {MAX_QUEUES})"));
            }
            if self.disks[..index].iter().any(|other| other.id == disk.id) {
                return invalid(format!("disk {:?} is there twice", disk.id));
            }
        }
        Ok(())
    }
}

/// Whether a virtio-rng fits beside these disks.
pub fn check_rng<'a>(
    rng: bool,
    mut disk_ids: impl ExactSizeIterator<Item = &'a str>,
) -> Result<(), String> {
    if !rng {
        return Ok(());
    }
    if disk_ids.len() >= MAX_DISKS {
        return Err(format!("at most {} disks beside a virtio-rng", MAX_DISKS - 1));
    }
    if disk_ids.any(|id| id == super::RNG_INSTANCE) {
        return Err(format!("a disk beside a virtio-rng cannot be {:?}", super::RNG_INSTANCE));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) fn sample() -> Description {
    use devices::state::HexBytes;
    let disk = |id: &str| DiskDescription {
        id: id.into(),
        len_bytes: 512,
        read_only: false,
        queues: 4,
        travels: None,
    };
    Description {
        name: Some("vm1".into()),
        memory_bytes: 128 << 20,
        cpus: 2,
        cpu: "x86-64-v2,+aes".parse().unwrap(),
        cmdline: "work=idle".into(),
        acpi: true,
        disks: vec![disk("disk0"), disk("disk1")],
        rng: true,
        platform: Some(Platform {
            testdev: true,
            fw_cfg: vec![FwCfgFile { name: "opt/x".into(), content: HexBytes(b"text".into()) }],
            ..Platform::default()
        }),
        bitmaps: false,
        cpuid: vec![Blob(kvm_cpuid_entry2 { function: 1, ..Default::default() })],
        tsc_khz: 2_000_000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::fw_cfg::MAX_USER_BYTES;
    use devices::state::HexBytes;

    #[test]
    fn a_description_survives_a_round_trip() {
        let sample = sample();
        assert_eq!(Description::from_stream(&sample.to_stream()).unwrap(), sample);
    }

    #[test]
    fn impossible_machines_are_refused_by_name() {
        let refuse = |change: &dyn Fn(&mut Description), expected: &str| {
            let mut bad = sample();
            change(&mut bad);
            let error = Description::from_stream(&bad.to_stream()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        };
        refuse(&|d| d.cpus = 0, "0 vCPUs");
        refuse(&|d| d.cpus = 255, "255 vCPUs");
        refuse(&|d| d.memory_bytes = 1, "not a multiple");
        refuse(&|d| d.memory_bytes = 1 << 60, "out of range");
        refuse(&|d| d.disks[1].id = "disk0".into(), "twice");
        refuse(&|d| d.disks[1].queues = 0, "0 queues");
        refuse(&|d| d.disks[1].queues = 17, "17 queues");
        refuse(&|d| d.disks[1].len_bytes = 700, "of 700 bytes");
        refuse(&|d| d.disks[1].len_bytes = 0, "of 0 bytes");
        refuse(
            &|d| {
                d.disks[1].len_bytes = 1 << 62;
                d.disks[1].travels = Some(Travels { backing: None, data_bytes: 0 });
            },
            "at most 17592186044416 may",
        );
        refuse(&|d| d.disks[1].id = "rng".into(), "beside a virtio-rng");
        refuse(
            &|d| {
                let more = (2..MAX_DISKS)
                    .map(|n| DiskDescription { id: format!("disk{n}"), ..d.disks[0].clone() });
                let more: Vec<_> = more.collect();
                d.disks.extend(more);
            },
            "at most 7 disks beside",
        );
        refuse(&|d| d.cpuid.clear(), "0 CPUID entries");
        let platform = |change: fn(&mut Platform)| {
            move |d: &mut Description| d.platform.iter_mut().for_each(change)
        };
        let ports = |base, len| Some(PortRange { base, len });
        refuse(&|d| d.platform.as_mut().unwrap().debug_exit = ports(0x510, 1), "fw_cfg device");
        refuse(&platform(|p| p.fw_cfg.push(p.fw_cfg[0].clone())), "\"opt/x\" is given twice");
        refuse(&platform(|p| p.fw_cfg[0].name = "a b".into()), "\"a b\" may have");
        let long = |p: &mut Platform| {
            let content = HexBytes(vec![0; MAX_USER_BYTES]);
            p.fw_cfg.push(FwCfgFile { name: "opt/y".into(), content });
        };
        refuse(&platform(long), "more than 262144 bytes");
        let mut old = sample().to_stream();
        let mut machine: serde_json::Value = old.machine.decode().unwrap();
        machine.as_object_mut().unwrap().remove("rng");
        machine.as_object_mut().unwrap().remove("platform");
        machine["disks"][0].as_object_mut().unwrap().remove("queues");
        old.machine = machine.into();
        let old = Description::from_stream(&old).unwrap();
        assert_eq!((old.rng, old.disks[0].queues), (false, 1), "what older guests have");
        assert_eq!(old.platform, None);
        let mut stream = sample().to_stream();
        stream.ram_bytes = 4 << 20;
        assert!(Description::from_stream(&stream).is_err());
        stream.version = 2;
        assert!(matches!(
            Description::from_stream(&stream),
            Err(DescriptionError::NewerVersion { found: 2 })
        ));
    }
}
