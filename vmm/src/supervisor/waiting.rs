//! Requests on the control socket that are not answered yet, and what their clients have asked since.
//!
//! QMP answers a client in order: while one of its requests waits, those after it wait as well. Other
//! clients are served meanwhile.

use crate::control::{ClientId, Incoming};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Requests of one client that may wait behind one that is not answered yet.
const MAX_BEHIND: usize = 64;
/// How long a request waits to be begun: whatever it waits for has a limit of its own, below this.
const BLOCKED_LIMIT: Duration = Duration::from_secs(30);

/// A request that waits to be begun.
pub struct Blocked {
    /// The request.
    pub request: Incoming,
    until: Instant,
}

/// All of them.
#[derive(Default)]
pub struct Waiting {
    /// Clients that wait for an answer, and what they have asked after it.
    behind: BTreeMap<ClientId, VecDeque<Incoming>>,
    /// What cannot be begun before something else has ended, in the order that it came.
    blocked: VecDeque<Blocked>,
}

impl Waiting {
    /// Takes a request whose client waits for an answer; gives it back if the client does not.
    pub fn behind(&mut self, request: Incoming) -> Behind {
        match self.behind.get_mut(&request.client) {
            None => Behind::Next(request),
            Some(queue) if queue.len() >= MAX_BEHIND => Behind::TooMany(request),
            Some(queue) => {
                queue.push_back(request);
                Behind::Waits
            }
        }
    }

    /// This client's answer will come later.
    pub fn hold(&mut self, client: ClientId) {
        self.behind.entry(client).or_default();
    }

    /// It has come; returns what the client has asked meanwhile.
    pub fn release(&mut self, client: ClientId) -> VecDeque<Incoming> {
        // A client that left has asked nothing more.
        self.behind.remove(&client).unwrap_or_default()
    }

    /// This request is to be begun later.
    pub fn block(&mut self, request: Incoming) {
        self.blocked.push_back(Blocked { request, until: Instant::now() + BLOCKED_LIMIT });
    }

    /// All that are to be begun now, if they can be.
    pub fn take_blocked(&mut self) -> VecDeque<Blocked> {
        std::mem::take(&mut self.blocked)
    }

    /// This one cannot be yet.
    pub fn block_again(&mut self, blocked: Blocked) {
        self.blocked.push_back(blocked);
    }

    /// Those that have waited too long.
    pub fn take_overdue(&mut self, now: Instant) -> Vec<Incoming> {
        let mut late = Vec::new();
        while self.blocked.front().is_some_and(|blocked| blocked.until <= now) {
            late.extend(self.blocked.pop_front().map(|blocked| blocked.request));
        }
        late
    }

    /// When the first of them has.
    pub fn deadline(&self) -> Option<Instant> {
        self.blocked.front().map(|blocked| blocked.until)
    }
}

/// What becomes of a request.
#[derive(Debug, PartialEq)]
pub enum Behind {
    /// It is its client's next.
    Next(Incoming),
    /// It waits.
    Waits,
    /// Too many wait already.
    TooMany(Incoming),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::command::Command;
    use crate::control::message::Request;

    fn request(client: u32, id: u64) -> Incoming {
        Incoming {
            client: ClientId(client),
            id: Some(id.into()),
            command: Command::QueryStatus,
            request: Request {
                execute: "query-status".into(),
                arguments: Default::default(),
                id: None,
            },
        }
    }

    #[test]
    fn a_clients_later_requests_wait_in_order_and_another_clients_do_not() {
        let mut waiting = Waiting::default();
        waiting.hold(ClientId(1));
        assert_eq!(waiting.behind(request(1, 7)), Behind::Waits);
        assert_eq!(waiting.behind(request(1, 8)), Behind::Waits);
        assert_eq!(waiting.behind(request(2, 9)), Behind::Next(request(2, 9)));
        assert_eq!(waiting.release(ClientId(1)), [request(1, 7), request(1, 8)]);
        assert_eq!(waiting.behind(request(1, 10)), Behind::Next(request(1, 10)));
    }

    #[test]
    fn a_client_cannot_have_any_number_wait() {
        let mut waiting = Waiting::default();
        waiting.hold(ClientId(1));
        for id in 0..MAX_BEHIND as u64 {
            assert_eq!(waiting.behind(request(1, id)), Behind::Waits);
        }
        assert!(matches!(waiting.behind(request(1, 0)), Behind::TooMany(_)));
    }

    #[test]
    fn what_is_blocked_does_not_wait_for_ever() {
        let mut waiting = Waiting::default();
        waiting.block(request(1, 1));
        let now = Instant::now();
        assert_eq!(waiting.take_overdue(now), []);
        assert!(waiting.deadline().is_some_and(|deadline| deadline > now));
        assert_eq!(waiting.take_overdue(now + BLOCKED_LIMIT * 2), [request(1, 1)]);
        assert_eq!(waiting.deadline(), None);
    }
}
