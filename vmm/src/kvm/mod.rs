//! Opens KVM and checks its capabilities. Almost all unsafe code of this crate lives in this folder.
//!
//! [`memory`] maps guest RAM, [`vm`] owns slots, interrupts and the dirty log, [`vcpu`] runs and kicks one
//! vCPU, [`alarm`] kicks it after a delay, [`cpu_state`] and [`vm_state`] save and restore their state;
//! [`nested`] hides nested virtualization.

pub mod alarm;
pub mod blob;
pub mod cpu_state;
mod ioctls;
pub mod memory;
mod msrs;
pub mod nested;
pub mod vcpu;
pub mod vm;
pub mod vm_state;

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

/// An error of KVM, or of guest memory.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error(
        "/dev/kvm does not exist: load kvm_intel or kvm_amd (or enable nested virtualisation), \
         then try `ferry doctor`"
    )]
    Missing,
    /// `/dev/kvm` exists but we may not open it.
    #[error("no permission to open /dev/kvm: add yourself to group kvm, then log in again")]
    Permission,
    #[error("cannot open /dev/kvm")]
    Open(#[source] std::io::Error),
    /// Not version 12, the stable API since 2007.
    #[error("KVM API version is {0}, expected {KVM_API_VERSION}: the kernel is too old")]
    ApiVersion(i32),
    /// A required capability is missing.
    #[error("KVM lacks {0:?}, which Ferry needs; `ferry doctor` lists what is missing")]
    Capability(Cap),
    /// More vCPUs than this KVM allows.
    #[error("{wanted} vCPUs asked for, this KVM allows {most}")]
    TooManyCpus { wanted: usize, most: usize },
    #[error("{what} failed")]
    Ioctl {
        /// The ioctl, by its KVM name.
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot map {bytes} bytes of guest memory: lower --memory or free memory on the host")]
    Map {
        bytes: u64,
        #[source]
        source: std::io::Error,
    },
    /// A saved state that this KVM or machine cannot load.
    #[error("{what}: {reason}")]
    State { what: &'static str, reason: String },
}

/// Adds the ioctl's name to an error.
pub(crate) fn ioctl<T>(
    what: &'static str,
    result: Result<T, kvm_ioctls::Error>,
) -> Result<T, KvmError> {
    result.map_err(|error| KvmError::Ioctl { what, source: error.into() })
}

/// An open `/dev/kvm` with all required capabilities.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
}

/// Capabilities without which no guest runs here. `ferry doctor` lists them one by one.
pub const REQUIRED: [Cap; 14] = [
    Cap::Irqchip,
    Cap::UserMemory,
    Cap::SetTssAddr,
    Cap::Pit2,
    Cap::PitState2,
    Cap::Irqfd,
    Cap::Ioeventfd,
    Cap::MpState,
    Cap::VcpuEvents,
    Cap::Xsave,
    Cap::Xcrs,
    Cap::AdjustClock,
    Cap::ImmediateExit,
    Cap::ExtCpuid,
];

impl Host {
    /// Opens `/dev/kvm` and checks version and capabilities.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::Missing,
            libc::EACCES | libc::EPERM => KvmError::Permission,
            _ => KvmError::Open(error.into()),
        })?;
        let version = kvm.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            return Err(KvmError::ApiVersion(version));
        }
        if let Some(missing) = REQUIRED.into_iter().find(|cap| !kvm.check_extension(*cap)) {
            return Err(KvmError::Capability(missing));
        }
        Ok(Self { kvm })
    }

    /// The underlying handle.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The CPUID that this host supports.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        ioctl("KVM_GET_SUPPORTED_CPUID", self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))
    }

    /// Checks the number of vCPUs early, for a better error than KVM's.
    pub fn check_cpu_count(&self, wanted: usize) -> Result<(), KvmError> {
        let most = self.kvm.get_max_vcpus();
        if wanted > most {
            return Err(KvmError::TooManyCpus { wanted, most });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
