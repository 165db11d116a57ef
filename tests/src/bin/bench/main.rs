//! `make bench`: Ferry and QEMU side by side, on the same guest, in the same run; medians.
//!
//! Both are driven through their control sockets by the same code. Runs alternate between the two, so
//! that a change of the host's load meets both. [`rows`] lists the figures; [`alone`], [`moves`],
//! [`engine`] and [`disks`] take them.

mod alone;
mod disks;
mod engine;
mod moves;
mod rows;

use anyhow::{Context, Result, bail};
use ferry_tests::qemu;
use rows::{Program, ROWS, Row, Target};
use std::process::ExitCode;

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
        let alone = matches!(row.target, Target::AtLeast(_));
        let programs = options.programs.iter();
        for program in programs.filter(|program| !alone || **program == Program::Ferry) {
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
        Target::AtLeast(least) => (format!("≥ {least}"), ferry.map(|ferry| ferry >= *least)),
        Target::RatioAtMost(most) => {
            (format!("ratio ≤ {most:.2}"), ratio.map(|ratio| ratio <= *most))
        }
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
    let (mut table, mut failed) = (vec![], 0);
    for row in &options.rows {
        let (qemu, ferry) = match measure(row, &options) {
            Ok(figures) => figures,
            Err(error) => {
                eprintln!("bench: row {}: {error:#}", row.name);
                table.push(format!("{:46} {:>5} FAILED, see above", row.title, row.unit));
                failed += 1;
                continue;
            }
        };
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
    if failed > 0 {
        bail!("{failed} rows have no figure");
    }
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
