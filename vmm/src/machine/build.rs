//! Builds a paused machine from a configuration or a description. The same code builds a booting and an
//! incoming machine, so that both have the same hardware.

use super::cpu::config::CpuConfig;
use super::cpu::model::{guest_cpuid, hide_nested, with_shown};
use super::cpu::names::Feature;
use super::description::{Description, DiskDescription, Platform};
use super::platform::{PlatformBackends, PlatformDevices, add_debug_exit, insert};
use super::vcpus::{VcpuContext, Vcpus};
use super::{Backends, Disk, Machine, MachineError, cpu_features};
use crate::boot::items::{boot_files, boot_sizes};
use crate::boot::layout::{self, MmioSlot};
use crate::boot::payload::BootPayload;
use crate::boot::{self, BootSource, EntryPoint, Hardware, cpu};
use crate::kvm::blob::Blob;
use crate::kvm::cpu_state::{CpuStateLayout, effective_cpuid, set_cpuid, set_tsc_khz};
use crate::kvm::vcpu::Vcpu;
use crate::kvm::vm::Vm;
use crate::kvm::vm_state::set_up_8259s;
use crate::kvm::{Host, memory};
use devices::block::BlockNode;
use devices::bus::Bus;
use devices::irq::EventIrq;
use devices::ram::{GuestRam, RamLayout};
use devices::reset::{ExitSink, I8042, PowerPort, SleepControl};
use devices::serial::SerialConsole;
use devices::virtio::VirtioDevice;
use devices::virtio::blk::Block;
use devices::virtio::mmio::{MMIO_LEN, MmioTransport, NOTIFY_OFFSET};
use devices::virtio::rng::Rng;
use kvm_bindings::kvm_cpuid_entry2;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// The guest-visible configuration of a new machine.
pub struct NewMachine<'a> {
    /// The guest's name.
    pub name: Option<String>,
    /// RAM size.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Their model and features.
    pub cpu: CpuConfig,
    /// Kernel, and initrd or modules.
    pub payload: &'a BootPayload,
    /// Polled between pieces of a boot file; `false` cancels.
    pub go_on: &'a dyn Fn() -> bool,
    /// Kernel command line, without what Ferry adds.
    pub cmdline: String,
    /// Whether there are ACPI tables.
    pub acpi: bool,
    /// Number of queues of each disk of the backends.
    pub disk_queues: Vec<u16>,
    /// Whether the machine has a virtio-rng.
    pub rng: bool,
    /// What test kernels look at; none in a guest of an older Ferry that is reset.
    pub platform: Option<Platform>,
}

/// What this host's KVM can give to a vCPU, without a machine.
pub fn available_cpuid(host: &Host) -> Result<Vec<kvm_cpuid_entry2>, MachineError> {
    let parts = Parts::create(host, PROBE_BYTES, 1)?;
    let tsc_khz = parts.first()?.tsc_khz()?;
    parts.available_cpuid(host, tsc_khz)
}

/// RAM of a machine that never runs.
const PROBE_BYTES: u64 = 4 << 20;

impl Machine {
    /// Builds a machine and loads its kernel. It does not run yet and holds no permit.
    pub fn boot(
        host: &Host,
        new: NewMachine<'_>,
        backends: Backends,
    ) -> Result<Self, MachineError> {
        let parts = Parts::create(host, new.memory_bytes, new.cpus)?;
        let tsc_khz = parts.first()?.tsc_khz()?;
        let cpuid = guest_cpuid(&new.cpu, &parts.available_cpuid(host, tsc_khz)?)?;
        parts.configure_cpus(&cpuid, tsc_khz)?;
        let queues = new.disk_queues.into_iter().chain(std::iter::repeat(1));
        let disks = backends.disks.iter().zip(queues);
        let disks = disks.map(|(node, queues)| describe_disk(node, queues)).collect::<Vec<_>>();
        let source = BootSource { payload: new.payload, cmdline: &new.cmdline, go_on: new.go_on };
        let device_count = disks.len() + usize::from(new.rng);
        let virtio = (0..device_count).map(device_slot).collect::<Result<_, _>>()?;
        let fw_cfg = new.platform.is_some();
        let hardware = Hardware { acpi: new.acpi, cpus: new.cpus, fw_cfg, virtio };
        let entry = boot::load(&source, &hardware, parts.vm.ram(), parts.vm.layout())?;
        cpu::set_entry(parts.first()?, entry, parts.vm.ram())?;
        if let EntryPoint::Multiboot { .. } = entry {
            set_up_8259s(&parts.vm)?;
        }
        let shown = effective_cpuid(parts.first()?)?;
        warn_of_forced_features(&new.cpu, &cpuid, &shown);
        let description = Description {
            bitmaps: false,
            name: new.name,
            memory_bytes: new.memory_bytes,
            cpus: new.cpus,
            cpu: new.cpu,
            cmdline: new.cmdline,
            acpi: new.acpi,
            disks,
            rng: new.rng,
            platform: new.platform,
            cpuid: shown.into_iter().map(Blob).collect(),
            tsc_khz,
        };
        let machine = parts.assemble(host, description, backends)?;
        if let Some(platform) = &machine.platform {
            platform.set_boot(boot_sizes(new.payload, entry)?, boot_files(new.payload));
        }
        Ok(machine)
    }

    /// Builds a machine for an incoming guest, without its state. Fails if the guest could not run on this
    /// host.
    pub fn arrive(
        host: &Host,
        description: Description,
        backends: Backends,
    ) -> Result<Self, MachineError> {
        check_disks(&description.disks, &backends.disks)?;
        let parts = Parts::create(host, description.memory_bytes, description.cpus)?;
        let mut guest: Vec<_> = description.cpuid.iter().map(|entry| entry.0).collect();
        let supported = host.supported_cpuid()?;
        parts.configure_cpus(supported.as_slice(), description.tsc_khz)?;
        let shown = effective_cpuid(parts.first()?)?;
        let mut missing = cpu_features::missing(&guest, [supported.as_slice(), &shown]);
        let lacks = |feature: &Feature| !feature.is_in(supported.as_slice());
        missing
            .extend(description.cpu.nested_features().filter(lacks).map(|it| it.name().to_owned()));
        // Earlier versions offered nested virtualization to every guest.
        hide_nested(&description.cpu, &mut guest);
        if !missing.is_empty() {
            return Err(MachineError::CpuFeatures(missing));
        }
        parts.configure_cpus(&guest, description.tsc_khz)?;
        parts.assemble(host, description, backends)
    }
}

/// The KVM side of a machine, before its threads exist.
struct Parts {
    vm: Arc<Vm>,
    vcpus: Vec<Vcpu>,
}

impl Parts {
    fn create(host: &Host, memory_bytes: u64, cpus: u8) -> Result<Self, MachineError> {
        host.check_cpu_count(cpus.into())?;
        let layout = RamLayout::for_size(memory_bytes)
            .map_err(|error| MachineError::Records(error.to_string()))?;
        let ram = memory::allocate(&layout)?;
        let vm = Arc::new(Vm::create(host, ram, layout)?);
        let vcpus = (0..cpus).map(|index| vm.create_vcpu(index)).collect::<Result<_, _>>()?;
        Ok(Self { vm, vcpus })
    }

    fn first(&self) -> Result<&Vcpu, MachineError> {
        self.vcpus.first().ok_or_else(|| MachineError::Records("a machine needs a vCPU".into()))
    }

    /// What KVM says it supports, and what the first vCPU shows once it has that.
    fn available_cpuid(
        &self,
        host: &Host,
        tsc_khz: u32,
    ) -> Result<Vec<kvm_cpuid_entry2>, MachineError> {
        let supported = host.supported_cpuid()?;
        let first = self.first()?;
        set_cpuid(first, &cpu::cpuid(supported.as_slice(), 0, 1, tsc_khz))?;
        Ok(with_shown(supported.as_slice(), &effective_cpuid(first)?))
    }

    fn configure_cpus(&self, base: &[kvm_cpuid_entry2], tsc_khz: u32) -> Result<(), MachineError> {
        let too_many = |_| MachineError::Records("more vCPUs than APIC ids".into());
        let count = u8::try_from(self.vcpus.len()).map_err(too_many)?;
        for vcpu in &self.vcpus {
            set_tsc_khz(vcpu, tsc_khz)?;
            set_cpuid(vcpu, &cpu::cpuid(base, vcpu.index(), count, tsc_khz))?;
        }
        Ok(())
    }

    fn assemble(
        self,
        host: &Host,
        description: Description,
        backends: Backends,
    ) -> Result<Machine, MachineError> {
        let vm = self.vm;
        let ended = Arc::new(AtomicBool::new(false));
        let on_exit = backends.events.on_exit.clone();
        let exits = || -> ExitSink {
            let (ended, on_exit) = (ended.clone(), on_exit.clone());
            Box::new(move |exit| {
                // Stops all vCPUs until the VMM has handled the request.
                if !ended.swap(true, Ordering::AcqRel) {
                    on_exit(exit);
                }
            })
        };
        let irq = irq_line(&vm, layout::COM1_GSI)?;
        let setup = |what| move |source| MachineError::Setup { what, source };
        let serial = SerialConsole::new(irq, backends.serial_output).map_err(setup("COM1"))?;
        let serial = Arc::new(Mutex::new(serial));
        let mut pio = Bus::new();
        insert(&mut pio, layout::COM1_PORT.into(), 8, serial.clone())?;
        insert(&mut pio, layout::I8042_PORT.into(), 5, Arc::new(Mutex::new(I8042::new(exits()))))?;
        add_debug_exit(&mut pio, description.platform.as_ref(), exits())?;
        insert(
            &mut pio,
            layout::POWER_PORT.into(),
            2,
            Arc::new(Mutex::new(PowerPort::new(exits()))),
        )?;
        let sleep = Arc::new(Mutex::new(SleepControl::new(exits())));
        insert(&mut pio, layout::SLEEP_CONTROL_PORT.into(), 2, sleep)?;
        let power_button = irq_line(&vm, layout::POWER_BUTTON_GSI)?;
        let mut mmio = Bus::new();
        let platform = match &description.platform {
            None => None,
            Some(platform) => {
                let on_crash_loaded = backends.events.on_crash_loaded.clone();
                let debug_output = backends.debug_output;
                let ends = PlatformBackends { debug_output, exits: &exits, on_crash_loaded };
                let buses = (&mut pio, &mut mmio);
                Some(PlatformDevices::add(buses, &vm, &description, platform, ends)?)
            }
        };
        let mut disks = Vec::with_capacity(backends.disks.len());
        for (node, described) in backends.disks.into_iter().zip(&description.disks) {
            let device = Box::new(Block::new(node.clone(), described.queues));
            let transport = add_device(&vm, &mut mmio, disks.len(), device)?;
            disks.push(Disk { node, transport });
        }
        let rng = if description.rng {
            Some(add_device(&vm, &mut mmio, disks.len(), Box::new(Rng))?)
        } else {
            None
        };
        let mut cpu_layout = CpuStateLayout::probe(host, &vm, description.cpu.nested())?;
        if let Some(first) = self.vcpus.first() {
            cpu_layout.keep_readable(first)?;
        }
        let context = VcpuContext {
            pio: Arc::new(pio),
            mmio: Arc::new(mmio),
            unclaimed: Arc::default(),
            ended: ended.clone(),
            on_end: backends.events.on_end,
            layout: cpu_layout,
        };
        let vcpus = Vcpus::start(self.vcpus, &context)?;
        Ok(Machine {
            vcpus,
            disks,
            rng,
            serial,
            platform,
            power_button,
            ended,
            description,
            permit: None,
            running: false,
            vm,
        })
    }
}

/// Some hosts show a guest features whatever was set.
fn warn_of_forced_features(cpu: &CpuConfig, set: &[kvm_cpuid_entry2], shown: &[kvm_cpuid_entry2]) {
    if cpu.is_default() {
        return;
    }
    let forced = Feature::all().into_iter().filter(|it| it.is_in(shown) && !it.is_in(set));
    let names: Vec<_> = forced.map(Feature::name).collect();
    if !names.is_empty() {
        log::warn!(
            "--cpu {cpu}: this host's KVM shows the guest nevertheless: {}",
            names.join(", ")
        );
    }
}

fn irq_line(vm: &Vm, gsi: u32) -> Result<Arc<EventIrq>, MachineError> {
    let irq = EventIrq::new()
        .map_err(|source| MachineError::Setup { what: "interrupt eventfd", source })?;
    vm.route_irq(irq.event(), gsi)?;
    Ok(Arc::new(irq))
}

fn describe_disk(node: &BlockNode, queues: u16) -> DiskDescription {
    DiskDescription {
        id: node.id().to_owned(),
        len_bytes: node.len_bytes(),
        read_only: node.read_only(),
        queues,
        travels: None,
    }
}

/// Checks the images against the description.
fn check_disks(expected: &[DiskDescription], given: &[Arc<BlockNode>]) -> Result<(), MachineError> {
    for (index, disk) in expected.iter().enumerate() {
        let (id, len_bytes) = (disk.id.clone(), disk.len_bytes);
        let Some(node) = given.get(index).filter(|node| node.id() == disk.id) else {
            return Err(MachineError::DiskNotGiven { id, len_bytes });
        };
        if node.len_bytes() != len_bytes {
            let found = node.len_bytes();
            let reason = format!("the guest knows it with {len_bytes} bytes, here it has {found}");
            return Err(MachineError::DiskMismatch { id, reason });
        }
        if node.read_only() && !disk.read_only {
            let reason = "the guest writes it, but it is read-only here".into();
            return Err(MachineError::DiskMismatch { id, reason });
        }
    }
    Ok(())
}

fn device_slot(index: usize) -> Result<MmioSlot, MachineError> {
    let most = layout::VIRTIO_GSIS.len();
    layout::virtio_slot(index)
        .ok_or_else(|| MachineError::Records(format!("at most {most} virtio devices are possible")))
}

/// Adds virtio device `index`: its registers, notifications and interrupt line.
fn add_device(
    vm: &Vm,
    mmio: &mut Bus,
    index: usize,
    device: Box<dyn VirtioDevice>,
) -> Result<Arc<Mutex<MmioTransport>>, MachineError> {
    let slot = device_slot(index)?;
    let irq = irq_line(vm, slot.gsi)?;
    let ram: GuestRam = vm.ram().clone();
    let transport = MmioTransport::new(ram, device, irq)
        .map_err(|source| MachineError::Setup { what: "virtio device", source })?;
    for (queue, event) in (0..).zip(transport.queue_events()) {
        vm.route_notify(event, slot.base + NOTIFY_OFFSET, queue)?;
    }
    let transport = Arc::new(Mutex::new(transport));
    insert(mmio, slot.base, MMIO_LEN, transport.clone())?;
    Ok(transport)
}
