//! The configuration from the command line, a TOML file or both; validated in one place.

mod disk;
mod hardware;
mod hop;
mod units;

pub use disk::{DiskConfig, ReceiveDisk, is_id};
pub use hardware::{DebugExitConfig, DebugconConfig, FwCfgItem, FwCfgSource, HardwareConfig};
#[cfg(test)]
pub(crate) use hop::tests::nothing_by_default;
pub use units::{Switch, parse_compression, parse_duration, parse_memory, parse_rate, parse_size};

use crate::limits::Limits;
use crate::machine::cpu::config::CpuConfig;
use crate::machine::description::check_rng;
use devices::block::qcow2::BackingChoice;
use migration::transport::Address;
use regex_lite::Regex;
use serde::{Deserialize, Deserializer, Serialize, de::Error};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// The environment variable that stands for `--migrate-every`, so that an existing test suite runs under
/// migration without a change.
pub const MIGRATE_EVERY: &str = "FERRY_MIGRATE_EVERY";
/// Minimum RAM: kernels are loaded at 1 MiB.
const MIN_MEMORY: u64 = 4 << 20;

/// Backend of COM1.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SerialConfig {
    /// Standard input and output.
    #[default]
    Stdio,
    /// Discards output.
    Null,
    /// Output to a file.
    File(PathBuf),
    /// A Unix socket for one client.
    Socket(PathBuf),
}

impl FromStr for SerialConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "null" => Ok(Self::Null),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(format!("{text:?}: expected stdio, null, file=PATH or socket=PATH")),
        }
    }
}

/// A control socket, `unix:PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketPath(pub PathBuf);

impl FromStr for SocketPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self(path.into())),
            _ => Err(format!("{text:?}: expected unix:PATH")),
        }
    }
}

/// Options common to `ferry run` and `ferry receive`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Backend of COM1.
    pub serial: SerialConfig,
    /// Backend of the debug console.
    pub debugcon: DebugconConfig,
    /// The control socket.
    pub qmp: Option<SocketPath>,
    /// Exit after this long.
    pub timeout: Option<Duration>,
    /// Exit with success when serial output matches.
    #[serde(with = "hop::pattern")]
    pub expect: Option<Regex>,
    /// Exit when the guest requests a reset.
    pub no_reboot: bool,
    /// Exit with the parent process: a shuttle, or `ferry test`.
    pub with_parent: bool,
    /// Say nothing when the guest ends by itself: its exit code tells.
    pub quiet: bool,
}

/// The files that a guest boots from, at its start and after each reset.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootFiles {
    /// The kernel.
    #[serde(with = "hop::os_path")]
    pub kernel: PathBuf,
    /// Initial ramdisk, or Multiboot modules.
    #[serde(with = "hop::optional_os_path")]
    pub initrd: Option<PathBuf>,
}

/// A guest to boot.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Kernel and ramdisk.
    pub boot: BootFiles,
    /// The kernel's command line.
    pub cmdline: String,
    /// Whether the guest has ACPI tables.
    pub acpi: bool,
    /// Whether the guest has a virtio-rng.
    pub rng: bool,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// vCPUs.
    pub cpus: u8,
    /// Their model and features.
    pub cpu: CpuConfig,
    /// Disks, each with its name.
    pub disks: Vec<(String, DiskConfig)>,
    /// Devices for test kernels.
    pub hardware: HardwareConfig,
    /// The guest's name.
    pub name: Option<String>,
    /// Whether it waits for `cont` before its first instruction.
    pub paused: bool,
    /// Migrate it to a new process at this interval.
    pub migrate_every: Option<Duration>,
    /// Options of this process.
    pub host: HostConfig,
}

/// An incoming guest.
#[derive(Debug, Clone)]
pub struct ReceiveConfig {
    /// Where to listen.
    pub address: Address,
    /// Images for its disks.
    pub disks: Vec<ReceiveDisk>,
    /// Folder for migrated disks without a `--disk` option.
    pub disk_dir: Option<PathBuf>,
    /// Where images are offered over NBD until the guest takes them.
    pub nbd: Option<Address>,
    /// Whether migrated disks may replace existing images.
    pub overwrite: bool,
    /// Leave it paused after its migration.
    pub paused: bool,
    /// The largest guest to accept.
    pub limits: Limits,
    /// What to boot if the guest requests a reset.
    pub boot: Option<BootFiles>,
    /// Options of this process.
    pub host: HostConfig,
}

fn from_text<'de, T: FromStr<Err = String>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(D::Error::custom)
}

fn list_from_text<'de, T: FromStr<Err = String>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
}

/// Options of `ferry run` as given on the command line or in a file, under the same names.
#[derive(Debug, Clone, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct RunOptions {
    /// Kernel to boot: a bzImage, a 64-bit ELF (PVH or vmlinux) or a Multiboot kernel
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Initial ramdisk; for a Multiboot or PVH kernel modules, "PATH ARGUMENTS,PATH,…"
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Guest memory [default: 128M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Number of vCPUs, 1 to 254 if KVM offers them [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u8>,
    /// CPU model: host, max or a baseline x86-64-v1 to x86-64-v4, then ,+FEATURE or ,-FEATURE [default: host]
    #[arg(long, value_name = "MODEL,…", allow_hyphen_values = true)]
    #[serde(deserialize_with = "from_text")]
    pub cpu: Option<CpuConfig>,
    /// A disk: path=PATH[,id=ID][,format=raw|qcow2][,backing=none|PATH][,readonly=on][,queues=N][,cache=writeback|none]
    #[arg(long = "disk", value_name = "path=PATH,…")]
    #[serde(deserialize_with = "list_from_text")]
    pub disk: Vec<DiskConfig>,
    /// The guest's name
    #[arg(long)]
    pub name: Option<String>,
    /// Whether the guest has ACPI tables [default: on]
    #[arg(long, value_name = "on|off")]
    #[serde(deserialize_with = "from_text")]
    pub acpi: Option<Switch>,
    /// Do not run the guest before `cont` on the control socket
    #[arg(long)]
    pub paused: bool,
    /// Migrate the running guest to a new process at this interval, e.g. 2s [default: FERRY_MIGRATE_EVERY]
    #[arg(long, value_name = "DURATION")]
    pub migrate_every: Option<String>,
    /// Give the guest a source of random bytes (virtio-rng)
    #[arg(long)]
    pub rng: bool,
    /// Give the guest QEMU's pc-testdev: interrupt lines, ports and memory for tests
    #[arg(long)]
    pub testdev: bool,
    /// A file for the guest to find in fw_cfg
    #[arg(long = "fw-cfg", value_name = "name=NAME,file=PATH|string=TEXT")]
    #[serde(deserialize_with = "list_from_text")]
    pub fw_cfg: Vec<FwCfgItem>,
    /// Ports of the debug-exit device (QEMU's isa-debug-exit) [default: iobase=0xf4,iosize=4]
    #[arg(long, value_name = "iobase=N,iosize=N|off")]
    #[serde(deserialize_with = "from_text")]
    pub debug_exit: Option<DebugExitConfig>,
    /// Where bytes go that the guest writes to port 0xe9: null, stdio or file=PATH [default: null]
    #[arg(long, value_name = "WHERE")]
    #[serde(deserialize_with = "from_text")]
    pub debugcon: Option<DebugconConfig>,
    /// Options for this process.
    #[command(flatten)]
    #[serde(flatten)]
    pub host: HostOptions,
}

/// Options of a process that runs a guest.
#[derive(Debug, Clone, Default, Deserialize, clap::Args)]
#[serde(default)]
pub struct HostOptions {
    /// Backend of COM1: stdio, null, file=PATH or socket=PATH [default: stdio]
    #[arg(long, value_name = "WHERE")]
    #[serde(deserialize_with = "from_text")]
    pub serial: Option<SerialConfig>,
    /// Control socket
    #[arg(long, value_name = "unix:PATH")]
    #[serde(deserialize_with = "from_text")]
    pub qmp: Option<SocketPath>,
    /// Exit with code 124 after this long, e.g. 30s
    #[arg(long, value_name = "DURATION")]
    pub timeout: Option<String>,
    /// Exit with code 0 as soon as serial output matches
    #[arg(long, value_name = "REGEX")]
    pub expect: Option<String>,
    /// Exit with code 0 when the guest requests a reset
    #[arg(long)]
    pub no_reboot: bool,
}

impl RunOptions {
    /// These options, with defaults from `file`.
    pub fn over(self, file: Self) -> Self {
        let disk = if self.disk.is_empty() { file.disk } else { self.disk };
        let fw_cfg = if self.fw_cfg.is_empty() { file.fw_cfg } else { self.fw_cfg };
        Self {
            kernel: self.kernel.or(file.kernel),
            initrd: self.initrd.or(file.initrd),
            cmdline: self.cmdline.or(file.cmdline),
            memory: self.memory.or(file.memory),
            cpus: self.cpus.or(file.cpus),
            cpu: self.cpu.or(file.cpu),
            disk,
            name: self.name.or(file.name),
            acpi: self.acpi.or(file.acpi),
            rng: self.rng || file.rng,
            testdev: self.testdev || file.testdev,
            fw_cfg,
            debug_exit: self.debug_exit.or(file.debug_exit),
            debugcon: self.debugcon.or(file.debugcon),
            paused: self.paused || file.paused,
            migrate_every: self.migrate_every.or(file.migrate_every),
            host: HostOptions {
                serial: self.host.serial.or(file.host.serial),
                qmp: self.host.qmp.or(file.host.qmp),
                timeout: self.host.timeout.or(file.host.timeout),
                expect: self.host.expect.or(file.host.expect),
                no_reboot: self.host.no_reboot || file.host.no_reboot,
            },
        }
    }

    /// These options, with the interval of moves from the environment unless it is given.
    ///
    /// # Errors
    /// Names the variable if it has no interval.
    pub fn or_environment(self) -> Result<Self, Vec<String>> {
        let value = std::env::var_os(MIGRATE_EVERY);
        self.or_interval(value.as_deref()).map_err(|problem| vec![problem])
    }

    fn or_interval(mut self, value: Option<&OsStr>) -> Result<Self, String> {
        // Set to nothing is not set, as for a shell's `${…:-}`.
        let Some(value) = value.filter(|value| !value.is_empty()) else { return Ok(self) };
        let text = value.to_str().ok_or_else(|| format!("{MIGRATE_EVERY}: it is not UTF-8"))?;
        parse_duration(text).map_err(|error| format!("{MIGRATE_EVERY}: {error}"))?;
        self.migrate_every.get_or_insert_with(|| text.to_owned());
        Ok(self)
    }

    /// Validates everything; reports every problem, by option name.
    pub fn validate(self) -> Result<RunConfig, Vec<String>> {
        let mut problems = Vec::new();
        let memory_bytes = match parse_memory(self.memory.as_deref().unwrap_or("128M")) {
            Ok(bytes) if bytes < MIN_MEMORY => {
                problems.push(format!("--memory: {bytes} bytes are too little, at least 4M"));
                MIN_MEMORY
            }
            Ok(bytes) => bytes,
            Err(error) => {
                problems.push(format!("--memory: {error}"));
                MIN_MEMORY
            }
        };
        if let Err(error) = devices::ram::RamLayout::for_size(memory_bytes) {
            problems.push(format!("--memory: {error}"));
        }
        let cpus = self.cpus.unwrap_or(1);
        if !(1..=crate::machine::description::MAX_CPUS).contains(&cpus) {
            let most = crate::machine::description::MAX_CPUS;
            problems.push(format!("--cpus: {cpus} is not in 1 to {most}"));
        }
        if self.kernel.is_none() {
            problems.push("--kernel: give the kernel to boot".into());
        }
        let most = crate::machine::description::MAX_DISKS;
        if self.disk.len() > most {
            problems.push(format!("--disk: at most {most} disks"));
        }
        let mut disks: Vec<(String, DiskConfig)> = Vec::new();
        for (index, disk) in self.disk.into_iter().enumerate() {
            let id = disk.id.clone().unwrap_or_else(|| format!("disk{index}"));
            if !is_id(&id) {
                problems.push(format!("--disk: id {id:?} may have letters, digits, _ - ."));
            }
            if disks.iter().any(|(other, _)| *other == id) {
                problems.push(format!("--disk: id {id:?} is given twice"));
            }
            disks.push((id, disk));
        }
        let migrate_every = duration("--migrate-every", self.migrate_every, &mut problems);
        for (id, disk) in &disks {
            if migrate_every.is_some() && disk.backing != BackingChoice::Recorded {
                problems.push(format!(
                    "--migrate-every: disk {id:?} has backing=…, which the next process would not use"
                ));
            }
        }
        if let Err(error) = check_rng(self.rng, disks.iter().map(|(id, _)| id.as_str())) {
            problems.push(format!("--rng: {error}"));
        }
        let debug_exit = self.debug_exit.unwrap_or_default();
        let hardware = HardwareConfig { testdev: self.testdev, fw_cfg: self.fw_cfg, debug_exit };
        hardware.check(&mut problems);
        let mut host = self.host.validate(&mut problems);
        host.debugcon = self.debugcon.unwrap_or_default();
        if host.debugcon == DebugconConfig::Stdio && host.serial != SerialConfig::Stdio {
            problems
                .push("--debugcon: stdio is shared with the serial console: --serial stdio".into());
        }
        match self.kernel {
            Some(kernel) if problems.is_empty() => Ok(RunConfig {
                boot: BootFiles { kernel, initrd: self.initrd },
                acpi: self.acpi.unwrap_or(Switch(true)).0,
                rng: self.rng,
                // Documented default: an empty command line.
                cmdline: self.cmdline.unwrap_or_default(),
                memory_bytes,
                cpus,
                // Documented default: host.
                cpu: self.cpu.unwrap_or_default(),
                disks,
                hardware,
                name: self.name,
                paused: self.paused,
                migrate_every,
                host,
            }),
            _ => Err(problems),
        }
    }
}

impl HostOptions {
    /// Validates everything; adds every problem to `problems`.
    pub fn validate(self, problems: &mut Vec<String>) -> HostConfig {
        let timeout = duration("--timeout", self.timeout, problems);
        let expect = self.expect.and_then(|pattern| match Regex::new(&pattern) {
            Ok(pattern) => Some(pattern),
            Err(error) => {
                problems.push(format!("--expect: {error}"));
                None
            }
        });
        HostConfig {
            // Documented default: stdio.
            serial: self.serial.unwrap_or_default(),
            debugcon: DebugconConfig::default(),
            qmp: self.qmp,
            timeout,
            expect,
            no_reboot: self.no_reboot,
            with_parent: false,
            quiet: false,
        }
    }
}

fn duration(option: &str, text: Option<String>, problems: &mut Vec<String>) -> Option<Duration> {
    match parse_duration(&text?) {
        Ok(duration) => Some(duration),
        Err(error) => {
            problems.push(format!("{option}: {error}"));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_problem_is_reported_at_once_by_option() {
        let options = RunOptions {
            memory: Some("3K".into()),
            cpus: Some(255),
            disk: vec!["path=a,id=x".parse().unwrap(), "path=b,id=x".parse().unwrap()],
            host: HostOptions { expect: Some("(".into()), ..Default::default() },
            ..Default::default()
        };
        let problems = options.validate().unwrap_err().join("\n");
        for option in ["--memory", "--cpus", "--kernel", "--disk", "--expect"] {
            assert!(problems.contains(option), "{problems} lacks {option}");
        }
    }

    #[test]
    fn the_interval_of_the_environment_counts_unless_one_is_given() {
        let of = |given: Option<&str>, value: Option<&str>| {
            let migrate_every = given.map(str::to_owned);
            let options = RunOptions { migrate_every, ..Default::default() };
            options.or_interval(value.map(OsStr::new)).map(|options| options.migrate_every)
        };
        assert_eq!(of(None, Some("200ms")), Ok(Some("200ms".into())));
        assert_eq!(of(Some("1s"), Some("200ms")), Ok(Some("1s".into())));
        assert_eq!((of(None, None), of(None, Some(""))), (Ok(None), Ok(None)));
        let error = of(Some("1s"), Some("often")).unwrap_err();
        assert!(error.contains(MIGRATE_EVERY) && error.contains("often"), "{error}");
    }

    #[test]
    fn consoles_are_read() {
        assert_eq!("file=/l".parse(), Ok(SerialConfig::File("/l".into())));
        assert!("tty".parse::<SerialConfig>().is_err());
    }

    #[test]
    fn a_file_has_the_options_names_and_the_command_line_wins() {
        let file: RunOptions = toml::from_str(
            "kernel = \"k\"\nmemory = \"1G\"\nserial = \"null\"\ndisk = [\"path=d\"]",
        )
        .unwrap();
        let options = RunOptions { memory: Some("2G".into()), ..Default::default() };
        let config = options.over(file).validate().unwrap();
        assert_eq!((config.memory_bytes, config.host.serial), (2 << 30, SerialConfig::Null));
        assert_eq!(config.disks[0].0, "disk0");
        assert!(toml::from_str::<RunOptions>("colour = \"red\"").is_err());
    }
}
