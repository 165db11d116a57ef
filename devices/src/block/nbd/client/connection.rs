//! One connection with several requests in flight, from several threads. It has no thread of its own: one of those
//! that wait reads for all.
//!
//! ```text
//! send     under the writer lock: header and data of a request, whole
//! wait     the reading side is a value that wanders between those who wait:
//!            Idle   ─▶ the next who waits takes it, and receives headers
//!            a reply for somebody else, without data  ─▶ its outcome is noted, its thread woken
//!            a reply for somebody else, with data     ─▶ Passed to that thread, which reads on into its own buffer
//!            one's own reply is complete              ─▶ Idle again, and one who waits is woken
//! ```
//! The first failure is kept: it fails every request in flight and every later one.

use super::failure::{Cause, RequestError, ServerError};
use super::handshake::Export;
use super::reply::{Answer, Header, Reply, ReplyError};
use super::wire::{Limit, Reader, Wire};
use crate::block::nbd::protocol::{Request, command};
use crate::lock;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Thread;

/// A request, but for its cookie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order<'a> {
    pub command: u16,
    pub flags: u16,
    pub offset: u64,
    pub len: u32,
    /// What a write writes.
    pub data: &'a [u8],
}

/// A connection after its handshake.
#[derive(Debug)]
pub(super) struct Connection {
    wire: Wire,
    structured: bool,
    /// Held while a request is sent, so that it is sent whole.
    sending: Mutex<()>,
    table: Mutex<Table>,
    in_flight: AtomicUsize,
}

#[derive(Debug)]
struct Table {
    next_cookie: u64,
    /// By cookie. No more than there are threads that make requests.
    pending: HashMap<u64, Pending>,
    turn: Turn,
    lost: Option<Cause>,
}

#[derive(Debug)]
struct Pending {
    thread: Thread,
    /// Whether it waits, having sent its request.
    waits: bool,
    /// Whether its reply carries no data, so that anybody can receive it.
    is_plain: bool,
    outcome: Option<Result<(), ServerError>>,
}

/// Who reads.
#[derive(Debug)]
enum Turn {
    Idle(Reader),
    Taken,
    /// The thread that waits for this cookie, beginning after this header.
    Passed(u64, Header, Reader),
}

/// A request that this thread has sent.
struct Sent<'a> {
    cookie: u64,
    reply: Reply<'a>,
    outcome: Option<Result<(), ServerError>>,
}

/// How a turn of reading ended.
enum Ended {
    /// One's own replies are complete.
    Complete,
    /// After the header of a reply with data for somebody else.
    Before(Header),
}

/// Fails all if a thread panics in its turn: the others would wait for it.
struct Unfinished<'a>(&'a Connection);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0
                .lose(&Cause { kind: std::io::ErrorKind::Other, text: "a thread panicked".into() });
        }
    }
}

impl Connection {
    pub fn new(wire: Wire, reader: Reader, export: &Export) -> Self {
        let (pending, turn, lost) = (HashMap::new(), Turn::Idle(reader), None);
        let table = Mutex::new(Table { next_cookie: 1, pending, turn, lost });
        let (sending, in_flight) = (Mutex::new(()), AtomicUsize::new(0));
        Self { wire, structured: export.structured, sending, table, in_flight }
    }

    /// Requests that have not ended.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Why it is lost, if it is.
    pub fn lost(&self) -> Option<Cause> {
        lock(&self.table).lost.clone()
    }

    /// Fails everything in flight and everything later, if nothing has done so before.
    pub fn lose(&self, cause: &Cause) {
        let mut table = lock(&self.table);
        if table.lost.is_some() {
            return;
        }
        table.lost = Some(cause.clone());
        table.pending.values().for_each(|pending| pending.thread.unpark());
        drop(table);
        self.wire.shutdown();
    }

    /// Makes a request and waits for its reply.
    pub fn perform(&self, order: Order<'_>, answer: Answer<'_>) -> Result<(), RequestError> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let is_plain = matches!(answer, Answer::Done);
        let result = self.send(order, is_plain).and_then(|cookie| {
            let reply = Reply::new(answer, self.structured);
            let mut sent = [Sent { cookie, reply, outcome: None }];
            self.wait(&mut sent)?;
            let [Sent { outcome, .. }] = sent;
            outcome.unwrap_or(Ok(())).map_err(RequestError::Refused)
        });
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// Makes requests whose replies carry no data, and waits for all of them. Returns the first that failed.
    pub fn perform_all<'o>(
        &self,
        orders: impl Iterator<Item = Order<'o>> + Clone,
    ) -> Result<(), (Order<'o>, RequestError)> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let result = self.send_all(orders);
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        result
    }

    fn send_all<'o>(
        &self,
        orders: impl Iterator<Item = Order<'o>> + Clone,
    ) -> Result<(), (Order<'o>, RequestError)> {
        let mut sent = Vec::with_capacity(orders.size_hint().0);
        let mut first = None;
        for order in orders.clone() {
            first.get_or_insert(order);
            let cookie = self.send(order, true).map_err(|error| (order, error))?;
            let reply = Reply::new(Answer::Done, self.structured);
            sent.push(Sent { cookie, reply, outcome: None });
        }
        let Some(first) = first else { return Ok(()) };
        self.wait(&mut sent).map_err(|error| (first, error))?;
        let failed = sent.into_iter().zip(orders).find_map(|(sent, order)| match sent.outcome {
            Some(Err(refusal)) => Some((order, RequestError::Refused(refusal))),
            _ => None,
        });
        failed.map_or(Ok(()), Err)
    }

    fn send(&self, order: Order<'_>, is_plain: bool) -> Result<u64, RequestError> {
        let sending = lock(&self.sending);
        let cookie = self.register(is_plain).map_err(RequestError::Lost)?;
        let Order { command, flags, offset, len, data } = order;
        let header = Request { flags, command, cookie, offset, len }.encode();
        let result = self.wire.send(&header, data, Limit::Progress);
        drop(sending);
        result.map(|()| cookie).map_err(|error| self.fail(&Cause::of(&error)))
    }

    /// Loses the connection, and returns why it was lost first.
    fn fail(&self, cause: &Cause) -> RequestError {
        self.lose(cause);
        RequestError::Lost(self.lost().unwrap_or_else(|| cause.clone()))
    }

    fn register(&self, is_plain: bool) -> Result<u64, Cause> {
        let mut table = lock(&self.table);
        if let Some(cause) = &table.lost {
            return Err(cause.clone());
        }
        if table.pending.is_empty() {
            // The server had nothing to do.
            self.wire.touch();
        }
        let cookie = table.next_cookie;
        table.next_cookie = cookie.wrapping_add(1);
        let thread = std::thread::current();
        table.pending.insert(cookie, Pending { thread, waits: false, is_plain, outcome: None });
        Ok(cookie)
    }

    /// Waits for the replies to `sent`, reading for all when it is this thread's turn.
    fn wait(&self, sent: &mut [Sent<'_>]) -> Result<(), RequestError> {
        let mut table = lock(&self.table);
        loop {
            table.collect(sent);
            if sent.iter().all(|sent| sent.outcome.is_some()) {
                return Ok(());
            }
            if let Some(cause) = &table.lost {
                return Err(RequestError::Lost(cause.clone()));
            }
            let (mut reader, header) = match std::mem::replace(&mut table.turn, Turn::Taken) {
                Turn::Idle(reader) => (reader, None),
                Turn::Passed(to, header, reader) if sent.iter().any(|sent| sent.cookie == to) => {
                    (reader, Some(header))
                }
                other => {
                    table.turn = other;
                    drop(table);
                    std::thread::park();
                    table = lock(&self.table);
                    continue;
                }
            };
            drop(table);
            let ended = {
                let _unfinished = Unfinished(self);
                self.read(sent, header, &mut reader)
            };
            table = lock(&self.table);
            match ended {
                Ok(Ended::Complete) => {
                    table.collect(sent);
                    table.pass_on(reader);
                    return Ok(());
                }
                Ok(Ended::Before(header)) => table.pass_to(header, reader),
                Err(error) => {
                    drop(table);
                    return Err(self.fail(&error.cause()));
                }
            }
        }
    }

    /// Receives replies until those to `sent` are complete, or one with data for somebody else comes.
    fn read(
        &self,
        sent: &mut [Sent<'_>],
        mut passed: Option<Header>,
        reader: &mut Reader,
    ) -> Result<Ended, ReplyError> {
        loop {
            let header = match passed.take() {
                Some(header) => header,
                None => Header::receive(&self.wire, reader)?,
            };
            self.wire.touch();
            match sent.iter_mut().find(|sent| sent.cookie == header.cookie()) {
                Some(own) if own.outcome.is_some() => {
                    return Err(ReplyError::UnknownCookie(own.cookie));
                }
                Some(own) => own.outcome = own.reply.receive(header, &self.wire, reader)?,
                None if self.note(header)? => {}
                None => return Ok(Ended::Before(header)),
            }
            if sent.iter().all(|sent| sent.outcome.is_some()) {
                return Ok(Ended::Complete);
            }
        }
    }

    /// Notes the outcome of somebody else's request; `false` if its thread must go on reading.
    fn note(&self, header: Header) -> Result<bool, ReplyError> {
        let mut table = lock(&self.table);
        let pending = table.pending.get_mut(&header.cookie());
        let pending = pending.filter(|pending| pending.outcome.is_none());
        let pending = pending.ok_or(ReplyError::UnknownCookie(header.cookie()))?;
        let outcome = header.outcome_without_data().filter(|_| pending.is_plain);
        if outcome.is_none() {
            return Ok(false);
        }
        if !self.structured && matches!(header, Header::Chunk(_)) {
            return Err(ReplyError::Unnegotiated);
        }
        pending.outcome = outcome;
        pending.thread.unpark();
        Ok(true)
    }
}

impl Table {
    /// What is known of `sent`. What is complete is removed at once: it must not be woken in another's place.
    fn collect(&mut self, sent: &mut [Sent<'_>]) {
        for sent in sent {
            let Some(pending) = self.pending.get_mut(&sent.cookie) else { continue };
            pending.waits = true;
            if sent.outcome.is_none() {
                sent.outcome = pending.outcome.take();
            }
            if sent.outcome.is_some() {
                self.pending.remove(&sent.cookie);
            }
        }
    }

    /// The turn is anybody's: wakes the one that has waited longest, if any.
    fn pass_on(&mut self, reader: Reader) {
        self.turn = Turn::Idle(reader);
        let waits = |(_, pending): &(&u64, &Pending)| pending.waits && pending.outcome.is_none();
        let next = self.pending.iter().filter(waits).min_by_key(|(cookie, _)| **cookie);
        if let Some((_, pending)) = next {
            pending.thread.unpark();
        }
    }

    /// The turn is that of the thread to which `header` belongs.
    fn pass_to(&mut self, header: Header, reader: Reader) {
        let to = header.cookie();
        self.turn = Turn::Passed(to, header, reader);
        if let Some(pending) = self.pending.get(&to) {
            pending.thread.unpark();
        }
    }
}

impl Drop for Connection {
    /// Takes leave; the socket is closed next.
    fn drop(&mut self) {
        if self.lost().is_none() {
            let leave =
                Request { flags: 0, command: command::DISCONNECT, cookie: 0, offset: 0, len: 0 };
            self.wire.send_now(&leave.encode());
        }
    }
}
