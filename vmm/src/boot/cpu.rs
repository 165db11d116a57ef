//! Initial registers, page tables, GDT and CPUID of a cold boot.

use super::layout::{BOOT_STACK, GDT, GDT_BYTES, PAGE_TABLES, PVH_START_INFO, ZERO_PAGE};
use super::{BootError, EntryPoint, write_bytes};
use crate::kvm::KvmError;
use crate::kvm::cpu_state::set_boot_registers;
use crate::kvm::vcpu::Vcpu;
use devices::ram::{GuestAddress, GuestRam};
use kvm_bindings::{kvm_cpuid_entry2, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::Bytes;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 2;
const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_HUGE: u64 = 1 << 7;

/// Sets vCPU 0 to the entry point. The others wait for INIT and SIPI, KVM's initial state.
pub fn set_entry(vcpu: &Vcpu, entry: EntryPoint, ram: &GuestRam) -> Result<(), KvmError> {
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry {
        EntryPoint::Pvh { address } => {
            regs.rbx = PVH_START_INFO;
            enter_32_bit(vcpu, regs, address, GDT, ram)
        }
        EntryPoint::Multiboot { address, magic, info, gdt } => {
            (regs.rax, regs.rbx) = (magic.into(), info);
            enter_32_bit(vcpu, regs, address, gdt, ram)
        }
        EntryPoint::Linux32 { address } => {
            regs.rsi = ZERO_PAGE;
            enter_32_bit(vcpu, regs, address, GDT, ram)
        }
        EntryPoint::Linux64 { address } => {
            regs.rip = address;
            regs.rsi = ZERO_PAGE;
            regs.rsp = BOOT_STACK;
            regs.rbp = BOOT_STACK;
            let code = segment(CODE_SELECTOR, 0xb, Mode::Long64);
            write_gdt(ram, GDT, code)?;
            set_boot_registers(vcpu, &regs, |sregs| {
                set_segments(sregs, code, GDT);
                sregs.cr3 = PAGE_TABLES;
                sregs.cr4 |= CR4_PAE;
                sregs.cr0 |= CR0_PE | CR0_PG;
                sregs.efer |= EFER_LME | EFER_LMA;
            })
        }
    }
}

fn enter_32_bit(
    vcpu: &Vcpu,
    mut regs: kvm_regs,
    address: u64,
    gdt: u64,
    ram: &GuestRam,
) -> Result<(), KvmError> {
    regs.rip = address;
    let code = segment(CODE_SELECTOR, 0xb, Mode::Protected32);
    write_gdt(ram, gdt, code)?;
    set_boot_registers(vcpu, &regs, |sregs| {
        set_segments(sregs, code, gdt);
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
    })
}

/// Selectors required by Linux's boot protocol; the other protocols do not specify them.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
const GDT_LIMIT: u16 = 0x27;
const _: () = assert!(GDT_LIMIT as u64 + 1 == GDT_BYTES);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Protected32,
    Long64,
}

fn segment(selector: u16, type_: u8, mode: Mode) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(mode == Mode::Protected32),
        s: 1,
        l: u8::from(mode == Mode::Long64),
        g: 1,
        ..Default::default()
    }
}

fn data_segment() -> kvm_segment {
    segment(DATA_SELECTOR, 0x3, Mode::Protected32)
}

fn task_segment() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        selector: TASK_SELECTOR,
        type_: 0xb,
        present: 1,
        ..Default::default()
    }
}

fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment, gdt: u64) {
    sregs.cs = code;
    let data = data_segment();
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task_segment();
    sregs.gdt.base = gdt;
    sregs.gdt.limit = GDT_LIMIT;
    sregs.idt.limit = 0;
}

/// A descriptor as the CPU reads it (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let bit = |value: u8, at: u32| u64::from(value) << at;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | bit(segment.type_, 40)
        | bit(segment.s, 44)
        | bit(segment.dpl, 45)
        | bit(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
        | (segment.base >> 24 & 0xff) << 56
}

fn write_gdt(ram: &GuestRam, gdt: u64, code: kvm_segment) -> Result<(), KvmError> {
    let (data, task) = (data_segment(), task_segment());
    let table = [0, 0, descriptor(code), descriptor(data), descriptor(task)];
    for (address, entry) in (gdt..).step_by(8).zip(table) {
        ram.write_obj(entry, GuestAddress(address))
            .map_err(|error| KvmError::State { what: "boot GDT", reason: error.to_string() })?;
    }
    Ok(())
}

/// Identity-maps the first 4 GiB with 2 MiB pages.
pub(super) fn write_page_tables(ram: &GuestRam) -> Result<(), BootError> {
    let page = |number: u64| PAGE_TABLES + number * 4096;
    let mut tables = vec![0u64; 6 * 512];
    tables[0] = page(1) | PAGE_PRESENT_WRITABLE;
    for (slot, number) in (2..6).enumerate() {
        tables[512 + slot] = page(number) | PAGE_PRESENT_WRITABLE;
    }
    for (entry, address) in tables[1024..].iter_mut().zip((0..).step_by(2 << 20)) {
        *entry = address | PAGE_PRESENT_WRITABLE | PAGE_HUGE;
    }
    write_bytes(ram, PAGE_TABLES, zerocopy::IntoBytes::as_bytes(tables.as_slice()))
}

/// CPUID of vCPU `index` of `count`: `base` (a CPU model's, or the guest's from its source) with this vCPU's
/// APIC id, a topology of one package with `count` cores, and the TSC frequency in the hypervisor leaf.
pub fn cpuid(
    base: &[kvm_cpuid_entry2],
    index: u8,
    count: u8,
    tsc_khz: u32,
) -> Vec<kvm_cpuid_entry2> {
    let mut entries = base.to_vec();
    patch(&mut entries, u32::from(index), u32::from(count), tsc_khz);
    entries
}

const FEATURE_HTT: u32 = 1 << 28;
const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// TSC and bus frequency in kHz, in VMware's leaf that Linux reads.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
const BUS_KHZ: u32 = 1_000_000;
/// The first four letters of `AuthenticAMD` and `HygonGenuine`.
const AMD_VENDORS: [u32; 2] = [0x6874_7541, 0x6f67_7948];
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_CMP_LEGACY: u32 = 1 << 1;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

fn patch(entries: &mut Vec<kvm_cpuid_entry2>, id: u32, count: u32, tsc_khz: u32) {
    let id_bits = count.next_power_of_two().trailing_zeros();
    let amd = entries.iter().any(|entry| entry.function == 0 && AMD_VENDORS.contains(&entry.ebx));
    for entry in entries.iter_mut() {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ebx = entry.ebx & 0xff00 | count << 16 | id << 24;
                let htt = if count > 1 { FEATURE_HTT } else { 0 };
                entry.edx = entry.edx & !FEATURE_HTT | htt;
            }
            (4, _) => {
                // One thread per core, `count` cores in the package (SDM volume 2, CPUID leaf 4).
                let ids = (1 << id_bits) - 1;
                let shared_by = if entry.eax >> 5 & 7 >= 3 { ids } else { 0 };
                // The field for cores has 6 bits; kernels read leaf 0xb for more.
                entry.eax = entry.eax & 0x3fff | shared_by << 14 | ids.min(0x3f) << 26;
            }
            (0xb | 0x1f, 0) => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 1 << 8),
            (0xb | 0x1f, 1) => (entry.eax, entry.ebx, entry.ecx) = (id_bits, count, 2 << 8 | 1),
            (0xb | 0x1f, level) => (entry.eax, entry.ebx, entry.ecx) = (0, 0, level),
            // The same for AMD (APM volume 3, appendix E.4): `count` cores with one thread each.
            (AMD_SIZES, _) if amd => entry.ecx = id_bits << 12 | (count - 1),
            (AMD_TOPOLOGY, _) if amd => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            (AMD_FEATURES, _) if amd && count > 1 => entry.ecx |= AMD_CMP_LEGACY,
            (HYPERVISOR_BASE, _) => {
                entry.eax = entry.eax.max(HYPERVISOR_TIMING);
            }
            _ => {}
        }
        if matches!(entry.function, 0xb | 0x1f) {
            entry.edx = id;
        }
    }
    entries.retain(|entry| entry.function != HYPERVISOR_TIMING);
    entries.push(kvm_cpuid_entry2 {
        function: HYPERVISOR_TIMING,
        eax: tsc_khz,
        ebx: BUS_KHZ,
        ..Default::default()
    });
}

#[cfg(test)]
mod tests {
    use super::super::test_ram;
    use super::*;

    #[test]
    fn descriptors_are_the_architects_own() {
        assert_eq!(descriptor(segment(8, 0xb, Mode::Protected32)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(segment(8, 0xb, Mode::Long64)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(data_segment()), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn the_first_four_gib_are_identity_mapped() {
        let (ram, _) = test_ram(4 << 20);
        write_page_tables(&ram).unwrap();
        let entry = |at: u64| ram.read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!(entry(PAGE_TABLES), PAGE_TABLES + 0x1000 + 3);
        assert_eq!(entry(PAGE_TABLES + 0x1000 + 3 * 8), PAGE_TABLES + 0x5003);
        assert_eq!(entry(PAGE_TABLES + 0x2000 + 2047 * 8), (4 << 30) - (2 << 20) + 0x83);
    }

    #[test]
    fn each_vcpu_gets_its_own_apic_id_and_the_same_topology() {
        let leaf = |function, index| kvm_cpuid_entry2 { function, index, ..Default::default() };
        let mut entries = vec![leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(HYPERVISOR_BASE, 0)];
        patch(&mut entries, 2, 3, 2_000_000);
        assert_eq!(entries[0].ebx >> 24, 2);
        assert_eq!(entries[0].ebx >> 16 & 0xff, 3);
        assert_eq!((entries[1].edx, entries[2].edx), (2, 2));
        assert_eq!((entries[2].eax, entries[2].ebx), (2, 3));
        let mut amd = vec![leaf(0, 0), leaf(AMD_SIZES, 0), leaf(AMD_TOPOLOGY, 0)];
        patch(&mut amd, 2, 3, 2_000_000);
        assert_eq!((amd[1].ecx, amd[2].eax), (0, 0), "not AMD's CPU");
        amd[0].ebx = AMD_VENDORS[0];
        patch(&mut amd, 2, 3, 2_000_000);
        assert_eq!((amd[1].ecx, amd[2].eax), (2 << 12 | 2, 2));
        let mut many = vec![leaf(1, 0), kvm_cpuid_entry2 { eax: 3 << 5, ..leaf(4, 0) }];
        patch(&mut many, 253, 254, 2_000_000);
        assert_eq!((many[0].ebx >> 24, many[0].ebx >> 16 & 0xff), (253, 254));
        assert_eq!((many[1].eax >> 14 & 0xfff, many[1].eax >> 26), (255, 63));
        let timing = entries.last().unwrap();
        assert_eq!((timing.function, timing.eax), (HYPERVISOR_TIMING, 2_000_000));
    }
}
