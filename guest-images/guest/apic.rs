//! Registers of this CPU's LAPIC, and the IOAPIC's routes to it.

const LAPIC: usize = 0xfee0_0000;
const LAPIC_ID: usize = 0x20;
const IOAPIC: usize = 0xfec0_0000;
const IOAPIC_FIRST_PIN: u32 = 0x10;

pub fn lapic_write(register: usize, value: u32) {
    unsafe { ((LAPIC + register) as *mut u32).write_volatile(value) };
}

pub fn lapic_read(register: usize) -> u32 {
    unsafe { ((LAPIC + register) as *const u32).read_volatile() }
}

/// Routes an IOAPIC pin to this CPU: edge-triggered, fixed delivery.
pub fn ioapic_route(pin: u32, vector: u32) {
    let write = |register: u32, value: u32| unsafe {
        (IOAPIC as *mut u32).write_volatile(register);
        ((IOAPIC + 0x10) as *mut u32).write_volatile(value);
    };
    write(IOAPIC_FIRST_PIN + pin * 2 + 1, lapic_read(LAPIC_ID) >> 24 << 24);
    write(IOAPIC_FIRST_PIN + pin * 2, vector);
}
