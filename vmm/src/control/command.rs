//! QMP commands: one table of their names, arguments and replies, by which requests become typed commands.
//! The supervisor executes them.

use super::arguments::{Arguments, EMPTY, Kind, Member, missing, needed, optional};
use super::backup::{self, BackupSpec};
use super::bitmap::{self, BitmapAction, BitmapChange};
use super::cpu_model::{self, Expansion};
use super::export::{self, ExportCommand};
use super::job::{self, JobAction, JobCommand, MirrorSpec, NodeSpec};
use super::message::{QmpError, Request};
use super::options::{
    CAPABILITIES, Capability, OwnOptions, PARAMETERS, ParameterChange, capabilities, migration_id,
};
use crate::disk_selection::{DiskMode, DiskSelection};
use devices::block::bitmaps::BitmapName;
use devices::block::job::Cancel;
use migration::block::Tuning;
use std::time::Duration;

/// An action of a transaction that begins backups.
#[derive(Debug, Clone, PartialEq)]
pub enum BackupStep {
    /// Changes a bitmap.
    Bitmap(BitmapAction),
    /// Begins a backup.
    Backup(Box<BackupSpec>),
}

/// A parsed command.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// `qmp_capabilities`, which is valid only as the first command.
    Negotiate,
    /// `query-version`
    QueryVersion,
    /// `query-commands`
    QueryCommands,
    /// `query-qmp-schema`
    QuerySchema,
    /// `query-status`
    QueryStatus,
    /// `query-name`
    QueryName,
    /// `query-uuid`
    QueryUuid,
    /// `query-kvm`
    QueryKvm,
    /// `query-cpu-model-expansion`
    ExpandCpuModel(Expansion),
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
    /// `block-dirty-bitmap-add` and the like, or `transaction`: all of them, or none.
    ChangeBitmaps(Vec<BitmapAction>),
    /// `x-block-dirty-bitmap-store`
    StoreBitmaps {
        /// The disk.
        node: String,
    },
    /// `x-debug-block-dirty-bitmap-sha256`
    BitmapSha256 {
        /// The disk.
        node: String,
        /// The bitmap.
        name: BitmapName,
    },
    /// `drive-backup` or `blockdev-backup`, or a transaction with one: all of the steps, or none.
    Backup(Vec<BackupStep>),
    /// `drive-mirror` or `blockdev-mirror`
    Mirror(Box<MirrorSpec>),
    /// `blockdev-add`
    AddNode(NodeSpec),
    /// `blockdev-del`
    DeleteNode {
        /// The node.
        name: String,
    },
    /// `query-block-jobs`
    QueryBlockJobs,
    /// `query-jobs`
    QueryJobs,
    /// A command to a block job.
    Job(JobCommand),
    /// `block-export-add` and the like.
    Export(ExportCommand),
    /// `query-block-exports`
    QueryExports,
    /// `stop`
    Stop,
    /// `cont`
    Cont {
        /// `x-force`: run a guest whose migration ended as unknown; the operator confirms that it runs
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
        /// `x-disks`, or QEMU's `blk` and `inc`: which disks to migrate. `None`: the capability `block` says it.
        disks: Option<DiskSelection>,
        /// `x-disk-reads` and `x-disk-buffers`.
        tuning: Tuning,
        /// What holds for this migration alone.
        own: OwnOptions,
    },
    /// `migrate_cancel`
    MigrateCancel,
    /// `x-migrate-give-up`
    MigrateGiveUp,
    /// `query-migrate`
    QueryMigrate {
        /// `x-id`: of this migration rather than the last one.
        id: Option<String>,
    },
    /// `migrate-set-parameters`
    SetParameters(ParameterChange),
    /// `query-migrate-parameters`
    QueryParameters,
    /// `query-migrate-cache-size`, QEMU's until 5.2, with `migrate-set-cache-size`.
    QueryCacheSize,
    /// `migrate-set-capabilities`
    SetCapabilities(Vec<(Capability, bool)>),
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

/// A command, as the table has it.
pub struct Entry {
    /// Its name.
    pub name: &'static str,
    /// Its arguments.
    pub arguments: &'static [Member],
    /// Its reply.
    pub returns: Kind,
    /// Reads the arguments, which have been checked.
    read: fn(&mut Arguments) -> Result<Command, QmpError>,
}

impl Entry {
    pub(super) const fn new(
        name: &'static str,
        arguments: &'static [Member],
        returns: Kind,
        read: fn(&mut Arguments) -> Result<Command, QmpError>,
    ) -> Self {
        Self { name, arguments, returns, read }
    }
}

const fn object(name: &'static str, members: &'static [Member]) -> Kind {
    Kind::Object { name, members }
}

/// The command that ends the negotiation.
pub const NEGOTIATION: &str = "qmp_capabilities";

const TIME_UNIT: Kind = Kind::Choice { name: "TimeUnit", values: &["second", "millisecond"] };

/// All commands: what requests are checked and parsed by, and `query-commands` and `query-qmp-schema` show.
/// Ferry's own commands and arguments begin with `x-`.
pub const COMMANDS: &[Entry] = &[
    Entry::new(
        NEGOTIATION,
        &[optional(
            "enable",
            Kind::List(&Kind::Choice { name: "QMPCapability", values: &["oob"] }),
        )],
        EMPTY,
        negotiation,
    ),
    Entry::new("query-version", &[], Kind::Any, |_| Ok(Command::QueryVersion)),
    Entry::new(
        "query-commands",
        &[],
        Kind::List(&object("CommandInfo", &[needed("name", Kind::Text)])),
        |_| Ok(Command::QueryCommands),
    ),
    Entry::new("query-qmp-schema", &[], Kind::List(&Kind::Any), |_| Ok(Command::QuerySchema)),
    Entry::new(
        "query-status",
        &[],
        object(
            "StatusInfo",
            &[
                needed("status", Kind::Text),
                needed("running", Kind::Flag),
                needed("singlestep", Kind::Flag),
            ],
        ),
        |_| Ok(Command::QueryStatus),
    ),
    Entry::new("query-name", &[], object("NameInfo", &[optional("name", Kind::Text)]), |_| {
        Ok(Command::QueryName)
    }),
    Entry::new("query-uuid", &[], object("UuidInfo", &[needed("UUID", Kind::Text)]), |_| {
        Ok(Command::QueryUuid)
    }),
    Entry::new(
        "query-kvm",
        &[],
        object("KvmInfo", &[needed("enabled", Kind::Flag), needed("present", Kind::Flag)]),
        |_| Ok(Command::QueryKvm),
    ),
    Entry::new(
        "query-cpu-model-expansion",
        cpu_model::EXPANSION,
        cpu_model::EXPANDED,
        |arguments| Ok(Command::ExpandCpuModel(cpu_model::expansion(arguments)?)),
    ),
    Entry::new(
        "query-memory-size-summary",
        &[],
        object(
            "MemoryInfo",
            &[needed("base-memory", Kind::Whole), optional("plugged-memory", Kind::Whole)],
        ),
        |_| Ok(Command::QueryMemorySize),
    ),
    Entry::new("query-cpus-fast", &[], Kind::List(&Kind::Any), |_| Ok(Command::QueryCpus)),
    Entry::new("query-block", &[], Kind::List(&Kind::Any), |_| Ok(Command::QueryBlock)),
    Entry::new(
        "query-named-block-nodes",
        &[optional("flat", Kind::Flag)],
        Kind::List(&Kind::Any),
        |arguments| {
            // Without effect: our node list is flat anyway.
            arguments.flag("flat");
            Ok(Command::QueryNamedBlockNodes)
        },
    ),
    Entry::new(
        "query-blockstats",
        &[optional("query-nodes", Kind::Flag)],
        Kind::List(&Kind::Any),
        |arguments| {
            // Without effect: every disk is one node.
            arguments.flag("query-nodes");
            Ok(Command::QueryBlockStats)
        },
    ),
    Entry::new("block-dirty-bitmap-add", bitmap::ADD, EMPTY, |arguments| {
        change(bitmap::add(arguments)?)
    }),
    Entry::new("block-dirty-bitmap-remove", bitmap::NAMED, EMPTY, |arguments| {
        change(bitmap::simple(arguments, BitmapChange::Remove)?)
    }),
    Entry::new("block-dirty-bitmap-clear", bitmap::NAMED, EMPTY, |arguments| {
        change(bitmap::simple(arguments, BitmapChange::Clear)?)
    }),
    Entry::new("block-dirty-bitmap-enable", bitmap::NAMED, EMPTY, |arguments| {
        change(bitmap::simple(arguments, BitmapChange::Enable)?)
    }),
    Entry::new("block-dirty-bitmap-disable", bitmap::NAMED, EMPTY, |arguments| {
        change(bitmap::simple(arguments, BitmapChange::Disable)?)
    }),
    Entry::new("block-dirty-bitmap-merge", bitmap::MERGE, EMPTY, |arguments| {
        change(bitmap::merge(arguments)?)
    }),
    Entry::new("x-block-dirty-bitmap-store", &[needed("node", Kind::Text)], EMPTY, |arguments| {
        let node = arguments.text("node").ok_or_else(|| missing("node"))?;
        Ok(Command::StoreBitmaps { node })
    }),
    Entry::new("drive-mirror", job::DRIVE_MIRROR, EMPTY, |arguments| {
        Ok(Command::Mirror(Box::new(job::drive_mirror(arguments)?)))
    }),
    Entry::new("blockdev-mirror", job::BLOCKDEV_MIRROR, EMPTY, |arguments| {
        Ok(Command::Mirror(Box::new(job::blockdev_mirror(arguments)?)))
    }),
    Entry::new("drive-backup", backup::DRIVE_BACKUP, EMPTY, |arguments| {
        Ok(begin(backup::drive_backup(arguments)?))
    }),
    Entry::new("blockdev-backup", backup::BLOCKDEV_BACKUP, EMPTY, |arguments| {
        Ok(begin(backup::blockdev_backup(arguments)?))
    }),
    Entry::new("blockdev-add", job::BLOCKDEV_ADD, EMPTY, |arguments| {
        Ok(Command::AddNode(job::blockdev_add(arguments)?))
    }),
    Entry::new("blockdev-del", &[needed("node-name", Kind::Text)], EMPTY, |arguments| {
        let name = arguments.text("node-name").ok_or_else(|| missing("node-name"))?;
        Ok(Command::DeleteNode { name })
    }),
    Entry::new("query-block-jobs", &[], Kind::List(&Kind::Any), |_| Ok(Command::QueryBlockJobs)),
    Entry::new("query-jobs", &[], Kind::List(&Kind::Any), |_| Ok(Command::QueryJobs)),
    Entry::new("block-job-set-speed", job::SET_SPEED, EMPTY, |arguments| {
        Ok(Command::Job(job::of_device(arguments, job::set_speed)?))
    }),
    Entry::new("block-job-cancel", job::CANCEL, EMPTY, |arguments| {
        Ok(Command::Job(job::of_device(arguments, job::cancel)?))
    }),
    Entry::new("block-job-pause", job::DEVICE, EMPTY, |arguments| {
        Ok(Command::Job(job::of_device(arguments, |_| JobAction::Pause)?))
    }),
    Entry::new("block-job-resume", job::DEVICE, EMPTY, |arguments| {
        Ok(Command::Job(job::of_device(arguments, |_| JobAction::Resume)?))
    }),
    Entry::new("block-job-complete", job::DEVICE, EMPTY, |arguments| {
        Ok(Command::Job(job::of_device(arguments, |_| JobAction::Complete)?))
    }),
    Entry::new("block-job-finalize", job::ID, EMPTY, |arguments| {
        Ok(Command::Job(job::of_id(arguments, true, JobAction::Finalize)?))
    }),
    Entry::new("block-job-dismiss", job::ID, EMPTY, |arguments| {
        Ok(Command::Job(job::of_id(arguments, true, JobAction::Dismiss)?))
    }),
    Entry::new("block-job-change", job::CHANGE, EMPTY, |arguments| {
        Ok(Command::Job(job::change(arguments)?))
    }),
    Entry::new("job-pause", job::ID, EMPTY, |arguments| of_job(arguments, JobAction::Pause)),
    Entry::new("job-resume", job::ID, EMPTY, |arguments| of_job(arguments, JobAction::Resume)),
    Entry::new("job-cancel", job::ID, EMPTY, |arguments| {
        of_job(arguments, JobAction::Cancel(Cancel::Force))
    }),
    Entry::new("job-complete", job::ID, EMPTY, |arguments| of_job(arguments, JobAction::Complete)),
    Entry::new("job-finalize", job::ID, EMPTY, |arguments| of_job(arguments, JobAction::Finalize)),
    Entry::new("job-dismiss", job::ID, EMPTY, |arguments| of_job(arguments, JobAction::Dismiss)),
    Entry::new("transaction", bitmap::TRANSACTION, EMPTY, transaction),
    Entry::new(
        "x-debug-block-dirty-bitmap-sha256",
        bitmap::NAMED,
        object("BlockDirtyBitmapSha256", &[needed("sha256", Kind::Text)]),
        |arguments| {
            let (node, name) = bitmap::named(arguments)?;
            Ok(Command::BitmapSha256 { node, name })
        },
    ),
    Entry::new("nbd-server-start", export::START, EMPTY, |arguments| {
        Ok(Command::Export(export::start(arguments)?))
    }),
    Entry::new("nbd-server-stop", &[], EMPTY, |_| Ok(Command::Export(ExportCommand::Stop))),
    Entry::new("nbd-server-add", export::NBD_ADD, EMPTY, |arguments| {
        Ok(Command::Export(export::nbd_add(arguments)?))
    }),
    Entry::new(
        "nbd-server-remove",
        &[needed("name", Kind::Text), export::MODE],
        EMPTY,
        |arguments| Ok(Command::Export(export::remove(arguments, "name")?)),
    ),
    Entry::new("block-export-add", export::ADD, EMPTY, |arguments| {
        Ok(Command::Export(export::add(arguments)?))
    }),
    Entry::new("block-export-del", &[needed("id", Kind::Text), export::MODE], EMPTY, |arguments| {
        Ok(Command::Export(export::remove(arguments, "id")?))
    }),
    Entry::new("query-block-exports", &[], Kind::List(&export::INFO), |_| {
        Ok(Command::QueryExports)
    }),
    Entry::new("stop", &[], EMPTY, |_| Ok(Command::Stop)),
    Entry::new("cont", &[optional("x-force", Kind::Flag)], EMPTY, |arguments| {
        Ok(Command::Cont { force: arguments.flag("x-force").unwrap_or(false) })
    }),
    Entry::new("system_reset", &[], EMPTY, |_| Ok(Command::Reset)),
    Entry::new("system_powerdown", &[], EMPTY, |_| Ok(Command::Powerdown)),
    Entry::new("quit", &[], EMPTY, |_| Ok(Command::Quit)),
    Entry::new(
        "x-console-input",
        &[needed("data", Kind::Text)],
        object("x-ConsoleInput", &[needed("taken", Kind::Whole)]),
        console_input,
    ),
    Entry::new(
        "migrate",
        &[
            needed("uri", Kind::Text),
            optional("blk", Kind::Flag),
            optional("inc", Kind::Flag),
            optional("detach", Kind::Flag),
            optional("resume", Kind::Flag),
            // A mode, or an object of modes by disk.
            optional("x-disks", Kind::Any),
            optional("x-disk-reads", Kind::Whole),
            optional("x-disk-buffers", Kind::Whole),
            optional("x-id", Kind::Text),
            optional("x-parameters", object("MigrateSetParameters", PARAMETERS)),
            optional("x-capabilities", CAPABILITIES),
            optional("x-end-source", Kind::Flag),
        ],
        EMPTY,
        migrate,
    ),
    Entry::new("migrate_cancel", &[], EMPTY, |_| Ok(Command::MigrateCancel)),
    Entry::new("x-migrate-give-up", &[], EMPTY, |_| Ok(Command::MigrateGiveUp)),
    Entry::new("query-migrate", &[optional("x-id", Kind::Text)], Kind::Any, |arguments| {
        Ok(Command::QueryMigrate { id: migration_id(arguments)? })
    }),
    Entry::new("migrate-set-parameters", PARAMETERS, EMPTY, |arguments| {
        Ok(Command::SetParameters(ParameterChange::parse(arguments)?))
    }),
    Entry::new("query-migrate-parameters", &[], object("MigrationParameters", PARAMETERS), |_| {
        Ok(Command::QueryParameters)
    }),
    Entry::new("migrate-set-cache-size", &[needed("value", Kind::Whole)], EMPTY, |arguments| {
        let xbzrle_cache_size = arguments.number("value");
        Ok(Command::SetParameters(ParameterChange { xbzrle_cache_size, ..Default::default() }))
    }),
    Entry::new("query-migrate-cache-size", &[], Kind::Whole, |_| Ok(Command::QueryCacheSize)),
    Entry::new(
        "migrate-set-capabilities",
        &[needed("capabilities", CAPABILITIES)],
        EMPTY,
        |arguments| {
            let list = arguments.list("capabilities").ok_or_else(|| missing("capabilities"))?;
            Ok(Command::SetCapabilities(capabilities(list)?))
        },
    ),
    Entry::new("query-migrate-capabilities", &[], CAPABILITIES, |_| Ok(Command::QueryCapabilities)),
    Entry::new(
        "calc-dirty-rate",
        &[
            needed("calc-time", Kind::Whole),
            optional("calc-time-unit", TIME_UNIT),
            optional("sample-pages", Kind::Whole),
            // QEMU's other ways do not look at every page.
            optional(
                "mode",
                Kind::Choice { name: "DirtyRateMeasureMode", values: &["dirty-bitmap"] },
            ),
        ],
        EMPTY,
        |arguments| Ok(Command::CalcDirtyRate(calc_time(arguments)?)),
    ),
    Entry::new(
        "query-dirty-rate",
        &[optional("calc-time-unit", TIME_UNIT)],
        Kind::Any,
        |arguments| Ok(Command::QueryDirtyRate { in_millis: in_millis(arguments) }),
    ),
];

impl Command {
    /// Parses a request; errors use QEMU's wording.
    pub fn parse(request: &Request) -> Result<Self, QmpError> {
        let Some(entry) = COMMANDS.iter().find(|entry| entry.name == request.execute) else {
            let desc = format!("The command {} has not been found", request.execute);
            return Err(QmpError::not_found(desc));
        };
        let mut arguments = Arguments::new(entry.arguments, request.arguments.clone())?;
        let command = (entry.read)(&mut arguments)?;
        debug_assert!(arguments.are_read(), "{}: an argument is listed but not read", entry.name);
        Ok(command)
    }
}

/// The greeting offers no capability, so none can be enabled.
fn negotiation(arguments: &mut Arguments) -> Result<Command, QmpError> {
    let wanted = arguments.list("enable").unwrap_or_default();
    match wanted.iter().find_map(|name| name.as_str()) {
        Some(name) => Err(QmpError::generic(format!("Capability {name} not available"))),
        None => Ok(Command::Negotiate),
    }
}

fn change(action: BitmapAction) -> Result<Command, QmpError> {
    Ok(Command::ChangeBitmaps(vec![action]))
}

fn of_job(arguments: &mut Arguments, action: JobAction) -> Result<Command, QmpError> {
    Ok(Command::Job(job::of_id(arguments, false, action)?))
}

fn begin(spec: BackupSpec) -> Command {
    Command::Backup(vec![BackupStep::Backup(Box::new(spec))])
}

/// An action is the command of the same name.
fn transaction(arguments: &mut Arguments) -> Result<Command, QmpError> {
    let mut all = Vec::new();
    for action in bitmap::transaction(arguments)? {
        match Command::parse(&action)? {
            Command::ChangeBitmaps(actions) => {
                all.extend(actions.into_iter().map(BackupStep::Bitmap));
            }
            Command::Backup(steps) => all.extend(steps),
            _ => {
                let desc = format!("{} cannot be part of a transaction", action.execute);
                return Err(QmpError::generic(desc));
            }
        }
    }
    if all.iter().any(|step| matches!(step, BackupStep::Backup(_))) {
        return Ok(Command::Backup(all));
    }
    let change = |step| match step {
        BackupStep::Bitmap(action) => Some(action),
        BackupStep::Backup(_) => None,
    };
    Ok(Command::ChangeBitmaps(all.into_iter().filter_map(change).collect()))
}

fn console_input(arguments: &mut Arguments) -> Result<Command, QmpError> {
    let data = arguments.text("data").ok_or_else(|| missing("data"))?;
    let bytes: Result<_, _> = data.chars().map(u8::try_from).collect();
    let bytes =
        bytes.map_err(|_| QmpError::generic("Parameter 'data' expects characters up to U+00FF"))?;
    Ok(Command::ConsoleInput(bytes))
}

fn migrate(arguments: &mut Arguments) -> Result<Command, QmpError> {
    let uri = arguments.text("uri").ok_or_else(|| missing("uri"))?;
    // Always detached, as in QEMU.
    arguments.flag("detach");
    if arguments.flag("resume") == Some(true) {
        return Err(QmpError::generic("Parameter 'resume' is not supported"));
    }
    let disks = disk_selection(arguments)?;
    let limits = Tuning::default();
    let reads = arguments.count("x-disk-reads", Tuning::MAX_READS)?;
    let buffers = arguments.count("x-disk-buffers", Tuning::MAX_BUFFERS)?;
    let tuning =
        Tuning { reads: reads.unwrap_or(limits.reads), buffers: buffers.unwrap_or(limits.buffers) };
    let own = OwnOptions::parse(arguments)?;
    Ok(Command::Migrate { uri, disks, tuning, own })
}

/// `blk` copies whole disks, `inc` the data above their backing files; `x-disks` chooses per disk. `None` if
/// none of them is given.
fn disk_selection(arguments: &mut Arguments) -> Result<Option<DiskSelection>, QmpError> {
    let blk = arguments.flag("blk").unwrap_or(false);
    let inc = arguments.flag("inc").unwrap_or(false);
    let others = match (blk, inc) {
        (_, true) => DiskMode::Top,
        (true, false) => DiskMode::Full,
        (false, false) => DiskMode::None,
    };
    let Some(value) = arguments.any("x-disks") else {
        let given = others != DiskMode::None;
        return Ok(given.then_some(DiskSelection { others, named: Vec::new() }));
    };
    let mut selection = DiskSelection::from_json(&value)
        .map_err(|error| QmpError::generic(format!("Parameter 'x-disks': {error}")))?;
    if others != DiskMode::None {
        if !value.is_object() {
            let desc = "Parameter 'x-disks' says for all disks what 'blk' or 'inc' says already";
            return Err(QmpError::generic(desc));
        }
        selection.others = others;
    }
    Ok(Some(selection))
}

/// Whether `calc-time-unit` is milliseconds.
fn in_millis(arguments: &mut Arguments) -> bool {
    arguments.text("calc-time-unit").is_some_and(|unit| unit == "millisecond")
}

/// The duration of `calc-dirty-rate`.
fn calc_time(arguments: &mut Arguments) -> Result<Duration, QmpError> {
    const RANGE: std::ops::RangeInclusive<Duration> =
        Duration::from_millis(50)..=Duration::from_secs(60);
    let time = arguments.number("calc-time").ok_or_else(|| missing("calc-time"))?;
    let time = match in_millis(arguments) {
        true => Duration::from_millis(time),
        false => Duration::from_secs(time),
    };
    // Without effect: the dirty log covers every page, so nothing is sampled, and there is one mode.
    arguments.number("sample-pages");
    arguments.text("mode");
    if !RANGE.contains(&time) {
        return Err(QmpError::generic(
            "Parameter 'calc-time' expects a time in the range of 50 milliseconds to 60 seconds",
        ));
    }
    Ok(time)
}

#[cfg(test)]
mod tests;
