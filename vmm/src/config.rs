//! What a user can ask for, from the command line, a TOML file or both; checked in one place.

use crate::machine::description::check_rng;
use devices::block::Format;
use devices::block::failure::ErrorPolicy;
use devices::block::qcow2::Backing;
use devices::block::raw::Cache;
use devices::virtio::blk::MAX_QUEUES;
use migration::params::Compression;
use migration::ram::compress::Method;
use migration::transport::Address;
use serde::{Deserialize, Deserializer, de::Error};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Least RAM of a guest: its kernel starts at 1 MiB.
const MIN_MEMORY: u64 = 4 << 20;

/// A size such as `512M`, `1G` or `64K`; a plain number is MiB for memory and bytes for rates.
pub fn parse_size(text: &str, plain_unit: u64) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => plain_unit,
        "B" => 1,
        "K" | "KB" | "KIB" => 1 << 10,
        "M" | "MB" | "MIB" => 1 << 20,
        "G" | "GB" | "GIB" => 1 << 30,
        "T" | "TB" | "TIB" => 1 << 40,
        other => return Err(format!("unknown unit {other:?} in {text:?}")),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("{text:?} is not a size such as 512M or 1G"))?;
    number.checked_mul(unit).ok_or_else(|| format!("{text:?} is too large"))
}

/// Memory: a plain number is MiB, as for QEMU.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    parse_size(text, 1 << 20)
}

/// A rate in bytes per second.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    parse_size(text, 1)
}

/// Reads a compression method with its level: `none`, `zlib`, `zlib:6`, `zstd:3`.
pub fn parse_compression(text: &str) -> Result<(Compression, Option<u8>), String> {
    let (name, level) = match text.split_once(':') {
        Some((name, level)) => (name, Some(level)),
        None => (text, None),
    };
    let method = Compression::from_name(name)
        .ok_or_else(|| format!("{name:?} is not a method; there are none, zlib and zstd"))?;
    let most = match method {
        Compression::None if level.is_some() => return Err("none has no level".to_owned()),
        Compression::None => 0,
        Compression::Zlib => Method::MAX_ZLIB_LEVEL,
        Compression::Zstd => Method::MAX_ZSTD_LEVEL,
    };
    let level = level.map(|level| {
        let number = level.parse().ok().filter(|number| *number <= most);
        number.ok_or_else(|| format!("{level:?} is not a level of {name}, from 0 to {most}"))
    });
    Ok((method, level.transpose()?))
}

/// `on` or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switch(pub bool);

impl FromStr for Switch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "on" => Ok(Self(true)),
            "off" => Ok(Self(false)),
            other => Err(format!("{other:?} is neither on nor off")),
        }
    }
}

/// A duration such as `20ms`, `30s` or `2m`; a plain number is seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: f64 = digits
        .parse()
        .ok()
        .filter(|number: &f64| number.is_finite() && *number >= 0.0)
        .ok_or_else(|| format!("{text:?} is not a duration such as 20ms or 30s"))?;
    let seconds = match &text[digits.len()..] {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "" | "s" => number,
        "m" | "min" => number * 60.0,
        "h" => number * 3600.0,
        other => return Err(format!("unknown unit {other:?} in {text:?}")),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("{text:?} is too long"))
}

/// Where COM1 goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SerialConfig {
    /// Standard input and output.
    #[default]
    Stdio,
    /// Nowhere.
    Null,
    /// Output to a file.
    File(PathBuf),
    /// A Unix socket that a client may connect to.
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
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// A disk: `path=…,id=…,format=raw,readonly=on,queues=4,cache=none`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image.
    pub path: PathBuf,
    /// Its name; `disk0`, `disk1`… if not given.
    pub id: Option<String>,
    /// How its bytes lie in the image. Never guessed from that.
    pub format: Format,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What becomes of requests that fail.
    pub errors: ErrorPolicy,
    /// Number of its queues.
    pub queues: u16,
    /// Whether the host's page cache is used.
    pub cache: Cache,
    /// As it was given.
    pub text: String,
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut path, mut id, mut read_only) = (None, None, false);
        let (mut queues, mut cache, mut format) = (1, Cache::Writeback, Format::Raw);
        let mut errors = ErrorPolicy::default();
        for pair in text.split(',') {
            match pair.split_once('=') {
                Some(("path" | "file", value)) if !value.is_empty() => path = Some(value.into()),
                Some(("id", value)) => id = Some(value.to_owned()),
                Some(("format", value)) => format = value.parse()?,
                Some(("readonly", "on")) => read_only = true,
                Some(("readonly", "off")) => read_only = false,
                Some(("queues", value)) => queues = parse_queues(value)?,
                Some(("cache", value)) => cache = value.parse()?,
                Some(("rerror", value)) => errors.on_read = value.parse()?,
                Some(("werror", value)) => errors.on_write = value.parse()?,
                _ => {
                    let keys = "path=PATH[,id=ID][,format=raw|qcow2][,readonly=on|off][,queues=N]\
                                [,cache=writeback|none][,rerror=report|ignore|stop|enospc][,werror=…]";
                    return Err(format!("{pair:?} in {text:?}: expected {keys}"));
                }
            }
        }
        let path = path.ok_or_else(|| format!("{text:?} has no path=PATH"))?;
        Ok(Self { path, id, format, read_only, errors, queues, cache, text: text.to_owned() })
    }
}

fn parse_queues(text: &str) -> Result<u16, String> {
    let fine = |queues: &u16| (1..=MAX_QUEUES).contains(queues);
    text.parse().ok().filter(fine).ok_or_else(|| format!("queues {text:?}: 1 to {MAX_QUEUES}"))
}

/// Whether `id` can name a disk: no path tricks, and short enough for get-id users to tell apart.
pub fn is_id(id: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    !id.is_empty() && id.len() <= 64 && id.chars().all(fine) && !id.starts_with('.')
}

/// A disk of an arriving guest: `ID=PATH[,format=qcow2][,backing=BASE][,cache=none]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveDisk {
    /// Its name at the source.
    pub id: String,
    /// The image here.
    pub path: PathBuf,
    /// Whether the host's page cache is used here.
    pub cache: Cache,
    /// How its bytes lie in the image here.
    pub format: Format,
    /// What an image that is made here stands on.
    pub backing: Option<Backing>,
    /// What becomes of requests that fail here.
    pub errors: ErrorPolicy,
}

impl FromStr for ReceiveDisk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((id, path)) if is_id(id) && !path.is_empty() => {
                let (mut path, mut cache, mut format) = (path, Cache::Writeback, Format::Raw);
                let (mut backing, mut backing_format) = (None, None);
                let mut errors = ErrorPolicy::default();
                // A path may have commas, so only what we know at its end is not part of it.
                while let Some((rest, option)) = path.rsplit_once(',') {
                    match option.split_once('=') {
                        Some(("cache", value)) => cache = value.parse()?,
                        Some(("rerror", value)) => errors.on_read = value.parse()?,
                        Some(("werror", value)) => errors.on_write = value.parse()?,
                        Some(("format", value)) => format = value.parse()?,
                        Some(("backing", value)) => backing = Some(PathBuf::from(value)),
                        Some(("backing-format", value)) => backing_format = Some(value.parse()?),
                        _ => break,
                    }
                    path = rest;
                }
                let backing = match (backing, backing_format, format) {
                    (None, None, _) => None,
                    (Some(path), Some(format), Format::Qcow2) => Some(Backing { path, format }),
                    _ => {
                        return Err(format!(
                            "{text:?}: a backing file needs format=qcow2, backing=PATH and \
                             backing-format=raw|qcow2"
                        ));
                    }
                };
                Ok(Self { id: id.to_owned(), path: path.into(), cache, format, backing, errors })
            }
            _ => Err(format!(
                "{text:?}: expected ID=PATH[,format=raw|qcow2][,backing=PATH,backing-format=…][,cache=writeback|none]"
            )),
        }
    }
}

/// What `ferry run` and `ferry receive` have in common.
#[derive(Debug, Clone, Default)]
pub struct HostConfig {
    /// Where COM1 goes.
    pub serial: SerialConfig,
    /// The control socket.
    pub qmp: Option<SocketPath>,
    /// End after this long.
    pub timeout: Option<Duration>,
    /// End well when serial output matches.
    pub expect: Option<String>,
    /// End when the guest asks for a reset.
    pub no_reboot: bool,
    /// End when the parent process does.
    pub with_parent: bool,
}

/// What a guest boots from, at its start and after each reset.
#[derive(Debug, Clone)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: PathBuf,
    /// Initial ramdisk, or Multiboot modules.
    pub initrd: Option<PathBuf>,
}

/// A guest to boot.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// Kernel and ramdisk.
    pub boot: BootFiles,
    /// The kernel's command line.
    pub cmdline: String,
    /// Whether the guest finds ACPI tables.
    pub acpi: bool,
    /// Whether the guest has a virtio-rng.
    pub rng: bool,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// vCPUs.
    pub cpus: u8,
    /// Disks, each with its name.
    pub disks: Vec<(String, DiskConfig)>,
    /// The guest's name.
    pub name: Option<String>,
    /// Move it to a fresh process this often.
    pub migrate_every: Option<Duration>,
    /// This process.
    pub host: HostConfig,
}

/// A guest to wait for.
#[derive(Debug, Clone)]
pub struct ReceiveConfig {
    /// Where to listen.
    pub address: Address,
    /// Images of its disks.
    pub disks: Vec<ReceiveDisk>,
    /// Where disks that travel go, if nothing else is said of them.
    pub disk_dir: Option<PathBuf>,
    /// Whether disks that travel may replace images.
    pub overwrite: bool,
    /// Do not run it when it has arrived.
    pub paused: bool,
    /// What to boot if the guest asks for a reset.
    pub boot: Option<BootFiles>,
    /// This process.
    pub host: HostConfig,
}

fn from_text<'de, T: FromStr<Err = String>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(D::Error::custom)
}

fn disks_from_text<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<DiskConfig>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
}

/// Options of `ferry run` as they were given, on the command line or in a file, under the same names.
#[derive(Debug, Clone, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct RunOptions {
    /// Kernel to boot: a bzImage, a 64-bit ELF (PVH or vmlinux) or a Multiboot kernel
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Initial ramdisk; for a Multiboot kernel its modules, "PATH ARGUMENTS,PATH,…"
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Guest memory [default: 128M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Number of vCPUs, 1 to 16 [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u8>,
    /// A disk: path=PATH[,id=ID][,format=raw|qcow2][,readonly=on][,queues=N][,cache=writeback|none]
    #[arg(long = "disk", value_name = "path=PATH,…")]
    #[serde(deserialize_with = "disks_from_text")]
    pub disk: Vec<DiskConfig>,
    /// The guest's name
    #[arg(long)]
    pub name: Option<String>,
    /// Whether the guest finds ACPI tables [default: on]
    #[arg(long, value_name = "on|off")]
    #[serde(deserialize_with = "from_text")]
    pub acpi: Option<Switch>,
    /// Move the guest to a fresh process this often, e.g. 2s, while it runs
    #[arg(long, value_name = "DURATION")]
    pub migrate_every: Option<String>,
    /// Give the guest a source of random bytes (virtio-rng)
    #[arg(long)]
    pub rng: bool,
    /// Options for this process.
    #[command(flatten)]
    #[serde(flatten)]
    pub host: HostOptions,
}

/// Options of a process that runs a guest.
#[derive(Debug, Clone, Default, Deserialize, clap::Args)]
#[serde(default)]
pub struct HostOptions {
    /// Where COM1 goes: stdio, null, file=PATH or socket=PATH [default: stdio]
    #[arg(long, value_name = "WHERE")]
    #[serde(deserialize_with = "from_text")]
    pub serial: Option<SerialConfig>,
    /// Control socket
    #[arg(long, value_name = "unix:PATH")]
    #[serde(deserialize_with = "from_text")]
    pub qmp: Option<SocketPath>,
    /// End with exit code 124 after this long, e.g. 30s
    #[arg(long, value_name = "DURATION")]
    pub timeout: Option<String>,
    /// End with exit code 0 as soon as serial output matches
    #[arg(long, value_name = "REGEX")]
    pub expect: Option<String>,
    /// End, with exit code 0, when the guest asks for a reset
    #[arg(long)]
    pub no_reboot: bool,
    /// End when the process that started this one does: for `--migrate-every`
    #[arg(long, hide = true)]
    #[serde(skip)]
    pub with_parent: bool,
}

impl RunOptions {
    /// These options, and `file`'s where these are silent.
    pub fn over(self, file: Self) -> Self {
        let disk = if self.disk.is_empty() { file.disk } else { self.disk };
        Self {
            kernel: self.kernel.or(file.kernel),
            initrd: self.initrd.or(file.initrd),
            cmdline: self.cmdline.or(file.cmdline),
            memory: self.memory.or(file.memory),
            cpus: self.cpus.or(file.cpus),
            disk,
            name: self.name.or(file.name),
            acpi: self.acpi.or(file.acpi),
            rng: self.rng || file.rng,
            migrate_every: self.migrate_every.or(file.migrate_every),
            host: HostOptions {
                serial: self.host.serial.or(file.host.serial),
                qmp: self.host.qmp.or(file.host.qmp),
                timeout: self.host.timeout.or(file.host.timeout),
                expect: self.host.expect.or(file.host.expect),
                no_reboot: self.host.no_reboot || file.host.no_reboot,
                with_parent: self.host.with_parent,
            },
        }
    }

    /// Checks all; every problem is reported, by option name.
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
            if migrate_every.is_some() && disk.format == Format::Qcow2 {
                problems.push(format!(
                    "--migrate-every: disk {id:?} is qcow2, which two processes cannot share"
                ));
            }
        }
        if let Err(error) = check_rng(self.rng, disks.iter().map(|(id, _)| id.as_str())) {
            problems.push(format!("--rng: {error}"));
        }
        let host = self.host.validate(&mut problems);
        match self.kernel {
            Some(kernel) if problems.is_empty() => Ok(RunConfig {
                boot: BootFiles { kernel, initrd: self.initrd },
                acpi: self.acpi.unwrap_or(Switch(true)).0,
                rng: self.rng,
                cmdline: self.cmdline.unwrap_or_default(),
                memory_bytes,
                cpus,
                disks,
                name: self.name,
                migrate_every,
                host,
            }),
            _ => Err(problems),
        }
    }
}

impl HostOptions {
    /// Checks all; adds every problem to `problems`.
    pub fn validate(self, problems: &mut Vec<String>) -> HostConfig {
        let timeout = duration("--timeout", self.timeout, problems);
        if let Some(Err(error)) = self.expect.as_deref().map(regex_lite::Regex::new) {
            problems.push(format!("--expect: {error}"));
        }
        HostConfig {
            serial: self.serial.unwrap_or_default(),
            qmp: self.qmp,
            timeout,
            expect: self.expect,
            no_reboot: self.no_reboot,
            with_parent: self.with_parent,
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
    fn sizes_and_durations_are_read_as_people_write_them() {
        assert_eq!(parse_memory("512M"), Ok(512 << 20));
        assert_eq!(parse_memory("128"), Ok(128 << 20));
        assert_eq!(parse_rate("1G"), Ok(1 << 30));
        assert_eq!(parse_duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(parse_duration("1.5"), Ok(Duration::from_millis(1500)));
        for bad in ["", "M", "12Q", "-1", "99999999999T"] {
            assert!(parse_memory(bad).is_err(), "{bad}");
        }
        for bad in ["", "s", "-1s", "5y", "inf"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_problem_is_reported_at_once_by_option() {
        let options = RunOptions {
            memory: Some("3K".into()),
            cpus: Some(17),
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
    fn disks_and_consoles_are_read_and_tricks_refused() {
        let disk: DiskConfig = "path=/a,id=root,format=raw,readonly=on".parse().unwrap();
        assert_eq!((disk.id.as_deref(), disk.read_only), (Some("root"), true));
        assert_eq!((disk.queues, disk.cache), (1, Cache::Writeback));
        let disk: DiskConfig = "path=/a,queues=16,cache=none".parse().unwrap();
        assert_eq!((disk.queues, disk.cache), (16, Cache::None));
        for bad in ["queues=0", "queues=17", "queues=", "queues=-1", "cache=unsafe", "cache="] {
            assert!(format!("path=/a,{bad}").parse::<DiskConfig>().is_err(), "{bad}");
        }
        let given = |text: &str| text.parse::<ReceiveDisk>().map(|disk| (disk.path, disk.cache));
        assert_eq!(given("d=/a"), Ok(("/a".into(), Cache::Writeback)));
        assert_eq!(given("d=/a,b,cache=none"), Ok(("/a,b".into(), Cache::None)));
        assert_eq!(given("d=/a,x=y,cache=none,format=raw"), Ok(("/a,x=y".into(), Cache::None)));
        let disk: ReceiveDisk = "d=/a,format=qcow2,backing=/b,backing-format=raw".parse().unwrap();
        let backing = Backing { path: "/b".into(), format: Format::Raw };
        assert_eq!((disk.path.to_str(), disk.backing), (Some("/a"), Some(backing)));
        for bad in ["backing=/b", "format=qcow2,backing=/b", "backing=/b,backing-format=raw"] {
            assert!(format!("d=/a,{bad}").parse::<ReceiveDisk>().is_err(), "{bad}");
        }
        assert!(given("d=/a,cache=no").is_err() && given("d=/a,format=vmdk").is_err());
        for bad in ["", "id=x", "path=/a,format=vmdk", "path=/a,size=3", "path=/a,readonly=maybe"] {
            assert!(bad.parse::<DiskConfig>().is_err(), "{bad}");
        }
        assert!("../x=/tmp/a".parse::<ReceiveDisk>().is_err());
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
