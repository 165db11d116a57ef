//! NBD exports of the guest's disks. Listening, holding bitmaps and ending connections take time, and so each request
//! is executed by a task.
//!
//! **Exports and moving.** A disk is written by the guest's host only. So a migration and a writable export exclude
//! each other: whichever comes second is refused. Read-only exports end when the guest has been handed over.

use super::Supervisor;
use super::nbd::{ExportsDone, Nbd};
use super::tasks::{self, Done, TaskId};
use crate::control::command::Command;
use crate::control::event::Event;
use crate::control::export::{ExportCommand, NewExport};
use crate::control::message::{MIGRATION_IN_PROGRESS, QmpError};
use crate::control::{Incoming, QmpResult};
use crate::error::chain;
use crate::machine::run_state::RunState;
use devices::block::nbd::server::{Export, ExportError, ExportInfo, OnDeleted};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Most requests in progress: a client that leaves does not end its request.
const MAX_IN_PROGRESS: usize = 32;

/// The NBD server and requests about it.
#[derive(Default)]
pub(super) struct Exports {
    server: State,
    /// In progress, with what they are about.
    requests: BTreeMap<TaskId, Incoming>,
}

#[derive(Default)]
enum State {
    #[default]
    Off,
    Starting,
    On(Arc<Nbd>),
}

type Work = Box<dyn FnOnce() -> ExportsDone + Send>;

fn refusal(error: &ExportError) -> QmpError {
    QmpError { hint: error.hint(), ..QmpError::generic(error.to_string()) }
}

fn replied(result: Result<(), ExportError>) -> ExportsDone {
    ExportsDone::Replied(result.map(|()| json!({})).map_err(|error| refusal(&error)))
}

impl Exports {
    fn server(&self) -> Result<&Arc<Nbd>, QmpError> {
        match &self.server {
            State::On(nbd) => Ok(nbd),
            State::Starting => Err(QmpError::generic("The NBD server is being started")),
            State::Off => Err(refusal(&ExportError::NotRunning)),
        }
    }

    fn list(&self) -> Vec<ExportInfo> {
        self.server().map(|nbd| nbd.exports()).unwrap_or_default()
    }

    /// The reply to `query-block-exports`.
    pub(super) fn query(&self) -> Value {
        let one = |export: ExportInfo| {
            json!({
                "id": export.id,
                "type": "nbd",
                "node-name": export.node,
                "shutting-down": export.shutting_down,
            })
        };
        self.list().into_iter().map(one).collect()
    }

    /// That the guest may move.
    pub(super) fn allow_migration(&self) -> Result<(), QmpError> {
        if let Some(export) = self.list().into_iter().find(|export| export.writable) {
            let ExportInfo { id, node, .. } = export;
            let desc = format!(
                "Export '{id}' lets others write to disk '{node}': remove it (block-export-del) before \
                 the guest is migrated"
            );
            return Err(QmpError::generic(desc));
        }
        let adds = |request: &Incoming| matches!(&request.command, Command::Export(ExportCommand::Add(new)) if new.writable);
        match self.requests.values().any(adds) {
            true => Err(QmpError::generic("A writable export is being added: try again")),
            false => Ok(()),
        }
    }

    /// The server, which nobody can use any more.
    pub(super) fn take(&mut self) -> Option<Arc<Nbd>> {
        match std::mem::take(&mut self.server) {
            State::On(nbd) => Some(nbd),
            State::Off | State::Starting => None,
        }
    }
}

impl Supervisor {
    /// Executes a request about exports. The reply comes later, unless it is refused at once.
    pub(super) fn use_exports(&mut self, request: &Incoming) -> Option<QmpResult> {
        let Command::Export(command) = &request.command else {
            return Some(Err(QmpError::generic("this command is not about exports")));
        };
        if self.exports.requests.len() >= MAX_IN_PROGRESS {
            let desc = "too many requests about exports are in progress: try again";
            return Some(Err(QmpError::generic(desc)));
        }
        let work = match self.work_on_exports(command) {
            Ok(work) => work,
            Err(error) => return Some(Err(error)),
        };
        match self.tasks.start("exports", None, move |_| Done::Exports(work())) {
            Ok(task) => {
                if matches!(command, ExportCommand::Start { .. }) {
                    self.exports.server = State::Starting;
                }
                self.exports.requests.insert(task, request.clone());
                None
            }
            Err(error) => Some(Err(QmpError::generic(chain(&error)))),
        }
    }

    fn work_on_exports(&mut self, command: &ExportCommand) -> Result<Work, QmpError> {
        Ok(match command.clone() {
            ExportCommand::Start { address, limits } => {
                if !matches!(self.exports.server, State::Off) {
                    return Err(QmpError::generic("NBD server already running"));
                }
                let mailbox = self.event_loop.mailbox().clone();
                let on_deleted: OnDeleted = Arc::new(move |id| {
                    mailbox.post(super::messages::Message::ExportDeleted(id.to_owned()));
                });
                Box::new(move || {
                    let started = Nbd::start(&address, limits, on_deleted);
                    ExportsDone::Started(started.map(Arc::new))
                })
            }
            ExportCommand::Stop => {
                self.exports.server()?;
                let nbd = self.exports.take();
                Box::new(move || {
                    if let Some(nbd) = nbd {
                        nbd.close();
                        tasks::discard(nbd);
                    }
                    ExportsDone::Replied(Ok(json!({})))
                })
            }
            ExportCommand::Add(new) => {
                let nbd = self.exports.server()?.clone();
                let export = self.export(new)?;
                Box::new(move || replied(nbd.add(export)))
            }
            ExportCommand::Remove { id, mode } => {
                let nbd = self.exports.server()?.clone();
                Box::new(move || replied(nbd.remove(&id, mode)))
            }
        })
    }

    fn export(&self, new: NewExport) -> Result<Export, QmpError> {
        let NewExport { id, node, name, description, writable, bitmaps } = new;
        let Some(disk) = self.node(&node) else {
            let desc = format!("Cannot find device='{node}' nor node-name='{node}'");
            return Err(QmpError::generic(desc));
        };
        self.disks_are_here()?;
        if writable && self.jobs.busy() {
            let desc = format!("{MIGRATION_IN_PROGRESS}: cannot let others write to a disk now");
            return Err(QmpError::generic(desc));
        }
        Ok(Export { id, name, description, node: disk, writable, bitmaps })
    }

    /// A task that may have been about exports has ended. Returns `done` if it was not.
    pub(super) fn on_exports_done(&mut self, id: TaskId, done: Done) -> Option<Done> {
        let Some(request) = self.exports.requests.remove(&id) else { return Some(done) };
        let starts = matches!(request.command, Command::Export(ExportCommand::Start { .. }));
        let result = match done {
            Done::Exports(ExportsDone::Started(Ok(nbd))) if self.ending.is_some() => {
                tasks::discard(nbd);
                Err(super::ending::shutting_down())
            }
            Done::Exports(ExportsDone::Started(started)) => {
                let (state, result) = match started {
                    Ok(nbd) => (State::On(nbd), Ok(json!({}))),
                    Err(error) => (State::Off, Err(error)),
                };
                self.exports.server = state;
                result
            }
            Done::Exports(ExportsDone::Replied(result)) => result,
            _ => {
                if starts {
                    self.exports.server = State::Off;
                }
                Err(QmpError::generic("the thread for exports panicked, which is a bug"))
            }
        };
        // It has been added while the guest left.
        if self.state == RunState::Postmigrate {
            self.end_exports();
        }
        self.answer(&request, result);
        None
    }

    /// The last client of an export that was removed is gone.
    pub(super) fn on_export_deleted(&mut self, id: &str) {
        self.tell(&Event::export_deleted(id));
    }

    /// The guest has been handed over: nobody may read its disks here.
    pub(super) fn end_exports(&mut self) {
        let Ok(nbd) = self.exports.server() else { return };
        let nbd = nbd.clone();
        if let Err(error) = tasks::spawn("end-exports", move || nbd.remove_all()) {
            log::error!("cannot start a thread: {error}");
        }
    }
}
