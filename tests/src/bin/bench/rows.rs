//! What is measured, in which unit, and what Ferry has to reach. A row is a line here and a function in
//! [`alone`], [`moves`], [`engine`] or [`disks`].

use crate::figures::Figure;
use crate::latency::{self, Job, Of100};
use crate::memory::Memory;
use crate::mirrors::{self, To};
use crate::moves::Look;
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
    /// At least this.
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
    pub measure: Measure,
    /// What it should be.
    pub target: Target,
    /// Who takes it.
    pub columns: Columns,
    /// How often, if nothing is said.
    pub runs: usize,
}

/// How a figure is taken.
pub enum Measure {
    /// It is what it is.
    Exact(fn(Program) -> Result<f64>),
    /// It may have no end.
    Bounded(fn(Program) -> Result<Figure>),
}

impl Measure {
    /// Takes one.
    pub fn take(&self, program: Program) -> Result<Figure> {
        match self {
            Self::Exact(measure) => measure(program).map(Figure::from),
            Self::Bounded(measure) => measure(program),
        }
    }
}

/// What a row has figures of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Columns {
    /// Ferry: there is nothing to compare with.
    Ferry,
    /// And of one other: the QEMU at hand, or what the title says.
    Two,
    /// And of a newer QEMU too.
    All,
}

/// Runs of most rows.
pub const RUNS: usize = 5;

/// All of them.
pub const ROWS: &[Row] = &[
    Row {
        name: "start",
        title: "process start to first serial byte, 128 MiB",
        unit: "ms",
        measure: Measure::Exact(alone::first_byte),
        target: Target::AtMost(2.0),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "memory",
        title: "VMM memory beyond the guest's, idle, 128 MiB",
        unit: "MB",
        measure: Measure::Exact(alone::memory),
        target: Target::AtMost(2.2),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "asleep",
        title: "migrate 1 GiB, asleep, 75 % random, 1 channel",
        unit: "GB/s",
        measure: Measure::Exact(|program| moves::asleep(program, Memory::Warm)),
        target: Target::RatioAtLeast(1.4),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "asleep-cold",
        title: "the same, in memory as the host gives it",
        unit: "GB/s",
        measure: Measure::Exact(|program| moves::asleep(program, Memory::AsItComes)),
        target: Target::RatioAtLeast(1.4),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "gap",
        title: "guest's largest gap, spinning, limit 20 ms",
        unit: "ms",
        measure: Measure::Exact(moves::gap_spinning),
        target: Target::AtMost(1.0),
        columns: Columns::All,
        runs: 15,
    },
    Row {
        name: "gap-dirty",
        title: "the same, dirtying 256 MiB at 500 MB/s",
        unit: "ms",
        measure: Measure::Exact(moves::gap_dirtying),
        target: Target::RatioAtMost(0.4),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "speed-dirty",
        title: "guest's writes while it moves, wants 1000 MB/s",
        unit: "MB/s",
        measure: Measure::Exact(moves::speed_while_moving),
        target: Target::AtLeast(970.0),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "converge",
        title: "cap 1 Gb/s, dirtying 500 MB/s, auto-converge",
        unit: "s",
        measure: Measure::Bounded(|program| {
            moves::capped(program, &[moves::AUTO_CONVERGE], Look::TotalSeconds)
        }),
        target: Target::AtMost(20.0),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "converge-gap",
        title: "the same: guest's largest gap on the way",
        unit: "ms",
        measure: Measure::Bounded(|program| {
            moves::capped(program, &[moves::AUTO_CONVERGE], Look::LargestGapMs)
        }),
        target: Target::AtMost(20.0),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "asleep-4g",
        title: "migrate 4 GiB, asleep, 75 % random, 1 channel",
        unit: "GB/s",
        measure: Measure::Exact(engine::one_channel),
        target: Target::RatioAtLeast(1.2),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "channels",
        title: "the same, best of 1, 2 and 4 channels",
        unit: "GB/s",
        measure: Measure::Exact(engine::best_channels),
        target: Target::RatioAtLeast(1.4),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "sockets",
        title: "the same; first column: two plain sockets",
        unit: "GB/s",
        measure: Measure::Exact(engine::against_sockets),
        target: Target::RatioAtLeast(0.95),
        columns: Columns::Two,
        runs: RUNS,
    },
    Row {
        name: "cpu-time",
        title: "processor time per GiB, both sides",
        unit: "s",
        measure: Measure::Exact(engine::processor_time),
        target: Target::RatioAtMost(0.8),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "xbzrle",
        title: "cap 1 Gb/s, dirtying 500 MB/s, xbzrle, 64 MiB",
        unit: "s",
        measure: Measure::Bounded(engine::xbzrle),
        target: Target::AtMost(20.0),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "zlib",
        title: "cap 1 Gb/s, 1 GiB of text, zlib level 1",
        unit: "s",
        measure: Measure::Exact(engine::zlib),
        target: Target::RatioAtMost(1.0 / 3.0),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "xbzrle-encode",
        title: "XBZRLE encode, 5 % of bytes changed, one core",
        unit: "GB/s",
        measure: Measure::Exact(engine::xbzrle_encode),
        target: Target::AtLeast(4.0),
        columns: Columns::Ferry,
        runs: RUNS,
    },
    Row {
        name: "zero-scan",
        title: "zero-page scan; first column: plain vector sum",
        unit: "GB/s",
        measure: Measure::Exact(engine::zero_scan),
        target: Target::RatioAtLeast(0.9),
        columns: Columns::Two,
        runs: RUNS,
    },
    Row {
        name: "zero",
        title: "migrate 1 GiB, idle, mostly zero: total",
        unit: "ms",
        measure: Measure::Exact(moves::mostly_zero),
        target: Target::AtMost(40.0),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "blk-rand-1",
        title: "virtio-blk random 4 KiB reads, queue depth 1",
        unit: "kIOPS",
        measure: Measure::Exact(|program| Ok(alone::disk_reads(program, "bs=4096 qd=1")?.1)),
        target: Target::RatioAtLeast(1.0),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "blk-rand-32",
        title: "the same, queue depth 32",
        unit: "kIOPS",
        measure: Measure::Exact(|program| Ok(alone::disk_reads(program, "bs=4096 qd=32")?.1)),
        target: Target::RatioAtLeast(1.0),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "blk-seq-1",
        title: "virtio-blk sequential 1 MiB reads, depth 1",
        unit: "GB/s",
        measure: Measure::Exact(|program| {
            Ok(alone::disk_reads(program, "bs=1048576 qd=1 pattern=seq")?.0)
        }),
        target: Target::RatioAtLeast(1.1),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "blk-seq-32",
        title: "the same, queue depth 32",
        unit: "GB/s",
        measure: Measure::Exact(|program| {
            Ok(alone::disk_reads(program, "bs=1048576 qd=32 pattern=seq")?.0)
        }),
        target: Target::RatioAtLeast(1.0),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "linux-boot",
        title: "Debian's cloud kernel, process start to /init",
        unit: "s",
        measure: Measure::Exact(alone::linux_boot),
        target: Target::RatioAtMost(0.9),
        columns: Columns::Two,
        runs: RUNS,
    },
    Row {
        name: "disk-direct",
        title: "migrate with 1 GiB random disk, cache=none",
        unit: "GB/s",
        measure: Measure::Exact(|program| disks::full(program, "none")),
        target: Target::RatioAtLeast(1.5),
        columns: Columns::Two,
        runs: RUNS,
    },
    Row {
        name: "disk-cached",
        title: "the same, cache=writeback",
        unit: "GB/s",
        measure: Measure::Exact(|program| disks::full(program, "writeback")),
        target: Target::RatioAtLeast(1.5),
        columns: Columns::Two,
        runs: RUNS,
    },
    Row {
        name: "disk-cp",
        title: "the same; instead of QEMU, cp and fsync",
        unit: "GB/s",
        measure: Measure::Exact(disks::against_cp),
        target: Target::RatioAtLeast(0.9),
        columns: Columns::Two,
        runs: RUNS,
    },
    Row {
        name: "mirror-none",
        title: "mirror 1 GiB to a file, cache=none, until ready",
        unit: "MB/s",
        measure: Measure::Exact(|program| mirrors::speed(program, To::File("none"))),
        target: Target::RatioAtLeast(1.3),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "mirror-writeback",
        title: "the same, cache=writeback",
        unit: "MB/s",
        measure: Measure::Exact(|program| mirrors::speed(program, To::File("writeback"))),
        target: Target::RatioAtLeast(1.3),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "mirror-nbd-unix",
        title: "the same, to qemu-nbd over a Unix socket",
        unit: "MB/s",
        measure: Measure::Exact(|program| mirrors::speed(program, To::Unix)),
        target: Target::RatioAtLeast(1.3),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "mirror-nbd-tcp",
        title: "the same, to qemu-nbd over TCP",
        unit: "MB/s",
        measure: Measure::Exact(|program| mirrors::speed(program, To::Tcp)),
        target: Target::RatioAtLeast(2.5),
        columns: Columns::All,
        runs: RUNS,
    },
    Row {
        name: "mirror-idle",
        title: "processor time of a mirror that is ready, idle guest",
        unit: "%",
        measure: Measure::Exact(mirrors::idle),
        target: Target::AtMost(0.1),
        columns: Columns::All,
        runs: 3,
    },
    Row {
        name: "nbd-read",
        title: "nbdcopy reads an export of 1 GiB, beside qemu-nbd",
        unit: "MB/s",
        measure: Measure::Exact(mirrors::export_read),
        target: Target::RatioAtLeast(1.1),
        columns: Columns::Two,
        runs: RUNS,
    },
    Row {
        name: "write-alone-p50",
        title: "a write of the guest with no job, p50",
        unit: "us",
        measure: Measure::Exact(|program| latency::of_writes(program, Job::None, Of100::P50)),
        target: Target::RatioAtMost(1.0),
        columns: Columns::All,
        runs: 3,
    },
    Row {
        name: "write-background-p50",
        title: "a write of the guest while a mirror copies, p50",
        unit: "us",
        measure: Measure::Exact(|program| latency::of_writes(program, Job::Background, Of100::P50)),
        target: Target::RatioAtMost(0.8),
        columns: Columns::All,
        runs: 3,
    },
    Row {
        name: "write-background-p99",
        title: "a write of the guest while a mirror copies, p99",
        unit: "us",
        measure: Measure::Exact(|program| latency::of_writes(program, Job::Background, Of100::P99)),
        target: Target::RatioAtMost(0.8),
        columns: Columns::All,
        runs: 3,
    },
    Row {
        name: "write-blocking-p50",
        title: "the same, mirror ready, write-blocking, p50",
        unit: "us",
        measure: Measure::Exact(|program| {
            latency::of_writes(program, Job::WriteBlocking, Of100::P50)
        }),
        target: Target::RatioAtMost(0.8),
        columns: Columns::All,
        runs: 3,
    },
    Row {
        name: "write-blocking-p99",
        title: "the same, mirror ready, write-blocking, p99",
        unit: "us",
        measure: Measure::Exact(|program| {
            latency::of_writes(program, Job::WriteBlocking, Of100::P99)
        }),
        target: Target::RatioAtMost(0.8),
        columns: Columns::All,
        runs: 3,
    },
    Row {
        name: "write-backup-p50",
        title: "the same, while a backup copies, p50",
        unit: "us",
        measure: Measure::Exact(|program| latency::of_writes(program, Job::Backup, Of100::P50)),
        target: Target::RatioAtMost(0.8),
        columns: Columns::All,
        runs: 3,
    },
    Row {
        name: "write-backup-p99",
        title: "the same, while a backup copies, p99",
        unit: "us",
        measure: Measure::Exact(|program| latency::of_writes(program, Job::Backup, Of100::P99)),
        target: Target::RatioAtMost(0.8),
        columns: Columns::All,
        runs: 3,
    },
    Row {
        name: "disk-sparse",
        title: "migrate with 8 GiB disk, 256 MiB of data",
        unit: "GB/s",
        measure: Measure::Exact(disks::sparse),
        target: Target::RatioAtLeast(3.0),
        columns: Columns::Two,
        runs: RUNS,
    },
    Row {
        name: "disk-text",
        title: "cap 1 Gb/s, text disk; first column: no zstd",
        unit: "s",
        columns: Columns::Two,
        runs: RUNS,
        measure: Measure::Exact(disks::text),
        target: Target::RatioAtMost(1.0 / 2.0),
    },
    Row {
        name: "disk-gap",
        title: "largest gap, writing 50 MB/s to a 1 GiB disk",
        unit: "ms",
        measure: Measure::Exact(disks::gap_writing),
        target: Target::AtMost(15.0),
        columns: Columns::Two,
        runs: RUNS,
    },
    Row {
        name: "bitmaps-gap",
        title: "gap with 8 bitmaps of 1 TiB; first: without",
        unit: "ms",
        measure: Measure::Exact(bitmaps::gap),
        target: Target::RatioAtMost(1.1),
        columns: Columns::Two,
        runs: RUNS,
    },
    Row {
        name: "bitmaps-total",
        title: "the same: until all has arrived",
        unit: "ms",
        measure: Measure::Exact(bitmaps::total),
        target: Target::MoreByAtMost(100.0),
        columns: Columns::Two,
        runs: RUNS,
    },
    Row {
        name: "bitmap-write",
        title: "a write of 4 KiB with 1 dirty bitmap, by none",
        unit: "",
        measure: Measure::Exact(|_| bitmaps::write(1)),
        target: Target::AtMost(1.05),
        columns: Columns::Ferry,
        runs: RUNS,
    },
    Row {
        name: "bitmap-write-4",
        title: "the same with 4",
        unit: "",
        measure: Measure::Exact(|_| bitmaps::write(4)),
        // As much for each.
        target: Target::AtMost(1.2),
        columns: Columns::Ferry,
        runs: RUNS,
    },
    Row {
        name: "bitmap-scan",
        title: "scan of a bitmap of 1 TiB, 0.1 % dirty",
        unit: "ms",
        measure: Measure::Exact(|_| bitmaps::scan()),
        target: Target::AtMost(1.0),
        columns: Columns::Ferry,
        runs: RUNS,
    },
    Row {
        name: "bitmap-merge",
        title: "merge of two bitmaps of 1 TiB, all dirty",
        unit: "ms",
        measure: Measure::Exact(|_| bitmaps::merge()),
        target: Target::AtMost(5.0),
        columns: Columns::Ferry,
        runs: RUNS,
    },
];
