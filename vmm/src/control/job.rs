//! Arguments of the commands for block jobs and their targets, and replies to the queries. Used by `command`; the
//! supervisor executes them.

use super::arguments::{Arguments, Kind, Member, missing, needed, optional};
use super::message::QmpError;
use devices::block::Format;
use devices::block::copy::Side;
use devices::block::failure::OnError;
use devices::block::job::mirror::Sync;
use devices::block::job::{Cancel, CopyMode, JobEvent, JobInfo, JobOptions};
use devices::block::raw::Cache;
use serde_json::{Value, json};

/// What a job copies to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetSpec {
    /// `drive-mirror`, `drive-backup`: a file, block device or NBD server.
    File {
        /// `target`
        location: String,
        /// `format`; that of the disk by default.
        format: Option<Format>,
        /// Whether it is there already, and stays as it is.
        existing: bool,
    },
    /// `blockdev-mirror`, `blockdev-backup`: a node of `blockdev-add`.
    Node(String),
}

impl TargetSpec {
    /// Its name, if it is a node.
    pub fn node(&self) -> Option<&str> {
        match self {
            Self::Node(name) => Some(name),
            Self::File { .. } => None,
        }
    }
}

/// `drive-mirror` or `blockdev-mirror`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorSpec {
    /// The disk.
    pub device: String,
    pub target: TargetSpec,
    pub sync: Sync,
    /// Chosen by the target by default.
    pub granularity: Option<u64>,
    pub buf_size: Option<u64>,
    pub copy_mode: CopyMode,
    pub unmap: bool,
    pub job: JobOptions,
}

/// `blockdev-add`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSpec {
    pub name: String,
    /// An image, or an NBD address, if it is given.
    pub location: Option<String>,
    pub format: Format,
    pub read_only: bool,
    pub cache: Cache,
}

/// What is done to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobAction {
    SetSpeed(u64),
    Pause,
    Resume,
    Cancel(Cancel),
    Complete,
    Finalize,
    Dismiss,
    ChangeCopyMode(CopyMode),
}

/// A command to a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobCommand {
    /// The job's id.
    pub id: String,
    pub action: JobAction,
    /// Whether it is one of the commands for block jobs, which have an error of their own.
    pub of_block_job: bool,
}

pub(super) const ON_ERROR: Kind = Kind::Choice {
    name: "BlockdevOnError",
    values: &["report", "ignore", "enospc", "stop", "auto"],
};
const SYNC: Kind = Kind::Choice {
    name: "MirrorSyncMode",
    // The others of QEMU's are for backups.
    values: &["top", "full", "none"],
};
const COPY_MODE: Kind =
    Kind::Choice { name: "MirrorCopyMode", values: &["background", "write-blocking"] };

/// What commands take, beside `target`, that copy to a file.
pub(super) const COPY_TO: [Member; 2] = [
    optional("format", Kind::Choice { name: "x-ImageFormat", values: &["raw", "qcow2"] }),
    optional(
        "mode",
        Kind::Choice { name: "NewImageMode", values: &["existing", "absolute-paths"] },
    ),
];

/// What `drive-mirror` takes.
pub const DRIVE_MIRROR: &[Member] = &[
    optional("job-id", Kind::Text),
    needed("device", Kind::Text),
    needed("target", Kind::Text),
    needed("sync", SYNC),
    COPY_TO[0],
    COPY_TO[1],
    optional("node-name", Kind::Text),
    optional("replaces", Kind::Text),
    optional("speed", Kind::Whole),
    optional("granularity", Kind::Whole),
    optional("buf-size", Kind::Whole),
    optional("on-source-error", ON_ERROR),
    optional("on-target-error", ON_ERROR),
    optional("unmap", Kind::Flag),
    optional("copy-mode", COPY_MODE),
    optional("auto-finalize", Kind::Flag),
    optional("auto-dismiss", Kind::Flag),
];

/// What `blockdev-mirror` takes.
pub const BLOCKDEV_MIRROR: &[Member] = &[
    optional("job-id", Kind::Text),
    needed("device", Kind::Text),
    needed("target", Kind::Text),
    optional("replaces", Kind::Text),
    needed("sync", SYNC),
    optional("speed", Kind::Whole),
    optional("granularity", Kind::Whole),
    optional("buf-size", Kind::Whole),
    optional("on-source-error", ON_ERROR),
    optional("on-target-error", ON_ERROR),
    optional("filter-node-name", Kind::Text),
    optional("copy-mode", COPY_MODE),
    optional("auto-finalize", Kind::Flag),
    optional("auto-dismiss", Kind::Flag),
];

/// A file under a format, in QEMU's `BlockdevOptions`, or a format's file as a whole.
const PROTOCOL: Kind = Kind::Object {
    name: "x-BlockdevOptionsFile",
    members: &[
        needed(
            "driver",
            Kind::Choice { name: "x-BlockdevProtocol", values: &["file", "host_device", "nbd"] },
        ),
        optional("filename", Kind::Text),
        optional("node-name", Kind::Text),
        optional("server", SERVER),
        optional("export", Kind::Text),
    ],
};
const SERVER: Kind = Kind::Object {
    name: "x-SocketAddress",
    members: &[
        needed("type", Kind::Choice { name: "SocketAddressType", values: &["inet", "unix"] }),
        optional("path", Kind::Text),
        optional("host", Kind::Text),
        optional("port", Kind::Text),
    ],
};

/// What `blockdev-add` takes.
pub const BLOCKDEV_ADD: &[Member] = &[
    needed(
        "driver",
        Kind::Choice {
            name: "BlockdevDriver",
            values: &["raw", "qcow2", "file", "host_device", "nbd"],
        },
    ),
    needed("node-name", Kind::Text),
    optional("read-only", Kind::Flag),
    optional(
        "cache",
        Kind::Object {
            name: "BlockdevCacheOptions",
            members: &[optional("direct", Kind::Flag), optional("no-flush", Kind::Flag)],
        },
    ),
    optional("file", PROTOCOL),
    optional("filename", Kind::Text),
    optional("server", SERVER),
    optional("export", Kind::Text),
];

/// What the commands with a `device`, a block job's id, take.
pub const DEVICE: &[Member] = &[needed("device", Kind::Text)];
/// What the commands with an `id` take.
pub const ID: &[Member] = &[needed("id", Kind::Text)];
/// What `block-job-set-speed` takes.
pub const SET_SPEED: &[Member] = &[needed("device", Kind::Text), needed("speed", Kind::Whole)];
/// What `block-job-cancel` takes.
pub const CANCEL: &[Member] = &[needed("device", Kind::Text), optional("force", Kind::Flag)];
/// What `block-job-change` takes.
pub const CHANGE: &[Member] = &[
    needed("id", Kind::Text),
    needed("type", Kind::Choice { name: "JobType", values: &["mirror"] }),
    needed("copy-mode", COPY_MODE),
];

pub(super) fn text(arguments: &mut Arguments, name: &str) -> Result<String, QmpError> {
    arguments.text(name).ok_or_else(|| missing(name))
}

fn copy_mode(arguments: &mut Arguments) -> CopyMode {
    match arguments.text("copy-mode").as_deref() {
        Some("write-blocking") => CopyMode::WriteBlocking,
        _ => CopyMode::Background,
    }
}

fn on_error(arguments: &mut Arguments, name: &str) -> OnError {
    match arguments.text(name).as_deref() {
        Some("ignore") => OnError::Ignore,
        Some("stop") => OnError::Stop,
        Some("enospc" | "auto") => OnError::Enospc,
        _ => OnError::Report,
    }
}

/// Whether `id` can name a job or a node: QEMU's rule for ids, and bounded.
pub fn is_well_formed(id: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    id.len() <= 64 && id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.chars().all(fine)
}

/// Reads what every job takes; its id is that of the device by default.
pub(super) fn job_options(arguments: &mut Arguments, device: &str) -> Result<JobOptions, QmpError> {
    let id = arguments.text("job-id").unwrap_or_else(|| device.to_owned());
    if !is_well_formed(&id) {
        return Err(QmpError::generic(format!("Invalid job ID '{id}'")));
    }
    Ok(JobOptions {
        id,
        speed: arguments.number("speed").unwrap_or(0),
        auto_finalize: arguments.flag("auto-finalize").unwrap_or(true),
        auto_dismiss: arguments.flag("auto-dismiss").unwrap_or(true),
        on_source_error: on_error(arguments, "on-source-error"),
        on_target_error: on_error(arguments, "on-target-error"),
    })
}

fn mirror(
    arguments: &mut Arguments,
    target: impl FnOnce(&mut Arguments) -> Result<TargetSpec, QmpError>,
) -> Result<MirrorSpec, QmpError> {
    let device = text(arguments, "device")?;
    if let Some(replaces) = arguments.text("replaces").filter(|replaces| *replaces != device) {
        // A disk is one node here.
        let desc = format!("Parameter 'replaces' expects '{device}', not '{replaces}'");
        return Err(QmpError::generic(desc));
    }
    let sync = match text(arguments, "sync")?.as_str() {
        "full" => Sync::Full,
        "top" => Sync::Top,
        _ => Sync::None,
    };
    Ok(MirrorSpec {
        job: job_options(arguments, &device)?,
        target: target(arguments)?,
        sync,
        granularity: arguments.number("granularity").filter(|granularity| *granularity > 0),
        buf_size: arguments.number("buf-size").filter(|size| *size > 0),
        copy_mode: copy_mode(arguments),
        unmap: true,
        device,
    })
}

/// Reads which file is copied to.
pub(super) fn copy_to(arguments: &mut Arguments) -> Result<TargetSpec, QmpError> {
    let format = arguments.text("format").map(|format| format.parse());
    let format = format
        .transpose()
        .map_err(|error: String| QmpError::generic(format!("Parameter 'format': {error}")))?;
    let existing = arguments.text("mode").is_some_and(|mode| mode == "existing");
    Ok(TargetSpec::File { location: text(arguments, "target")?, format, existing })
}

/// Reads `drive-mirror`.
pub fn drive_mirror(arguments: &mut Arguments) -> Result<MirrorSpec, QmpError> {
    let unmap = arguments.flag("unmap").unwrap_or(true);
    // Nodes of this kind have no name of their own here.
    arguments.text("node-name");
    let spec = mirror(arguments, copy_to)?;
    Ok(MirrorSpec { unmap, ..spec })
}

/// Reads `blockdev-mirror`.
pub fn blockdev_mirror(arguments: &mut Arguments) -> Result<MirrorSpec, QmpError> {
    arguments.text("filter-node-name");
    mirror(arguments, |arguments| Ok(TargetSpec::Node(text(arguments, "target")?)))
}

/// An NBD server's address, as a URI.
fn nbd(server: &Value, export: Option<&str>) -> Result<String, QmpError> {
    let export = export.unwrap_or("");
    let part = |name: &str| server[name].as_str().ok_or_else(|| missing(name));
    Ok(match server["type"].as_str() {
        Some("unix") => format!("nbd:unix:{}:exportname={export}", part("path")?),
        _ => format!("nbd:{}:{}:exportname={export}", part("host")?, part("port")?),
    })
}

/// Reads `blockdev-add`.
pub fn blockdev_add(arguments: &mut Arguments) -> Result<NodeSpec, QmpError> {
    let name = text(arguments, "node-name")?;
    if !is_well_formed(&name) {
        return Err(QmpError::generic(format!("Invalid node-name: '{name}'")));
    }
    let driver = text(arguments, "driver")?;
    let read_only = arguments.flag("read-only").unwrap_or(false);
    let cache = arguments.object("cache").unwrap_or_default();
    if cache.get("no-flush").and_then(Value::as_bool) == Some(true) {
        return Err(QmpError::generic("Parameter 'cache.no-flush' is not supported"));
    }
    let direct = cache.get("direct").and_then(Value::as_bool) == Some(true);
    let cache = if direct { Cache::None } else { Cache::Writeback };
    let format = if driver == "qcow2" { Format::Qcow2 } else { Format::Raw };
    // A format has its file below it; a file or server stands for itself.
    let mut own = json!({
        "driver": driver,
        "filename": arguments.any("filename"),
        "server": arguments.any("server"),
        "export": arguments.any("export"),
    });
    let file = arguments.any("file").unwrap_or_default();
    if matches!(driver.as_str(), "raw" | "qcow2") {
        own = file;
    }
    let location = match own["driver"].as_str() {
        Some("nbd") if own["server"].is_null() => None,
        Some("nbd") => Some(nbd(&own["server"], own["export"].as_str())?),
        _ => own["filename"].as_str().map(str::to_owned),
    };
    Ok(NodeSpec { name, location, format, read_only, cache })
}

/// Reads a command whose job is its `device`.
pub fn of_device(
    arguments: &mut Arguments,
    action: impl FnOnce(&mut Arguments) -> JobAction,
) -> Result<JobCommand, QmpError> {
    let (id, action) = (text(arguments, "device")?, action(arguments));
    Ok(JobCommand { id, action, of_block_job: true })
}

/// Reads a command whose job is its `id`.
pub fn of_id(
    arguments: &mut Arguments,
    of_block_job: bool,
    action: JobAction,
) -> Result<JobCommand, QmpError> {
    Ok(JobCommand { id: text(arguments, "id")?, action, of_block_job })
}

/// Reads `block-job-set-speed`.
pub fn set_speed(arguments: &mut Arguments) -> JobAction {
    JobAction::SetSpeed(arguments.number("speed").unwrap_or(0))
}

/// Reads `block-job-cancel`.
pub fn cancel(arguments: &mut Arguments) -> JobAction {
    let force = arguments.flag("force").unwrap_or(false);
    JobAction::Cancel(if force { Cancel::Force } else { Cancel::Soft })
}

/// Reads `block-job-change`.
pub fn change(arguments: &mut Arguments) -> Result<JobCommand, QmpError> {
    arguments.text("type");
    let action = JobAction::ChangeCopyMode(copy_mode(arguments));
    of_id(arguments, true, action)
}

/// That no job has the id that a command names.
pub fn not_found(command: &JobCommand) -> QmpError {
    match command.of_block_job {
        true => QmpError::not_active(format!("Block job '{}' not found", command.id)),
        false => QmpError::generic("Job not found"),
    }
}

/// One element of the reply to `query-block-jobs`: QEMU's `BlockJobInfo`.
pub fn block_job(info: &JobInfo) -> Value {
    let mut shown = json!({
        "type": info.kind.name(),
        "device": info.id,
        "len": info.len_bytes,
        "offset": info.offset_bytes,
        "busy": info.busy,
        "paused": info.paused,
        "speed": info.speed,
        "io-status": info.io_status.name(),
        "ready": info.ready,
        "status": info.status.name(),
        "auto-finalize": info.auto_finalize,
        "auto-dismiss": info.auto_dismiss,
    });
    if let Some(error) = &info.error {
        shown["error"] = error.as_str().into();
    }
    if let Some(synced) = info.actively_synced {
        shown["actively-synced"] = synced.into();
    }
    shown
}

/// One element of the reply to `query-jobs`: QEMU's `JobInfo`.
pub fn job(info: &JobInfo) -> Value {
    let mut shown = json!({
        "id": info.id,
        "type": info.kind.name(),
        "status": info.status.name(),
        "current-progress": info.offset_bytes,
        "total-progress": info.len_bytes,
    });
    if let Some(error) = &info.error {
        shown["error"] = error.as_str().into();
    }
    shown
}

/// The data of an event about a block job.
fn progress(info: &JobInfo) -> Value {
    json!({
        "type": info.kind.name(),
        "device": info.id,
        "len": info.len_bytes,
        "offset": info.offset_bytes,
        "speed": info.speed,
    })
}

/// Name and data of a job's event.
pub fn event(event: &JobEvent) -> (&'static str, Value) {
    match event {
        JobEvent::Status { id, status } => {
            ("JOB_STATUS_CHANGE", json!({"id": id, "status": status.name()}))
        }
        JobEvent::Ready(info) => ("BLOCK_JOB_READY", progress(info)),
        JobEvent::Pending(info) => {
            ("BLOCK_JOB_PENDING", json!({"type": info.kind.name(), "id": info.id}))
        }
        JobEvent::Completed(info) => {
            let mut data = progress(info);
            if let Some(error) = &info.error {
                data["error"] = error.as_str().into();
            }
            ("BLOCK_JOB_COMPLETED", data)
        }
        JobEvent::Cancelled(info) => ("BLOCK_JOB_CANCELLED", progress(info)),
        JobEvent::Error { id, side, action } => {
            let operation = if *side == Side::Source { "read" } else { "write" };
            let data = json!({"device": id, "operation": operation, "action": action});
            ("BLOCK_JOB_ERROR", data)
        }
    }
}

/// Members of the data of events about block jobs.
pub const PROGRESS: &[Member] = &[
    needed("type", Kind::Text),
    needed("device", Kind::Text),
    needed("len", Kind::Whole),
    needed("offset", Kind::Whole),
    needed("speed", Kind::Whole),
];
/// Of `BLOCK_JOB_COMPLETED`.
pub const COMPLETED: &[Member] = &[
    needed("type", Kind::Text),
    needed("device", Kind::Text),
    needed("len", Kind::Whole),
    needed("offset", Kind::Whole),
    needed("speed", Kind::Whole),
    optional("error", Kind::Text),
];
/// Of `BLOCK_JOB_ERROR`.
pub const ERROR: &[Member] =
    &[needed("device", Kind::Text), needed("operation", Kind::Text), needed("action", Kind::Text)];
/// Of `BLOCK_JOB_PENDING`.
pub const PENDING: &[Member] = &[needed("type", Kind::Text), needed("id", Kind::Text)];
/// Of `JOB_STATUS_CHANGE`.
pub const STATUS: &[Member] = &[needed("id", Kind::Text), needed("status", Kind::Text)];
