//! The session of a client, and what becomes of it: lost, made again, ended.
//!
//! ```text
//! Up ── a connection is lost ──▶ Down ── a request, once the interval has passed ──▶ Connecting ──▶ Up | Down
//! any ── interrupt, close ──▶ Ended
//! ```
//! Requests fail at once while it is down, and wait for the outcome while one of them connects.

use super::NbdOptions;
use super::failure::{Cause, NbdIoError, NbdOpenError, OpenReason, chain};
use super::handshake::Export;
use super::session::{Session, Terms};
use super::unflushed::Unflushed;
use super::wire::{Stop, resolve};
use crate::block::nbd::address::{NbdAddress, NbdServer};
use crate::block::nbd::protocol::transmission_flag;
use crate::lock;
use socket2::SockAddr;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

/// What a client and its handles share.
#[derive(Debug)]
pub(super) struct Shared {
    pub address: NbdAddress,
    options: NbdOptions,
    /// As it was when it was opened; it must not change.
    pub export: Export,
    /// The place that has answered: all connections go there.
    place: SockAddr,
    stop: Arc<Stop>,
    state: Mutex<State>,
    changed: Condvar,
    /// What was not flushed in sessions that were lost.
    pub lost_writes: Unflushed,
}

#[derive(Debug)]
enum State {
    Up(Arc<Session>),
    Down(Down),
    /// A thread connects.
    Connecting,
    Ended(Cause),
}

#[derive(Debug, Clone)]
struct Down {
    cause: Cause,
    /// Why the last attempt to connect again failed.
    attempt: Option<Arc<str>>,
    retry_at: Instant,
}

/// Sets the state when an attempt to connect ends, also by a panic.
struct Attempt<'a> {
    shared: &'a Shared,
    result: Result<Arc<Session>, Down>,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        // It may have ended meanwhile.
        if matches!(*state, State::Connecting) {
            *state = match &self.result {
                Ok(session) => State::Up(session.clone()),
                Err(down) => State::Down(down.clone()),
            };
        }
        self.shared.changed.notify_all();
    }
}

impl Shared {
    pub fn open(address: &NbdAddress, options: NbdOptions) -> Result<Self, NbdOpenError> {
        let failed = |reason| NbdOpenError { address: address.clone(), reason };
        let until = Instant::now() + options.connect_timeout;
        let places = resolve(address, until).map_err(|error| failed(OpenReason::Connect(error)))?;
        let stop = Stop::new().map_err(|error| failed(OpenReason::Connect(error)))?;
        let stop = Arc::new(stop);
        let (session, place) = open(address, &options, &places, &stop, until).map_err(failed)?;
        let (export, lost_writes) = (session.export, Unflushed::new(session.export.len_bytes));
        let (state, changed) = (Mutex::new(State::Up(Arc::new(session))), Condvar::new());
        let address = address.clone();
        Ok(Self { address, options, export, place, stop, state, changed, lost_writes })
    }

    pub fn is_read_only(&self) -> bool {
        self.options.read_only || self.export.has(transmission_flag::READ_ONLY)
    }

    pub fn is_connected(&self) -> bool {
        self.connection_count() > 0
    }

    pub fn connection_count(&self) -> usize {
        match &*lock(&self.state) {
            State::Up(session) if session.lost().is_none() => session.connection_count(),
            _ => 0,
        }
    }

    /// The session for a request; connects again if it is time for that.
    pub fn session(&self) -> io::Result<Arc<Session>> {
        let mut state = lock(&self.state);
        loop {
            let down = match &*state {
                State::Up(session) => return Ok(session.clone()),
                State::Ended(cause) => return Err(NbdIoError::lost(&self.address, cause)),
                State::Down(down) if Instant::now() < down.retry_at => return Err(self.error(down)),
                State::Down(down) => down.clone(),
                State::Connecting => {
                    let woken = self.changed.wait(state);
                    state = woken.unwrap_or_else(PoisonError::into_inner);
                    // The outcome is for those, too, who have waited for it.
                    match &*state {
                        State::Down(down) => return Err(self.error(down)),
                        _ => continue,
                    }
                }
            };
            *state = State::Connecting;
            drop(state);
            self.connect_again(down);
            state = lock(&self.state);
            if let State::Down(down) = &*state {
                return Err(self.error(down));
            }
        }
    }

    fn connect_again(&self, down: Down) {
        let panicked = Down { retry_at: Instant::now(), ..down.clone() };
        let mut attempt = Attempt { shared: self, result: Err(panicked) };
        let until = Instant::now() + self.options.connect_timeout;
        let place = std::slice::from_ref(&self.place);
        let opened = open(&self.address, &self.options, place, &self.stop, until);
        let fits = opened.and_then(|(session, _)| self.check(session.export).map(|()| session));
        attempt.result = match fits {
            Ok(session) => {
                log::info!("{}: connected again", self.address);
                Ok(Arc::new(session))
            }
            Err(reason) => {
                let retry_at = Instant::now() + self.options.reconnect_interval;
                Err(Down { attempt: Some(chain(&reason).into()), retry_at, ..down })
            }
        };
    }

    /// It must be the same disk, as far as can be seen.
    fn check(&self, found: Export) -> Result<(), OpenReason> {
        if found.len_bytes != self.export.len_bytes {
            let (before, now) = (self.export.len_bytes, found.len_bytes);
            return Err(OpenReason::Resized { before, now });
        }
        if found.has(transmission_flag::READ_ONLY) && !self.is_read_only() {
            return Err(OpenReason::ReadOnlyNow);
        }
        Ok(())
    }

    fn error(&self, down: &Down) -> io::Error {
        let Down { cause, attempt, .. } = down;
        let Some(now) = attempt.clone() else {
            return NbdIoError::lost(&self.address, cause);
        };
        let (address, text) = (self.address.to_string(), cause.text.clone());
        io::Error::new(cause.kind, NbdIoError::LostForNow { address, cause: text, now })
    }

    /// `session` was lost.
    pub fn note_lost(&self, session: &Arc<Session>, cause: &Cause) {
        let mut state = lock(&self.state);
        if matches!(&*state, State::Up(now) if Arc::ptr_eq(now, session)) {
            log::warn!("{}: the connection was lost: {}", self.address, cause.text);
            let retry_at = Instant::now() + self.options.reconnect_interval;
            *state = State::Down(Down { cause: cause.clone(), attempt: None, retry_at });
        }
        drop(state);
        self.settle(session);
    }

    /// If `session` is lost, so is what was not flushed in it. Called after each addition to that.
    pub fn settle(&self, session: &Session) {
        if session.lost().is_some() {
            self.lost_writes.add_all(session.unflushed.take());
        }
    }

    /// Fails while writes may have been lost.
    pub fn check_lost_writes(&self) -> io::Result<()> {
        if self.lost_writes.is_empty() {
            return Ok(());
        }
        Err(io::Error::other(NbdIoError::Unflushed { address: self.address.to_string() }))
    }

    /// See [`super::NbdControl::interrupt`].
    pub fn interrupt(&self) {
        self.stop.set();
        let cause = Cause::interrupted();
        if let State::Up(session) = self.end(&cause) {
            session.lose(&cause);
        }
    }

    /// Takes leave of the server.
    pub fn close(&self) {
        let cause = Cause { kind: io::ErrorKind::NotConnected, text: "it was closed".into() };
        // Dropping the session does.
        drop(self.end(&cause));
    }

    fn end(&self, cause: &Cause) -> State {
        let mut state = lock(&self.state);
        let before = match &*state {
            // The first cause stays.
            State::Ended(first) => State::Ended(first.clone()),
            _ => State::Ended(cause.clone()),
        };
        let before = std::mem::replace(&mut *state, before);
        self.changed.notify_all();
        before
    }
}

fn open(
    address: &NbdAddress,
    options: &NbdOptions,
    places: &[SockAddr],
    stop: &Arc<Stop>,
    until: Instant,
) -> Result<(Session, SockAddr), OpenReason> {
    let paying = match address.server() {
        NbdServer::Unix(_) => 1,
        NbdServer::Tcp { .. } => 2,
    };
    let max_connections = options.max_connections.unwrap_or(paying);
    let (stall, export) = (options.stall_timeout, address.export());
    Session::open(&Terms { places, export, stop, stall, until, max_connections })
}
