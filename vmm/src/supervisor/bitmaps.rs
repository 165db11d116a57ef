//! Named dirty bitmaps of disks. Merging, digesting and freeing a large one takes long, and so each request is
//! executed by a task.

use super::Supervisor;
use super::tasks::{Done, TaskId};
use crate::control::bitmap::{BitmapAction, BitmapChange};
use crate::control::command::Command;
use crate::control::message::QmpError;
use crate::control::{Incoming, QmpResult};
use crate::error::chain;
use devices::block::BlockNode;
use devices::block::bitmaps::{Action, BitmapError, BitmapName, MergeSource, execute};
use serde_json::json;
use std::sync::Arc;

/// Most requests in progress: a client that leaves does not end its request.
const MAX_IN_PROGRESS: usize = 32;

/// Requests in progress.
pub(super) type BitmapRequests = std::collections::BTreeMap<TaskId, Incoming>;

type Work = Box<dyn FnOnce() -> QmpResult + Send>;

impl Supervisor {
    /// Executes a request about bitmaps. The reply comes later, unless there is nothing to do.
    pub(super) fn use_bitmaps(&mut self, request: &Incoming) -> Option<QmpResult> {
        let work = match &request.command {
            Command::ChangeBitmaps(actions) if actions.is_empty() => return Some(Ok(json!({}))),
            Command::ChangeBitmaps(actions) => self.change(actions),
            Command::StoreBitmaps { node } => self.store(node),
            Command::BitmapSha256 { node, name } => self.digest(node, name.clone()),
            _ => Err(QmpError::generic("this command is not about bitmaps")),
        };
        let work = match work {
            Ok(work) => work,
            Err(error) => return Some(Err(error)),
        };
        if self.bitmap_requests.len() >= MAX_IN_PROGRESS {
            let desc = "too many requests about bitmaps are in progress: try again";
            return Some(Err(QmpError::generic(desc)));
        }
        match self.tasks.start("bitmaps", None, move |_| Done::Bitmaps(work())) {
            Ok(task) => {
                self.bitmap_requests.insert(task, request.clone());
                None
            }
            Err(error) => Some(Err(QmpError::generic(chain(&error)))),
        }
    }

    /// A task that may have been about bitmaps has ended. Returns `done` if it was not.
    pub(super) fn on_bitmaps_done(&mut self, id: TaskId, done: Done) -> Option<Done> {
        let Some(request) = self.bitmap_requests.remove(&id) else { return Some(done) };
        let result = match done {
            Done::Bitmaps(result) => result,
            _ => Err(QmpError::generic("the thread for bitmaps panicked, which is a bug")),
        };
        self.answer(&request, result);
        None
    }

    pub(super) fn node(&self, name: &str) -> Option<Arc<BlockNode>> {
        let mut disks = self.machine.as_ref()?.disks().iter();
        disks.find(|disk| disk.node.id() == name).map(|disk| disk.node.clone())
    }

    fn node_of_bitmap(&self, name: &str) -> Result<Arc<BlockNode>, QmpError> {
        self.node(name).ok_or_else(|| QmpError::generic(format!("Node '{name}' not found")))
    }

    fn change(&self, actions: &[BitmapAction]) -> Result<Work, QmpError> {
        let read = |action| self.action(action);
        let actions = actions.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        Ok(Box::new(move || {
            execute(&actions).map_err(|(_, error)| refusal(&error))?;
            mark_added(actions.iter().map(|(node, action)| (node, action)));
            Ok(json!({}))
        }))
    }

    pub(super) fn action(
        &self,
        action: &BitmapAction,
    ) -> Result<(Arc<BlockNode>, Action), QmpError> {
        let node = match &action.change {
            // QEMU takes the name of a device, too, and says so here only.
            BitmapChange::Add(_) => self.node(&action.node).ok_or_else(|| {
                let name = &action.node;
                let desc = format!("Cannot find device='{name}' nor node-name='{name}'");
                QmpError::generic(desc)
            }),
            _ => self.node_of_bitmap(&action.node),
        }?;
        let action = match action.change.clone() {
            BitmapChange::Add(new) => Action::Add(new),
            BitmapChange::Remove(name) => Action::Remove(name),
            BitmapChange::Clear(name) => Action::Clear(name),
            BitmapChange::Enable(name) => Action::Enable(name),
            BitmapChange::Disable(name) => Action::Disable(name),
            BitmapChange::Merge { target, sources } => {
                let source = |(node, name): (Option<String>, BitmapName)| {
                    let node = node.map(|node| self.node_of_bitmap(&node)).transpose()?;
                    Ok(MergeSource { node, name })
                };
                let sources = sources.into_iter().map(source).collect::<Result<_, QmpError>>()?;
                Action::Merge { target, sources }
            }
        };
        Ok((node, action))
    }

    fn store(&self, node: &str) -> Result<Work, QmpError> {
        let node = self.node_of_bitmap(node)?;
        Ok(Box::new(move || match node.save_bitmaps() {
            Ok(()) => Ok(json!({})),
            Err(error) => Err(QmpError::generic(chain(&error))),
        }))
    }

    fn digest(&self, node: &str, name: BitmapName) -> Result<Work, QmpError> {
        let node = self.node_of_bitmap(node)?;
        Ok(Box::new(move || match node.bitmaps().sha256(&name) {
            Ok(sha256) => Ok(json!({"sha256": sha256})),
            Err(error) => Err(refusal(&error)),
        }))
    }
}

/// Has the files beside the images name the persistent bitmaps that `actions` have added: a crash is noticed then.
/// That it may not be is no reason to undo what has been done.
pub(super) fn mark_added<'a>(actions: impl Iterator<Item = (&'a Arc<BlockNode>, &'a Action)>) {
    let adds = |action: &Action| matches!(action, Action::Add(new) if new.persistent);
    for (node, _) in actions.filter(|(_, action)| adds(action)) {
        if let Err(error) = node.mark_added_bitmaps() {
            log::warn!("disk {}: {}", node.id(), chain(&error));
        }
    }
}

pub(super) fn refusal(error: &BitmapError) -> QmpError {
    QmpError { hint: error.hint(), ..QmpError::generic(error.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inconsistent_bitmap_comes_with_a_hint() {
        let name = BitmapName::new("b").unwrap();
        let lost = refusal(&BitmapError::Inconsistent { name: name.clone() });
        assert_eq!(lost.desc, "Bitmap 'b' is inconsistent and cannot be used");
        assert!(lost.hint.is_some_and(|hint| hint.contains("block-dirty-bitmap-remove")));
        assert_eq!(refusal(&BitmapError::NotFound { name }).hint, None);
    }
}
