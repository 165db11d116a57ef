//! Waits with live values in every x87 and vector register (SSE, AVX or AVX-512, whatever the CPU has),
//! then checks that they are still there.

use crate::clock::{self, MSR_TSC_DEADLINE};
use crate::cpu::{SERVICE_SLEEP, SERVICE_WRMSR_AND_SLEEP};
use crate::heartbeat::{self, FPU_CORRUPT};
use core::arch::asm;
use core::arch::x86_64::__cpuid_count;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Vector registers and the 64-bit words of each.
static REGISTERS: AtomicUsize = AtomicUsize::new(16);
static WORDS: AtomicUsize = AtomicUsize::new(2);

const MOST: usize = 32;
const X87: usize = 8;

/// What the registers held: vectors, x87 integers, opmasks (64 bytes apart, like vectors).
#[repr(C, align(64))]
struct Image {
    vectors: [[u64; 8]; MOST],
    x87: [u64; X87],
    masks: [u16; 8],
}

/// Finds out how wide the registers are. Ring 0 has enabled all that CPUID tells of.
pub fn start() {
    let leaf1 = __cpuid_count(1, 0).ecx;
    if leaf1 >> 27 & 1 == 0 || leaf1 >> 28 & 1 == 0 {
        return;
    }
    let enabled: u32;
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") enabled, out("edx") _) };
    if enabled & 6 == 6 {
        WORDS.store(4, Relaxed);
    }
    if enabled & 0xe6 == 0xe6 && __cpuid_count(7, 0).ebx >> 16 & 1 == 1 {
        WORDS.store(8, Relaxed);
        REGISTERS.store(MOST, Relaxed);
    }
}

/// What a wait needs and leaves.
struct Wait {
    service: u64,
    low: u64,
    high: u64,
    previous: u64,
    largest: u64,
    until: u64,
}

const SPIN: u8 = 0;
const SLEEP: u8 = 1;
/// For the self-test: each changes what a wait should keep.
const LOSE_VECTOR: u8 = 2;
const LOSE_X87: u8 = 3;

// Values differ from wait to wait: each starts at another place of this pool. Those of different CPUs
// start apart as well.
static POOL: [[u64; 8]; MOST * 3] = {
    let mut pool = [[0; 8]; MOST * 3];
    let mut at = 0;
    while at < MOST * 24 {
        pool[at / 8][at % 8] = (at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 1;
        at += 1;
    }
    pool
};

macro_rules! hold {
    ($list:literal, $masks:literal, $move:literal, $name:literal, $end:literal, $body:literal,
     $wait:expr, $from:expr, $to:expr) => {
        unsafe {
            asm!(
                ".irp i,0,1,2,3,4,5,6,7", "fild qword ptr [rsi + 64*\\i]", ".endr",
                concat!(".irp i,", $list), concat!($move, " ", $name, "\\i, [rsi + 64*\\i]"), ".endr",
                concat!(".irp i,", $masks), "kmovw k\\i, [rsi + 64*\\i]", ".endr",
                $body,
                concat!(".irp i,", $masks), "kmovw [r11 + 2112 + 2*\\i], k\\i", ".endr",
                concat!(".irp i,", $list), concat!($move, " [r11 + 64*\\i], ", $name, "\\i"), ".endr",
                ".irp i,7,6,5,4,3,2,1,0", "fistp qword ptr [r11 + 2048 + 8*\\i]", ".endr",
                $end,
                in("rsi") $from, in("r11") $to, in("rdi") $wait.service,
                in("rcx") u64::from(MSR_TSC_DEADLINE),
                inout("rax") $wait.low => _, inout("rdx") $wait.high => _,
                inout("r8") $wait.previous, inout("r9") $wait.largest, in("r10") $wait.until,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _,
                out("xmm5") _, out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _,
                out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _, out("xmm14") _,
                out("xmm15") _, out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            )
        }
    };
    ($body:literal, $wait:expr, $from:expr, $to:expr) => {
        match WORDS.load(Relaxed) {
            8 => hold!("0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
                "1,2,3,4,5,6,7", "vmovdqu64", "zmm", "vzeroupper", $body, $wait, $from, $to),
            4 => hold!("0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15", "\n.endr\n.rept 0", "vmovdqu", "ymm",
                "vzeroupper", $body, $wait, $from, $to),
            _ => hold!("0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15", "\n.endr\n.rept 0", "movdqu", "xmm",
                "", $body, $wait, $from, $to),
        }
    };
}

/// Waits with live registers; says whether they are as they were.
fn wait<const HOW: u8>(cpu: usize, wait: &mut Wait) -> bool {
    let from = &POOL[cpu * 4 + (wait.until >> 8) as usize % 32..];
    let mut back = Image { vectors: [[0; 8]; MOST], x87: [0; X87], masks: [0; 8] };
    let to = &raw mut back;
    match HOW {
        SPIN => hold!(
            "2: rdtsc\nshl rdx, 32\nor rax, rdx\nmov rdx, rax\nsub rdx, r8\ncmp rdx, r9\n\
             cmova r9, rdx\nmov r8, rax\ncmp rax, r10\njb 2b",
            wait,
            from.as_ptr(),
            to
        ),
        SLEEP => hold!("int3", wait, from.as_ptr(), to),
        LOSE_VECTOR => hold!("psrlq xmm13, 1", wait, from.as_ptr(), to),
        _ => hold!("fxch st(5)", wait, from.as_ptr(), to),
    }
    let (registers, words) = (REGISTERS.load(Relaxed), WORDS.load(Relaxed));
    let vectors = (0..registers).all(|at| from[at][..words] == back.vectors[at][..words]);
    let x87 = (0..X87).all(|at| from[at][0] == back.x87[at]);
    let masks = words < 8 || (1..8).all(|at| from[at][0] as u16 == back.masks[at]);
    vectors && x87 && masks
}

fn must_hold(cpu: usize, held: bool) {
    if !held {
        heartbeat::report_once(&FPU_CORRUPT, format_args!("fpu cpu={cpu}"));
    }
}

/// Whether a register that changes is noticed, and none is when none does.
pub fn self_test() -> bool {
    let mut state = Wait { service: 0, low: 0, high: 0, previous: 0, largest: 0, until: 0 };
    wait::<SPIN>(0, &mut state)
        && !wait::<LOSE_VECTOR>(0, &mut state)
        && !wait::<LOSE_X87>(0, &mut state)
        && wait::<SPIN>(0, &mut state)
}

/// Spins until TSC value `until`; returns the largest step that the TSC made since `last`, and its last
/// value.
pub fn spin(cpu: usize, until: u64, last: u64) -> (u64, u64) {
    let mut state = Wait { service: 0, low: 0, high: 0, previous: last, largest: 0, until };
    must_hold(cpu, wait::<SPIN>(cpu, &mut state));
    (state.largest, state.previous)
}

/// Sleeps until TSC value `until` or any other interrupt.
pub fn sleep(cpu: usize, until: u64) {
    let mut service = SERVICE_WRMSR_AND_SLEEP;
    if !clock::timer_is_by_deadline() {
        service = SERVICE_SLEEP;
        clock::arm_one_shot(until);
    }
    let (low, high) = (until & 0xffff_ffff, until >> 32);
    let mut state = Wait { service, low, high, previous: 0, largest: 0, until };
    must_hold(cpu, wait::<SLEEP>(cpu, &mut state));
}
