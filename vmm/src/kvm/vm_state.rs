//! Interrupt controllers, PIT and clocks as plain data, and back.
//!
//! The clock record pairs KVM's clock with the host's TSC and wall time at the save. With such a
//! pair from both hosts the guest's TSC goes on as if it had never left: the new offset is the old
//! one, plus the TSC ticks by which the hosts differ, plus the time that passed (Linux,
//! `Documentation/virt/kvm/devices/vcpu.rst`).

use super::blob::Blob;
use super::vm::Vm;
use super::{KvmError, ioctl};
use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use serde::{Deserialize, Serialize};

/// Both 8259s, the IOAPIC and the PIT.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IrqchipState {
    pic_master: Blob<kvm_irqchip>,
    pic_slave: Blob<kvm_irqchip>,
    ioapic: Blob<kvm_irqchip>,
    pit: Blob<kvm_pit_state2>,
}

impl IrqchipState {
    /// Reads all; after the vCPUs, so that nothing is in flight.
    pub fn save(vm: &Vm) -> Result<Self, KvmError> {
        let chip = |chip_id| {
            let mut state = kvm_irqchip { chip_id, ..Default::default() };
            ioctl("KVM_GET_IRQCHIP", vm.fd().get_irqchip(&mut state))?;
            Ok::<_, KvmError>(Blob(state))
        };
        Ok(Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: Blob(ioctl("KVM_GET_PIT2", vm.fd().get_pit2())?),
        })
    }

    /// Writes all; after the vCPUs' LAPICs.
    pub fn restore(&self, vm: &Vm) -> Result<(), KvmError> {
        let chips = [
            (KVM_IRQCHIP_PIC_MASTER, &self.pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, &self.pic_slave),
            (KVM_IRQCHIP_IOAPIC, &self.ioapic),
        ];
        for (expected, Blob(chip)) in chips {
            if chip.chip_id != expected {
                let reason = format!("chip {} where {expected} belongs", chip.chip_id);
                return Err(KvmError::State { what: "irqchip state", reason });
            }
            ioctl("KVM_SET_IRQCHIP", vm.fd().set_irqchip(chip))?;
        }
        ioctl("KVM_SET_PIT2", vm.fd().set_pit2(&self.pit.0))
    }
}

/// KVM's clock, and host TSC and wall time read together with it where KVM offers them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// kvmclock in nanoseconds.
    pub clock_ns: u64,
    /// Wall time in nanoseconds since 1970.
    pub realtime_ns: Option<u64>,
    /// The host's TSC.
    pub host_tsc: Option<u64>,
}

impl ClockState {
    /// Reads the clock.
    pub fn save(vm: &Vm) -> Result<Self, KvmError> {
        let data = ioctl("KVM_GET_CLOCK", vm.fd().get_clock())?;
        let has = |flag| data.flags & flag != 0;
        Ok(Self {
            clock_ns: data.clock,
            realtime_ns: has(KVM_CLOCK_REALTIME).then_some(data.realtime),
            host_tsc: has(KVM_CLOCK_HOST_TSC).then_some(data.host_tsc),
        })
    }

    /// Sets the clock to go on from here; with the wall time KVM adds what passed since the save.
    pub fn restore(&self, vm: &Vm) -> Result<(), KvmError> {
        let mut data = kvm_clock_data { clock: self.clock_ns, ..Default::default() };
        if let Some(realtime) = self.realtime_ns {
            data.flags = KVM_CLOCK_REALTIME;
            data.realtime = realtime;
            match vm.fd().set_clock(&data) {
                Ok(()) => return Ok(()),
                Err(error) => log::debug!("KVM_SET_CLOCK takes no wall time here: {error}"),
            }
            data.flags = 0;
        }
        ioctl("KVM_SET_CLOCK", vm.fd().set_clock(&data))
    }

    /// The TSC offset that continues here what `offset` was when `self` was saved elsewhere, given
    /// the pair read `here`. `None` where a host has no such pair.
    pub fn continue_tsc(&self, here: &Self, offset: u64, tsc_khz: u32) -> Option<u64> {
        let elapsed_ns = i128::from(here.realtime_ns?) - i128::from(self.realtime_ns?);
        let elapsed_ticks = elapsed_ns * i128::from(tsc_khz) / 1_000_000;
        let there = i128::from(offset) + i128::from(self.host_tsc?);
        let offset = there + elapsed_ticks - i128::from(here.host_tsc?);
        u64::try_from(offset.rem_euclid(1 << 64)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(realtime_ns: u64, host_tsc: u64) -> ClockState {
        ClockState { clock_ns: 0, realtime_ns: Some(realtime_ns), host_tsc: Some(host_tsc) }
    }

    #[test]
    fn a_tsc_that_stays_on_its_host_keeps_its_offset() {
        let (saved, now) = (clock(1_000, 5_000), clock(1_001_000, 2_005_000));
        assert_eq!(saved.continue_tsc(&now, 77, 2_000_000), Some(77));
    }

    #[test]
    fn a_tsc_moved_to_a_younger_host_gets_the_difference() {
        // 1 ms later on a host that booted later: guest TSC 5_000_100 + 2_000_000 ticks of 2 GHz.
        let (saved, now) = (clock(0, 5_000_000), clock(1_000_000, 10));
        let offset = saved.continue_tsc(&now, 100, 2_000_000).unwrap();
        assert_eq!(offset.wrapping_add(10), 7_000_100);
        let behind = clock(0, 10).continue_tsc(&clock(0, 5_000_000), 0, 2_000_000).unwrap();
        assert_eq!(behind.wrapping_add(5_000_000), 10, "negative offsets wrap");
    }

    #[test]
    fn without_a_pair_there_is_no_offset() {
        let none = ClockState { clock_ns: 1, realtime_ns: None, host_tsc: None };
        assert_eq!(none.continue_tsc(&clock(0, 0), 1, 1), None);
    }
}
