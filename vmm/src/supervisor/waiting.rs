//! Control socket requests without a reply yet, and later requests of the same clients. Owned by the
//! supervisor.
//!
//! QMP replies to a client in order: while one of its requests waits, the following ones are queued. Other
//! clients are served meanwhile.

use crate::control::{ClientId, Incoming};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Limit of queued requests per client.
const MAX_BEHIND: usize = 64;
/// How long a request may be blocked: everything that it waits for has a shorter limit.
const BLOCKED_LIMIT: Duration = Duration::from_secs(30);

/// A request that cannot start yet.
pub struct Blocked {
    /// The request.
    pub request: Incoming,
    until: Instant,
}

/// All waiting requests.
#[derive(Default)]
pub struct Waiting {
    /// Clients that wait for a reply, and their queued requests.
    behind: BTreeMap<ClientId, VecDeque<Incoming>>,
    /// Requests that cannot start yet, in order of arrival.
    blocked: VecDeque<Blocked>,
}

impl Waiting {
    /// Queues a request if its client waits for a reply; otherwise returns it.
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

    /// The client's reply will come later.
    pub fn hold(&mut self, client: ClientId) {
        self.behind.entry(client).or_default();
    }

    /// The reply was sent; returns the client's queued requests.
    pub fn release(&mut self, client: ClientId) -> VecDeque<Incoming> {
        // A client that left has asked nothing more.
        self.behind.remove(&client).unwrap_or_default()
    }

    /// Blocks a request.
    pub fn block(&mut self, request: Incoming) {
        self.blocked.push_back(Blocked { request, until: Instant::now() + BLOCKED_LIMIT });
    }

    /// Takes all blocked requests to try them again.
    pub fn take_blocked(&mut self) -> VecDeque<Blocked> {
        std::mem::take(&mut self.blocked)
    }

    /// Blocks a request again.
    pub fn block_again(&mut self, blocked: Blocked) {
        self.blocked.push_back(blocked);
    }

    /// Takes the requests that have waited too long.
    pub fn take_overdue(&mut self, now: Instant) -> Vec<Incoming> {
        let mut late = Vec::new();
        while self.blocked.front().is_some_and(|blocked| blocked.until <= now) {
            late.extend(self.blocked.pop_front().map(|blocked| blocked.request));
        }
        late
    }

    /// When the next request has waited too long.
    pub fn deadline(&self) -> Option<Instant> {
        self.blocked.front().map(|blocked| blocked.until)
    }
}

/// Where a request goes.
#[derive(Debug, PartialEq)]
pub enum Behind {
    /// It can be executed now.
    Next(Incoming),
    /// It is queued.
    Waits,
    /// Refused: too many are queued.
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
