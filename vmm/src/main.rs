//! The `ferry` program: argv -> configuration -> work -> exit code.

use clap::Parser;
use std::process::ExitCode;
use std::time::Duration;
use vmm::cli::{Cli, Command};
use vmm::log_queue::LogQueue;
use vmm::shuttle;
use vmm::supervisor::{self, SetupError, exit_code};

/// How long the process waits at its end for the log to be written.
const LOG_PATIENCE: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    vmm::footprint::use_one_heap();
    let cli = Cli::parse();
    let level = match cli.verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    let log_queue = LogQueue::new();
    let target = env_logger::Target::Pipe(Box::new(log_queue.writer()));
    env_logger::Builder::new().filter_level(level).parse_default_env().target(target).init();
    let code = match cli.command {
        Command::Run(args) => start(args.into_config(), |config| match config.migrate_every {
            Some(every) => shuttle::run(config, every),
            None => supervisor::run(config),
        }),
        Command::Receive(args) => start(args.into_config(), supervisor::receive),
        Command::Migrate(args) => vmm::client::migrate::run(&args),
        Command::Ctl(args) => vmm::client::ctl::run(&args),
        Command::Doctor => vmm::doctor::run(),
    };
    log_queue.flush(LOG_PATIENCE);
    ExitCode::from(code)
}

fn start<C>(config: Result<C, Vec<String>>, run: impl FnOnce(C) -> Result<u8, SetupError>) -> u8 {
    match config.map(run) {
        Err(problems) => {
            for problem in problems {
                eprintln!("ferry: {problem}");
            }
            exit_code::USAGE
        }
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            eprintln!("ferry: {}", vmm::error::chain(&error));
            error.exit_code()
        }
    }
}

/// The progress bar's estimate is the only caller of libm. With our own `pow` the linker leaves libm out,
/// which saves 170 KiB of memory per idle VMM.
// SAFETY: the C library's name and signature, and its meaning.
#[unsafe(no_mangle)]
extern "C" fn pow(base: f64, exponent: f64) -> f64 {
    libm::pow(base, exponent)
}
