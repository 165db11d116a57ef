//! Ferry's own test guest: one PVH kernel that runs unchanged under Ferry and QEMU, checks its own
//! memory, disk, clock and vector registers, and says on the serial line what it saw.
//!
//! Ring 0 is a page of assembly (`guest/ring0.s`) in plain integer instructions, because a software
//! KVM emulates ring 0; the work is ordinary Rust in ring 3.
//!
//! # Command line
//! Words separated by spaces; unknown ones are ignored.
//!
//! | word | meaning |
//! |---|---|
//! | `work=hello` | print a line, then exit: `code=N` writes N to port 0xf4 (exit status `N << 1 \| 1`), `code=reset` resets, else power off |
//! | `work=idle` | every CPU sleeps on its LAPIC timer, one wake-up per heartbeat |
//! | `work=spin` | every CPU watches the TSC; RAM is filled first if `fill=` is given |
//! | `work=dirty` | fill RAM, then rewrite a working set at a rate |
//! | `work=disk` | virtio-blk driver: numbered, checksummed sectors, rewritten for ever |
//! | `work=diskread` | read blocks of `bs=4096` bytes, `qd=1` to 32 at a time, `pattern=seq\|rand`, for `run_ms=1000`; then exit with 0 |
//! | `work=selftest` | flip bits and see that each check notices; code 0 if so, 1 if not |
//! | `work=fault` | touch unmapped memory: shows what `FAULT` looks like |
//! | `cpus=N` | CPUs to use, 1 to 8; the default is all that CPUID tells of. Others stay parked |
//! | `hb_ms=100` | time between heartbeats |
//! | `timer=deadline\|oneshot` | how to sleep; the default is the TSC deadline if CPUID has it |
//! | `fill=random\|text\|zero` | what pages hold: incompressible, compressible, zeroes; default `random` |
//! | `fill_pct=75` | how much of RAM is filled; the rest is never written and must stay zero |
//! | `ram=all\|MB` | how much of RAM to use, default all |
//! | `ws_mb=256` | `dirty`: the working set, split between the CPUs. `disk`: pages that are rewritten beside it, default none |
//! | `ram_mbps=50` | `disk`: the rate of that, in 10^6 bytes per second |
//! | `rate_mbps=500` | `dirty`: bytes of pages rewritten, in 10^6 per second; 0 rewrites nothing. `disk`: the same of sectors; default as fast as can be |
//! | `pattern=seq\|rand` | `dirty`: order of rewriting |
//! | `change_pct=100` | `dirty`: how much of a page a rewrite changes; its head always changes |
//! | `sleep=1` | `spin`, `dirty`: sleep like `idle` after the fill, and rewrite nothing |
//! | `steps=1` | `disk`: after the fill, writes, discards and zeroes in the order of [`steps`], in place of writes at random; held until a `g` |
//! | `disk_mb=N` | `disk`: how much of the disk to use, from its start; default all, at most 1024 |
//! | `virtio_mmio.device=SIZE@BASE:IRQ` | devices; the first that is a disk is used |
//! | `ram_mb=N` | RAM from address 0, only for a VMM that passes no memory map |
//!
//! # Output
//! The very first byte, sent before anything else is done, is the `F` of the first line, which starts
//! with `FERRY `. Every line ends with `\n`. A migration may cut a line in two: what the destination
//! prints goes on where the source stopped. Then come lines of these kinds, with fields in this order;
//! more fields may follow at the end of a line:
//!
//! - `FERRY hello from the guest cpus=N ram_mb=M` (`work=hello`), else `FERRY guest work=W`.
//! - `READY work=W cpus=N ram_mb=M pages=P fill_us=T`: P pages are filled; heartbeats follow. For a disk
//!   `READY work=disk cpus=1 ram_mb=M sectors=S fill_us=T features=0xF id=ID`: S sectors are written and
//!   flushed, F the features acknowledged, ID what the device answered to get-id.
//! - `HB n=K t_us=T gen=G max_gap_us=U ws_mbps=R corrupt=C fpu=F alive=A kvmclock_us=V`: heartbeat K
//!   (counted from 0 without a gap) at guest time T (TSC since boot). G pages or sectors rewritten so
//!   far. U the largest gap since the last heartbeat, over all CPUs: between two reads of the TSC, how
//!   late a sleeper woke, or how long a cycle of `disk` took; only the time of a check is left out. R the
//!   rate since then, in 10^6 bytes per second. C mismatches so far of any kind, F those in registers. A
//!   of the CPUs made progress since the last heartbeat. V is time by kvmclock, 0 where there is none. A
//!   disk adds `acked=N lost_irq=L ram_gen=G steps=S held=H writes=W write_p50_us=M write_p99_us=N`: requests that the
//!   device acknowledged, those that a timer found instead of an interrupt, pages rewritten beside it, steps taken, and
//!   whether it takes none now; how often a few sectors were written since the last heartbeat, and how long half and
//!   99 of 100 of these took at most.
//! - `CORRUPT WHAT …` at the first mismatch of each kind: `CORRUPT page=I expected_gen=E found_gen=G`,
//!   `CORRUPT sector=…` likewise, `CORRUPT untouched=I word=W found=0x…`, `CORRUPT fpu cpu=C`,
//!   `CORRUPT clock last=T now=U` (it went backwards), `CORRUPT kvmclock …`. The guest goes on; `corrupt=`
//!   counts all of them.
//! - `CHECK pages=P corrupt=C gen=G untouched=U` or `CHECK sectors=S corrupt=C gen=G acked=N` answers a
//!   `c` on the serial line, for `disk` with the pages beside it as `ram_pages=`: all was read, every byte of it; C as in heartbeats, so 0 means that nothing
//!   was ever wrong. `q` exits through port 0xf4 with 0 (status 1), `p` powers off, `r` resets, `g` and
//!   `h` have a disk with `steps=1` take them or not.
//! - `READY work=diskread bs=B qd=Q blocks=N`, then `DISKREAD requests=R us=T kbps=K iops=I`: R reads in T, K in
//!   1000 bytes per second.
//! - `SELFTEST flipped bit detected at page N bit B`, `SELFTEST flipped bit detected in a sector`,
//!   `SELFTEST lost registers detected`, `SELFTEST failed …`.
//! - `FAULT vector=V error=E rip=R cr2=A` (exit code 0x7f), `PANIC …` (0x7d), `ERROR …`, `DISK-ERROR …`:
//!   something that must not happen.
//!
//! Power-off is 0x2000 to port 0x604, then the i8042's reset, then a triple fault.

#[path = "../guest/steps.rs"]
pub mod steps;

/// Path of the built kernel.
pub const KERNEL: &str = env!("FERRY_GUEST_KERNEL");
/// Path of a Multiboot kernel as a 32-bit ELF: prints `CMDLINE …` and, for each module, `MODULE string HOLDS
/// content`, then writes the number of modules to port 0xf4. With a command line that ends with `wait` it
/// prints `WAITING` and waits for a key on the serial line first: `r` resets.
pub const MULTIBOOT_ELF: &str = env!("FERRY_MULTIBOOT_ELF");
/// The same as a flat binary.
pub const MULTIBOOT_FLAT: &str = env!("FERRY_MULTIBOOT_FLAT");
/// Path of a Multiboot kernel that uses the devices of test kernels. The letter behind `do=` on its command line says how;
/// exit code 1 if all was as it should be and 0xff if not, unless it ends in another way:
///
/// | `do=` | what it does |
/// |---|---|
/// | `f` | reads fw_cfg byte by byte: `FWCFG cpus=N ram=N file=… initrd=LENGTH sum=N`, numbers as 8 hexadecimal digits, the content of the file `opt/test`, and the initrd's checksum: rotated left by a bit, then the next byte added |
/// | `d` | the same by DMA, without the file; what must be refused, too |
/// | `i` | takes interrupts of the test device, edges and levels: `IRQ edges=N levels=N` |
/// | `v` | takes interrupts of the 8259s as a BIOS leaves them |
/// | `m` | keeps data in the test device's register and memory |
/// | `b` | writes 2048 lines to the debug console: four letters from `a` to `p`, which count |
/// | `n` | touches ports 0x70 and 0x80 and memory at 0xfed00000, twice |
/// | `c` `p` | says through pvpanic that it has crashed and goes on, that it has panicked |
/// | `e` `o` `r` `t` | ends with 5 at port 0x501, powers off, resets through port 0x92, triple fault |
/// | `xNN` | ends with NN, after some NN ms |
/// | `s` | starts the CPUs that fw_cfg counts, in real mode, and wakes them: `CPUS others=N` |
/// | `a` | goes to real mode, takes an `int`, an interrupt and a fault there, and comes back: `REAL ints=N keyboards=N divides=N` |
/// | `q…` | the same, after a key on the serial line |
pub const TEST_DEVICES: &str = env!("FERRY_TEST_DEVICES");
/// The same, linked to 0x8000.
pub const MULTIBOOT_LOW: &str = env!("FERRY_MULTIBOOT_LOW");
/// Path of a relocatable Multiboot 2 kernel, a 32-bit ELF: does as the Multiboot kernel. 0x7f on port 0xf4 means that
/// something is not as it asked for; this holds for the next two, too.
pub const MULTIBOOT2: &str = env!("FERRY_MULTIBOOT2");
/// Path of a 32-bit ELF with a PVH note: prints `CMDLINE …` and, for each module, `MODULE string HOLDS content`, or
/// `INITRD content` if it has no string, then writes the number of modules to port 0xf4; with `wait` at the end of its command line, after a key.
pub const PVH32: &str = env!("FERRY_PVH32");
/// Path of a bzImage with a 32-bit entry only: the same, with the ramdisk's length.
pub const LINUX32: &str = env!("FERRY_LINUX32");
/// Path of a Multiboot kernel that starts all other CPUs with INIT and start-up messages, says `CPUS n OTHERS m` in
/// hexadecimal, m of them with an x2APIC id between 1 and n - 1 of their own, and waits for a key: `r` does it again,
/// any other ends with 0 on port 0xf4.
pub const CPUS: &str = env!("FERRY_CPUS");
/// Path of a 64-bit ELF without a PVH note, to be entered as Linux is: prints `CMDLINE …` and `INITRD content`, then
/// writes the ramdisk's length to port 0xf4.
pub const VMLINUX: &str = env!("FERRY_VMLINUX");

#[cfg(test)]
mod tests {
    use std::process::Command;

    #[test]
    fn ring_0_uses_integer_instructions_only() {
        let output = Command::new("objdump")
            .args(["-d", "-j", ".ring0", super::KERNEL])
            .output()
            .expect("binutils is installed");
        assert!(output.status.success(), "{output:?}");
        let code = String::from_utf8_lossy(&output.stdout);
        assert!(code.contains("iretq") && code.contains("wrmsr"), "that is ring 0");
        for register in ["xmm", "ymm", "zmm", "st(", "%mm"] {
            assert!(!code.contains(register), "ring 0 uses {register}");
        }
    }
}
