//! The connections to one export that are used together, made at once and lost at once. Several only where the
//! server says that a flush on one of them covers all.

use super::connection::{Connection, Order};
use super::failure::{Cause, OpenReason, RequestError};
use super::handshake::{Export, negotiate};
use super::reply::Answer;
use super::unflushed::Unflushed;
use super::wire::{Limit, Reader, Stop, Wire};
use crate::block::nbd::protocol::transmission_flag;
use socket2::SockAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A server that takes no more connections lets further ones wait: they are given up after this.
const FURTHER_CONNECTION: Duration = Duration::from_millis(500);

/// How to connect.
#[derive(Debug, Clone)]
pub(super) struct Terms<'a> {
    pub places: &'a [SockAddr],
    pub export: &'a str,
    pub stop: &'a Arc<Stop>,
    pub stall: Duration,
    pub until: Instant,
    pub max_connections: usize,
}

/// Connections to one export.
#[derive(Debug)]
pub(super) struct Session {
    pub export: Export,
    connections: Vec<Connection>,
    turn: AtomicUsize,
    /// What was written since the last flush.
    pub unflushed: Unflushed,
}

impl Session {
    /// Connects. Also returns the place that answered.
    pub fn open(terms: &Terms<'_>) -> Result<(Self, SockAddr), OpenReason> {
        let (first, export, place) = connect(terms, terms.places, terms.until)?;
        let mut connections = vec![first];
        let is_shared = export.has(transmission_flag::CAN_MULTI_CONN);
        while is_shared && connections.len() < terms.max_connections {
            let until = terms.until.min(Instant::now() + FURTHER_CONNECTION);
            match connect(terms, std::slice::from_ref(&place), until) {
                Ok((further, same, _)) if same == export => connections.push(further),
                // What there is suffices.
                Ok(_) => break,
                Err(reason) => {
                    log::debug!("no further connection to the NBD server: {reason}");
                    break;
                }
            }
        }
        let (turn, unflushed) = (AtomicUsize::new(0), Unflushed::new(export.len_bytes));
        Ok((Self { export, connections, turn, unflushed }, place))
    }

    /// How many connections it has.
    pub fn connection_count(&self) -> usize {
        self.connections.len()
    }

    /// Why it is lost, if it is.
    pub fn lost(&self) -> Option<Cause> {
        self.connections.iter().find_map(Connection::lost)
    }

    /// Fails every request in flight and every later one.
    pub fn lose(&self, cause: &Cause) {
        self.connections.iter().for_each(|connection| connection.lose(cause));
    }

    /// Makes a request on the connection that has least to do.
    pub fn perform(&self, order: Order<'_>, answer: Answer<'_>) -> Result<(), RequestError> {
        self.least_busy().perform(order, answer).inspect_err(|error| self.note(error))
    }

    /// Makes requests whose replies carry no data, all at once. Returns the first that failed.
    pub fn perform_all<'o>(
        &self,
        orders: impl Iterator<Item = Order<'o>> + Clone,
    ) -> Result<(), (Order<'o>, RequestError)> {
        self.least_busy().perform_all(orders).inspect_err(|(_, error)| self.note(error))
    }

    fn least_busy(&self) -> &Connection {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let count = self.connections.len();
        let in_turn = (0..count).map(|at| &self.connections[turn.wrapping_add(at) % count]);
        let least = in_turn.min_by_key(|connection| connection.in_flight());
        least.expect("a session has a connection")
    }

    /// With one connection all are lost.
    fn note(&self, error: &RequestError) {
        if let RequestError::Lost(cause) = error {
            self.lose(cause);
        }
    }
}

fn connect(
    terms: &Terms<'_>,
    places: &[SockAddr],
    until: Instant,
) -> Result<(Connection, Export, SockAddr), OpenReason> {
    let connected = Wire::connect(places, terms.stop, terms.stall, until);
    let (wire, place) = connected.map_err(OpenReason::Connect)?;
    let mut reader = Reader::new();
    let export = negotiate(&wire, &mut reader, terms.export, Limit::Until(until))?;
    Ok((Connection::new(wire, reader, &export), export, place))
}
