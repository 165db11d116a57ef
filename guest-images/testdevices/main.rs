//! A Multiboot 1 kernel, flat, that uses the devices which test kernels use: fw_cfg, the test device, the debug console,
//! and every way to end. What it does is the letter behind `do=` on its command line; see `TEST_DEVICES` in the crate.
#![no_std]
#![no_main]

core::arch::global_asm!(
    include_str!("../multiboot/header-flat.s"),
    include_str!("../print_byte.s"),
    options(att_syntax)
);
core::arch::global_asm!(
    include_str!("kernel.s"),
    include_str!("fw_cfg.s"),
    include_str!("irq.s"),
    include_str!("realmode.s")
);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
