//! The `ferry` program: argv -> configuration -> work -> exit code.

use clap::Parser;
use std::ffi::OsString;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Duration;
use vmm::cli::{Cli, Command};
use vmm::config::RunConfig;
use vmm::error::chain;
use vmm::exit_code::{self, Exit};
use vmm::log_queue::{self, say, say_line};
use vmm::qemu::{Prepared, Request};
use vmm::setup::SetupError;
use vmm::shuttle::{self, ChildConfig, Work};
use vmm::supervisor;

/// How long the process waits at its end for the log to be written.
const LOG_PATIENCE: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    vmm::footprint::use_one_heap();
    let argv: Vec<_> = std::env::args_os().collect();
    if let Some(arguments) = vmm::qemu::arguments(&argv) {
        return ExitCode::from(qemu(&arguments));
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(text) => return no_command(&text),
    };
    // A child of the shuttle logs as much as that.
    let (verbose, child) = match cli.command {
        Command::Child => match ChildConfig::read(io::stdin().lock()) {
            Ok(config) => (config.verbose, Some(config)),
            Err(error) => {
                eprintln!("ferry: no configuration on standard input: {error}");
                return ExitCode::from(exit_code::USAGE);
            }
        },
        _ => (cli.verbose, None),
    };
    log_builder(verbose).init();
    let code = match cli.command {
        Command::Run(args) => start(args.into_config(), |config| run(config, verbose)),
        Command::Qemu { arguments } => qemu(&arguments),
        Command::Test(args) => vmm::suite::run(*args, verbose),
        Command::Child => start(child.ok_or_else(Vec::new), |config| match config.into_work() {
            Work::Run(config) => run(config, verbose),
            Work::Receive(config) => supervisor::receive(config),
        }),
        Command::Receive(args) => start(args.into_config(), supervisor::receive),
        Command::Migrate(args) => vmm::client::migrate::run(&args),
        Command::Backup(args) => vmm::client::backup::run(&args),
        Command::Ctl(args) => vmm::client::ctl::run(&args),
        Command::Doctor(args) if args.cpu_model => vmm::doctor::cpu::print_model(),
        Command::Doctor(args) if !args.baseline.is_empty() => {
            vmm::doctor::cpu::print_baseline(&args.baseline)
        }
        Command::Doctor(_) => vmm::doctor::run(),
    };
    log_queue::stderr().flush(LOG_PATIENCE);
    ExitCode::from(code)
}

/// The log, to standard error.
fn log_builder(verbose: u8) -> env_logger::Builder {
    let level = match verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    let target = env_logger::Target::Pipe(Box::new(log_queue::stderr().writer()));
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level).parse_default_env().target(target);
    builder
}

/// Boots a guest, here or in child processes.
fn run(config: RunConfig, verbose: u8) -> Result<Exit, SetupError> {
    match config.migrate_every {
        Some(every) => shuttle::run(config, every, verbose),
        None => supervisor::run(config),
    }
}

/// Runs a guest from QEMU's command line.
fn qemu(arguments: &[OsString]) -> u8 {
    let usage = |problems: Vec<String>| Exit::new(exit_code::USAGE, problems.join("; "));
    let prepared = match vmm::qemu::translate(arguments) {
        Ok(Request::Print(text)) => {
            // Who has read enough may have closed the pipe.
            let _ = io::stdout().write_all(text.as_bytes());
            return exit_code::OK;
        }
        Ok(Request::Run(translated)) => {
            let verbose = translated.verbose;
            let mut log = log_builder(verbose);
            // Runners take other words on standard error for a failure.
            log.format(|line, record| {
                let level = match record.level() {
                    log::Level::Warn => "warning".to_owned(),
                    level => level.as_str().to_lowercase(),
                };
                writeln!(line, "ferry: {level}: {}", record.args())
            });
            log.init();
            translated.remarks.iter().for_each(|remark| log::info!("{remark}"));
            translated.prepare().map(|prepared| (prepared, verbose))
        }
        Err(problems) => Err(usage(problems)),
    };
    let exit = match prepared {
        Ok((Prepared { config, overlays }, verbose)) => {
            let exit = end_of(Ok(config), |config| run(config, verbose));
            drop(overlays);
            exit
        }
        Err(exit) => exit,
    };
    if exit.is_guests_own() {
        log::info!("{}", exit.why);
    } else {
        say_line(&exit.to_string());
    }
    log_queue::stderr().flush(LOG_PATIENCE);
    exit.code
}

/// Help, the version or a usage error.
fn no_command(text: &clap::Error) -> ExitCode {
    // Nothing else can be done if it cannot be written.
    let _ = text.print();
    if !text.use_stderr() {
        return ExitCode::SUCCESS;
    }
    eprintln!("{}", Exit::new(exit_code::USAGE, "usage"));
    ExitCode::from(exit_code::USAGE)
}

/// Runs a guest; the last line on standard error says how that ended.
fn start<C>(config: Result<C, Vec<String>>, run: impl FnOnce(C) -> Result<Exit, SetupError>) -> u8 {
    let exit = end_of(config, run);
    say_line(&exit.to_string());
    exit.code
}

/// Runs a guest to its end.
fn end_of<C>(
    config: Result<C, Vec<String>>,
    run: impl FnOnce(C) -> Result<Exit, SetupError>,
) -> Exit {
    // A panic would end with 101, which is a guest's code.
    let run = |config| catch_unwind(AssertUnwindSafe(|| run(config)));
    match config.map(run) {
        Err(problems) => {
            problems.iter().for_each(say);
            Exit::new(exit_code::USAGE, "the options above cannot be used")
        }
        Ok(Ok(Ok(exit))) => exit,
        Ok(Ok(Err(error))) => Exit::new(exit_code::CANNOT_RUN, chain(&error)),
        Ok(Err(_)) => Exit::new(exit_code::CANNOT_RUN, "ferry panicked, which is a bug"),
    }
}

/// The progress bar's estimate is the only caller of libm. With our own `pow` the linker leaves libm out,
/// which saves 170 KiB of memory per idle VMM.
// SAFETY: the C library's name and signature, and its meaning.
#[unsafe(no_mangle)]
extern "C" fn pow(base: f64, exponent: f64) -> f64 {
    libm::pow(base, exponent)
}
