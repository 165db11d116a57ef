//! A vCPU's state and a VM's clock from one VM to another, on this host's KVM. No guest code runs.

use super::cpu_state::{CpuStateLayout, VcpuState, set_cpuid};
use super::vcpu::Vcpu;
use super::vm::Vm;
use super::vm_state::ClockState;
use super::{Host, KvmError, memory, msrs};
use crate::boot::cpu;
use devices::ram::RamLayout;
use ferry_tests::needs;
use serde_json::{Value, json};

const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_FIXED_64K: u32 = 0x250;
const MTRR_BASE_3: u32 = 0x206;
const MTRR_MASK_3: u32 = 0x207;
const MC5_STATUS: u32 = 0x415;
const MC5_ADDR: u32 = 0x416;
const MCG_STATUS: u32 = 0x17a;

/// A VM with one vCPU that has never run. The vCPU goes first.
struct Fresh {
    vcpu: Vcpu,
    layout: CpuStateLayout,
    vm: Vm,
}

fn fresh() -> Fresh {
    let host = Host::open().unwrap();
    let ram = RamLayout::for_size(16 << 20).unwrap();
    let vm = Vm::create(&host, memory::allocate(&ram).unwrap(), ram).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let supported = host.supported_cpuid().unwrap();
    let cpuid = cpu::cpuid(supported.as_slice(), 0, 1, vcpu.tsc_khz().unwrap());
    set_cpuid(&vcpu, &cpuid).unwrap();
    let mut layout = CpuStateLayout::probe(&host, &vm, false).unwrap();
    layout.keep_readable(&vcpu).unwrap();
    Fresh { vcpu, layout, vm }
}

impl Fresh {
    fn save(&self) -> VcpuState {
        VcpuState::save(&self.vcpu, &self.layout).unwrap()
    }

    fn restore(&self, state: &VcpuState) -> Result<(), KvmError> {
        state.restore(&self.vcpu, &self.layout, None)
    }

    fn value(&self, index: u32) -> u64 {
        let values = msrs::read(&self.vcpu, &[index]).unwrap();
        values.first().unwrap_or_else(|| panic!("KVM has no MSR {index:#x}")).1
    }
}

/// What travels, with the MSRs that `change` makes of those saved.
fn travels(state: &VcpuState, change: impl FnOnce(&mut Vec<Value>)) -> VcpuState {
    let mut record = serde_json::to_value(state).unwrap();
    change(record["msrs"].as_array_mut().unwrap());
    serde_json::from_value(record).unwrap()
}

#[test]
#[needs(kvm)]
fn mtrrs_and_machine_check_banks_travel() {
    let (source, destination) = (fresh(), fresh());
    let values = [
        (MTRR_FIXED_64K, 0x0606_0606_0606_0606),
        (MTRR_BASE_3, 0x8000_0000),
        (MTRR_MASK_3, 0xf_8000_0800),
        (MTRR_DEF_TYPE, 0xc06),
        (MCG_STATUS, 0x4),
        (MC5_STATUS, 0xb200_0000_0000_0151),
        (MC5_ADDR, 0x1234_5000),
    ];
    msrs::write(&source.vcpu, &values).unwrap();
    let before = values.map(|(index, _)| destination.value(index));
    let state = travels(&source.save(), |_| {});
    destination.restore(&state).unwrap();
    for ((index, value), before) in values.into_iter().zip(before) {
        assert_ne!(before, value, "MSR {index:#x} proves nothing");
        assert_eq!(destination.value(index), value, "MSR {index:#x}");
    }
}

#[test]
#[needs(kvm)]
fn a_register_of_another_host_is_refused_by_number_unless_it_was_not_used() {
    let (source, destination) = (fresh(), fresh());
    let state = source.save();
    let unused = travels(&state, |msrs| msrs.push(json!([0x4711_0815, 0])));
    destination.restore(&unused).unwrap();
    let used = travels(&state, |msrs| msrs.insert(0, json!([0x4711_0815, 7])));
    let error = destination.restore(&used).unwrap_err().to_string();
    assert!(error.contains("MSR 0x47110815 = 0x7"), "{error}");
    // Read-only, so KVM refuses to write it; another number of ranges would be missed by the guest.
    let ranges = travels(&state, |msrs| {
        let cap = msrs.iter_mut().find(|msr| msr[0] == json!(0xfe)).expect("MTRRcap is saved");
        *cap = json!([0xfe, 0x50a]);
    });
    let error = destination.restore(&ranges).unwrap_err().to_string();
    assert!(error.contains("IA32_MTRRCAP"), "{error}");
}

#[test]
#[needs(kvm)]
fn a_vcpu_of_a_host_with_hundreds_of_registers_is_written_in_portions() {
    // KVM takes fewer than 256 at a time. None of these exists, and all were zero.
    let (source, destination) = (fresh(), fresh());
    let many = travels(&source.save(), |msrs| {
        msrs.splice(0..0, (0..300).map(|number| json!([0x4711_0000 + number, 0])));
        msrs.retain(|msr| msr[0] != json!(MTRR_DEF_TYPE));
        msrs.push(json!([MTRR_DEF_TYPE, 0xc06]));
    });
    destination.restore(&many).unwrap();
    assert_eq!(destination.value(MTRR_DEF_TYPE), 0xc06);
}

#[test]
#[needs(kvm)]
fn kvmclock_goes_on_from_where_it_was_whatever_the_wall_clock_says() {
    let source = fresh();
    const LIVED_NS: u64 = 3_600_000_000_000;
    let saved = ClockState { clock_ns: LIVED_NS, realtime_ns: None, host_tsc: None };
    saved.restore(&source.vm).unwrap();
    let saved = ClockState::save(&source.vm).unwrap();
    assert!(saved.clock_ns >= LIVED_NS);
    // As it is; a source whose wall clock is an hour ahead; one that is an hour behind.
    let hour = 3_600_000_000_000;
    let shifts = [0, hour, -hour];
    for shift in shifts {
        let realtime_ns = saved.realtime_ns.map(|now| now.strict_add_signed(shift));
        let source_clock = ClockState { realtime_ns, ..saved.clone() };
        let destination = fresh();
        let here = source_clock.restore(&destination.vm).unwrap();
        let clock_ns = ClockState::save(&destination.vm).unwrap().clock_ns;
        assert!(clock_ns >= saved.clock_ns, "{clock_ns} after {} (shift {shift})", saved.clock_ns);
        assert!(clock_ns < saved.clock_ns + hour.unsigned_abs() / 2, "shift {shift}");
        let has_pair = |clock: &ClockState| clock.realtime_ns.is_some() && clock.host_tsc.is_some();
        assert_eq!(has_pair(&here), has_pair(&saved), "a VM that has not run has the pair, too");
    }
}
