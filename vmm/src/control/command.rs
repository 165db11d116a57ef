//! Every command and its arguments.

use super::message::{QmpError, Request};
use crate::travel::{DiskMode, DiskSelection};
use migration::block::Tuning;
use migration::params::Params;
use serde_json::{Map, Value, json};
use std::time::Duration;

/// All commands, as `query-commands` lists them.
pub const NAMES: [&str; 20] = [
    "qmp_capabilities",
    "query-version",
    "query-commands",
    "query-status",
    "query-name",
    "query-cpus-fast",
    "query-block",
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
];

/// A request that was understood.
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
    /// `query-cpus-fast`
    QueryCpus,
    /// `query-block`
    QueryBlock,
    /// `stop`
    Stop,
    /// `cont`
    Cont {
        /// Ferry's own: run a guest whose migration ended as unknown, on the operator's word that it
        /// runs nowhere else.
        force: bool,
    },
    /// `system_reset`
    Reset,
    /// `system_powerdown`
    Powerdown,
    /// `quit`
    Quit,
    /// `x-console-input`, Ferry's own: bytes for the guest's serial port. The answer's `taken` says how
    /// many it had room for. Each character of `data` is a byte, U+0000 to U+00FF.
    ConsoleInput(Vec<u8>),
    /// `migrate`
    Migrate {
        /// The destination.
        uri: String,
        /// `disks`, or QEMU's `blk` and `inc`: what of the disks travels.
        disks: DiskSelection,
        /// `x-disk-reads` and `x-disk-buffers`.
        tuning: Tuning,
    },
    /// `migrate_cancel`
    MigrateCancel,
    /// `query-migrate`
    QueryMigrate,
    /// `migrate-set-parameters`
    SetParameters(ParameterChange),
    /// `query-migrate-parameters`
    QueryParameters,
    /// `migrate-set-capabilities`
    SetCapabilities(Vec<(String, bool)>),
    /// `query-migrate-capabilities`
    QueryCapabilities,
}

/// Parameters to change; the others stay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ParameterChange {
    /// `max-bandwidth`, bytes per second.
    pub max_bandwidth: Option<u64>,
    /// `downtime-limit`.
    pub downtime_limit: Option<Duration>,
}

impl ParameterChange {
    /// `params` with the changes, checked.
    pub fn apply(self, mut params: Params) -> Result<Params, QmpError> {
        params.max_bandwidth = self.max_bandwidth.unwrap_or(params.max_bandwidth);
        params.downtime_limit = self.downtime_limit.unwrap_or(params.downtime_limit);
        params.validate().map_err(|error| QmpError::generic(error.to_string()))?;
        Ok(params)
    }
}

/// As `query-migrate-parameters` answers.
pub fn parameters(params: &Params) -> Value {
    json!({
        "max-bandwidth": params.max_bandwidth,
        "downtime-limit": u64::try_from(params.downtime_limit.as_millis()).unwrap_or(u64::MAX),
    })
}

/// Takes arguments one by one, then refuses the rest.
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

    fn flag(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        self.optional(name, "boolean", Value::as_bool)
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, QmpError> {
        self.optional(name, "string", |value| value.as_str().map(str::to_owned))
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

impl Command {
    /// Understands a request; QEMU's words for what is wrong with it.
    pub fn parse(request: &Request) -> Result<Self, QmpError> {
        let mut arguments = Arguments(request.arguments.clone());
        let command = match request.execute.as_str() {
            "query-version" => Self::QueryVersion,
            "query-commands" => Self::QueryCommands,
            "query-status" => Self::QueryStatus,
            "query-name" => Self::QueryName,
            "query-cpus-fast" => Self::QueryCpus,
            "query-block" => Self::QueryBlock,
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
                Self::Migrate { uri, disks, tuning }
            }
            "migrate_cancel" => Self::MigrateCancel,
            "query-migrate" => Self::QueryMigrate,
            "migrate-set-parameters" => Self::SetParameters(ParameterChange {
                max_bandwidth: arguments.number("max-bandwidth")?,
                downtime_limit: arguments.number("downtime-limit")?.map(Duration::from_millis),
            }),
            "query-migrate-parameters" => Self::QueryParameters,
            "migrate-set-capabilities" => {
                let list = arguments
                    .optional("capabilities", "array", |value| value.as_array().cloned())?
                    .ok_or_else(|| missing("capabilities"))?;
                Self::SetCapabilities(list.iter().map(capability).collect::<Result<_, _>>()?)
            }
            "query-migrate-capabilities" => Self::QueryCapabilities,
            other => {
                let desc = format!("The command {other} has not been found");
                return Err(QmpError::not_found(desc));
            }
        };
        arguments.none_left()?;
        Ok(command)
    }
}

/// `blk` copies disks as a whole, `inc` what lies above their backing files; `disks` says it one by one.
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

fn capability(value: &Value) -> Result<(String, bool), QmpError> {
    let name =
        value.get("capability").and_then(Value::as_str).ok_or_else(|| missing("capability"))?;
    let state = value.get("state").and_then(Value::as_bool).ok_or_else(|| missing("state"))?;
    match name {
        "events" => Ok((name.to_owned(), state)),
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
    fn parameters_are_checked() {
        let change = parse("migrate-set-parameters", json!({"downtime-limit": 2_000_001}));
        let Ok(Command::SetParameters(change)) = change else { panic!("{change:?}") };
        assert!(change.apply(Params::default()).is_err());
    }
}
