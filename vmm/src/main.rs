//! The `ferry` program: argv -> configuration -> work -> exit code.

use clap::Parser;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Duration;
use vmm::cli::{Cli, Command};
use vmm::error::chain;
use vmm::exit_code::{self, Exit};
use vmm::log_queue::{self, say, say_line};
use vmm::setup::SetupError;
use vmm::shuttle::{self, ChildConfig, Work};
use vmm::supervisor;

/// How long the process waits at its end for the log to be written.
const LOG_PATIENCE: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    vmm::footprint::use_one_heap();
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
    let level = match verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    let log_queue = log_queue::stderr();
    let target = env_logger::Target::Pipe(Box::new(log_queue.writer()));
    env_logger::Builder::new().filter_level(level).parse_default_env().target(target).init();
    let code = match cli.command {
        Command::Run(args) => start(args.into_config(), |config| match config.migrate_every {
            Some(every) => shuttle::run(config, every, verbose),
            None => supervisor::run(config),
        }),
        Command::Child => start(child.ok_or_else(Vec::new), |config| match config.into_work() {
            Work::Run(config) => supervisor::run(config),
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
    log_queue.flush(LOG_PATIENCE);
    ExitCode::from(code)
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
    // A panic would end with 101, which is a guest's code.
    let run = |config| catch_unwind(AssertUnwindSafe(|| run(config)));
    let exit = match config.map(run) {
        Err(problems) => {
            problems.iter().for_each(say);
            Exit::new(exit_code::USAGE, "the options above cannot be used")
        }
        Ok(Ok(Ok(exit))) => exit,
        Ok(Ok(Err(error))) => Exit::new(exit_code::CANNOT_RUN, chain(&error)),
        Ok(Err(_)) => Exit::new(exit_code::CANNOT_RUN, "ferry panicked, which is a bug"),
    };
    say_line(&exit.to_string());
    exit.code
}

/// The progress bar's estimate is the only caller of libm. With our own `pow` the linker leaves libm out,
/// which saves 170 KiB of memory per idle VMM.
// SAFETY: the C library's name and signature, and its meaning.
#[unsafe(no_mangle)]
extern "C" fn pow(base: f64, exponent: f64) -> f64 {
    libm::pow(base, exponent)
}
