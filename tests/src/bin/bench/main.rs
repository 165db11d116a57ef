//! `make bench`: Ferry and QEMU side by side, on the same guest, in the same run; medians.
//!
//! Both are driven through their control sockets by the same code. Runs alternate between them, so that a
//! change of the host's load meets both; memory is warm before each move ([`memory`]). [`rows`] lists the figures; [`alone`], [`moves`],
//! [`engine`], [`disks`] and [`bitmaps`] take them; [`figures`] says what they mean, [`table`] prints them.

mod alone;
mod bitmaps;
mod disks;
mod engine;
mod figures;
mod latency;
mod memory;
mod mirrors;
mod moves;
mod rows;
mod table;

use anyhow::{Context, Result, bail};
use ferry_tests::{ferry, qemu};
use figures::{Figure, Figures, Measured};
use rows::{Columns, Program, ROWS, Row};
use std::ffi::OsStr;
use std::process::{Command, ExitCode};
use table::Head;

struct Options {
    rows: Vec<&'static Row>,
    /// Of every row; `None` for what each row wants.
    runs: Option<usize>,
    programs: Vec<Program>,
    /// Prints the table as Markdown.
    markdown: bool,
}

impl Options {
    fn runs_of(&self, row: &Row) -> usize {
        self.runs.unwrap_or(row.runs)
    }

    fn runs_in_words(&self) -> String {
        let usual = self.runs.unwrap_or(rows::RUNS);
        let others = self.rows.iter().map(|row| (row.name, self.runs_of(row)));
        let others = others.filter(|(_, runs)| *runs != usual);
        let others: Vec<_> = others.map(|(name, runs)| format!("{name} of {runs}")).collect();
        match others.as_slice() {
            [] => format!("medians of {usual}"),
            others => format!("medians of {usual}, {}", others.join(", ")),
        }
    }
}

fn options() -> Result<Options> {
    let programs = vec![Program::Qemu, Program::Newer, Program::Ferry];
    let mut options = Options { rows: Vec::new(), runs: None, programs, markdown: false };
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
            "--runs" => options.runs = Some(value()?.parse().context("--runs")?),
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
    if options.runs == Some(0) {
        bail!("--runs 0 measures nothing");
    }
    Ok(options)
}

/// Measures one row under every program. One that fails costs the others nothing.
fn measure(row: &Row, options: &Options) -> Measured {
    let mut measured = Measured::default();
    let mut programs = options.programs.clone();
    programs.retain(|program| match program {
        Program::Ferry => true,
        Program::Qemu => row.columns != Columns::Ferry,
        Program::Newer => row.columns == Columns::All,
    });
    for _ in 0..options.runs_of(row) {
        for program in &programs {
            let own = measured.of(*program);
            if own.failure.is_none() {
                match row.measure.take(*program) {
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
        let text: Vec<_> = own.all.iter().map(Figure::to_string).collect();
        eprintln!("    {:10} {}", row.name, text.join(" "));
    }
    measured
}

fn bench() -> Result<()> {
    let mut options = options()?;
    let (qemu, newer) = (qemu::qemu().version(), qemu::newer().and_then(qemu::Qemu::version));
    if qemu.is_none() {
        eprintln!("qemu-system-x86_64 is not installed: no figures to compare with");
        options.programs.retain(|program| *program != Program::Qemu);
    }
    if newer.is_none() {
        options.programs.retain(|program| *program != Program::Newer);
    }
    let ferry = said(ferry::binary(), "--version")?;
    let ferry = ferry.trim_start_matches("ferry ").to_owned();
    let runs = options.runs_in_words();
    let head = Head { host: host()?, qemu, newer, ferry, runs };
    if !options.markdown {
        println!("{}\n", head.text());
    }
    let (mut table, mut failed, mut missed) = (vec![], 0, 0);
    for row in &options.rows {
        let measured = measure(row, &options);
        failed += measured.all().into_iter().filter(|own| own.failure.is_some()).count();
        let ratio = measured.ratio(&row.target);
        let (target, met) = measured.verdict(&row.target);
        missed += u32::from(met == Some(false));
        let met = met.map_or("-", |met| if met { "met" } else { "MISSED" });
        let [qemu, newer, ferry] = measured.all().map(Figures::cell);
        table.push([
            row.title.to_owned(),
            row.unit.to_owned(),
            qemu,
            newer,
            ferry,
            ratio.map_or("-".into(), |ratio| ratio.to_string()),
            target,
            met.to_owned(),
        ]);
    }
    let remark = memory::report();
    if options.markdown {
        print!("{}", table::markdown(&head, &table, remark.as_deref()));
    } else {
        print!("{}", table::plain(&table, remark.as_deref()));
    }
    if failed > 0 {
        bail!("{failed} times a program gave no figure");
    }
    if missed > 0 {
        bail!("{missed} rows missed their target");
    }
    Ok(())
}

fn said(program: impl AsRef<OsStr>, argument: &str) -> Result<String> {
    let program = program.as_ref();
    let output = Command::new(program).arg(argument).output();
    let output = output.with_context(|| program.to_string_lossy().into_owned())?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Date, processors and kernel.
fn host() -> Result<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown", |(_, model)| model);
    let count = std::thread::available_parallelism()?;
    Ok(format!("{}, {count} x {model}, Linux {}", said("date", "+%F")?, said("uname", "-r")?))
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

#[cfg(test)]
mod tests {
    use super::*;
    use rows::{Measure, Target};

    fn row(name: &'static str, measure: fn(Program) -> Result<f64>, columns: Columns) -> Row {
        let (title, unit, target) = ("", "", Target::AtMost(1.0));
        Row { name, title, unit, measure: Measure::Exact(measure), target, columns, runs: 2 }
    }

    fn options(runs: Option<usize>, rows: Vec<&'static Row>) -> Options {
        let programs = vec![Program::Qemu, Program::Newer, Program::Ferry];
        Options { rows, runs, programs, markdown: false }
    }

    #[test]
    fn a_program_that_fails_is_not_asked_again_and_costs_the_others_nothing() {
        let fails = row(
            "fails",
            |program| match program {
                Program::Qemu => bail!("as a test wants it"),
                Program::Newer => Ok(2.0),
                Program::Ferry => Ok(1.0),
            },
            Columns::All,
        );
        let measured = measure(&fails, &options(Some(3), Vec::new()));
        assert_eq!(measured.all().map(|own| own.all.len()), [0, 3, 3]);
        assert_eq!(measured.all().map(|own| own.failure.is_some()), [true, false, false]);
        assert_eq!(measured.verdict(&fails.target).1, Some(true));
    }

    #[test]
    fn a_row_has_its_own_columns_and_number_of_runs() {
        for (columns, expected) in
            [(Columns::Ferry, [0, 0, 2]), (Columns::Two, [2, 0, 2]), (Columns::All, [2, 2, 2])]
        {
            let measured = measure(&row("x", |_| Ok(1.0), columns), &options(None, Vec::new()));
            assert_eq!(measured.all().map(|own| own.all.len()), expected);
        }
        let all = || ROWS.iter().collect();
        let runs = |name| ROWS.iter().find(|row| row.name == name).map(|row| row.runs);
        assert_eq!((runs("gap"), runs("gap-dirty")), (Some(15), Some(rows::RUNS)));
        assert!(options(None, all()).runs_in_words().contains("medians of 5, gap of 15"));
        assert_eq!(options(Some(3), all()).runs_in_words(), "medians of 3");
    }

    #[test]
    fn rows_have_names_of_their_own() {
        for (index, row) in ROWS.iter().enumerate() {
            assert!(ROWS[..index].iter().all(|other| other.name != row.name), "{}", row.name);
        }
    }
}
