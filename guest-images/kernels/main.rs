//! Kernels in assembly, one per way to be booted, and one that starts many CPUs: each prints what its loader has told
//! it, then exits through port 0xf4. Plain integer instructions.
#![no_std]
#![no_main]

#[cfg(multiboot2)]
core::arch::global_asm!(include_str!("multiboot2.s"), options(att_syntax));
#[cfg(pvh32)]
core::arch::global_asm!(include_str!("pvh32.s"), options(att_syntax));
#[cfg(linux32)]
core::arch::global_asm!(include_str!("linux32.s"), options(att_syntax));
#[cfg(cpus)]
core::arch::global_asm!(include_str!("cpus.s"), options(att_syntax));
core::arch::global_asm!(
    ".section .text, \"ax\"\n.code32",
    include_str!("common.s"),
    include_str!("../print_byte.s"),
    options(att_syntax)
);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
