//! `make bench`: Ferry and QEMU side by side, on the same guest, in the same run; medians.
//!
//! Both are driven through their control sockets by the same code. Runs alternate between the two, so
//! that a change of the host's load meets both.

use anyhow::{Context, Result, bail};
use ferry_tests::ferry::{self, Guest};
use ferry_tests::lines::Lines;
use ferry_tests::linux;
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qemu;
use ferry_tests::qmp::Qmp;
use ferry_tests::verdict::{Heartbeat, Transcript};
use serde_json::{Value, json};
use std::io::Read;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Which program is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Program {
    Ferry,
    Qemu,
}

/// What Ferry has to reach.
enum Target {
    /// At most this.
    AtMost(f64),
    /// Ferry's figure by QEMU's, at most.
    RatioAtMost(f64),
    /// Ferry's figure by QEMU's, at least.
    RatioAtLeast(f64),
}

struct Row {
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    measure: fn(Program) -> Result<f64>,
    target: Target,
}

const ROWS: &[Row] = &[
    Row {
        name: "start",
        title: "process start to first serial byte, 128 MiB",
        unit: "ms",
        measure: first_byte,
        target: Target::RatioAtMost(0.1),
    },
    Row {
        name: "memory",
        title: "VMM memory beyond the guest's, idle, 128 MiB",
        unit: "MB",
        measure: memory,
        target: Target::AtMost(3.0),
    },
    Row {
        name: "asleep",
        title: "migrate 1 GiB, asleep, 75 % random, TCP",
        unit: "GB/s",
        measure: asleep,
        target: Target::RatioAtLeast(1.1),
    },
    Row {
        name: "gap",
        title: "guest's largest gap, spinning, limit 20 ms",
        unit: "ms",
        measure: gap_spinning,
        target: Target::AtMost(1.3),
    },
    Row {
        name: "gap-dirty",
        title: "the same, dirtying 256 MiB at 500 MB/s",
        unit: "ms",
        measure: gap_dirtying,
        target: Target::AtMost(10.0),
    },
    Row {
        name: "zero",
        title: "migrate 1 GiB, idle, mostly zero: total",
        unit: "ms",
        measure: mostly_zero,
        target: Target::AtMost(40.0),
    },
    Row {
        name: "blk-rand-1",
        title: "virtio-blk random 4 KiB reads, queue depth 1",
        unit: "kIOPS",
        measure: |program| Ok(disk_reads(program, "bs=4096 qd=1")?.1),
        target: Target::RatioAtLeast(1.0),
    },
    Row {
        name: "blk-rand-32",
        title: "the same, queue depth 32",
        unit: "kIOPS",
        measure: |program| Ok(disk_reads(program, "bs=4096 qd=32")?.1),
        target: Target::RatioAtLeast(1.0),
    },
    Row {
        name: "blk-seq-1",
        title: "virtio-blk sequential 1 MiB reads, depth 1",
        unit: "GB/s",
        measure: |program| Ok(disk_reads(program, "bs=1048576 qd=1 pattern=seq")?.0),
        target: Target::RatioAtLeast(1.0),
    },
    Row {
        name: "blk-seq-32",
        title: "the same, queue depth 32",
        unit: "GB/s",
        measure: |program| Ok(disk_reads(program, "bs=1048576 qd=32 pattern=seq")?.0),
        target: Target::RatioAtLeast(1.0),
    },
    Row {
        name: "linux-boot",
        title: "Debian's cloud kernel, process start to /init",
        unit: "s",
        measure: linux_boot,
        target: Target::RatioAtMost(0.9),
    },
];

/// Where stock Linux runs: here, or both VMMs in one emulated machine.
fn linux_boot(program: Program) -> Result<f64> {
    let contender = match program {
        Program::Ferry => linux::boot::Contender { name: "ferry", run: ferry::run },
        Program::Qemu => linux::boot::Contender { name: "qemu", run: qemu::run },
    };
    linux::boot::seconds(&contender, || {
        let mut arguments = vec!["--row".to_owned(), "linux-boot".to_owned()];
        let mut given = std::env::args().skip(1);
        while let Some(argument) = given.next() {
            let value = given.next();
            if argument != "--row" {
                arguments.push(argument);
                arguments.extend(value);
            }
        }
        arguments
    })
}

fn run(program: Program, guest: &Guest) -> Result<Vmm> {
    match program {
        Program::Ferry => ferry::run(guest),
        Program::Qemu => qemu::run(guest),
    }
}

fn first_byte(program: Program) -> Result<f64> {
    let vmm = run(program, &Guest::new("work=hello", 128))?;
    let first = vmm.serial().wait_first_byte(SOON)?;
    Ok((first - vmm.process.started()).as_secs_f64() * 1e3)
}

/// Proportional memory of the process without the guest's RAM, which is its one mapping of that size.
fn memory(program: Program) -> Result<f64> {
    let guest = Guest::new("work=idle", 128);
    let vmm = run(program, &guest)?;
    vmm.wait_line("^HB n=3 ")?;
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vmm.process.id()))?;
    let kib = |line: &str, key: &str| {
        line.strip_prefix(key)?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    };
    let (mut size, mut total, mut ram, mut ram_size) = (0, 0, 0, 0);
    for line in smaps.lines() {
        if let Some(value) = kib(line, "Size:") {
            size = value;
        }
        if let Some(value) = kib(line, "Pss:") {
            total += value;
            if size >= guest.memory_mb << 10 && size > ram_size {
                (ram, ram_size) = (value, size);
            }
        }
    }
    if ram_size == 0 {
        bail!("no mapping is as large as the guest's RAM");
    }
    Ok((total - ram) as f64 * 1024.0 / 1e6)
}

/// GB/s and thousands of reads per second, as the guest measures them, from a disk of random bytes in
/// the page cache.
fn disk_reads(program: Program, how: &str) -> Result<(f64, f64)> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.img");
    let random = std::fs::File::open("/dev/urandom")?;
    std::io::copy(&mut random.take(256 << 20), &mut std::fs::File::create(&image)?)?;
    let guest = Guest::new(&format!("work=diskread {how}"), 256).disk("disk", &image);
    let vmm = run(program, &guest)?;
    let line = vmm.wait_line("^DISKREAD ")?.text;
    let field = |name: &str| -> Result<f64> {
        let value = line.split(' ').find_map(|word| word.strip_prefix(name));
        Ok(value.with_context(|| format!("no {name} in {line:?}"))?.parse()?)
    };
    Ok((field("kbps=")? / 1e6, field("iops=")? / 1e3))
}

struct Moved {
    info: Value,
    largest_gap_us: u64,
}

/// Boots `guest`, lets it settle, moves it over TCP, and hears what it says at the destination.
fn moved(program: Program, guest: &Guest, downtime_limit_ms: u64) -> Result<Moved> {
    let source = run(program, guest)?;
    let (destination, address) = match program {
        Program::Ferry => {
            let destination = ferry::receive()?;
            (destination.vmm, destination.address)
        }
        Program::Qemu => qemu::receive(guest)?,
    };
    source.wait_line("READY ")?;
    // The first heartbeats hold the end of the fill; the guest is at its pace after a few.
    let settled = source.wait_line("^HB n=5 ")?;
    let before = Heartbeat::parse(&settled.text).context("a heartbeat")?.number;
    let mut qmp = source.qmp()?;
    qmp.want_migration_events()?;
    // QEMU's own cap of 128 MiB/s is lifted; Ferry has none.
    let parameters =
        json!({"max-bandwidth": 10_000_000_000u64, "downtime-limit": downtime_limit_ms});
    qmp.execute("migrate-set-parameters", parameters)?;
    qmp.execute("migrate", json!({"uri": address}))?;
    let status =
        qmp.wait_migration(&["completed", "failed", "cancelled"], Duration::from_secs(60))?;
    let info = final_info(&mut qmp)?;
    if status != "completed" {
        bail!("the migration is {status}: {info}");
    }
    let first = destination.wait_line("^HB ")?;
    destination.serial().wait_from(first.index + 1, "^HB ", SOON)?;
    let parts: [&Lines; 2] = [source.serial(), destination.serial()];
    let life = Transcript::of(parts);
    // Where KVM is software, QEMU loses vector registers on the way, which the guest notices; that is
    // no reason to have nothing to compare with.
    if program == Program::Ferry {
        life.judge()?;
    }
    Ok(Moved { info, largest_gap_us: life.largest_gap_us(before + 1)? })
}

/// What `query-migrate` says once all is said: QEMU sends the event before it takes the time.
fn final_info(qmp: &mut Qmp) -> Result<Value> {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        let info = qmp.execute("query-migrate", json!({}))?;
        let is_final = info["total-time"].as_u64().is_some_and(|ms| ms > 0);
        if is_final || info["status"] != "completed" || Instant::now() > deadline {
            return Ok(info);
        }
    }
}

fn total_ms(info: &Value) -> Result<f64> {
    info["total-time"].as_f64().with_context(|| format!("no total-time in {info}"))
}

fn asleep(program: Program) -> Result<f64> {
    let guest = Guest::new("work=dirty fill=random fill_pct=75 sleep=1", 1024);
    let moved = moved(program, &guest, 300)?;
    Ok((1u64 << 30) as f64 / 1e6 / total_ms(&moved.info)?)
}

fn gap_spinning(program: Program) -> Result<f64> {
    let guest = Guest::new("work=spin fill=random fill_pct=75", 1024);
    Ok(moved(program, &guest, 20)?.largest_gap_us as f64 / 1e3)
}

fn gap_dirtying(program: Program) -> Result<f64> {
    let guest = Guest::new("work=dirty fill=random fill_pct=75 ws_mb=256 rate_mbps=500", 1024);
    Ok(moved(program, &guest, 20)?.largest_gap_us as f64 / 1e3)
}

fn mostly_zero(program: Program) -> Result<f64> {
    total_ms(&moved(program, &Guest::new("work=idle", 1024), 300)?.info)
}

fn median(figures: &mut [f64]) -> f64 {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    if figures.len() % 2 == 1 {
        figures[middle]
    } else {
        (figures[middle - 1] + figures[middle]) / 2.0
    }
}

struct Options {
    rows: Vec<&'static Row>,
    runs: usize,
    programs: Vec<Program>,
}

fn options() -> Result<Options> {
    let mut options =
        Options { rows: Vec::new(), runs: 5, programs: vec![Program::Qemu, Program::Ferry] };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--row" => {
                let name = value()?;
                let row = ROWS.iter().find(|row| row.name == name).with_context(|| {
                    let names: Vec<_> = ROWS.iter().map(|row| row.name).collect();
                    format!("no row {name}; there are {}", names.join(", "))
                })?;
                options.rows.push(row);
            }
            "--runs" => options.runs = value()?.parse().context("--runs")?,
            "--only" => {
                options.programs = match value()?.as_str() {
                    "ferry" => vec![Program::Ferry],
                    "qemu" => vec![Program::Qemu],
                    other => bail!("--only {other}: ferry or qemu"),
                }
            }
            _ => bail!("{argument}: expected --row NAME, --runs N or --only ferry|qemu"),
        }
    }
    if options.rows.is_empty() {
        options.rows = ROWS.iter().collect();
    }
    if options.runs == 0 {
        bail!("--runs 0 measures nothing");
    }
    Ok(options)
}

/// Medians of one row for QEMU and Ferry, and the spread for those who want to judge them.
fn measure(row: &Row, options: &Options) -> Result<(Option<f64>, Option<f64>)> {
    let mut figures = [Vec::new(), Vec::new()];
    for _ in 0..options.runs {
        for program in &options.programs {
            let figure = (row.measure)(*program)?;
            figures[usize::from(*program == Program::Ferry)].push(figure);
        }
    }
    let [qemu, ferry] = figures.map(|mut figures| {
        (!figures.is_empty()).then(|| {
            let median = median(&mut figures);
            let text: Vec<_> = figures.iter().map(|figure| format!("{figure:.2}")).collect();
            eprintln!("    {:10} {}", row.name, text.join(" "));
            median
        })
    });
    Ok((qemu, ferry))
}

fn verdict(target: &Target, qemu: Option<f64>, ferry: Option<f64>) -> (String, Option<bool>) {
    let ratio = qemu.zip(ferry).map(|(qemu, ferry)| ferry / qemu);
    match target {
        Target::AtMost(most) => (format!("≤ {most}"), ferry.map(|ferry| ferry <= *most)),
        Target::RatioAtMost(most) => (format!("ratio ≤ {most}"), ratio.map(|ratio| ratio <= *most)),
        Target::RatioAtLeast(least) => {
            (format!("ratio ≥ {least}"), ratio.map(|ratio| ratio >= *least))
        }
    }
}

fn bench() -> Result<()> {
    let mut options = options()?;
    let qemu = qemu::version();
    if qemu.is_none() {
        println!("qemu-system-x86_64 is not installed: no figures to compare with");
        options.programs.retain(|program| *program != Program::Qemu);
    }
    println!("Medians of {}; QEMU is {}\n", options.runs, qemu.as_deref().unwrap_or("absent"));
    let cell = |figure: Option<f64>| figure.map_or("-".into(), |figure| format!("{figure:.2}"));
    let mut table = vec![];
    for row in &options.rows {
        let (qemu, ferry) = measure(row, &options).with_context(|| format!("row {}", row.name))?;
        let (target, met) = verdict(&row.target, qemu, ferry);
        let met = met.map_or("-", |met| if met { "met" } else { "MISSED" });
        let ratio = qemu.zip(ferry).map(|(qemu, ferry)| ferry / qemu);
        table.push(format!(
            "{:46} {:>5} {:>8} {:>8} {:>7}  {:13} {met}",
            row.title,
            row.unit,
            cell(qemu),
            cell(ferry),
            cell(ratio),
            target
        ));
    }
    println!("{:46} {:>5} {:>8} {:>8} {:>7}  target", "", "", "QEMU", "Ferry", "ratio");
    table.iter().for_each(|line| println!("{line}"));
    Ok(())
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
