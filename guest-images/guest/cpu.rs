//! What a CPU does for us: ports, system calls to ring 0, CPUID.

use core::arch::asm;
use core::arch::x86_64::CpuidResult;

/// What int3 does, in rdi; see `ring0.s`.
pub const SERVICE_SLEEP: u64 = 0;
const SERVICE_WRMSR: u64 = 1;
pub const SERVICE_WRMSR_AND_SLEEP: u64 = 2;
const SERVICE_CPUID: u64 = 3;
pub const SERVICE_TRIPLE_FAULT: u64 = 4;

pub fn outb(port: u16, value: u8) {
    unsafe { asm!("out dx, al", in("dx") port, in("al") value) };
}

pub fn outl(port: u16, value: u32) {
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value) };
}

pub fn inb(port: u16) -> u8 {
    let value;
    unsafe { asm!("in al, dx", in("dx") port, out("al") value) };
    value
}

/// Sleeps until an interrupt; one that is pending already counts.
pub fn sleep_until_interrupt() {
    unsafe { asm!("int3", in("rdi") SERVICE_SLEEP) };
}

pub fn service_wrmsr(msr: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    unsafe { asm!("int3", in("rdi") SERVICE_WRMSR, in("ecx") msr, in("eax") low, in("edx") high) };
}

/// CPUID as KVM presents it: in ring 3 a software KVM lets the host's shine through.
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    let (eax, ebx, ecx, edx);
    unsafe {
        asm!("mov {saved}, rbx", "int3", "xchg {saved}, rbx", saved = out(reg) ebx,
             in("rdi") SERVICE_CPUID, inout("eax") leaf => eax, inout("ecx") subleaf => ecx,
             out("edx") edx)
    };
    let ebx: u64 = ebx;
    CpuidResult { eax, ebx: ebx as u32, ecx, edx }
}

/// CPUs that CPUID tells of.
pub fn cpu_count() -> usize {
    let most = cpuid(0, 0).eax;
    let by_topology = if most >= 0xb { cpuid(0xb, 1).ebx & 0xffff } else { 0 };
    let leaf1 = cpuid(1, 0);
    let by_package = if leaf1.edx >> 28 & 1 == 1 { leaf1.ebx >> 16 & 0xff } else { 1 };
    if by_topology > 0 { by_topology as usize } else { by_package as usize }
}
