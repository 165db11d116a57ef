//! Allocated sizes of disks for `query-block`. The storage may hang, so the sizes are queried on threads,
//! with a short timeout; a disk that does not respond shows its last known size, or none.

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

/// Known sizes, and the requests that wait for new ones.
#[derive(Default)]
pub(super) struct Sizes {
    known: Arc<Mutex<block::Sizes>>,
    /// Handed to the task and back, so that a hanging disk has only one thread.
    work: Arc<Mutex<Option<DiskWork<Option<u64>>>>>,
    asking: Option<(TaskId, Vec<Incoming>)>,
}

impl Supervisor {
    /// Queries the sizes; the reply to `request` comes afterwards. Without disks, or if a query is not
    /// possible, replies with the known sizes.
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

    /// The sizes have been queried.
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
            Command::QueryNamedBlockNodes => {
                block::named_nodes(self.nodes().chain(self.block_jobs.nodes()), &known)
            }
            _ => block::devices(self.nodes(), &known),
        }
    }
}

/// Queries each disk on its own thread, until [`SIZE_LIMIT`] has passed.
fn ask(
    nodes: &[Arc<BlockNode>],
    known: &Mutex<block::Sizes>,
    work: &Mutex<Option<DiskWork<Option<u64>>>>,
) {
    // Drop the queries of an earlier machine.
    let mut asked = devices::lock(work)
        .take()
        .filter(|work| work.is_about(nodes))
        .unwrap_or_else(|| DiskWork::new("sizing", nodes.to_vec()));
    let deadline = Instant::now() + SIZE_LIMIT;
    match asked.run(|_| true, |node| node.allocated_bytes().ok(), deadline, &|| true) {
        Ok(done) => {
            let mut known = devices::lock(known);
            for (node, done) in nodes.iter().zip(done) {
                match done.result {
                    Some(Some(bytes)) => drop(known.insert(node.id().to_owned(), bytes)),
                    // Omit a size that cannot be queried.
                    Some(None) => drop(known.remove(node.id())),
                    None => {}
                }
            }
        }
        Err(error) => log::warn!("cannot ask disks for their sizes: {error}"),
    }
    *devices::lock(work) = Some(asked);
}
