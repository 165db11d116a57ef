//! A Multiboot 1 kernel: prints what the loader has told it, then exits through port 0xf4 with the
//! number of modules. With a command line that ends with `wait` it first waits for a key: `r` resets.
#![no_std]
#![no_main]

#[cfg(flat)]
core::arch::global_asm!(include_str!("header-flat.s"), options(att_syntax));
#[cfg(not(flat))]
core::arch::global_asm!(include_str!("header-elf.s"), options(att_syntax));
core::arch::global_asm!(
    include_str!("kernel.s"),
    include_str!("../print_byte.s"),
    options(att_syntax)
);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
