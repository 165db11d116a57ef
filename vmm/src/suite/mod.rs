//! `ferry test`: runs many test kernels, each in a process of its own, and reports.
//!
//! [`plan`] says what is run, from the command line or from kvm-unit-tests' configuration ([`unittests`],
//! [`words`]). Workers start one [`process`] after the other, whose output is kept ([`capture`]);
//! [`verdict`] says what its end means, and [`report`] tells people and programs.

mod capture;
mod plan;
mod process;
mod report;
mod unittests;
pub mod verdict;
mod words;

use crate::cli::TestArgs;
use crate::exit_code::{self, Exit};
use crate::log_queue::{say, say_line};
use indicatif::{ProgressBar, ProgressStyle};
use plan::{Case, Plan};
use report::tap::Tap;
use report::text::Text;
use report::{Report, Totals, junit};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use verdict::{Outcome, judge};

/// How a line of a test's own summary begins.
const SUMMARY: &str = "SUMMARY: ";

/// What workers tell the main thread.
enum News {
    Started(usize),
    /// `None`: it was stopped before its end.
    Ended(usize, Option<Outcome>),
}

/// Runs tests; returns the exit code.
pub fn run(args: TestArgs, verbose: u8) -> u8 {
    let cases = match plan::cases(&args) {
        Ok(cases) => cases,
        Err(problems) => {
            problems.iter().for_each(say);
            say_line(&Exit::new(exit_code::USAGE, "the options above cannot be used").to_string());
            return exit_code::USAGE;
        }
    };
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let twice = signal_hook::flag::register_conditional_shutdown(
            signal,
            exit_code::SIGNAL.into(),
            stop.clone(),
        );
        if let Err(error) = twice.and_then(|_| signal_hook::flag::register(signal, stop.clone())) {
            say(format_args!("a signal will not end the tests in order: {error}"));
        }
    }
    match run_cases(&args, cases, verbose, &stop) {
        Ok(_) if stop.load(Ordering::Relaxed) => exit_code::SIGNAL,
        Ok(totals) if totals.unexpected == 0 && totals.missing() == 0 => exit_code::OK,
        Ok(_) => exit_code::COMMAND_FAILED,
        Err(error) => {
            say(format_args!("the report cannot be written: {error}"));
            exit_code::COMMAND_FAILED
        }
    }
}

fn run_cases(
    args: &TestArgs,
    cases: Vec<Case>,
    verbose: u8,
    stop: &AtomicBool,
) -> io::Result<Totals> {
    let logs = args.log_dir.as_deref().map(|folder| log_files(folder, &cases)).transpose()?;
    let suite = args.config.as_deref().and_then(Path::file_stem).map(|stem| stem.to_string_lossy());
    let suite = suite.map_or_else(|| "ferry".to_owned(), std::borrow::Cow::into_owned);
    let names: Vec<_> = cases.iter().map(|case| case.name.clone()).collect();
    let stdout = io::stdout();
    let mut report: Box<dyn Report> = match args.tap {
        true => Box::new(Tap::new(stdout)),
        false => {
            let colour = stdout.is_terminal();
            Box::new(Text::new(stdout, colour))
        }
    };
    let mut totals = Totals { count: cases.len(), ..Totals::default() };
    let mut outcomes: Vec<Option<Outcome>> = vec![None; cases.len()];
    let mut progress = Progress::new(&names);
    report.begin(cases.len())?;
    let started = Instant::now();
    let host = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = args.jobs.map_or(host, usize::from).min(cases.len());
    let queue = Queue {
        cases: cases.into_iter().map(|case| Mutex::new(Some(case))).collect(),
        next: AtomicUsize::new(0),
        logs: logs.unwrap_or_default(),
        verbose,
        stop,
    };
    let written = std::thread::scope(|scope| {
        let (news, told) = channel();
        for _ in 0..jobs {
            let (queue, news) = (&queue, news.clone());
            scope.spawn(move || queue.work(&news));
        }
        drop(news);
        for news in told {
            let (index, outcome) = match news {
                News::Started(index) => {
                    progress.started(index);
                    continue;
                }
                News::Ended(index, outcome) => (index, outcome),
            };
            let result = progress.ended(index, || match &outcome {
                Some(outcome) => report.ended(&names[index], outcome),
                None => Ok(()),
            });
            if let Err(error) = result {
                // Nobody reads on: the tests that are running are not worth their end.
                stop.store(true, Ordering::Relaxed);
                return Err(error);
            }
            if let Some(outcome) = &outcome {
                totals.add(outcome);
            }
            outcomes[index] = outcome;
        }
        Ok(())
    });
    progress.finish();
    written?;
    totals.time = started.elapsed();
    report.finish(&totals)?;
    if let Some(path) = &args.junit {
        let tests = names.iter().map(String::as_str).zip(outcomes.iter().map(Option::as_ref));
        let xml = junit::file(&suite, &tests.collect::<Vec<_>>(), &totals);
        let written = std::fs::write(path, xml);
        written
            .map_err(|error| io::Error::other(format!("--junit {}: {error}", path.display())))?;
    }
    Ok(totals)
}

/// The tests, and who takes the next one.
struct Queue<'a> {
    /// Taken out when they are started.
    cases: Vec<Mutex<Option<Case>>>,
    next: AtomicUsize,
    /// Of each test, or none.
    logs: Vec<PathBuf>,
    verbose: u8,
    stop: &'a AtomicBool,
}

impl Queue<'_> {
    /// Runs tests until there are no more. Its thread is the parent of their processes, and outlives them.
    fn work(&self, news: &Sender<News>) {
        while !self.stop.load(Ordering::Relaxed) {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(case) = self.cases.get(index) else { return };
            let case = case.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some(case) = case else { return };
            // Fails if the report could not be written, and nobody listens.
            let _ = news.send(News::Started(index));
            let outcome = self.outcome(index, case);
            let _ = news.send(News::Ended(index, outcome));
        }
    }

    /// Runs a test; nothing comes of it if all are to end.
    fn outcome(&self, index: usize, case: Case) -> Option<Outcome> {
        let Case { name: _, plan, expected, pass } = case;
        let prepared = match plan {
            Plan::Run(prepared) => prepared,
            Plan::Skip(why) => return Some(Outcome::skipped(why, expected)),
            Plan::Error(why) => return Some(Outcome::error(why, expected)),
        };
        let log = match self.logs.get(index).map(File::create).transpose() {
            Ok(log) => log,
            Err(error) => return Some(Outcome::error(format!("--log-dir: {error}"), expected)),
        };
        let ended = process::run(prepared.config, self.verbose, log, self.stop);
        // Its temporary images were for this run.
        drop(prepared.overlays);
        let ended = match ended {
            Ok(ended) => ended,
            Err(error) => {
                return Some(Outcome::error(format!("its process: {error}"), expected));
            }
        };
        if process::was_interrupted(&ended) && self.stop.load(Ordering::Relaxed) {
            return None;
        }
        if let Some(error) = ended.not_kept {
            log::warn!("the output of a test is not whole: {error}");
        }
        let verdict = judge(ended.end, &pass);
        let as_expected = expected.is(verdict, Some(ended.end));
        let why = match as_expected || expected == verdict::Expected::Pass {
            true => ended.why,
            false => format!("{}, where {} was expected", ended.why, expected.in_words()),
        };
        Some(Outcome {
            verdict,
            as_expected,
            why,
            summary: summary(&ended.output),
            time: ended.time,
            moves: ended.moves,
            tail: ended.output,
        })
    }
}

/// The last summary in a test's output.
fn summary(output: &str) -> Option<String> {
    output.lines().rev().find_map(|line| line.strip_prefix(SUMMARY)).map(str::to_owned)
}

/// Files for the output of tests, whose names may have anything in them.
fn log_files(folder: &Path, cases: &[Case]) -> io::Result<Vec<PathBuf>> {
    std::fs::create_dir_all(folder)
        .map_err(|error| io::Error::other(format!("--log-dir {}: {error}", folder.display())))?;
    let mut taken = BTreeSet::new();
    let file = |case: &Case| {
        let fine = |char: char| char.is_ascii_alphanumeric() || matches!(char, '_' | '-' | '.');
        let name: String =
            case.name.chars().take(100).map(|char| if fine(char) { char } else { '_' }).collect();
        let name = name.trim_start_matches('.').to_owned();
        let mut file = format!("{name}.log");
        let mut number = 2u32;
        while !taken.insert(file.clone()) {
            file = format!("{name}-{number}.log");
            number += 1;
        }
        folder.join(file)
    };
    Ok(cases.iter().map(file).collect())
}

/// Which tests are running, shown on a terminal.
struct Progress<'a> {
    names: &'a [String],
    running: BTreeSet<usize>,
    bar: Option<ProgressBar>,
}

impl<'a> Progress<'a> {
    fn new(names: &'a [String]) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {wide_msg}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(names.len() as u64).with_style(style)
        });
        Self { names, running: BTreeSet::new(), bar }
    }

    fn started(&mut self, index: usize) {
        self.running.insert(index);
        self.show();
    }

    /// Writes to the terminal with `write`, without the bar.
    fn ended(&mut self, index: usize, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.running.remove(&index);
        let Some(bar) = &self.bar else { return write() };
        let result = bar.suspend(write);
        bar.inc(1);
        self.show();
        result
    }

    fn show(&self) {
        if let Some(bar) = &self.bar {
            let names: Vec<_> =
                self.running.iter().map(|index| report::printable(&self.names[*index])).collect();
            bar.set_message(names.join(", "));
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(name: &str) -> Case {
        Case {
            name: name.to_owned(),
            plan: Plan::Skip("a test's".into()),
            expected: verdict::Expected::Pass,
            pass: vec![verdict::PASSED],
        }
    }

    #[test]
    fn summaries_are_found_in_the_output() {
        let output = "PASS: a\nSUMMARY: 1 tests\nSUMMARY: 14 tests, 1 unexpected failures\nbye\n";
        assert_eq!(summary(output).as_deref(), Some("14 tests, 1 unexpected failures"));
        assert_eq!(summary("no SUMMARY: here"), None);
    }

    #[test]
    fn files_of_tests_stay_in_their_folder() {
        let folder = tempfile::tempdir().unwrap();
        let names = ["../../etc/x", "..", "a b", "a_b", &"l".repeat(1000)];
        let cases: Vec<_> = names.iter().map(|name| case(name)).collect();
        let files = log_files(folder.path(), &cases).unwrap();
        for file in &files {
            assert_eq!(file.parent(), Some(folder.path()));
            File::create(file).unwrap();
        }
        assert_eq!(files.iter().collect::<BTreeSet<_>>().len(), names.len());
    }
}
