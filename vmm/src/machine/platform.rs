//! The devices of every machine that test kernels look at, and the test device: built, saved and loaded together.

use super::MachineError;
use super::description::{Description, Platform, PortRange};
use crate::boot::items::memory_map;
use crate::boot::layout;
use crate::kvm::vm::Vm;
use devices::bus::{Bus, BusDevice, BusError};
use devices::debug_console::{DebugConsole, DebugOutput};
use devices::fw_cfg::{self, BootFiles, BootSizes, Facts, FwCfg, Items};
use devices::lock;
use devices::pvpanic::PvPanic;
use devices::reset::{DebugExitPort, ExitSink, FastReset};
use devices::state::{DeviceRecord, Persist};
use devices::testdev::{self, Levels, TestLines, TestMemory, TestRegister};
use std::io;
use std::sync::{Arc, Mutex};

/// Where the devices' bytes and events go.
pub(super) struct PlatformBackends<'a> {
    /// Of the debug console.
    pub debug_output: DebugOutput,
    /// Sinks for the guest's own end.
    pub exits: &'a dyn Fn() -> ExitSink,
    /// Called when the guest has crashed and goes on.
    pub on_crash_loaded: Arc<dyn Fn() + Send + Sync>,
}

/// The devices that have state.
pub(super) struct PlatformDevices {
    fast_reset: Arc<Mutex<FastReset>>,
    debug_console: Arc<Mutex<DebugConsole>>,
    fw_cfg: Arc<Mutex<FwCfg>>,
    testdev: Option<TestDevice>,
}

struct TestDevice {
    register: Arc<Mutex<TestRegister>>,
    lines: Arc<Mutex<TestLines>>,
    memory: Arc<Mutex<TestMemory>>,
}

/// Interrupt lines of a machine.
struct VmLines(Arc<Vm>);

impl Levels for VmLines {
    fn set(&self, gsi: u32, high: bool) -> io::Result<()> {
        self.0.set_line(gsi, high).map_err(io::Error::other)
    }
}

fn shared<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

/// Puts a device on a bus.
pub(super) fn insert(
    bus: &mut Bus,
    base: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
) -> Result<(), MachineError> {
    bus.insert(base, len, device).map_err(|error: BusError| MachineError::Setup {
        what: "device bus",
        source: io::Error::other(error),
    })
}

/// Puts the debug-exit device where the machine has it.
pub(super) fn add_debug_exit(
    pio: &mut Bus,
    platform: Option<&Platform>,
    sink: ExitSink,
) -> Result<(), MachineError> {
    let ports = platform.map_or(Some(PortRange::DEBUG_EXIT), |platform| platform.debug_exit);
    let Some(PortRange { base, len }) = ports else { return Ok(()) };
    insert(pio, base.into(), len.into(), shared(DebugExitPort::new(sink)))
}

impl PlatformDevices {
    /// Puts the devices of `platform` on the buses.
    pub fn add(
        (pio, mmio): (&mut Bus, &mut Bus),
        vm: &Arc<Vm>,
        description: &Description,
        platform: &Platform,
        backends: PlatformBackends<'_>,
    ) -> Result<Self, MachineError> {
        let PlatformBackends { debug_output, exits, on_crash_loaded } = backends;
        let fast_reset = shared(FastReset::new(exits()));
        insert(pio, layout::FAST_RESET_PORT.into(), 1, fast_reset.clone())?;
        let debug_console = shared(DebugConsole::new(debug_output));
        insert(pio, layout::DEBUG_CONSOLE_PORT.into(), 1, debug_console.clone())?;
        let pvpanic = PvPanic::new(exits(), Box::new(move || on_crash_loaded()));
        insert(pio, layout::PVPANIC_PORT.into(), 1, shared(pvpanic))?;
        let items = Items::new(&Facts {
            ram_bytes: description.memory_bytes,
            cpus: description.cpus,
            cmdline: &description.cmdline,
            usable: &memory_map(vm.layout()),
            user: &platform.user_items(),
        });
        let fw_cfg = shared(FwCfg::new(vm.ram().clone(), items));
        insert(pio, layout::FW_CFG_PORT.into(), fw_cfg::PORTS.into(), fw_cfg.clone())?;
        let testdev = if platform.testdev { Some(TestDevice::add(pio, mmio, vm)?) } else { None };
        Ok(Self { fast_reset, debug_console, fw_cfg, testdev })
    }

    /// The guest was booted from these files.
    pub fn set_boot(&self, sizes: BootSizes, files: BootFiles) {
        lock(&self.fw_cfg).set_boot(sizes, files);
    }

    /// The files that a guest was booted from have arrived.
    pub fn set_boot_files(&self, files: BootFiles) {
        lock(&self.fw_cfg).set_boot_files(files);
    }

    /// Holds unsent output of the debug console, which moves with the guest.
    pub fn hold_output(&self) {
        lock(&self.debug_console).hold_output();
    }

    /// Releases it: the guest runs here.
    pub fn release_output(&self) {
        lock(&self.debug_console).release_output();
    }

    /// Saves every device.
    pub fn save_records(&self) -> Vec<DeviceRecord> {
        let Self { fast_reset, debug_console, fw_cfg, testdev } = self;
        let mut records = vec![
            lock(fast_reset).save_record(""),
            lock(debug_console).save_record(""),
            lock(fw_cfg).save_record(""),
        ];
        if let Some(TestDevice { register, lines, memory }) = testdev {
            records.push(lock(register).save_record(""));
            records.push(lock(lines).save_record(""));
            records.push(lock(memory).save_record(""));
        }
        records
    }

    /// Loads every device from the record of its kind that `take` returns. The interrupt controllers must have been
    /// loaded: `level_triggered` has their pins that take levels.
    pub fn load_records(
        &self,
        level_triggered: u32,
        mut take: impl FnMut(&str) -> Result<DeviceRecord, MachineError>,
    ) -> Result<(), MachineError> {
        fn load<T: Persist>(
            device: &Mutex<T>,
            take: &mut impl FnMut(&str) -> Result<DeviceRecord, MachineError>,
        ) -> Result<(), MachineError> {
            Ok(lock(device).restore_record(take(T::KIND)?)?)
        }
        let Self { fast_reset, debug_console, fw_cfg, testdev } = self;
        load(fast_reset, &mut take)?;
        load(debug_console, &mut take)?;
        load(fw_cfg, &mut take)?;
        if let Some(TestDevice { register, lines, memory }) = testdev {
            load(register, &mut take)?;
            load(lines, &mut take)?;
            load(memory, &mut take)?;
            lock(lines).raise_again(level_triggered);
        }
        Ok(())
    }
}

impl TestDevice {
    fn add(pio: &mut Bus, mmio: &mut Bus, vm: &Arc<Vm>) -> Result<Self, MachineError> {
        let register = shared(TestRegister::default());
        let lines = shared(TestLines::new(Box::new(VmLines(vm.clone()))));
        let memory = shared(TestMemory::default());
        let ports = TestRegister::PORTS.into();
        insert(pio, layout::TESTDEV_PORT.into(), ports, register.clone())?;
        insert(pio, layout::TESTDEV_IRQ_PORT.into(), testdev::LINES.into(), lines.clone())?;
        insert(mmio, layout::TESTDEV_MEMORY, testdev::MEMORY_BYTES as u64, memory.clone())?;
        Ok(Self { register, lines, memory })
    }
}
