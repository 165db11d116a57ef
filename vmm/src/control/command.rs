//! QMP commands: parses requests into typed commands. The supervisor executes them.

use super::message::{QmpError, Request};
use crate::disk_selection::{DiskMode, DiskSelection};
use migration::block::Tuning;
use migration::params::{Compression, Params};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// All commands, as `query-commands` lists them.
pub const NAMES: [&str; 27] = [
    "qmp_capabilities",
    "query-version",
    "query-commands",
    "query-status",
    "query-name",
    "query-uuid",
    "query-kvm",
    "query-memory-size-summary",
    "query-cpus-fast",
    "query-block",
    "query-named-block-nodes",
    "query-blockstats",
    "stop",
    "cont",
    "system_reset",
    "system_powerdown",
    "quit",
    "x-console-input",
    "migrate",
    "migrate_cancel",
    "query-migrate",
    "migrate-set-parameters",
    "query-migrate-parameters",
    "migrate-set-capabilities",
    "query-migrate-capabilities",
    "calc-dirty-rate",
    "query-dirty-rate",
];

/// A parsed command.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// `query-version`
    QueryVersion,
    /// `query-commands`
    QueryCommands,
    /// `query-status`
    QueryStatus,
    /// `query-name`
    QueryName,
    /// `query-uuid`
    QueryUuid,
    /// `query-kvm`
    QueryKvm,
    /// `query-memory-size-summary`
    QueryMemorySize,
    /// `query-cpus-fast`
    QueryCpus,
    /// `query-block`
    QueryBlock,
    /// `query-named-block-nodes`
    QueryNamedBlockNodes,
    /// `query-blockstats`
    QueryBlockStats,
    /// `stop`
    Stop,
    /// `cont`
    Cont {
        /// Ferry's own: run a guest whose migration ended as unknown; the operator confirms that it runs
        /// nowhere else.
        force: bool,
    },
    /// `system_reset`
    Reset,
    /// `system_powerdown`
    Powerdown,
    /// `quit`
    Quit,
    /// `x-console-input`, Ferry's own: bytes for the guest's serial port. `taken` in the reply is the
    /// number of bytes that fitted. Each character of `data` is a byte, U+0000 to U+00FF.
    ConsoleInput(Vec<u8>),
    /// `migrate`
    Migrate {
        /// The destination.
        uri: String,
        /// `disks`, or QEMU's `blk` and `inc`: which disks to migrate.
        disks: DiskSelection,
        /// `x-disk-reads` and `x-disk-buffers`.
        tuning: Tuning,
        /// What holds for this migration alone.
        own: OwnOptions,
    },
    /// `migrate_cancel`
    MigrateCancel,
    /// `query-migrate`
    QueryMigrate {
        /// `x-id`: of this migration rather than the last one.
        id: Option<String>,
    },
    /// `migrate-set-parameters`
    SetParameters(ParameterChange),
    /// `query-migrate-parameters`
    QueryParameters,
    /// `migrate-set-capabilities`
    SetCapabilities(Vec<(String, bool)>),
    /// `query-migrate-capabilities`
    QueryCapabilities,
    /// `calc-dirty-rate`, with the duration of the measurement.
    CalcDirtyRate(Duration),
    /// `query-dirty-rate`
    QueryDirtyRate {
        /// Times in milliseconds instead of seconds.
        in_millis: bool,
    },
}

/// Options of one migration, Ferry's own: what `migrate-set-parameters` and `migrate-set-capabilities` have
/// set stays as it is for the next one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnOptions {
    /// `x-id`: the name by which its client follows it.
    pub id: Option<String>,
    /// `x-parameters`
    pub parameters: ParameterChange,
    /// `x-capabilities`
    pub capabilities: Vec<(String, bool)>,
    /// `x-end-source`: the process ends once the guest has moved and the client has gone.
    pub end_source: bool,
}

/// Longest `x-id`.
const MAX_ID_BYTES: usize = 64;

impl OwnOptions {
    fn parse(arguments: &mut Arguments) -> Result<Self, QmpError> {
        let id = migration_id(arguments)?;
        let parameters =
            arguments.optional("x-parameters", "object", |value| value.as_object().cloned())?;
        let mut parameters = Arguments(parameters.unwrap_or_default());
        let change = ParameterChange::parse(&mut parameters)?;
        parameters.none_left()?;
        let capabilities = arguments.capabilities("x-capabilities")?.unwrap_or_default();
        if capabilities.iter().any(|(name, _)| name == "events") {
            let desc =
                "Capability 'events' is not one of a migration: use migrate-set-capabilities";
            return Err(QmpError::generic(desc));
        }
        let end_source = arguments.flag("x-end-source")?.unwrap_or(false);
        Ok(Self { id, parameters: change, capabilities, end_source })
    }

    /// `params` for this migration, checked.
    pub fn apply(&self, mut params: Params) -> Result<Params, QmpError> {
        set_capabilities(&mut params, &self.capabilities);
        self.parameters.apply(params)
    }
}

fn migration_id(arguments: &mut Arguments) -> Result<Option<String>, QmpError> {
    match arguments.text("x-id")? {
        Some(id) if id.is_empty() || id.len() > MAX_ID_BYTES => Err(QmpError::generic(format!(
            "Parameter 'x-id' expects a name of 1 to {MAX_ID_BYTES} bytes"
        ))),
        id => Ok(id),
    }
}

/// Switches capabilities of migrations on or off.
pub fn set_capabilities(params: &mut Params, list: &[(String, bool)]) {
    for (name, state) in list {
        match name.as_str() {
            "auto-converge" => params.auto_converge = *state,
            "xbzrle" => params.xbzrle = *state,
            "multifd" => params.multifd = *state,
            // `events` is the control socket's, and `return-path` cannot be changed.
            _ => {}
        }
    }
}

/// Parameters to change; the others stay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ParameterChange {
    /// `max-bandwidth`, bytes per second.
    pub max_bandwidth: Option<u64>,
    /// `downtime-limit`.
    pub downtime_limit: Option<Duration>,
    /// `multifd-channels`
    pub multifd_channels: Option<u16>,
    /// `multifd-compression`
    pub multifd_compression: Option<Compression>,
    /// `multifd-zlib-level`
    pub multifd_zlib_level: Option<u8>,
    /// `multifd-zstd-level`
    pub multifd_zstd_level: Option<u8>,
    /// `xbzrle-cache-size`, bytes.
    pub xbzrle_cache_size: Option<u64>,
    /// `throttle-trigger-threshold`, percent, like the three below.
    pub throttle_trigger_threshold: Option<u8>,
    /// `cpu-throttle-initial`
    pub cpu_throttle_initial: Option<u8>,
    /// `cpu-throttle-increment`
    pub cpu_throttle_increment: Option<u8>,
    /// `max-cpu-throttle`
    pub max_cpu_throttle: Option<u8>,
    /// `cpu-throttle-tailslow`
    pub cpu_throttle_tailslow: Option<bool>,
}

fn change<T>(value: &mut T, new: Option<T>) {
    if let Some(new) = new {
        *value = new;
    }
}

impl ParameterChange {
    fn parse(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Ok(Self {
            max_bandwidth: arguments.number("max-bandwidth")?,
            downtime_limit: arguments.number("downtime-limit")?.map(Duration::from_millis),
            // Saturates: `Params::validate` refuses far smaller numbers.
            multifd_channels: arguments
                .number("multifd-channels")?
                .map(|number| u16::try_from(number).unwrap_or(u16::MAX)),
            multifd_compression: arguments
                .text("multifd-compression")?
                .map(|name| {
                    Compression::from_name(&name).ok_or_else(|| {
                        QmpError::generic(format!(
                            "Parameter 'multifd-compression' does not accept value '{name}': it is \
                             none, zlib or zstd"
                        ))
                    })
                })
                .transpose()?,
            multifd_zlib_level: arguments.small("multifd-zlib-level")?,
            multifd_zstd_level: arguments.small("multifd-zstd-level")?,
            xbzrle_cache_size: arguments.number("xbzrle-cache-size")?,
            throttle_trigger_threshold: arguments.small("throttle-trigger-threshold")?,
            cpu_throttle_initial: arguments.small("cpu-throttle-initial")?,
            cpu_throttle_increment: arguments.small("cpu-throttle-increment")?,
            max_cpu_throttle: arguments.small("max-cpu-throttle")?,
            cpu_throttle_tailslow: arguments.flag("cpu-throttle-tailslow")?,
        })
    }

    /// `params` with the changes, checked.
    pub fn apply(self, mut params: Params) -> Result<Params, QmpError> {
        change(&mut params.max_bandwidth, self.max_bandwidth);
        change(&mut params.downtime_limit, self.downtime_limit);
        change(&mut params.multifd_channels, self.multifd_channels);
        change(&mut params.compression, self.multifd_compression);
        change(&mut params.zlib_level, self.multifd_zlib_level);
        change(&mut params.zstd_level, self.multifd_zstd_level);
        change(&mut params.xbzrle_cache_size, self.xbzrle_cache_size);
        let throttle = &mut params.throttle;
        change(&mut throttle.trigger_threshold, self.throttle_trigger_threshold);
        change(&mut throttle.initial, self.cpu_throttle_initial);
        change(&mut throttle.increment, self.cpu_throttle_increment);
        change(&mut throttle.max, self.max_cpu_throttle);
        change(&mut throttle.tailslow, self.cpu_throttle_tailslow);
        params.validate().map_err(|error| QmpError::generic(error.to_string()))?;
        Ok(params)
    }
}

/// The reply to `query-migrate-parameters`.
pub fn parameters(params: &Params) -> Value {
    // Milliseconds: `u64` holds 580 million years.
    json!({
        "max-bandwidth": params.max_bandwidth,
        "downtime-limit": u64::try_from(params.downtime_limit.as_millis()).unwrap_or(u64::MAX),
        "multifd-channels": params.multifd_channels,
        "multifd-compression": params.compression.name(),
        "multifd-zlib-level": params.zlib_level,
        "multifd-zstd-level": params.zstd_level,
        "xbzrle-cache-size": params.xbzrle_cache_size,
        "throttle-trigger-threshold": params.throttle.trigger_threshold,
        "cpu-throttle-initial": params.throttle.initial,
        "cpu-throttle-increment": params.throttle.increment,
        "cpu-throttle-tailslow": params.throttle.tailslow,
        "max-cpu-throttle": params.throttle.max,
    })
}

/// Consumes arguments one by one and rejects unknown ones.
struct Arguments(Map<String, Value>);

impl Arguments {
    fn optional<T>(
        &mut self,
        name: &str,
        kind: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, QmpError> {
        let Some(value) = self.0.remove(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| {
            QmpError::generic(format!("Invalid parameter type for '{name}', expected: {kind}"))
        })
    }

    fn number(&mut self, name: &str) -> Result<Option<u64>, QmpError> {
        self.optional(name, "integer", Value::as_u64)
    }

    fn count(&mut self, name: &str, most: usize) -> Result<Option<usize>, QmpError> {
        let Some(number) = self.number(name)? else { return Ok(None) };
        let fitting = usize::try_from(number).ok().filter(|number| (1..=most).contains(number));
        fitting.map(Some).ok_or_else(|| {
            let desc = format!("Parameter '{name}' expects an integer in the range of 1 to {most}");
            QmpError::generic(desc)
        })
    }

    /// A percentage or level. Saturates at 255: the range check comes later and refuses that.
    fn small(&mut self, name: &str) -> Result<Option<u8>, QmpError> {
        Ok(self.number(name)?.map(|number| u8::try_from(number).unwrap_or(u8::MAX)))
    }

    fn flag(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        self.optional(name, "boolean", Value::as_bool)
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, QmpError> {
        self.optional(name, "string", |value| value.as_str().map(str::to_owned))
    }

    fn capabilities(&mut self, name: &str) -> Result<Option<Vec<(String, bool)>>, QmpError> {
        let list = self.optional(name, "array", |value| value.as_array().cloned())?;
        list.map(|list| list.iter().map(capability).collect()).transpose()
    }

    fn none_left(self) -> Result<(), QmpError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(QmpError::generic(format!("Parameter '{name}' is unexpected"))),
        }
    }
}

fn missing(name: &str) -> QmpError {
    QmpError::generic(format!("Parameter '{name}' is missing"))
}

/// Checks `qmp_capabilities`: the greeting offers no capability, so none can be enabled.
pub fn negotiate(request: &Request) -> Result<(), QmpError> {
    let mut arguments = Arguments(request.arguments.clone());
    let enable = arguments.optional("enable", "array", |value| value.as_array().cloned())?;
    arguments.none_left()?;
    match enable.unwrap_or_default().first() {
        None => Ok(()),
        Some(Value::String(name)) if name == "oob" => {
            Err(QmpError::generic(format!("Capability {name} not available")))
        }
        Some(Value::String(name)) => {
            let desc = format!("Parameter 'enable' does not accept value '{name}'");
            Err(QmpError::generic(desc))
        }
        Some(_) => Err(QmpError::generic("Invalid parameter type for 'enable', expected: string")),
    }
}

impl Command {
    /// Parses a request; errors use QEMU's wording.
    pub fn parse(request: &Request) -> Result<Self, QmpError> {
        let mut arguments = Arguments(request.arguments.clone());
        let command = match request.execute.as_str() {
            "query-version" => Self::QueryVersion,
            "query-commands" => Self::QueryCommands,
            "query-status" => Self::QueryStatus,
            "query-name" => Self::QueryName,
            "query-uuid" => Self::QueryUuid,
            "query-kvm" => Self::QueryKvm,
            "query-memory-size-summary" => Self::QueryMemorySize,
            "query-cpus-fast" => Self::QueryCpus,
            "query-block" => Self::QueryBlock,
            "query-named-block-nodes" => {
                // Accepted without effect: our node list is flat anyway.
                arguments.flag("flat")?;
                Self::QueryNamedBlockNodes
            }
            "query-blockstats" => {
                arguments.flag("query-nodes")?;
                Self::QueryBlockStats
            }
            "stop" => Self::Stop,
            "cont" => Self::Cont { force: arguments.flag("force")?.unwrap_or(false) },
            "system_reset" => Self::Reset,
            "system_powerdown" => Self::Powerdown,
            "quit" => Self::Quit,
            "x-console-input" => {
                let data = arguments.text("data")?.ok_or_else(|| missing("data"))?;
                let bytes: Result<_, _> = data.chars().map(u8::try_from).collect();
                Self::ConsoleInput(bytes.map_err(|_| {
                    QmpError::generic("Parameter 'data' expects characters up to U+00FF")
                })?)
            }
            "migrate" => {
                let uri = arguments.text("uri")?.ok_or_else(|| missing("uri"))?;
                // Always detached, as in QEMU.
                arguments.flag("detach")?;
                if arguments.flag("resume")? == Some(true) {
                    return Err(QmpError::generic("Parameter 'resume' is not supported"));
                }
                let disks = disk_selection(&mut arguments)?;
                let limits = Tuning::default();
                let tuning = Tuning {
                    reads: arguments
                        .count("x-disk-reads", Tuning::MAX_READS)?
                        .unwrap_or(limits.reads),
                    buffers: arguments
                        .count("x-disk-buffers", Tuning::MAX_BUFFERS)?
                        .unwrap_or(limits.buffers),
                };
                let own = OwnOptions::parse(&mut arguments)?;
                Self::Migrate { uri, disks, tuning, own }
            }
            "migrate_cancel" => Self::MigrateCancel,
            "query-migrate" => Self::QueryMigrate { id: migration_id(&mut arguments)? },
            "migrate-set-parameters" => {
                Self::SetParameters(ParameterChange::parse(&mut arguments)?)
            }
            "query-migrate-parameters" => Self::QueryParameters,
            "migrate-set-capabilities" => {
                let list = arguments.capabilities("capabilities")?;
                Self::SetCapabilities(list.ok_or_else(|| missing("capabilities"))?)
            }
            "query-migrate-capabilities" => Self::QueryCapabilities,
            "calc-dirty-rate" => Self::CalcDirtyRate(calc_time(&mut arguments)?),
            "query-dirty-rate" => Self::QueryDirtyRate { in_millis: in_millis(&mut arguments)? },
            other => {
                let desc = format!("The command {other} has not been found");
                return Err(QmpError::not_found(desc));
            }
        };
        arguments.none_left()?;
        Ok(command)
    }
}

/// `blk` copies whole disks, `inc` the data above their backing files; `disks` chooses per disk.
fn disk_selection(arguments: &mut Arguments) -> Result<DiskSelection, QmpError> {
    let blk = arguments.flag("blk")?.unwrap_or(false);
    let inc = arguments.flag("inc")?.unwrap_or(false);
    let others = match (blk, inc) {
        (_, true) => DiskMode::Top,
        (true, false) => DiskMode::Full,
        (false, false) => DiskMode::None,
    };
    let Some(value) = arguments.0.remove("disks") else {
        return Ok(DiskSelection { others, named: Vec::new() });
    };
    let mut selection = DiskSelection::from_json(&value)
        .map_err(|error| QmpError::generic(format!("Parameter 'disks': {error}")))?;
    if others != DiskMode::None {
        if !value.is_object() {
            let desc = "Parameter 'disks' says for all disks what 'blk' or 'inc' says already";
            return Err(QmpError::generic(desc));
        }
        selection.others = others;
    }
    Ok(selection)
}

/// Whether `calc-time-unit` is milliseconds.
fn in_millis(arguments: &mut Arguments) -> Result<bool, QmpError> {
    match arguments.text("calc-time-unit")?.as_deref() {
        None | Some("second") => Ok(false),
        Some("millisecond") => Ok(true),
        Some(_) => {
            Err(QmpError::generic("Parameter 'calc-time-unit' expects 'second' or 'millisecond'"))
        }
    }
}

/// The duration of `calc-dirty-rate`.
fn calc_time(arguments: &mut Arguments) -> Result<Duration, QmpError> {
    const RANGE: std::ops::RangeInclusive<Duration> =
        Duration::from_millis(50)..=Duration::from_secs(60);
    let time = arguments.number("calc-time")?.ok_or_else(|| missing("calc-time"))?;
    let time = match in_millis(arguments)? {
        true => Duration::from_millis(time),
        false => Duration::from_secs(time),
    };
    // Accepted without effect: the dirty log covers every page, so nothing is sampled.
    arguments.number("sample-pages")?;
    if let Some(mode) = arguments.text("mode")?
        && mode != "dirty-bitmap"
    {
        return Err(QmpError::generic(format!(
            "Mode {mode:?} is not supported: the dirty rate is measured with 'dirty-bitmap'"
        )));
    }
    if !RANGE.contains(&time) {
        return Err(QmpError::generic(
            "Parameter 'calc-time' expects a time in the range of 50 milliseconds to 60 seconds",
        ));
    }
    Ok(time)
}

fn capability(value: &Value) -> Result<(String, bool), QmpError> {
    let name =
        value.get("capability").and_then(Value::as_str).ok_or_else(|| missing("capability"))?;
    let state = value.get("state").and_then(Value::as_bool).ok_or_else(|| missing("state"))?;
    match name {
        "events" | "auto-converge" | "xbzrle" | "multifd" => Ok((name.to_owned(), state)),
        "return-path" if state => Ok((name.to_owned(), state)),
        "return-path" => Err(QmpError::generic("Capability 'return-path' is always on")),
        other => Err(QmpError::generic(format!("Invalid parameter '{other}'"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(execute: &str, arguments: Value) -> Result<Command, QmpError> {
        let arguments = arguments.as_object().cloned().unwrap_or_default();
        Command::parse(&Request { execute: execute.into(), arguments, id: None })
    }

    #[test]
    fn errors_have_qemus_words() {
        let desc = |execute, arguments| parse(execute, arguments).unwrap_err().desc;
        assert_eq!(desc("migrate", json!({})), "Parameter 'uri' is missing");
        assert_eq!(desc("stop", json!({"x": 1})), "Parameter 'x' is unexpected");
        assert_eq!(
            desc("migrate", json!({"uri": 7})),
            "Invalid parameter type for 'uri', expected: string"
        );
        assert_eq!(parse("nonesuch", json!({})).unwrap_err().class, "CommandNotFound");
    }

    #[test]
    fn disks_are_chosen_in_qemus_words_or_one_by_one() {
        let choose = |mut arguments: Value| {
            arguments["uri"] = "unix:/x".into();
            match parse("migrate", arguments) {
                Ok(Command::Migrate { disks, .. }) => {
                    Ok(["root", "data"].map(|id| disks.mode_of(id).name()))
                }
                Ok(other) => panic!("{other:?}"),
                Err(error) => Err(error.desc),
            }
        };
        assert_eq!(choose(json!({})), Ok(["none", "none"]));
        assert_eq!(choose(json!({"blk": true})), Ok(["full", "full"]));
        assert_eq!(choose(json!({"blk": true, "inc": true})), Ok(["top", "top"]));
        assert_eq!(choose(json!({"disks": "top"})), Ok(["top", "top"]));
        assert_eq!(choose(json!({"disks": {"data": "full"}})), Ok(["none", "full"]));
        assert_eq!(choose(json!({"blk": true, "disks": {"data": "none"}})), Ok(["full", "none"]));
        assert!(choose(json!({"blk": true, "disks": "top"})).unwrap_err().contains("already"));
        assert!(choose(json!({"disks": {"data": "half"}})).unwrap_err().contains("half"));
        assert!(choose(json!({"x-disk-reads": 17})).unwrap_err().contains("1 to 16"));
        assert!(choose(json!({"x-disk-buffers": 0})).unwrap_err().contains("1 to 512"));
    }

    #[test]
    fn every_listed_command_is_understood() {
        for name in NAMES.iter().filter(|name| **name != "qmp_capabilities") {
            if let Err(error) = parse(name, json!({})) {
                assert!(error.desc.ends_with("is missing"), "{name}: {error:?}");
            }
        }
    }

    #[test]
    fn the_time_of_a_measurement_is_checked() {
        let parsed = parse("calc-dirty-rate", json!({"calc-time": 1}));
        assert_eq!(parsed.unwrap(), Command::CalcDirtyRate(Duration::from_secs(1)));
        for arguments in [
            json!({"calc-time": 0}),
            json!({"calc-time": 61}),
            json!({"calc-time": 49, "calc-time-unit": "millisecond"}),
            json!({"calc-time": 1, "calc-time-unit": "hour"}),
            json!({"calc-time": 1, "mode": "page-sampling"}),
            json!({"calc-time": u64::MAX}),
        ] {
            assert!(parse("calc-dirty-rate", arguments.clone()).is_err(), "{arguments}");
        }
    }

    #[test]
    fn parameters_are_checked() {
        let change = parse("migrate-set-parameters", json!({"downtime-limit": 2_000_001}));
        let Ok(Command::SetParameters(change)) = change else { panic!("{change:?}") };
        assert!(change.apply(Params::default()).is_err());
        for (name, value) in [
            ("throttle-trigger-threshold", 0),
            ("cpu-throttle-initial", 100),
            ("cpu-throttle-increment", 1_000_000),
            ("max-cpu-throttle", 19),
        ] {
            let change = parse("migrate-set-parameters", json!({name: value}));
            let Ok(Command::SetParameters(change)) = change else { panic!("{change:?}") };
            let refused = change.apply(Params::default()).unwrap_err().desc;
            assert!(refused.contains(name), "{refused}");
        }
    }
}
