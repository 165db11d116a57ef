//! A kernel as a 64-bit ELF without a PVH note, as a vmlinux may be: prints what the zero page tells it, then exits
//! through port 0xf4 with the length of its ramdisk, or with 0x7f if something is not as Linux wants it.
#![no_std]
#![no_main]

core::arch::global_asm!(
    include_str!("kernel.s"),
    include_str!("../print_byte.s"),
    options(att_syntax)
);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
