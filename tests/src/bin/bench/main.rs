//! `make bench`: Ferry and QEMU side by side, on the same guest, in the same run; medians.
//!
//! Both are driven through their control sockets by the same code. Runs alternate between them, so that a
//! change of the host's load meets both; memory is warm before each move ([`memory`]). [`rows`] lists the figures; [`alone`], [`moves`],
//! [`engine`], [`disks`] and [`bitmaps`] take them.

mod alone;
mod bitmaps;
mod disks;
mod engine;
mod memory;
mod moves;
mod rows;

use anyhow::{Context, Result, bail};
use ferry_tests::qemu;
use rows::{Program, ROWS, Row, Target};
use std::process::{Command, ExitCode};

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
    /// Prints the table as Markdown.
    markdown: bool,
}

/// The figures of one program in one row.
#[derive(Default)]
struct Figures {
    all: Vec<f64>,
    /// Its first failure; it was not asked again.
    failure: Option<anyhow::Error>,
}

impl Figures {
    fn median(&self) -> Option<f64> {
        let mut all = self.all.clone();
        (!all.is_empty() && self.failure.is_none()).then(|| median(&mut all))
    }

    /// Median and spread, or how it failed.
    fn cell(&self) -> String {
        let Some(median) = self.median() else {
            return if self.failure.is_some() { "FAILED".into() } else { "-".into() };
        };
        let least = self.all.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.all.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        match self.all.len() {
            1 => format!("{median:.2}"),
            _ => format!("{median:.2} ({least:.2}-{most:.2})"),
        }
    }
}

fn options() -> Result<Options> {
    let programs = vec![Program::Qemu, Program::Newer, Program::Ferry];
    let mut options = Options { rows: Vec::new(), runs: 5, programs, markdown: false };
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
                    "qemu" => vec![Program::Qemu, Program::Newer],
                    other => bail!("--only {other}: ferry or qemu"),
                }
            }
            "--markdown" => options.markdown = true,
            _ => {
                bail!("{argument}: expected --row NAME, --runs N, --only ferry|qemu or --markdown")
            }
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

/// The figures of a row, by program.
#[derive(Default)]
struct Measured {
    qemu: Figures,
    newer: Figures,
    ferry: Figures,
}

impl Measured {
    fn of(&mut self, program: Program) -> &mut Figures {
        match program {
            Program::Qemu => &mut self.qemu,
            Program::Newer => &mut self.newer,
            Program::Ferry => &mut self.ferry,
        }
    }

    fn all(&self) -> [&Figures; 3] {
        [&self.qemu, &self.newer, &self.ferry]
    }

    /// Ferry's figure by that of the better QEMU.
    fn ratio(&self, target: &Target) -> Option<f64> {
        let better = match target {
            Target::AtMost(_) | Target::RatioAtMost(_) | Target::MoreByAtMost(_) => f64::min,
            Target::AtLeast(_) | Target::RatioAtLeast(_) => f64::max,
        };
        let qemus = [&self.qemu, &self.newer].into_iter().filter_map(Figures::median);
        Some(self.ferry.median()? / qemus.reduce(better)?)
    }
}

/// Measures one row under every program. One that fails costs the others nothing.
fn measure(row: &Row, options: &Options) -> Measured {
    let mut measured = Measured::default();
    let alone = matches!(row.target, Target::AtLeast(_));
    let mut programs = options.programs.clone();
    programs.retain(|program| match program {
        Program::Ferry => true,
        Program::Qemu => !alone,
        Program::Newer => row.newer,
    });
    for _ in 0..options.runs {
        for program in &programs {
            let own = measured.of(*program);
            if own.failure.is_none() {
                match (row.measure)(*program) {
                    Ok(figure) => own.all.push(figure),
                    Err(error) => {
                        eprintln!("bench: row {}, {program:?}: {error:#}", row.name);
                        own.failure = Some(error);
                    }
                }
            }
        }
        // Who comes first may meet other memory: in turns.
        programs.reverse();
    }
    for own in measured.all().into_iter().filter(|own| !own.all.is_empty()) {
        let text: Vec<_> = own.all.iter().map(|figure| format!("{figure:.2}")).collect();
        eprintln!("    {:10} {}", row.name, text.join(" "));
    }
    measured
}

/// The target in words, and whether it is met; `None` if that cannot be told.
fn verdict(target: &Target, ratio: Option<f64>, ferry: Option<f64>) -> (String, Option<bool>) {
    match target {
        Target::AtMost(most) => (format!("≤ {most}"), ferry.map(|ferry| ferry <= *most)),
        Target::AtLeast(least) => (format!("≥ {least}"), ferry.map(|ferry| ferry >= *least)),
        Target::RatioAtMost(most) => {
            (format!("ratio ≤ {most:.2}"), ratio.map(|ratio| ratio <= *most))
        }
        Target::MoreByAtMost(most) => {
            // The ratio is of the same two figures.
            let more = ferry.zip(ratio).map(|(ferry, ratio)| ferry - ferry / ratio);
            (format!("+ ≤ {most}"), more.map(|more| more <= *most))
        }
        Target::RatioAtLeast(least) => {
            (format!("ratio ≥ {least}"), ratio.map(|ratio| ratio >= *least))
        }
    }
}

fn bench() -> Result<()> {
    let mut options = options()?;
    let (qemu, newer) = (qemu::qemu().version(), qemu::newer().and_then(qemu::Qemu::version));
    if qemu.is_none() {
        println!("qemu-system-x86_64 is not installed: no figures to compare with");
        options.programs.retain(|program| *program != Program::Qemu);
    }
    if newer.is_none() {
        options.programs.retain(|program| *program != Program::Newer);
    }
    let or_absent = |version: Option<String>| version.unwrap_or_else(|| "absent".into());
    println!(
        "{}; medians of {}. QEMU: {}; newer QEMU: {}\n",
        host()?,
        options.runs,
        or_absent(qemu),
        or_absent(newer)
    );
    let (mut table, mut failed, mut missed) = (vec![], 0, 0);
    for row in &options.rows {
        let measured = measure(row, &options);
        failed += measured.all().into_iter().filter(|own| own.failure.is_some()).count();
        let ratio = measured.ratio(&row.target);
        let (target, met) = verdict(&row.target, ratio, measured.ferry.median());
        missed += u32::from(met == Some(false));
        let met = met.map_or("-", |met| if met { "met" } else { "MISSED" });
        let [qemu, newer, ferry] = measured.all().map(Figures::cell);
        table.push([
            row.title.to_owned(),
            row.unit.to_owned(),
            qemu,
            newer,
            ferry,
            ratio.map_or("-".into(), |ratio| format!("{ratio:.2}")),
            target,
            met.to_owned(),
        ]);
    }
    print(&table, options.markdown);
    if let Some(memory) = memory::report() {
        println!("\n{memory}");
    }
    if failed > 0 {
        bail!("{failed} times a program gave no figure");
    }
    if missed > 0 {
        bail!("{missed} rows missed their target");
    }
    Ok(())
}

/// Date, processors and kernel.
fn host() -> Result<String> {
    let said = |program: &str, argument: &str| -> Result<String> {
        let output = Command::new(program).arg(argument).output().context(program.to_owned())?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let info = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown", |(_, model)| model);
    let count = std::thread::available_parallelism()?;
    Ok(format!("{}, {count} x {model}, Linux {}", said("date", "+%F")?, said("uname", "-r")?))
}

fn print(table: &[[String; 8]], markdown: bool) {
    let head = ["", "", "QEMU", "newer QEMU", "Ferry", "ratio", "target", ""].map(str::to_owned);
    if markdown {
        for (index, row) in std::iter::once(&head).chain(table).enumerate() {
            println!("| {} |", row.join(" | "));
            if index == 0 {
                println!("|{}", "---|".repeat(head.len()));
            }
        }
        return;
    }
    for [title, unit, qemu, newer, ferry, ratio, target, met] in std::iter::once(&head).chain(table)
    {
        println!(
            "{title:46} {unit:>5} {qemu:>20} {newer:>20} {ferry:>20} {ratio:>7}  {target:13} {met}"
        );
    }
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
