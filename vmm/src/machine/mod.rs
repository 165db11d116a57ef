//! One guest's machine: its parts; start, stop, save and restore.
//!
//! [`build`] creates it from a [`description`]; [`vcpus`] runs it; [`dirty`] tracks writes to its RAM;
//! [`records`] saves and restores its devices. The supervisor owns the one machine of a process and is its
//! only caller. No vCPU runs without a [`RunPermit`].

pub mod build;
pub mod cpu;
pub mod cpu_features;
pub mod description;
pub mod dirty;
pub mod drain;
mod platform;
mod records;
pub mod run_state;
pub mod throttle;
mod unclaimed;
pub mod vcpus;

use crate::boot::BootError;
use crate::boot::items::boot_files;
use crate::boot::payload::BootPayload;
use crate::error::chain;
use crate::kvm::KvmError;
use crate::kvm::vm::Vm;
use crate::limits::LimitError;
use cpu::model::CpuModelError;
use description::{Description, DescriptionError};
use devices::block::BlockNode;
use devices::debug_console::DebugOutput;
use devices::irq::{EventIrq, IrqLine};
use devices::lock;
use devices::reset::GuestExit;
use devices::serial::SerialConsole;
use devices::state::RestoreError;
use devices::transmitter::Transmitter;
use devices::virtio::mmio::MmioTransport;
use drain::{DeviceDrain, Drains};
use migration::guest::RunPermit;
use platform::PlatformDevices;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;
use vcpus::{VcpuEnd, Vcpus, VcpusError};

/// Instance name of the virtio-rng's record; no disk beside it may have this id.
pub const RNG_INSTANCE: &str = "rng";

/// Why a machine cannot be built, started, stopped or moved.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Vcpus(#[from] VcpusError),
    #[error(transparent)]
    Description(#[from] DescriptionError),
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error(transparent)]
    CpuModel(#[from] CpuModelError),
    /// The CPU lacks features of the guest's CPUID.
    #[error("this host's CPU lacks features that the guest uses: {}", .0.join(", "))]
    CpuFeatures(Vec<String>),
    #[error("disk {id}")]
    Disk {
        id: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A disk without a `--disk` option.
    #[error("the guest has a disk {id:?} ({len_bytes} bytes): give its path with --disk {id}=PATH")]
    DiskNotGiven { id: String, len_bytes: u64 },
    /// An image that differs from the guest's disk.
    #[error("disk {id}: {reason}")]
    DiskMismatch { id: String, reason: String },
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The set of records does not fit the machine.
    #[error("device records: {0}")]
    Records(String),
    /// An eventfd or bus range could not be set up.
    #[error("cannot set up {what}")]
    Setup {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    /// The machine has no right to run.
    #[error(
        "the guest has been handed over and may run elsewhere; if you are sure that it does not, \
         resume it here with `ferry ctl SOCKET cont --force`"
    )]
    NoPermit,
}

/// Reported by a device or vCPU when the guest ends or cannot continue.
#[derive(Clone)]
pub struct GuestEvents {
    /// The guest asked for reset, power-off or debug-exit, or has panicked.
    pub on_exit: Arc<dyn Fn(GuestExit) + Send + Sync>,
    /// The guest has crashed and goes on, in a kernel for such a case.
    pub on_crash_loaded: Arc<dyn Fn() + Send + Sync>,
    /// A vCPU cannot continue.
    pub on_end: Arc<dyn Fn(VcpuEnd) + Send + Sync>,
}

/// A machine's backends on this host.
pub struct Backends {
    /// Disk images, in the order of the description; not yet locked.
    pub disks: Vec<Arc<BlockNode>>,
    /// Receives the guest's serial output.
    pub serial_output: Arc<Transmitter>,
    /// Receives the output of its debug console.
    pub debug_output: DebugOutput,
    /// Called when the guest ends.
    pub events: GuestEvents,
}

/// A virtio-blk device and its disk.
pub struct Disk {
    /// The image.
    pub node: Arc<BlockNode>,
    transport: Arc<Mutex<MmioTransport>>,
}

/// One guest. Field order matters: threads stop before the things they use are dropped.
pub struct Machine {
    vcpus: Vcpus,
    disks: Vec<Disk>,
    rng: Option<Arc<Mutex<MmioTransport>>>,
    serial: Arc<Mutex<SerialConsole>>,
    /// None in a guest of an older Ferry.
    platform: Option<PlatformDevices>,
    power_button: Arc<EventIrq>,
    /// Set by the device or vCPU that ended the guest; the supervisor gets its message a moment later.
    ended: Arc<AtomicBool>,
    description: Description,
    permit: Option<RunPermit>,
    /// Set while vCPUs run.
    running: bool,
    vm: Arc<Vm>,
}

impl Machine {
    /// The machine's description.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The KVM virtual machine and its RAM.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Its console, for input.
    pub fn serial(&self) -> &Arc<Mutex<SerialConsole>> {
        &self.serial
    }

    /// Queues console input for the guest; returns how many bytes fitted.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        lock(&self.serial).enqueue_input(bytes)
    }

    /// Presses the ACPI power button, which the guest may ignore.
    pub fn press_power_button(&self) -> Result<(), MachineError> {
        let setup = |source| MachineError::Setup { what: "power button", source };
        self.power_button.raise().map_err(setup)
    }

    /// The files that it was booted from have arrived with it.
    pub fn set_boot_files(&self, payload: &BootPayload) {
        self.platform.iter().for_each(|platform| platform.set_boot_files(boot_files(payload)));
    }

    /// Its disks.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// All virtio devices in slot order, with their records' instance names.
    fn virtio_devices(&self) -> impl Iterator<Item = (&str, MutexGuard<'_, MmioTransport>)> {
        let disks = self.disks.iter().map(|disk| (disk.node.id(), &disk.transport));
        let rng = self.rng.iter().map(|transport| (RNG_INSTANCE, transport));
        disks.chain(rng).map(|(instance, transport)| (instance, lock(transport)))
    }

    /// Kernel thread ids of the vCPUs.
    pub fn thread_ids(&self) -> Vec<i32> {
        self.vcpus.thread_ids()
    }

    /// Throttles the vCPUs by `percent`; 0 ends throttling.
    pub fn throttle(&self, percent: u8) {
        self.vcpus.throttle(percent);
    }

    /// Grants the right to run.
    pub fn grant(&mut self, permit: RunPermit) {
        self.permit = Some(permit);
        lock(&self.serial).release_output();
        self.platform.iter().for_each(PlatformDevices::release_output);
    }

    /// Revokes the right to run; the machine must be stopped.
    pub fn take_permit(&mut self) -> Option<RunPermit> {
        debug_assert!(!self.running, "a running guest needs its permit");
        let permit = self.permit.take()?;
        // Unsent output moves with the guest.
        lock(&self.serial).hold_output();
        self.platform.iter().for_each(PlatformDevices::hold_output);
        Some(permit)
    }

    /// Whether the machine has the right to run.
    pub fn has_permit(&self) -> bool {
        self.permit.is_some()
    }

    /// Its disks, in the order of the description.
    pub fn nodes(&self) -> Vec<Arc<BlockNode>> {
        self.disks.iter().map(|disk| disk.node.clone()).collect()
    }

    /// Starts or resumes all vCPUs and devices, or none on error.
    pub fn run(&mut self) -> Result<(), MachineError> {
        if self.permit.is_none() {
            return Err(MachineError::NoPermit);
        }
        if self.running {
            return Ok(());
        }
        // Check before any change: a resumed device writes guest RAM.
        self.vcpus.check()?;
        self.vcpus.notify_clock_paused()?;
        // Retry failed requests.
        self.disks.iter().for_each(|disk| disk.node.retry_failed());
        // Devices first: they repeat notifications and interrupts that were in flight at the pause.
        lock(&self.serial).resume();
        self.virtio_devices().for_each(|(_, mut device)| device.resume());
        if let Err(error) = self.vcpus.run() {
            // No vCPU runs, so stop the devices, too. Any later use drains them first.
            drop(self.begin_drain());
            return Err(error.into());
        }
        self.running = true;
        Ok(())
    }

    /// Stops the guest: on return no vCPU executes and no request is started. The caller waits for requests
    /// in flight on another thread. If the guest is stopped already, only that remains.
    pub fn begin_pause(&mut self) -> Result<Drains, MachineError> {
        let began = Instant::now();
        if self.running {
            self.vcpus.park()?;
            self.running = false;
        }
        let vcpus_took = began.elapsed();
        Ok(Drains { vcpus_took, devices: self.begin_drain() })
    }

    /// Like [`Machine::begin_pause`], for a guest that will not resume: continues if a vCPU cannot be
    /// stopped, which is logged and means that the machine cannot be dropped either.
    pub fn begin_end(&mut self) -> (Drains, bool) {
        let began = Instant::now();
        let parked = if self.running { self.vcpus.park() } else { Ok(()) };
        if let Err(error) = &parked {
            log::error!("while shutting down: {error}");
        }
        let drains = Drains { vcpus_took: began.elapsed(), devices: self.begin_drain() };
        self.flush_output();
        (drains, !matches!(parked, Err(VcpusError::Stuck { .. })))
    }

    /// Where each vCPU of a stopped guest is, in words, of those that answer by `deadline`.
    pub fn locate(&self, deadline: Instant) -> Vec<String> {
        self.vcpus.locate(deadline)
    }

    /// Sends as much serial output as the reader takes without blocking, so that a log is complete. For a
    /// stopped guest that stays here.
    pub fn flush_output(&self) {
        lock(&self.serial).pause();
    }

    /// Tells all devices to start no request.
    fn begin_drain(&self) -> Vec<DeviceDrain> {
        let disks = self.disks.iter().map(|disk| {
            let drain = lock(&disk.transport).begin_drain();
            DeviceDrain::of_disk(&disk.node, drain)
        });
        let rng = self.rng.iter().map(|transport| {
            let drain = lock(transport).begin_drain();
            DeviceDrain::of_device(RNG_INSTANCE, drain)
        });
        disks.chain(rng).collect()
    }

    /// Whether the guest has requested its end or a reset, or crashed, and so must not be migrated.
    /// Reliable once the machine is stopped.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Whether a failed request must stop the guest.
    pub fn has_stopped_disk(&self) -> bool {
        self.disks.iter().any(|disk| disk.node.is_stopped())
    }

    /// Whether a disk keeps failed requests that were not retried, also after a resume followed by a stop.
    /// Reliable once the machine is stopped.
    pub fn keeps_disk_requests(&self) -> bool {
        self.disks.iter().any(|disk| disk.node.has_kept_requests())
    }

    /// Whether vCPUs run.
    pub fn is_running(&self) -> bool {
        self.running
    }
}

/// Locks all disks, loads their bitmaps and has the files say that they are in use; on an error none is locked.
/// May block on storage.
pub fn lock_disks(nodes: &[Arc<BlockNode>]) -> Result<(), MachineError> {
    let again = lock_and_load(nodes)?;
    for (at, (node, again)) in nodes.iter().zip(again).enumerate() {
        if again {
            // The guest was here before, and can run in any case.
            node.mark_or_remove_bitmaps();
        } else if let Err(error) = node.mark_bitmaps() {
            let (marked, untouched) = nodes.split_at(at);
            unlock_disks(marked);
            give_back_disks(untouched);
            return Err(disk_error(node, error));
        }
    }
    Ok(())
}

/// As [`lock_disks`], for a guest that arrives: writes nothing, so that the pause has nothing to wait for and the
/// disks can be given back as they were. Call [`BlockNode::mark_or_remove_bitmaps`] when the guest runs.
pub fn lock_disks_in_pause(nodes: &[Arc<BlockNode>]) -> Result<(), MachineError> {
    lock_and_load(nodes).map(drop)
}

/// Returns of each whether its bitmaps were here before.
fn lock_and_load(nodes: &[Arc<BlockNode>]) -> Result<Vec<bool>, MachineError> {
    // First all locks: somebody may have one of them still, and then the others' bitmaps are of no use.
    let locked =
        nodes.iter().try_for_each(|node| node.lock().map_err(|error| disk_error(node, error)));
    let loaded = locked.and_then(|()| {
        let load =
            |node: &Arc<BlockNode>| node.load_bitmaps().map_err(|error| disk_error(node, error));
        nodes.iter().map(load).collect()
    });
    if loaded.is_err() {
        nodes.iter().for_each(|node| node.unlock());
    }
    loaded
}

fn disk_error(
    node: &BlockNode,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> MachineError {
    MachineError::Disk { id: node.id().to_owned(), source: source.into() }
}

/// Unlocks all disks, and stores the bitmaps of those for which that has not been done. May block on storage.
pub fn unlock_disks(nodes: &[Arc<BlockNode>]) {
    for node in nodes {
        close_bitmaps(node);
        node.unlock();
    }
}

/// Unlocks disks that [`lock_disks_in_pause`] has locked, and to which nothing was written.
pub fn give_back_disks(nodes: &[Arc<BlockNode>]) {
    for node in nodes {
        node.forget_bitmaps();
        node.unlock();
    }
}

/// Stores the bitmaps of a disk that is about to be closed. What is lost is logged by name.
pub fn close_bitmaps(node: &BlockNode) {
    if let Err(error) = node.close_bitmaps() {
        log::error!("disk {}: {}", node.id(), chain(&error));
    }
}
