//! Saves and restores every device in one fixed order.
//!
//! Saving: devices before KVM state (a completion may raise an interrupt that the irqchip must hold),
//! vCPUs, then irqchip and PIT, then the clock. Restoring: vCPUs (all at once, each on its thread), irqchip
//! and PIT, devices. The clock is set first: the vCPUs' TSCs continue from the same moment, and no step
//! that could fail is left for after the handover.

use super::platform::PlatformDevices;
use super::{Machine, MachineError};
use crate::kvm::cpu_state::VcpuState;
use crate::kvm::vm_state::{ClockState, IrqchipState};
use devices::lock;
use devices::serial::SerialConsole;
use devices::state::{DeviceRecord, JsonText, Persist};
use devices::virtio::mmio::MmioTransport;
use serde::Serialize;
use serde::de::DeserializeOwned;

const VCPU: &str = "vcpu";
const IRQCHIP: &str = "irqchip";
const CLOCK: &str = "clock";
/// Version of the three records above.
const VERSION: u16 = 1;

impl Machine {
    /// Saves all records. The machine must be stopped.
    pub fn save_records(&self) -> Result<Vec<DeviceRecord>, MachineError> {
        let mut records = vec![lock(&self.serial).save_record("")];
        records.extend(self.platform.iter().flat_map(PlatformDevices::save_records));
        for (instance, device) in self.virtio_devices() {
            records.push(device.save_record(instance));
        }
        for (index, state) in self.vcpus.save()?.iter().enumerate() {
            records.push(record(VCPU, &index.to_string(), state));
        }
        records.push(record(IRQCHIP, "", &IrqchipState::save(&self.vm)?));
        records.push(record(CLOCK, "", &ClockState::save(&self.vm)?));
        Ok(records)
    }

    /// Loads all records; each device must have exactly one. The machine must not have run yet.
    pub fn load_records(&mut self, records: Vec<DeviceRecord>) -> Result<(), MachineError> {
        let mut records = Records(records);
        let clock: ClockState = records.open(CLOCK, "")?;
        let mut vcpu_states = (0..self.description.cpus)
            .map(|index| records.open::<VcpuState>(VCPU, &index.to_string()))
            .collect::<Result<Vec<_>, _>>()?;
        let irqchip: IrqchipState = records.open(IRQCHIP, "")?;
        let here = clock.restore(&self.vm)?;
        let tsc_khz = self.description.tsc_khz;
        let elapsed_ticks = clock.elapsed_ticks(&here, tsc_khz);
        vcpu_states.iter_mut().for_each(|state| state.advance_tsc(elapsed_ticks));
        // vCPUs with a common TSC at the source need one here: all use the first one's offset.
        let first = vcpu_states.first().and_then(|state| state.tsc_offset);
        let offset = first.and_then(|offset| clock.continue_tsc(&here, offset, tsc_khz));
        self.vcpus.restore(vcpu_states, |_| offset)?;
        irqchip.restore(&self.vm)?;
        let serial = records.take(SerialConsole::KIND, "")?;
        lock(&self.serial).restore_record(serial)?;
        if let Some(platform) = &self.platform {
            platform.load_records(irqchip.level_triggered(), |kind| records.take(kind, ""))?;
        }
        for (instance, mut device) in self.virtio_devices() {
            device.restore_record(records.take(MmioTransport::KIND, instance)?)?;
        }
        records.must_be_empty()
    }
}

fn record(kind: &str, instance: &str, state: &impl Serialize) -> DeviceRecord {
    DeviceRecord {
        kind: kind.to_owned(),
        instance: instance.to_owned(),
        version: VERSION,
        state: JsonText::of(state),
    }
}

/// Records that are not loaded yet.
struct Records(Vec<DeviceRecord>);

impl Records {
    fn take(&mut self, kind: &str, instance: &str) -> Result<DeviceRecord, MachineError> {
        let is_it = |record: &DeviceRecord| record.kind == kind && record.instance == instance;
        let at = self.0.iter().position(is_it).ok_or_else(|| {
            MachineError::Records(format!("the stream has none for {kind} {instance:?}"))
        })?;
        Ok(self.0.swap_remove(at))
    }

    fn open<T: DeserializeOwned>(
        &mut self,
        kind: &'static str,
        instance: &str,
    ) -> Result<T, MachineError> {
        Ok(self.take(kind, instance)?.open(kind, VERSION)?)
    }

    fn must_be_empty(&self) -> Result<(), MachineError> {
        match self.0.first() {
            None => Ok(()),
            Some(extra) => Err(MachineError::Records(format!(
                "the stream has one for {} {:?}, which this machine does not have, or it is there twice",
                extra.kind, extra.instance
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_extra_or_newer_record_is_refused_by_name() {
        let mut records = Records(vec![record("clock", "", &1u8), record("vcpu", "7", &2u8)]);
        assert_eq!(records.open::<u8>("clock", "").unwrap(), 1);
        let missing = records.open::<u8>("clock", "").unwrap_err().to_string();
        assert!(missing.contains("none for clock"), "{missing}");
        let extra = records.must_be_empty().unwrap_err().to_string();
        assert!(extra.contains("vcpu \"7\""), "{extra}");
        let mut newer = record("clock", "", &1u8);
        newer.version = VERSION + 1;
        let error = Records(vec![newer]).open::<u8>("clock", "").unwrap_err().to_string();
        assert!(error.contains("newer"), "{error}");
    }
}
