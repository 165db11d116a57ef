//! The command line.

use crate::config::{
    BootFiles, HostOptions, ReceiveConfig, ReceiveDisk, RunConfig, RunOptions, Switch,
    parse_compression, parse_duration, parse_memory, parse_rate,
};
use crate::disk_selection::DiskSelection;
use crate::exit_code;
use crate::limits::Limits;
use crate::suite::verdict::NamedResult;
use clap::{Args, Parser, Subcommand};
use migration::params::Compression;
use migration::transport::Address;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// A small virtual machine monitor whose reason to exist is live migration
#[derive(Debug, Parser)]
#[command(name = "ferry", version)]
pub struct Cli {
    /// Log more; twice logs everything
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    /// The subcommand.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommand.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a guest in the foreground
    #[command(after_help = exit_code::HELP)]
    Run(Box<RunArgs>),
    /// Take QEMU's command line: `ferry qemu --help` lists what becomes of its options
    #[command(disable_help_flag = true)]
    Qemu {
        /// As for qemu-system-x86_64
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
        arguments: Vec<OsString>,
    },
    /// Run test kernels, each in a process of its own, and report which passed
    Test(Box<TestArgs>),
    /// Become the destination of a migration
    #[command(after_help = exit_code::HELP)]
    Receive(Box<ReceiveArgs>),
    /// Move the guest behind a control socket to another ferry
    Migrate(MigrateArgs),
    /// Save the disks of a running guest in a folder; check and restore what was saved
    Backup(BackupArgs),
    /// Send a command to a control socket
    Ctl(CtlArgs),
    /// Run or receive a guest for `ferry run --migrate-every` or `ferry test`, configured on standard input
    #[command(hide = true)]
    Child,
    /// Check this host's KVM and suggest fixes; compare CPUs of hosts
    Doctor(DoctorArgs),
}

/// `ferry run`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Options from a TOML file; those on the command line win
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
    /// The options.
    #[command(flatten)]
    pub options: RunOptions,
}

impl RunArgs {
    /// Merges the file, if given, and validates everything.
    pub fn into_config(self) -> Result<RunConfig, Vec<String>> {
        let file = match &self.config {
            None => RunOptions::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| vec![format!("--config {}: {error}", path.display())])?;
                toml::from_str(&text)
                    .map_err(|error| vec![format!("--config {}: {error}", path.display())])?
            }
        };
        self.options.over(file).or_environment()?.validate()
    }
}

/// `ferry test`
#[derive(Debug, Args)]
#[command(after_help = exit_code::TEST_HELP)]
pub struct TestArgs {
    /// Kernels to run; with --config, names of its tests [default there: all]
    #[arg(value_name = "KERNEL")]
    pub names: Vec<String>,
    /// Tests from a file in kvm-unit-tests' format (unittests.cfg); kernels lie beside it
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
    /// Of the file's tests, those in one of these groups
    #[arg(short, long, value_name = "GROUP,…", value_delimiter = ',', requires = "config")]
    pub groups: Vec<String>,
    /// Of the file's tests, those of the group `nodefault`, too
    #[arg(short, long, requires = "config")]
    pub all: bool,
    /// How many run at once [default: this host's processors]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub jobs: Option<u16>,
    /// Exit codes of a test that has passed [default: 1, and 0 with --expect]
    #[arg(long, value_name = "CODE,…", value_delimiter = ',')]
    pub pass: Vec<u8>,
    /// What a test is expected to end with, if not with a pass; may be repeated
    #[arg(long, value_name = "TEST=fail|skip|CODE")]
    pub expected: Vec<NamedResult>,
    /// Print a TAP 13 report
    #[arg(long)]
    pub tap: bool,
    /// Write a JUnit report to this file
    #[arg(long, value_name = "PATH")]
    pub junit: Option<PathBuf>,
    /// Keep the output of each test in this folder, as NAME.log
    #[arg(long, value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
    /// The options of `ferry run` that all tests have.
    #[command(flatten)]
    pub options: RunOptions,
}

/// `ferry receive`
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Where to listen: tcp:HOST:PORT or unix:PATH
    pub address: Address,
    /// Image of a guest's disk on this host:
    /// ID=PATH[,format=raw|qcow2][,backing=BASE,backing-format=raw|qcow2][,cache=writeback|none]
    #[arg(long = "disk", value_name = "ID=PATH,…")]
    pub disks: Vec<ReceiveDisk>,
    /// Folder for migrated disks, each in a file ID.img
    #[arg(long, value_name = "PATH")]
    pub disk_dir: Option<PathBuf>,
    /// Offer the images of --disk over NBD, each under its ID, until the guest takes them: the source mirrors its
    /// disks to them before it moves
    #[arg(long, value_name = "tcp:HOST:PORT|unix:PATH")]
    pub nbd: Option<Address>,
    /// Let migrated disks replace existing images
    #[arg(long)]
    pub overwrite: bool,
    /// Leave the guest paused after its migration
    #[arg(long)]
    pub paused: bool,
    /// Most memory of a guest, e.g. 4G [default: what is available]
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    pub max_memory: Option<u64>,
    /// Most vCPUs of a guest [default: this host's processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    pub max_cpus: Option<u8>,
    /// Kernel to boot if the guest resets itself here
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Initial ramdisk for that kernel
    #[arg(long, value_name = "PATH", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Options for this process.
    #[command(flatten)]
    pub host: HostOptions,
}

impl ReceiveArgs {
    /// Validates everything.
    pub fn into_config(self) -> Result<ReceiveConfig, Vec<String>> {
        let mut problems = Vec::new();
        for (index, disk) in self.disks.iter().enumerate() {
            if self.disks[..index].iter().any(|other| other.id == disk.id) {
                problems.push(format!("--disk: {:?} is given twice", disk.id));
            }
        }
        let host = self.host.validate(&mut problems);
        if !problems.is_empty() {
            return Err(problems);
        }
        Ok(ReceiveConfig {
            address: self.address,
            disks: self.disks,
            disk_dir: self.disk_dir,
            nbd: self.nbd,
            overwrite: self.overwrite,
            paused: self.paused,
            limits: Limits { memory_bytes: self.max_memory, cpus: self.max_cpus },
            boot: self.kernel.map(|kernel| BootFiles { kernel, initrd: self.initrd }),
            host,
        })
    }
}

/// `ferry migrate`
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Control socket of the source
    pub socket: String,
    /// The destination: tcp:HOST:PORT or unix:PATH
    pub address: Address,
    /// Downtime limit, e.g. 20ms
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub downtime_limit: Option<Duration>,
    /// Bandwidth limit in bytes per second, e.g. 1G; 0 for none
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub max_bandwidth: Option<u64>,
    /// Disks to migrate: full, top (only the data above a shared backing file) or none, for all or per
    /// disk, e.g. none,root=full [default: none]
    #[arg(long, value_name = "full|top|none,…")]
    pub disks: Option<DiskSelection>,
    /// Maximum disk reads in flight, 1 to 16
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=16))]
    pub disk_reads: Option<u64>,
    /// Maximum disk chunks read but not sent, 1 to 512
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=512))]
    pub disk_buffers: Option<u64>,
    /// Connections for RAM, and as many for disks, 1 to 16
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
    pub channels: Option<u16>,
    /// Send deltas of changed pages (XBZRLE)
    #[arg(long)]
    pub xbzrle: bool,
    /// Memory for the XBZRLE cache, e.g. 256M
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub xbzrle_cache_size: Option<u64>,
    /// Compress memory and disks: none, zlib[:0-9] or zstd[:0-20]
    #[arg(long, value_name = "METHOD[:LEVEL]", value_parser = parse_compression)]
    pub compress: Option<(Compression, Option<u8>)>,
    /// Throttle the guest if the migration does not converge
    #[arg(long)]
    pub auto_converge: bool,
    /// Whether dirty bitmaps follow their disks; without, they stay behind
    #[arg(long, value_name = "on|off", default_value = "on")]
    pub dirty_bitmaps: Switch,
    /// Keep the source process, with the guest stopped, after success
    #[arg(long)]
    pub keep_source: bool,
    /// Print one JSON line per step; the last is the summary
    #[arg(long)]
    pub json: bool,
}

/// `ferry backup`
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// SOCKET DIR: control socket of the guest, and folder of its backups. With --restore: DISK=IMAGE[,format=qcow2]…
    #[arg(value_name = "SOCKET DIR")]
    pub words: Vec<String>,
    /// Save this disk only, and others that are given [default: all writable ones]
    #[arg(long = "disk", value_name = "ID", conflicts_with_all = ["verify", "restore"])]
    pub disks: Vec<String>,
    /// Save whole disks, whatever was saved before
    #[arg(long, conflicts_with_all = ["verify", "restore"])]
    pub full: bool,
    /// Bandwidth limit of each disk in bytes per second, e.g. 100M; 0 for none
    #[arg(long, value_name = "RATE", value_parser = parse_rate, conflicts_with_all = ["verify", "restore"])]
    pub max_bandwidth: Option<u64>,
    /// Check every file in this folder against its SHA-256
    #[arg(long, value_name = "DIR", conflicts_with = "restore")]
    pub verify: Option<PathBuf>,
    /// Write the newest state of disks in this folder to images
    #[arg(long, value_name = "DIR")]
    pub restore: Option<PathBuf>,
    /// Let restored disks replace existing images
    #[arg(long, requires = "restore")]
    pub overwrite: bool,
}

/// `ferry doctor`
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print this host's CPU model as JSON, for --baseline
    #[arg(long, conflicts_with = "baseline")]
    pub cpu_model: bool,
    /// Print the --cpu with which a guest can move between this host and those of these files, made with --cpu-model
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub baseline: Vec<PathBuf>,
}

/// `ferry ctl`
#[derive(Debug, Args)]
pub struct CtlArgs {
    /// Control socket
    pub socket: String,
    /// status, stop, cont [--force], cancel, bitmap VERB …, mirror DISK TARGET …, job VERB … (see bitmap --help and so
    /// on), quit, or any QMP command with JSON arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub command: Vec<String>,
}
