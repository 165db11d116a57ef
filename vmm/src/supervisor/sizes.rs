//! How much space disks take on the host, for `query-block`: only the storage knows, and may not answer.
//! It is asked on threads, for a moment; a disk that does not answer shows what it said last, or nothing.

use super::Supervisor;
use super::tasks::{DiskWork, Done, TaskId};
use crate::control::command::Command;
use crate::control::message::QmpError;
use crate::control::{Incoming, block};
use crate::error::chain;
use devices::block::BlockNode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long `query-block` waits for the storage.
const SIZE_LIMIT: Duration = Duration::from_millis(20);

/// What has been learnt, and who waits for more.
#[derive(Default)]
pub(super) struct Sizes {
    known: Arc<Mutex<block::Sizes>>,
    /// Goes to the task and comes back with what it has learnt, so that a disk that hangs has one thread.
    work: Arc<Mutex<Option<DiskWork<Option<u64>>>>>,
    asking: Option<(TaskId, Vec<Incoming>)>,
}

impl Supervisor {
    /// Asks the disks for their sizes; the answer to `request` comes when they have been asked. With
    /// nothing to ask, or nobody to do it, it is what is known.
    pub(super) fn ask_sizes(
        &mut self,
        request: &Incoming,
    ) -> Option<Result<serde_json::Value, QmpError>> {
        if let Some((_, requests)) = &mut self.sizes.asking {
            requests.push(request.clone());
            return None;
        }
        // Without a machine there are no disks.
        let nodes = self.machine.as_ref().map(|machine| machine.nodes()).unwrap_or_default();
        if nodes.is_empty() || self.ending.is_some() {
            return Some(Ok(self.describe_disks(&request.command)));
        }
        let (known, work) = (self.sizes.known.clone(), self.sizes.work.clone());
        let started = self.tasks.start("sizes", Some(SIZE_LIMIT * 2), move |_| {
            ask(&nodes, &known, &work);
            Done::Sized
        });
        match started {
            Ok(id) => {
                self.sizes.asking = Some((id, vec![request.clone()]));
                None
            }
            Err(error) => Some(Err(QmpError::generic(chain(&error)))),
        }
    }

    /// The disks have been asked.
    pub(super) fn on_sized(&mut self, id: TaskId) {
        let Some((_, requests)) = self.sizes.asking.take_if(|(asking, _)| *asking == id) else {
            return;
        };
        for request in requests {
            let answer = self.describe_disks(&request.command);
            self.answer(&request, Ok(answer));
        }
    }

    fn describe_disks(&self, command: &Command) -> serde_json::Value {
        let known = devices::lock(&self.sizes.known);
        match command {
            Command::QueryNamedBlockNodes => block::named_nodes(self.nodes(), &known),
            _ => block::devices(self.nodes(), &known),
        }
    }
}

/// Asks each disk on a thread of its own, until [`SIZE_LIMIT`] has passed.
fn ask(
    nodes: &[Arc<BlockNode>],
    known: &Mutex<block::Sizes>,
    work: &Mutex<Option<DiskWork<Option<u64>>>>,
) {
    // Of the machine before, if it was built anew, nothing is asked any more.
    let mut asked = devices::lock(work)
        .take()
        .filter(|work| work.is_about(nodes))
        .unwrap_or_else(|| DiskWork::new("size", nodes.to_vec()));
    let deadline = Instant::now() + SIZE_LIMIT;
    match asked.run(|_| true, |node| node.allocated_bytes().ok(), deadline, &|| true) {
        Ok(done) => {
            let mut known = devices::lock(known);
            for (node, done) in nodes.iter().zip(done) {
                match done.result {
                    Some(Some(bytes)) => drop(known.insert(node.id().to_owned(), bytes)),
                    // What cannot be asked is left out.
                    Some(None) => drop(known.remove(node.id())),
                    None => {}
                }
            }
        }
        Err(error) => log::warn!("cannot ask disks for their sizes: {error}"),
    }
    *devices::lock(work) = Some(asked);
}
