//! Starts backups: of one disk, or of several at one moment, together with changes of bitmaps.
//!
//! A task opens the targets, waits for the guest's requests in flight and takes the moment; then each backup runs as a
//! job of [`super::block_jobs`].

use super::Supervisor;
use super::bitmaps::{mark_added, refusal};
use super::block_jobs::For;
use super::messages::Message;
use super::tasks::{self, Done};
use crate::control::backup::{BackupSpec, BitmapUse};
use crate::control::command::BackupStep;
use crate::control::job::TargetSpec;
use crate::control::message::QmpError;
use crate::control::{Incoming, QmpResult};
use crate::error::chain;
use crate::targets::{self, NewTarget, Target};
use devices::block::bitmaps::Action;
use devices::block::copy::Pair;
use devices::block::job::backup::{Backup, BackupOptions, BackupSync, BeginError, Step, begin};
use devices::block::job::mirror::Sync;
use devices::block::job::{Cancel, CopyMode, Job, JobKind, NewJob};
use devices::block::{BlockNode, Format};
use serde_json::json;
use std::sync::Arc;

/// Where a backup goes.
enum Place {
    /// To a node that is open.
    Node(Target),
    /// To a file.
    File(Box<NewTarget>),
}

/// A step of a transaction whose names have been found.
enum Planned {
    Bitmap(Arc<BlockNode>, Action),
    Backup { source: Arc<BlockNode>, sync: BackupSync, bitmap: BitmapUse, place: Place },
}

impl Planned {
    /// Opens the target.
    fn open(self, open: &[Arc<BlockNode>]) -> Result<Step, QmpError> {
        let (source, sync, bitmap, place) = match self {
            Self::Bitmap(node, action) => return Ok(Step::Bitmap(node, action)),
            Self::Backup { source, sync, bitmap, place } => (source, sync, bitmap, place),
        };
        let owns_target = matches!(place, Place::File(_));
        let target = match place {
            Place::Node(target) => target,
            Place::File(new) => {
                targets::create(&new, open).map_err(|error| QmpError::generic(chain(&error)))?
            }
        };
        let pair = Pair { source, target: target.node, unmap: true };
        let target_is_blank = target.is_blank;
        Ok(Step::Backup(BackupOptions { pair, sync, bitmap, target_is_blank, owns_target }))
    }
}

/// Opens the targets and takes the moment.
fn take(planned: Vec<Planned>, open: &[Arc<BlockNode>]) -> Result<Vec<Backup>, QmpError> {
    let steps = planned.into_iter().map(|step| step.open(open)).collect::<Result<Vec<_>, _>>()?;
    let begun = begin(&steps).map_err(|error| match error {
        BeginError::Bitmap(error) => refusal(&error),
        other => QmpError::generic(chain(&other)),
    })?;
    mark_added(steps.iter().filter_map(|step| match step {
        Step::Bitmap(node, action) => Some((node, action)),
        Step::Backup(_) => None,
    }));
    Ok(begun)
}

impl Supervisor {
    /// Executes `drive-backup`, `blockdev-backup` and transactions with them.
    pub(super) fn backup(&mut self, steps: &[BackupStep], request: &Incoming) -> Option<QmpResult> {
        let planned = match self.plan(steps) {
            Ok(planned) => planned,
            Err(error) => return Some(Err(error)),
        };
        let specs = steps.iter().filter_map(|step| match step {
            BackupStep::Backup(spec) => Some(spec.as_ref().clone()),
            BackupStep::Bitmap(_) => None,
        });
        let (what, open) = (For::Backups(specs.collect()), self.open_nodes());
        self.open(what, request, move || Done::Begun(take(planned, &open)))
    }

    fn plan(&self, steps: &[BackupStep]) -> Result<Vec<Planned>, QmpError> {
        self.no_migration("start a backup")?;
        self.disks_are_here()?;
        let mut planned = Vec::new();
        let mut before: Vec<&BackupSpec> = Vec::new();
        for step in steps {
            planned.push(match step {
                BackupStep::Bitmap(action) => {
                    let (node, action) = self.action(action)?;
                    Planned::Bitmap(node, action)
                }
                BackupStep::Backup(spec) => {
                    self.check_free_for(before.len())?;
                    let step = self.plan_one(spec, &before)?;
                    before.push(spec);
                    step
                }
            });
        }
        Ok(planned)
    }

    /// Plans a backup; `before` are those before it in the transaction.
    fn plan_one(&self, spec: &BackupSpec, before: &[&BackupSpec]) -> Result<Planned, QmpError> {
        let (sync, bitmap) = spec.resolve()?;
        let source = self.check_job(&spec.device, &spec.job.id)?;
        if before.iter().any(|other| other.job.id == spec.job.id) {
            return Err(QmpError::generic(format!("Job ID '{}' already in use", spec.job.id)));
        }
        // Without a backing file, `top` is everything.
        let is_whole = sync == BackupSync::Top && source.backing().is_none();
        let sync = if is_whole { BackupSync::Full } else { sync };
        let place = match &spec.target {
            TargetSpec::Node(name) => {
                if before.iter().any(|other| other.target.node() == Some(name)) {
                    let desc = format!("Node '{name}' is busy: two backups cannot write to it");
                    return Err(QmpError::generic(desc));
                }
                Place::Node(self.check_target(&source, name)?)
            }
            TargetSpec::File { location, format, existing } => Place::File(Box::new(NewTarget {
                location: location.clone(),
                format: format.unwrap_or_else(|| format_of(&source)),
                existing: *existing,
                sync: backing_of(sync),
                source: source.clone(),
                direct: source.is_direct(),
            })),
        };
        Ok(Planned::Backup { source, sync, bitmap, place })
    }

    /// Backups have begun: runs them as jobs.
    pub(super) fn on_backups_begun(&mut self, specs: Vec<BackupSpec>, done: Done) -> QmpResult {
        let begun = match done {
            Done::Begun(begun) => begun?,
            _ => {
                return Err(QmpError::generic("opening the targets takes too long: storage hangs"));
            }
        };
        if self.ending.is_some() {
            tasks::discard(begun);
            return Err(super::ending::shutting_down());
        }
        let mut started: Vec<Arc<Job>> = Vec::new();
        for (spec, backup) in specs.into_iter().zip(begun) {
            match self.run_backup(spec, backup) {
                Ok(job) => started.push(job),
                Err(error) => {
                    // All or none. One that has ended already cannot be cancelled.
                    started.iter().for_each(|job| drop(job.cancel(Cancel::Force)));
                    return Err(error);
                }
            }
        }
        Ok(json!({}))
    }

    fn run_backup(&mut self, spec: BackupSpec, backup: Backup) -> Result<Arc<Job>, QmpError> {
        let mailbox = self.event_loop.mailbox().clone();
        let new = NewJob {
            kind: JobKind::Backup,
            device: backup.device().to_owned(),
            target: Some(backup.target().to_owned()),
            copy_mode: CopyMode::default(),
            options: spec.job,
        };
        let mut first = Vec::with_capacity(2);
        let job = Job::start(
            new,
            &mut |event| first.push(event),
            move |event| mailbox.post(Message::BlockJob(event)),
            backup,
        );
        let job = job.map_err(|error| QmpError::generic(chain(&error)))?;
        first.iter().for_each(|event| self.on_job_event(event));
        self.block_jobs.add(job.clone());
        Ok(job)
    }

    /// That no backup is in progress: the destination's writes would not be seen by it.
    pub(super) fn no_backup(&self) -> Result<(), QmpError> {
        match self.block_jobs.backup() {
            None => Ok(()),
            Some((id, disk)) => Err(QmpError::generic(format!(
                "Disk {disk} is being backed up by job '{id}', which cannot move with the guest: wait for it or \
                 cancel it"
            ))),
        }
    }
}

fn format_of(source: &BlockNode) -> Format {
    if source.format() == "qcow2" { Format::Qcow2 } else { Format::Raw }
}

/// For which kind of copy an image is made: that decides its backing file.
fn backing_of(sync: BackupSync) -> Sync {
    match sync {
        BackupSync::Full | BackupSync::Bitmap => Sync::Full,
        BackupSync::Top => Sync::Top,
        BackupSync::None => Sync::None,
    }
}
