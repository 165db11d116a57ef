//! Block jobs and the nodes that they copy to. Opening a target may take as long as its storage hangs, and so a task
//! does it; the job has a thread of its own.

use super::Supervisor;
use super::messages::Message;
use super::tasks::{Done, TaskId};
use crate::control::backup::BackupSpec;
use crate::control::job::{JobAction, JobCommand, MirrorSpec, NodeSpec, TargetSpec, not_found};
use crate::control::message::{MIGRATION_IN_PROGRESS, QmpError};
use crate::control::{Event, Incoming, QmpResult};
use crate::error::chain;
use crate::targets::{self, NewTarget, Target};
use devices::block::copy::Pair;
use devices::block::job::mirror::{
    DEFAULT_BUF_SIZE, DEFAULT_GRANULARITY, Mirror, MirrorOptions, Sync,
};
use devices::block::job::{Cancel, Job, JobEvent, JobInfo, JobKind, JobStatus, NewJob};
use devices::block::{BlockNode, Format};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Most jobs, and most nodes beside the guest's disks.
const MAX_JOBS: usize = 16;
const MAX_NODES: usize = 32;
/// How long opening a target may take before the client hears that it takes too long.
const OPENING: Duration = Duration::from_secs(60);

/// What a task opens a target for.
pub(super) enum For {
    /// To be a node of this name.
    Node(String),
    Mirror(Box<MirrorSpec>, Arc<BlockNode>),
    /// Of a transaction, in its order.
    Backups(Vec<BackupSpec>),
}

impl For {
    /// The jobs that it is for, with the names of their targets that are nodes.
    fn jobs(&self) -> Vec<(&str, Option<&str>)> {
        match self {
            Self::Node(_) => Vec::new(),
            Self::Mirror(spec, _) => vec![(spec.job.id.as_str(), spec.target.node())],
            Self::Backups(specs) => {
                specs.iter().map(|spec| (spec.job.id.as_str(), spec.target.node())).collect()
            }
        }
    }
}

/// The jobs and the nodes beside the guest's disks.
#[derive(Default)]
pub(super) struct BlockJobs {
    jobs: Vec<Arc<Job>>,
    nodes: BTreeMap<String, Target>,
    opening: BTreeMap<TaskId, (Incoming, For)>,
    /// Those that the guest's move waits for.
    moving: Vec<Arc<Job>>,
}

impl BlockJobs {
    /// Shows every job.
    pub fn query(&self, show: fn(&JobInfo) -> Value) -> Value {
        self.jobs.iter().map(|job| show(&job.info())).collect()
    }

    /// The nodes beside the guest's disks.
    pub fn nodes(&self) -> impl Iterator<Item = &BlockNode> {
        self.nodes.values().map(|target| target.node.as_ref())
    }

    /// The mirrors that go on while the guest moves, or why it cannot.
    pub fn for_a_move(&mut self) -> Result<Vec<Arc<Job>>, String> {
        for job in self.jobs.iter().filter(|job| !job.has_ended()) {
            let info = job.info();
            // One that switches the disk over would leave the destination with another image than ours.
            if !info.ready || info.status != JobStatus::Ready || job.is_told_to_complete() {
                return Err(format!(
                    "The guest cannot move while job '{}' is {}: wait until it is ready, or cancel it",
                    info.id,
                    info.status.name()
                ));
            }
        }
        self.moving = self.jobs.iter().filter(|job| !job.has_ended()).cloned().collect();
        Ok(self.moving.clone())
    }

    /// The guest has moved. The mirrors that its move has waited for have all that it wrote here; one that was started
    /// meanwhile may not, and the disk is another's now.
    pub fn guest_has_moved(&mut self) {
        let waited_for = std::mem::take(&mut self.moving);
        for job in &self.jobs {
            let is_whole = waited_for.iter().any(|other| Arc::ptr_eq(other, job));
            let how = if is_whole { Cancel::Soft } else { Cancel::Force };
            if let Err(error) = job.cancel(how) {
                log::debug!("{error}");
            }
        }
    }

    /// A backup that runs or is about to: its id, and the disk's if it runs.
    pub fn backup(&self) -> Option<(String, String)> {
        let runs = |job: &&Arc<Job>| job.info().kind == JobKind::Backup && !job.has_ended();
        let running = self.jobs.iter().find(runs);
        running.map(|job| (job.id().to_owned(), job.device().to_owned())).or_else(|| {
            self.opening.values().find_map(|(_, what)| match what {
                For::Backups(specs) => {
                    specs.first().map(|spec| (spec.job.id.clone(), spec.device.clone()))
                }
                _ => None,
            })
        })
    }

    /// Takes in a job.
    pub fn add(&mut self, job: Arc<Job>) {
        self.jobs.push(job);
    }

    /// How many jobs there are, or are about to be.
    pub fn count(&self) -> usize {
        let opening = self.opening.values().map(|(_, what)| what.jobs().len());
        self.jobs.len() + opening.sum::<usize>()
    }

    fn find(&self, id: &str) -> Option<&Arc<Job>> {
        self.jobs.iter().find(|job| job.id() == id)
    }

    /// The id of the job that uses a node as its target, or is about to.
    fn user_of(&self, name: &str) -> Option<String> {
        let uses = |job: &&Arc<Job>| job.target() == Some(name) && !job.has_ended();
        let running = self.jobs.iter().find(uses).map(|job| job.id().to_owned());
        running.or_else(|| {
            let opening = self.opening.values().flat_map(|(_, what)| what.jobs());
            let mut opening = opening.filter(|(_, target)| *target == Some(name));
            opening.next().map(|(id, _)| id.to_owned())
        })
    }

    fn is_id_taken(&self, id: &str) -> bool {
        let mut opening = self.opening.values().flat_map(|(_, what)| what.jobs());
        self.find(id).is_some() || opening.any(|(other, _)| other == id)
    }

    fn is_name_taken(&self, name: &str) -> bool {
        let opens = |(_, what): &(Incoming, For)| matches!(what, For::Node(other) if other == name);
        self.nodes.contains_key(name) || self.opening.values().any(opens)
    }
}

/// The granularity that a target likes best: its cluster size within 4 to 64 KiB, as in QEMU.
fn granularity_of(target: &BlockNode) -> u64 {
    let cluster = target.cluster_bytes().unwrap_or(DEFAULT_GRANULARITY);
    cluster.clamp(4 << 10, 64 << 10)
}

impl Supervisor {
    fn disk(&self, name: &str) -> Result<Arc<BlockNode>, QmpError> {
        let disks = self.machine.as_ref().map(|machine| machine.disks()).unwrap_or_default();
        let found = disks.iter().find(|disk| disk.node.id() == name);
        found.map(|disk| disk.node.clone()).ok_or_else(|| {
            QmpError::generic(format!("Cannot find device='{name}' nor node-name='{name}'"))
        })
    }

    /// Everything that is open: none of it may be a target.
    pub(super) fn open_nodes(&self) -> Vec<Arc<BlockNode>> {
        let disks = self.machine.as_ref().map(|machine| machine.nodes()).unwrap_or_default();
        let targets = self.block_jobs.nodes.values().map(|target| target.node.clone());
        disks.into_iter().chain(targets).collect()
    }

    /// That one more may be opened or started.
    fn check_free(&self) -> Result<(), QmpError> {
        self.check_free_for(0)
    }

    /// That one more job may be started beside those that there are and `more`.
    pub(super) fn check_free_for(&self, more: usize) -> Result<(), QmpError> {
        if self.mode.host().with_parent {
            let desc = "Block jobs cannot be combined with --migrate-every";
            return Err(QmpError::generic(desc));
        }
        if self.block_jobs.count() + more >= MAX_JOBS {
            let desc = format!("There are {MAX_JOBS} jobs already: dismiss one first");
            return Err(QmpError::generic(desc));
        }
        Ok(())
    }

    /// Executes `drive-mirror` and `blockdev-mirror`.
    pub(super) fn mirror(&mut self, spec: &MirrorSpec, request: &Incoming) -> Option<QmpResult> {
        match self.check_mirror(spec) {
            Err(error) => Some(Err(error)),
            Ok((source, Some(target))) => Some(self.start_mirror(spec, source, target)),
            Ok((source, None)) => {
                let TargetSpec::File { location, format, existing } = &spec.target else {
                    return Some(Err(QmpError::generic("a target is a file or a node")));
                };
                let own = if source.format() == "qcow2" { Format::Qcow2 } else { Format::Raw };
                let new = NewTarget {
                    location: location.clone(),
                    format: format.unwrap_or(own),
                    existing: *existing,
                    sync: spec.sync,
                    source: source.clone(),
                    direct: source.is_direct(),
                };
                let open = self.open_nodes();
                let what = For::Mirror(Box::new(spec.clone()), source);
                self.open_target(what, request, move || targets::create(&new, &open))
            }
        }
    }

    fn check_mirror(
        &self,
        spec: &MirrorSpec,
    ) -> Result<(Arc<BlockNode>, Option<Target>), QmpError> {
        self.check_free()?;
        self.disks_are_here()?;
        let source = self.check_job(&spec.device, &spec.job.id)?;
        let target = spec.target.node().map(|name| self.check_target(&source, name));
        Ok((source, target.transpose()?))
    }

    /// The disk that a job works on, if there may be a job of this id.
    pub(super) fn check_job(&self, device: &str, id: &str) -> Result<Arc<BlockNode>, QmpError> {
        let source = self.disk(device)?;
        if self.block_jobs.is_id_taken(id) {
            return Err(QmpError::generic(format!("Job ID '{id}' already in use")));
        }
        Ok(source)
    }

    /// The node `name`, if a job may write to it.
    pub(super) fn check_target(&self, source: &BlockNode, name: &str) -> Result<Target, QmpError> {
        if name == source.id() {
            return Err(QmpError::generic("Can't mirror node into itself"));
        }
        if self.disk(name).is_ok() {
            return Err(QmpError::generic(format!(
                "Node '{name}' is busy: it is a disk of the guest"
            )));
        }
        let Some(target) = self.block_jobs.nodes.get(name) else {
            let desc = format!("Cannot find device='' nor node-name='{name}'");
            return Err(QmpError::generic(desc));
        };
        if let Some(job) = self.block_jobs.user_of(name) {
            let desc = format!("Node '{name}' is busy: block device is in use by block job: {job}");
            return Err(QmpError::generic(desc));
        }
        Ok(target.clone())
    }

    fn start_mirror(
        &mut self,
        spec: &MirrorSpec,
        source: Arc<BlockNode>,
        target: Target,
    ) -> QmpResult {
        // The guest may have left while the target was opened.
        self.disks_are_here()?;
        let refused = |error: &dyn std::error::Error| QmpError::generic(chain(error));
        let device = source.id().to_owned();
        let name = target.node.id().to_owned();
        let options = MirrorOptions {
            granularity: spec.granularity.unwrap_or_else(|| granularity_of(&target.node)),
            buf_size: spec.buf_size.unwrap_or(DEFAULT_BUF_SIZE),
            sync: if spec.sync == Sync::Top && source.backing().is_none() {
                Sync::Full
            } else {
                spec.sync
            },
            target_is_blank: target.is_blank,
            reopen: target.reopen.clone().map(|reopen| reopen.into_work()),
            remote: target.remote.clone(),
            pair: Pair { source, target: target.node, unmap: spec.unmap },
        };
        let mirror = Mirror::new(options).map_err(|error| refused(&error))?;
        let mailbox = self.event_loop.mailbox().clone();
        let mut first = Vec::with_capacity(2);
        let job = Job::start(
            NewJob {
                kind: JobKind::Mirror,
                options: spec.job.clone(),
                device,
                target: Some(name),
                copy_mode: spec.copy_mode,
            },
            &mut |event| first.push(event),
            move |event| mailbox.post(Message::BlockJob(event)),
            mirror,
        );
        let job = job.map_err(|error| refused(&error))?;
        first.iter().for_each(|event| self.on_job_event(event));
        self.block_jobs.jobs.push(job);
        Ok(json!({}))
    }

    fn open_target(
        &mut self,
        what: For,
        request: &Incoming,
        open: impl FnOnce() -> Result<Target, targets::TargetError> + Send + 'static,
    ) -> Option<QmpResult> {
        self.open(what, request, move || Done::Opened(open().map_err(|error| chain(&error))))
    }

    /// Has a task open targets.
    pub(super) fn open(
        &mut self,
        what: For,
        request: &Incoming,
        work: impl FnOnce() -> Done + Send + 'static,
    ) -> Option<QmpResult> {
        match self.tasks.start("open", Some(OPENING), move |_| work()) {
            Ok(task) => {
                self.block_jobs.opening.insert(task, (request.clone(), what));
                None
            }
            Err(error) => Some(Err(QmpError::generic(chain(&error)))),
        }
    }

    /// A task that may have opened a target has ended. Returns `done` if it was for something else.
    pub(super) fn on_target_opened(&mut self, id: TaskId, done: Done) -> Option<Done> {
        let Some((request, what)) = self.block_jobs.opening.remove(&id) else { return Some(done) };
        if let For::Backups(specs) = what {
            let result = self.on_backups_begun(specs, done);
            self.answer(&request, result);
            return None;
        }
        let opened = match done {
            Done::Opened(Ok(target)) => Ok(target),
            Done::Opened(Err(why)) => Err(why),
            _ => Err("opening the target takes too long: its storage hangs".to_owned()),
        };
        let result = match (opened, what) {
            (Err(why), _) => Err(QmpError::generic(why)),
            (Ok(target), For::Node(name)) => {
                self.block_jobs.nodes.insert(name, target);
                Ok(json!({}))
            }
            // A reset may have replaced the machine, but its disks stay.
            (Ok(_), For::Backups(_)) => Err(QmpError::generic("this was not a backup")),
            (Ok(target), For::Mirror(spec, source)) => match self.ending.is_some() {
                true => Err(super::ending::shutting_down()),
                false => self.start_mirror(&spec, source, target),
            },
        };
        self.answer(&request, result);
        None
    }

    /// Executes `blockdev-add`.
    pub(super) fn add_node(&mut self, spec: &NodeSpec, request: &Incoming) -> Option<QmpResult> {
        if let Err(error) = self.check_free() {
            return Some(Err(error));
        }
        if self.block_jobs.is_name_taken(&spec.name) || self.disk(&spec.name).is_ok() {
            let desc = format!("Duplicate nodes with node-name='{}'", spec.name);
            return Some(Err(QmpError::generic(desc)));
        }
        if self.block_jobs.nodes.len() >= MAX_NODES {
            let desc = format!("There are {MAX_NODES} nodes already: delete one first");
            return Some(Err(QmpError::generic(desc)));
        }
        let (spec, open) = (spec.clone(), self.open_nodes());
        let what = For::Node(spec.name.clone());
        self.open_target(what, request, move || targets::open(&spec, &open))
    }

    /// Executes `blockdev-del`.
    pub(super) fn delete_node(&mut self, name: &str) -> QmpResult {
        if self.disk(name).is_ok() {
            let desc = format!("Node {name} is in use: it is a disk of the guest");
            return Err(QmpError::generic(desc));
        }
        if let Some(job) = self.block_jobs.user_of(name) {
            let desc = format!("Node {name} is in use by block job {job}");
            return Err(QmpError::generic(desc));
        }
        match self.block_jobs.nodes.remove(name) {
            // Closing it may take as long as its storage hangs.
            Some(target) => super::tasks::discard(target),
            None => {
                let desc = format!("Failed to find node with node-name='{name}'");
                return Err(QmpError::generic(desc));
            }
        }
        Ok(json!({}))
    }

    /// Executes a command to a job.
    pub(super) fn job_command(&mut self, command: &JobCommand) -> QmpResult {
        let job = self.block_jobs.find(&command.id).ok_or_else(|| not_found(command))?.clone();
        if self.jobs.busy() && matches!(command.action, JobAction::Complete | JobAction::Finalize) {
            // The destination would open the image that the device has left.
            let desc = format!("{MIGRATION_IN_PROGRESS}: cannot switch a disk over now");
            return Err(QmpError::generic(desc));
        }
        let done = match command.action {
            JobAction::SetSpeed(speed) => job.set_speed(speed),
            JobAction::Pause => job.pause(),
            JobAction::Resume => job.resume(),
            JobAction::Cancel(how) => job.cancel(how),
            JobAction::Complete => job.complete(),
            JobAction::Finalize => job.finalize(),
            JobAction::Dismiss => job.dismiss(),
            JobAction::ChangeCopyMode(mode) => job.set_copy_mode(mode),
        };
        done.map(|()| json!({})).map_err(|error| QmpError::generic(error.to_string()))
    }

    /// Tells what has happened to a job, and forgets it when it is gone.
    pub(super) fn on_job_event(&mut self, event: &JobEvent) {
        self.tell(&Event::job(event));
        match event {
            JobEvent::Status { id, status: JobStatus::Null } => {
                self.block_jobs.jobs.retain(|job| job.id() != id);
            }
            JobEvent::Completed(info) => self.on_job_completed(info),
            _ => {}
        }
    }

    fn on_job_completed(&mut self, info: &JobInfo) {
        let Some(job) = self.block_jobs.find(&info.id).cloned() else { return };
        if let Some(error) = &info.error {
            log::error!("job {}: {error}", info.id);
        }
        // The node's storage is that of a disk now.
        if job.has_switched()
            && let Some(target) = job.target().and_then(|name| self.block_jobs.nodes.remove(name))
        {
            drop(target);
        }
    }
}
