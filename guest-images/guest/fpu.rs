//! Waits with live values in every vector and x87 register, then checks that they are still there.

use core::arch::asm;
use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// How often a register came back changed.
pub static CORRUPT: AtomicU64 = AtomicU64::new(0);

#[repr(C, align(64))]
struct Image {
    registers: [[u64; 4]; 16],
    integer: u64,
}

fn has_avx() -> bool {
    let ecx = __cpuid(1).ecx;
    ecx >> 27 & 1 == 1 && ecx >> 28 & 1 == 1
}

/// Spins until TSC value `until`; returns the largest step that the TSC made and the last value.
pub fn hold(until: u64, last: u64) -> (u64, u64) {
    let mut image = Image { registers: [[0; 4]; 16], integer: until | 1 };
    for (index, register) in image.registers.iter_mut().enumerate() {
        let word = |lane: u64| (until ^ (index as u64) << 8 ^ lane).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        *register = [word(0), word(1), word(2), word(3)];
    }
    let mut back = Image { registers: [[0; 4]; 16], integer: 0 };
    let (mut largest, mut previous) = (0u64, last);
    macro_rules! hold_with {
        ($load:literal, $register:literal) => {
            unsafe {
                asm!(
                    "fild qword ptr [{from} + 512]",
                    concat!($load, " ", $register, "0, [{from}]"), concat!($load, " ", $register, "1, [{from} + 32]"),
                    concat!($load, " ", $register, "2, [{from} + 64]"), concat!($load, " ", $register, "3, [{from} + 96]"),
                    concat!($load, " ", $register, "4, [{from} + 128]"), concat!($load, " ", $register, "5, [{from} + 160]"),
                    concat!($load, " ", $register, "6, [{from} + 192]"), concat!($load, " ", $register, "7, [{from} + 224]"),
                    concat!($load, " ", $register, "8, [{from} + 256]"), concat!($load, " ", $register, "9, [{from} + 288]"),
                    concat!($load, " ", $register, "10, [{from} + 320]"), concat!($load, " ", $register, "11, [{from} + 352]"),
                    concat!($load, " ", $register, "12, [{from} + 384]"), concat!($load, " ", $register, "13, [{from} + 416]"),
                    concat!($load, " ", $register, "14, [{from} + 448]"), concat!($load, " ", $register, "15, [{from} + 480]"),
                    "2:",
                    "rdtsc",
                    "shl rdx, 32",
                    "or rax, rdx",
                    "mov rdx, rax",
                    "sub rdx, {previous}",
                    "cmp rdx, {largest}",
                    "cmova {largest}, rdx",
                    "mov {previous}, rax",
                    "cmp rax, {until}",
                    "jb 2b",
                    concat!($load, " [{to}], ", $register, "0"), concat!($load, " [{to} + 32], ", $register, "1"),
                    concat!($load, " [{to} + 64], ", $register, "2"), concat!($load, " [{to} + 96], ", $register, "3"),
                    concat!($load, " [{to} + 128], ", $register, "4"), concat!($load, " [{to} + 160], ", $register, "5"),
                    concat!($load, " [{to} + 192], ", $register, "6"), concat!($load, " [{to} + 224], ", $register, "7"),
                    concat!($load, " [{to} + 256], ", $register, "8"), concat!($load, " [{to} + 288], ", $register, "9"),
                    concat!($load, " [{to} + 320], ", $register, "10"), concat!($load, " [{to} + 352], ", $register, "11"),
                    concat!($load, " [{to} + 384], ", $register, "12"), concat!($load, " [{to} + 416], ", $register, "13"),
                    concat!($load, " [{to} + 448], ", $register, "14"), concat!($load, " [{to} + 480], ", $register, "15"),
                    "fistp qword ptr [{to} + 512]",
                    from = in(reg) &raw const image, to = in(reg) &raw mut back, until = in(reg) until,
                    largest = inout(reg) largest, previous = inout(reg) previous,
                    out("rax") _, out("rdx") _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _,
                    out("st(5)") _, out("st(6)") _, out("st(7)") _,
                )
            }
        };
    }
    let lanes = if has_avx() {
        hold_with!("vmovups", "ymm");
        4
    } else {
        hold_with!("movups", "xmm");
        2
    };
    let same = |(a, b): (&[u64; 4], &[u64; 4])| a[..lanes] == b[..lanes];
    let whole = image.registers.iter().zip(&back.registers).all(same);
    if !whole || image.integer != back.integer {
        CORRUPT.fetch_add(1, Relaxed);
    }
    (largest, previous)
}
