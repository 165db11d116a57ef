//! Ferry's own test guest: one PVH kernel that runs unchanged under Ferry and QEMU, checks its own
//! memory, disk, clock and vector registers, and says on the serial line what it saw.
//!
//! Ring 0 is a page of assembly (`guest/ring0.s`) in plain integer instructions, because a software
//! KVM emulates ring 0; the work is ordinary Rust in ring 3.
//!
//! # Command line
//! | word | meaning |
//! |---|---|
//! | `work=hello` | print a line, then exit: `code=N` writes N to port 0xf4, else power off |
//! | `work=idle` | sleep on the LAPIC timer between heartbeats |
//! | `work=spin` | watch the TSC with live vector registers |
//! | `work=dirty` | fill RAM (`fill=random\|text\|zero`, `fill_pct=75`), then rewrite `ws_mb=` at `rate_mbps=` in `pattern=seq\|rand`; `sleep=1` sleeps after the fill |
//! | `work=disk` | virtio-blk driver: numbered, checksummed sectors, `disk_mb=` at most |
//! | `work=selftest` | flip bits and see that each check notices; code 0 if so |
//! | `cpus=N` | start N CPUs (1 to 8) |
//! | `hb_ms=100` | time between heartbeats |
//!
//! # Output
//! The very first byte is `F`, sent before anything else is done. Then lines:
//! - `READY work=W cpus=N ram_mb=M pages=P fill_us=T` (for disks `id=`, `sectors=`)
//! - `HB n=K t_us=T gen=G max_gap_us=U mbps=R corrupt=C fpu=F`: heartbeat K at guest time T; G pages or
//!   sectors rewritten so far; U the largest gap that the guest saw since the last heartbeat: between two
//!   reads of the TSC, or how late it woke
//! - `CORRUPT what=index expected_gen=… found_gen=…` at the first mismatch
//! - `CHECK pages=P corrupt=C gen=G` (or `sectors=`) answers a `c` on the serial line; `q` exits with
//!   code 0 through port 0xf4, `p` powers off
//! - `FAULT`, `PANIC`, `ERROR`, `DISK-ERROR`: something that must not happen

/// Path of the built kernel.
pub const KERNEL: &str = env!("FERRY_GUEST_KERNEL");

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
