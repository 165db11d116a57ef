//! Saves and restores interrupt controllers, PIT and clocks as plain data.
//!
//! The clock record pairs KVM's clock with the host's TSC and wall time at the save. With such a pair from
//! both hosts the guest's TSC continues seamlessly: the new offset is the old one, plus the difference of
//! the hosts' TSCs, plus the elapsed time (Linux, `Documentation/virt/kvm/devices/vcpu.rst`). kvmclock
//! advances by the same time, so that the two agree. Wall clocks of hosts may disagree: the elapsed time is
//! never negative and has an upper bound. Without a pair neither clock advances.

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
    /// Reads the state; call after saving the vCPUs, so that no interrupt is in flight.
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

    /// Loads the state; call after restoring the vCPUs' LAPICs.
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

    /// A bit for each GSI that its IOAPIC pin or its 8259 takes as a level.
    pub fn level_triggered(&self) -> u32 {
        /// Trigger mode in a redirection entry.
        const LEVEL: u64 = 1 << 15;
        // SAFETY: every bit pattern is a valid value of the three members, which hold integers alone.
        let (ioapic, master, slave) = unsafe {
            (self.ioapic.0.chip.ioapic, self.pic_master.0.chip.pic, self.pic_slave.0.chip.pic)
        };
        let entries = ioapic.redirtbl.iter().enumerate();
        let pins = entries.fold(0, |pins, (pin, entry)| {
            // SAFETY: the other view of the union is a bit field of the same 64 bits.
            let bits = unsafe { entry.bits };
            pins | u32::from(bits & LEVEL != 0) << pin
        });
        pins | u32::from(master.elcr) | u32::from(slave.elcr) << 8
    }
}

/// Leaves both 8259s as SeaBIOS does, for kernels that enter as from a BIOS: with its vectors, and masks that let the
/// timer, the keyboard, the cascade, the clock and the disks through.
pub fn set_up_8259s(vm: &Vm) -> Result<(), KvmError> {
    let setups = [(KVM_IRQCHIP_PIC_MASTER, 0x08, 0xb8), (KVM_IRQCHIP_PIC_SLAVE, 0x70, 0x8e)];
    for (chip_id, vector, mask) in setups {
        let mut state = kvm_irqchip { chip_id, ..Default::default() };
        ioctl("KVM_GET_IRQCHIP", vm.fd().get_irqchip(&mut state))?;
        // SAFETY: KVM has filled this member, as both are 8259s.
        let pic = unsafe { &mut state.chip.pic };
        (pic.irq_base, pic.imr, pic.init4) = (vector, mask, 1);
        ioctl("KVM_SET_IRQCHIP", vm.fd().set_irqchip(&state))?;
    }
    Ok(())
}

/// Limit of the elapsed time, in nanoseconds (10 minutes). Wall clocks that differ by more are wrong, and a
/// lagging clock harms a guest less than one that jumps.
const MAX_ELAPSED_NS: u64 = 600_000_000_000;
/// Limit of a guest's uptime, in nanoseconds (146 years), so that clocks never wrap.
const MAX_CLOCK_NS: u64 = u64::MAX / 4;

/// KVM's clock, with host TSC and wall time read atomically if KVM supports that.
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

    /// Validates an untrusted record.
    ///
    /// # Errors
    /// [`KvmError::State`] for a clock that no guest can have.
    pub fn validate(&self) -> Result<(), KvmError> {
        if self.clock_ns > MAX_CLOCK_NS {
            let reason = format!("a guest that has run for {} ns", self.clock_ns);
            return Err(KvmError::State { what: "clock", reason });
        }
        Ok(())
    }

    /// Continues the guest's kvmclock, saved as `self`, in `vm`, whose vCPUs must exist. Returns this
    /// host's clock at that moment, for [`Self::continue_tsc`].
    ///
    /// # Errors
    /// A clock that [`Self::validate`] refuses, or a failed ioctl.
    pub fn restore(&self, vm: &Vm) -> Result<Self, KvmError> {
        self.validate()?;
        // KVM updates its master clock when the clock is set: before that, it reports no pair.
        set_clock(vm, &kvm_clock_data { clock: self.clock_ns, ..Default::default() })?;
        let here = Self::save(vm)?;
        let Some(realtime) = here.realtime_ns else { return Ok(here) };
        // KVM adds the time until the call.
        let clock = self.continue_kvmclock(&here);
        let flags = KVM_CLOCK_REALTIME;
        set_clock(vm, &kvm_clock_data { clock, flags, realtime, ..Default::default() })?;
        Ok(here)
    }

    /// Nanoseconds since `self` was saved elsewhere, given the pair read `here`.
    fn elapsed_ns(&self, here: &Self) -> u64 {
        let pairs = (self.realtime_ns, self.host_tsc, here.realtime_ns, here.host_tsc);
        let (Some(then), Some(_), Some(now), Some(_)) = pairs else { return 0 };
        now.saturating_sub(then).min(MAX_ELAPSED_NS)
    }

    /// TSC ticks in that time.
    pub fn elapsed_ticks(&self, here: &Self, tsc_khz: u32) -> u64 {
        // Whole milliseconds and the rest separately, so that no frequency overflows.
        let (ns, khz) = (self.elapsed_ns(here), u64::from(tsc_khz));
        ns / 1_000_000 * khz + ns % 1_000_000 * khz / 1_000_000
    }

    /// The guest's kvmclock `here`, in nanoseconds.
    fn continue_kvmclock(&self, here: &Self) -> u64 {
        self.clock_ns.saturating_add(self.elapsed_ns(here))
    }

    /// The TSC offset that continues here what `offset` was when `self` was saved elsewhere, given
    /// the pair read `here`. `None` where a host has no such pair.
    pub fn continue_tsc(&self, here: &Self, offset: u64, tsc_khz: u32) -> Option<u64> {
        let guest_tsc = offset.wrapping_add(self.host_tsc?);
        let continued = guest_tsc.wrapping_add(self.elapsed_ticks(here, tsc_khz));
        Some(continued.wrapping_sub(here.host_tsc?))
    }
}

fn set_clock(vm: &Vm, data: &kvm_clock_data) -> Result<(), KvmError> {
    ioctl("KVM_SET_CLOCK", vm.fd().set_clock(data))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    #[test]
    fn a_wall_clock_behind_the_sources_stops_time_but_does_not_turn_it_back() {
        // The destination's clock is 1 s behind.
        let (saved, here) = (clock(5_000_000_000, 100), clock(4_000_000_000, 40));
        assert_eq!(saved.continue_tsc(&here, 900, 2_000_000), Some(960), "TSC 1000, as it left");
        assert_eq!(saved.continue_kvmclock(&here), saved.clock_ns);
    }

    #[test]
    fn a_wall_clock_far_ahead_counts_only_so_much() {
        let (saved, here) = (clock(0, 0), clock(u64::MAX, 0));
        assert_eq!(saved.continue_kvmclock(&here), MAX_ELAPSED_NS);
        assert_eq!(saved.continue_tsc(&here, 0, 1_000_000), Some(MAX_ELAPSED_NS));
    }

    #[test]
    fn a_clock_older_than_any_guest_is_refused() {
        assert!(clock(0, 0).validate().is_ok());
        let old = ClockState { clock_ns: u64::MAX, ..clock(0, 0) };
        assert!(old.validate().unwrap_err().to_string().contains("18446744073709551615 ns"));
    }

    #[test]
    fn a_clock_record_of_version_1_still_loads() {
        let text = r#"{"clock_ns":8270768,"realtime_ns":null,"host_tsc":null}"#;
        let state: ClockState = serde_json::from_str(text).unwrap();
        assert_eq!((state.clock_ns, state.realtime_ns), (8_270_768, None));
    }

    prop_compose! {
        /// Hosts with a pair, and some without.
        fn any_clock()(
            clock_ns in 0..=MAX_CLOCK_NS,
            realtime_ns: Option<u64>,
            host_tsc: Option<u64>,
        ) -> ClockState {
            ClockState { clock_ns, realtime_ns, host_tsc }
        }
    }

    proptest! {
        #[test]
        fn neither_clock_goes_back_and_both_go_on_alike(
            saved in any_clock(),
            here in any_clock(),
            offset: u64,
            tsc_khz in 1..=10_000_000_u32,
        ) {
            let clock_ns = saved.continue_kvmclock(&here).checked_sub(saved.clock_ns);
            let clock_ns = clock_ns.expect("kvmclock goes back");
            prop_assert!(clock_ns <= MAX_ELAPSED_NS);
            // Where there is no offset, the TSC is written with the value that it left with and this.
            let mut ticks = saved.elapsed_ticks(&here, tsc_khz);
            if let Some(continued) = saved.continue_tsc(&here, offset, tsc_khz) {
                let left = offset.wrapping_add(saved.host_tsc.unwrap());
                let arrived = continued.wrapping_add(here.host_tsc.unwrap());
                ticks = arrived.wrapping_sub(left);
            }
            // Ticks of as many nanoseconds, but for the part of one: never negative, which would be huge.
            let exact = u128::from(clock_ns) * u128::from(tsc_khz);
            let counted = u128::from(ticks) * 1_000_000;
            prop_assert!(counted <= exact && exact - counted < 1_000_000, "{ticks} in {clock_ns} ns");
        }
    }
}
