//! What is measured, in which unit, and what Ferry has to reach. A row is a line here and a function in
//! [`alone`], [`moves`], [`engine`] or [`disks`].

use crate::memory::Memory;
use crate::moves::Figure;
use crate::{alone, bitmaps, disks, engine, moves};
use anyhow::{Context, Result, bail};
use ferry_tests::qemu::{self, Qemu};

/// Which program is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// This one.
    Ferry,
    /// What it is compared with.
    Qemu,
    /// The same, newer; where there is one.
    Newer,
}

impl Program {
    /// Which QEMU it is.
    pub fn qemu(self) -> Result<&'static Qemu> {
        match self {
            Self::Ferry => bail!("Ferry is no QEMU"),
            Self::Qemu => Ok(qemu::qemu()),
            Self::Newer => qemu::newer().context("there is no newer QEMU"),
        }
    }
}

/// What Ferry has to reach.
pub enum Target {
    /// At most this.
    AtMost(f64),
    /// At least this; there is nothing to compare with.
    AtLeast(f64),
    /// Ferry's figure by QEMU's, at most.
    RatioAtMost(f64),
    /// Ferry's figure by QEMU's, at least.
    RatioAtLeast(f64),
    /// Ferry's figure less the first column's, at most.
    MoreByAtMost(f64),
}

/// One figure.
pub struct Row {
    /// For `--row`.
    pub name: &'static str,
    /// For people.
    pub title: &'static str,
    /// Of the figure.
    pub unit: &'static str,
    /// Takes it.
    pub measure: fn(Program) -> Result<f64>,
    /// What it should be.
    pub target: Target,
    /// Whether a newer QEMU can take it too: the first column is a QEMU, and that one has what it takes.
    pub newer: bool,
}

/// All of them.
pub const ROWS: &[Row] = &[
    Row {
        name: "start",
        title: "process start to first serial byte, 128 MiB",
        unit: "ms",
        measure: alone::first_byte,
        target: Target::AtMost(2.0),
        newer: true,
    },
    Row {
        name: "memory",
        title: "VMM memory beyond the guest's, idle, 128 MiB",
        unit: "MB",
        measure: alone::memory,
        target: Target::AtMost(2.2),
        newer: true,
    },
    Row {
        name: "asleep",
        title: "migrate 1 GiB, asleep, 75 % random, TCP",
        unit: "GB/s",
        measure: |program| moves::asleep(program, Memory::Warm),
        target: Target::RatioAtLeast(1.4),
        newer: true,
    },
    Row {
        name: "asleep-cold",
        title: "the same, in memory as the host gives it",
        unit: "GB/s",
        measure: |program| moves::asleep(program, Memory::AsItComes),
        target: Target::RatioAtLeast(1.4),
        newer: true,
    },
    Row {
        name: "gap",
        title: "guest's largest gap, spinning, limit 20 ms",
        unit: "ms",
        measure: moves::gap_spinning,
        target: Target::AtMost(1.0),
        newer: true,
    },
    Row {
        name: "gap-dirty",
        title: "the same, dirtying 256 MiB at 500 MB/s",
        unit: "ms",
        measure: moves::gap_dirtying,
        target: Target::RatioAtMost(0.4),
        newer: true,
    },
    Row {
        name: "speed-dirty",
        title: "guest's writes while it moves, wants 1000 MB/s",
        unit: "MB/s",
        measure: moves::speed_while_moving,
        target: Target::RatioAtLeast(1.2),
        newer: true,
    },
    Row {
        name: "converge",
        title: "cap 1 Gb/s, dirtying 500 MB/s, auto-converge",
        unit: "s",
        measure: |program| moves::capped(program, &[moves::AUTO_CONVERGE], Figure::TotalSeconds),
        target: Target::AtMost(20.0),
        newer: true,
    },
    Row {
        name: "converge-gap",
        title: "the same: guest's largest gap on the way",
        unit: "ms",
        measure: |program| moves::capped(program, &[moves::AUTO_CONVERGE], Figure::LargestGapMs),
        target: Target::AtMost(20.0),
        newer: true,
    },
    Row {
        name: "asleep-4g",
        title: "migrate 4 GiB, asleep, 75 % random, 1 channel",
        unit: "GB/s",
        measure: engine::one_channel,
        target: Target::RatioAtLeast(1.2),
        newer: true,
    },
    Row {
        name: "channels",
        title: "the same, best of 1, 2 and 4 channels",
        unit: "GB/s",
        measure: engine::best_channels,
        target: Target::RatioAtLeast(1.4),
        newer: true,
    },
    Row {
        name: "sockets",
        title: "the same; first column: two plain sockets",
        unit: "GB/s",
        measure: engine::against_sockets,
        target: Target::RatioAtLeast(0.95),
        newer: false,
    },
    Row {
        name: "cpu-time",
        title: "processor time per GiB, both sides",
        unit: "s",
        measure: engine::processor_time,
        target: Target::RatioAtMost(0.8),
        newer: true,
    },
    Row {
        name: "xbzrle",
        title: "cap 1 Gb/s, dirtying 500 MB/s, xbzrle, 64 MiB",
        unit: "s",
        measure: engine::xbzrle,
        target: Target::AtMost(20.0),
        newer: true,
    },
    Row {
        name: "zlib",
        title: "cap 1 Gb/s, 1 GiB of text, zlib level 1",
        unit: "s",
        measure: engine::zlib,
        target: Target::RatioAtMost(1.0 / 3.0),
        newer: true,
    },
    Row {
        name: "xbzrle-encode",
        title: "XBZRLE encode, 5 % of bytes changed, one core",
        unit: "GB/s",
        measure: engine::xbzrle_encode,
        target: Target::AtLeast(4.0),
        newer: false,
    },
    Row {
        name: "zero-scan",
        title: "zero-page scan; first column: plain vector sum",
        unit: "GB/s",
        measure: engine::zero_scan,
        target: Target::RatioAtLeast(0.9),
        newer: false,
    },
    Row {
        name: "zero",
        title: "migrate 1 GiB, idle, mostly zero: total",
        unit: "ms",
        measure: moves::mostly_zero,
        target: Target::AtMost(40.0),
        newer: true,
    },
    Row {
        name: "blk-rand-1",
        title: "virtio-blk random 4 KiB reads, queue depth 1",
        unit: "kIOPS",
        measure: |program| Ok(alone::disk_reads(program, "bs=4096 qd=1")?.1),
        target: Target::RatioAtLeast(1.0),
        newer: true,
    },
    Row {
        name: "blk-rand-32",
        title: "the same, queue depth 32",
        unit: "kIOPS",
        measure: |program| Ok(alone::disk_reads(program, "bs=4096 qd=32")?.1),
        target: Target::RatioAtLeast(1.0),
        newer: true,
    },
    Row {
        name: "blk-seq-1",
        title: "virtio-blk sequential 1 MiB reads, depth 1",
        unit: "GB/s",
        measure: |program| Ok(alone::disk_reads(program, "bs=1048576 qd=1 pattern=seq")?.0),
        target: Target::RatioAtLeast(1.1),
        newer: true,
    },
    Row {
        name: "blk-seq-32",
        title: "the same, queue depth 32",
        unit: "GB/s",
        measure: |program| Ok(alone::disk_reads(program, "bs=1048576 qd=32 pattern=seq")?.0),
        target: Target::RatioAtLeast(1.0),
        newer: true,
    },
    Row {
        name: "linux-boot",
        title: "Debian's cloud kernel, process start to /init",
        unit: "s",
        measure: alone::linux_boot,
        target: Target::RatioAtMost(0.9),
        newer: false,
    },
    Row {
        name: "disk-direct",
        title: "migrate with 1 GiB random disk, cache=none",
        unit: "GB/s",
        measure: |program| disks::full(program, "none"),
        target: Target::RatioAtLeast(1.5),
        newer: false,
    },
    Row {
        name: "disk-cached",
        title: "the same, cache=writeback",
        unit: "GB/s",
        measure: |program| disks::full(program, "writeback"),
        target: Target::RatioAtLeast(1.5),
        newer: false,
    },
    Row {
        name: "disk-cp",
        title: "the same; instead of QEMU, cp and fsync",
        unit: "GB/s",
        measure: disks::against_cp,
        target: Target::RatioAtLeast(0.9),
        newer: false,
    },
    Row {
        name: "disk-sparse",
        title: "migrate with 8 GiB disk, 256 MiB of data",
        unit: "GB/s",
        measure: disks::sparse,
        target: Target::RatioAtLeast(3.0),
        newer: false,
    },
    Row {
        name: "disk-text",
        title: "cap 1 Gb/s, text disk; first column: no zstd",
        unit: "s",
        newer: false,
        measure: disks::text,
        target: Target::RatioAtMost(1.0 / 2.0),
    },
    Row {
        name: "disk-gap",
        title: "largest gap, writing 50 MB/s to a 1 GiB disk",
        unit: "ms",
        measure: disks::gap_writing,
        target: Target::AtMost(15.0),
        newer: false,
    },
    Row {
        name: "bitmaps-gap",
        title: "gap with 8 bitmaps of 1 TiB; first: without",
        unit: "ms",
        measure: bitmaps::gap,
        target: Target::RatioAtMost(1.1),
        newer: false,
    },
    Row {
        name: "bitmaps-total",
        title: "the same: until all has arrived",
        unit: "ms",
        measure: bitmaps::total,
        target: Target::MoreByAtMost(100.0),
        newer: false,
    },
];
