//! `ferry run --migrate-every`: the guest runs in a child process and is migrated to a new one again and
//! again, while this process keeps the console, control socket, timeout and exit code. Children do
//! what `ferry run` and `ferry receive` do; each gets the whole configuration ([`ChildConfig`]).
//!
//! ```text
//! user ── console ─┬─ input ───────────▶ child n   (the guest)
//!                  └─ output ◀── pump ── child n, to its end, then child n+1
//! user ── control socket ── requests ──▶ child n; those that come during a move wait for its end
//! alarm ─▶ start child n+1, `migrate` to it on thread `hop` ─▶ child n+1 is the guest's
//! ```

mod child;
mod child_config;
mod hop;

pub use child_config::{ChildConfig, Part, Work};

use crate::client::ClientError;
use crate::config::RunConfig;
use crate::console::{Console, ConsoleEvent};
use crate::control::command::Command;
use crate::control::message::QmpError;
use crate::control::{Event, Incoming};
use crate::error::chain;
use crate::event_loop::{self, EventLoop, Handler};
use crate::exit_code::{self, Exit};
use crate::log_queue::say;
use crate::setup::{SetupError, end_with_parent};
use child::{Child, Connection, Pump};
use hop::HopError;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Messages from the shuttle's threads.
enum Message {
    /// An event of the console.
    Console(ConsoleEvent),
    /// A QMP event of a child.
    Event(ChildId, Value),
    /// A child has no more events.
    Silent(ChildId),
    /// A child has ended.
    Ended(ChildId, Exit),
    /// A child's answer to a request.
    Answered(ChildId, Box<Incoming>, Result<Value, ClientError>),
    /// All output of a child has been forwarded.
    Drained(ChildId),
    /// A move has ended; its downtime, if reported.
    Hopped(ChildId, Result<Option<Duration>, HopError>),
}

/// How long to wait for a child's end after its control socket has closed.
const ENDING_PATIENCE: Duration = Duration::from_secs(2);
/// How its last words but one begin.
pub const MOVED: &str = "moved";
/// Most requests that wait for the end of a move.
const MAX_WAITING: usize = 64;
/// Most events of a guest that has just moved, and more than there are before it is known to have.
const MAX_EVENTS: usize = 64;

/// Identifies a child.
type ChildId = u32;
/// The child that boots the guest.
const FIRST: ChildId = 1;

/// What the user has asked for, for every child.
struct User {
    config: RunConfig,
    /// The number of `-v`.
    verbose: u8,
}

/// A move in progress.
struct Move {
    to: Child,
    /// Requests to forward when it is over.
    waiting: Vec<Incoming>,
    /// Events of `to`, which are the guest's if it gets there.
    events: Vec<Value>,
}

struct Shuttle {
    user: User,
    every: Duration,
    folder: tempfile::TempDir,
    console: Console,
    pump: Pump,
    current: Child,
    /// To the current child; `None` if that ended before it accepted.
    connection: Option<Connection>,
    last_id: ChildId,
    moving: Option<Move>,
    ended: BTreeMap<ChildId, Exit>,
    drained: Option<ChildId>,
    /// Children whose events have all been heard.
    silent: BTreeSet<ChildId>,
    moves: u32,
    failures: u32,
    worst: Duration,
    event_loop: EventLoop<Message>,
}

/// Boots a guest, moves it at the interval `every` until it ends, or the process is told to. `verbose` is
/// the number of `-v`.
pub fn run(config: RunConfig, every: Duration, verbose: u8) -> Result<Exit, SetupError> {
    if config.host.with_parent {
        end_with_parent()?;
    }
    let control = config.host.qmp.as_ref().map(|path| path.0.as_path());
    let mut event_loop = EventLoop::open(control, config.host.timeout)?;
    let to_us = event_loop.mailbox().clone();
    let console = Console::open(
        &config.host.serial,
        config.host.expect.clone(),
        Arc::new(move |event| to_us.post(Message::Console(event))),
    )?;
    let folder = tempfile::Builder::new().prefix("ferry-").tempdir();
    let folder = folder.map_err(SetupError::start("make a folder for sockets"))?;
    let pump = Pump::start(console.output(), event_loop.mailbox().clone());
    let pump = pump.map_err(SetupError::start("start the thread that forwards output"))?;
    let user = User { config, verbose };
    let current = Child::start(FIRST, &user, folder.path(), event_loop.mailbox());
    let mut current = current.map_err(SetupError::start("start the process of the guest"))?;
    pump.follow(current.id(), current.take_output());
    current.listen(event_loop.mailbox());
    // A child that refuses connections has ended: the event loop gets its exit code and its output.
    let connection = current.connect(event_loop.mailbox()).ok();
    if let Some(connection) = &connection {
        console.attach(connection.input.clone());
        event_loop.set_alarm(every);
    }
    event_loop::serve(Shuttle {
        user,
        every,
        folder,
        console,
        pump,
        current,
        connection,
        last_id: FIRST,
        moving: None,
        ended: BTreeMap::new(),
        drained: None,
        silent: BTreeSet::new(),
        moves: 0,
        failures: 0,
        worst: Duration::ZERO,
        event_loop,
    })
    .map_err(SetupError::from)
}

impl Shuttle {
    fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn start_move(&mut self) {
        let id = self.last_id + 1;
        self.last_id = id;
        let started = Child::start(id, &self.user, self.folder(), self.event_loop.mailbox());
        let mut to = match started {
            Ok(to) => to,
            Err(error) => {
                self.move_failed(&HopError::Start(error));
                return self.event_loop.set_alarm(self.every);
            }
        };
        self.pump.follow(id, to.take_output());
        // Input is kept for the guest at its destination.
        self.console.detach();
        hop::start(id, &self.current, &mut to, self.event_loop.mailbox().clone());
        self.moving = Some(Move { to, waiting: Vec::new(), events: Vec::new() });
    }

    fn move_failed(&mut self, error: &HopError) {
        if matches!(error, HopError::Client(_))
            && let Some(exit) = self.current.ended_within(ENDING_PATIENCE)
        {
            // The guest has ended, so the move did not fail; the message about its end follows.
            self.ended.insert(self.current.id(), exit);
        }
        if !self.ended.contains_key(&self.current.id()) {
            self.failures += 1;
            say(format_args!("move {} failed: {}", self.moves + 1, chain(error)));
        }
    }

    fn finish_move(&mut self, result: Result<Option<Duration>, HopError>) {
        let Some(Move { to, waiting, events }) = self.moving.take() else { return };
        match result {
            Ok(downtime) => {
                self.moves += 1;
                match downtime {
                    Some(downtime) => {
                        self.worst = self.worst.max(downtime);
                        log::info!("move {}: downtime {downtime:.2?}", self.moves);
                    }
                    None => {
                        log::warn!("move {}: its downtime was not reported", self.moves);
                        // It may hang, and its output is waited for.
                        self.current.kill();
                    }
                }
                // As after booting: a child that refuses connections has ended, and its exit code is the
                // guest's.
                self.connection = to.connect(self.event_loop.mailbox()).ok();
                self.current = to;
                events.iter().for_each(|event| self.forward(event));
            }
            Err(error) => {
                self.move_failed(&error);
                if matches!(error, HopError::Unknown(_)) {
                    // Either child may have the guest: run neither.
                    self.finish(Exit::new(exit_code::CANNOT_RUN, chain(&error)));
                } else {
                    to.kill();
                }
            }
        }
        if let Some(connection) = &self.connection {
            self.console.attach(connection.input.clone());
        }
        for request in waiting {
            self.ask(Box::new(request));
        }
        if !self.end_if_over() {
            self.event_loop.set_alarm(self.every);
        }
    }

    /// A child has an event: the guest's, a move's, or one to keep until it is known where the guest is.
    fn on_event(&mut self, id: ChildId, event: Value) {
        let is_guests = id == self.current.id();
        match &mut self.moving {
            Some(_) if is_by_move(&event) => {}
            Some(moving) if moving.to.id() == id && moving.events.len() < MAX_EVENTS => {
                moving.events.push(event);
            }
            _ if is_guests => self.forward(&event),
            _ => {}
        }
    }

    fn forward(&mut self, event: &Value) {
        if let Some(name) = event["event"].as_str() {
            self.event_loop.broadcast(&Event::forwarded(name, event.get("data").cloned()));
        }
    }

    /// Forwards a request to the child that has the guest.
    fn ask(&mut self, request: Box<Incoming>) {
        if matches!(request.command, Command::Migrate { .. }) {
            let desc = "The guest is migrated by --migrate-every only";
            return self.event_loop.reply(&request, Err(QmpError::generic(desc)));
        }
        let refused = match &self.connection {
            None => Err(request),
            Some(connection) => connection.ask(request),
        };
        if let Err(request) = refused {
            self.event_loop.reply(&request, Err(QmpError::generic("The guest has ended")));
        }
    }

    fn answered(
        &mut self,
        id: ChildId,
        request: Box<Incoming>,
        result: Result<Value, ClientError>,
    ) {
        let result = match result {
            Ok(value) => Ok(value),
            // A child that quits may be gone before its reply.
            Err(_) if request.command == Command::Quit => Ok(json!({})),
            Err(ClientError::Lost(_)) if is_query(&request) && id != self.current.id() => {
                // The guest has moved meanwhile.
                return self.ask(request);
            }
            Err(ClientError::Lost(_)) if is_query(&request) && self.moving.is_some() => {
                return self.wait_for_move(request);
            }
            Err(error) => Err(QmpError::generic(chain(&error))),
        };
        self.event_loop.reply(&request, result);
    }

    fn wait_for_move(&mut self, request: Box<Incoming>) {
        match &mut self.moving {
            Some(moving) if moving.waiting.len() < MAX_WAITING => moving.waiting.push(*request),
            Some(_) => {
                let desc = "too many requests wait for the guest to move";
                self.event_loop.reply(&request, Err(QmpError::generic(desc)));
            }
            None => self.ask(request),
        }
    }

    /// Ends with the current child, once all its output and events are forwarded.
    fn end_if_over(&mut self) -> bool {
        let Some(exit) = self.ended.get(&self.current.id()).cloned() else { return false };
        let id = self.current.id();
        if self.moving.is_some() || self.drained < Some(id) || !self.silent.contains(&id) {
            return false;
        }
        // A guest's own end fails if `--expect` never matched; other failures say more.
        let exit = if exit.is_guests_own() { self.console.unless_expecting(exit) } else { exit };
        self.finish(exit);
        true
    }

    /// Ends because a user has asked for it with `how`.
    fn told_to(&mut self, how: &str) {
        let exit = Exit::new(exit_code::OK, format!("ended by {how}"));
        let exit = self.console.unless_expecting(exit);
        self.finish(exit);
    }

    fn finish(&mut self, exit: Exit) {
        let place = match exit.code {
            exit_code::TIMEOUT | exit_code::UNMATCHED | exit_code::CRASHED => {
                Some(self.console.last_output())
            }
            _ => None,
        };
        self.event_loop.end(exit.at(place));
    }
}

/// Whether an event tells of a move: the stop and resume, and the end of the process that the guest has left.
fn is_by_move(event: &Value) -> bool {
    match event["event"].as_str() {
        Some("STOP" | "RESUME") => true,
        Some("SHUTDOWN") => event["data"]["reason"] == "host-qmp-quit",
        _ => false,
    }
}

/// Whether a request changes nothing, and may be asked again of another child.
fn is_query(request: &Incoming) -> bool {
    request.request.execute.starts_with("query-")
}

impl Handler for Shuttle {
    type Message = Message;

    fn event_loop(&mut self) -> &mut EventLoop<Message> {
        &mut self.event_loop
    }

    fn on_message(&mut self, message: Message) {
        match message {
            Message::Console(ConsoleEvent::Expected) => {
                self.finish(Exit::new(exit_code::OK, "--expect matched"));
            }
            Message::Console(ConsoleEvent::Quit) => self.told_to("Ctrl-A x"),
            Message::Event(id, event) => self.on_event(id, event),
            Message::Silent(id) => {
                self.silent.insert(id);
                self.end_if_over();
            }
            Message::Ended(id, exit) => {
                self.ended.insert(id, exit);
                self.end_if_over();
            }
            Message::Answered(id, request, result) => self.answered(id, request, result),
            Message::Drained(id) => {
                self.drained = self.drained.max(Some(id));
                self.end_if_over();
            }
            Message::Hopped(id, result) => {
                if self.moving.as_ref().is_some_and(|moving| moving.to.id() == id) {
                    self.finish_move(result);
                }
            }
        }
    }

    fn on_request(&mut self, request: Incoming) {
        let waiting = self.moving.as_ref().map(|moving| &moving.waiting);
        match waiting {
            Some(_) if request.command == Command::Quit => {
                self.event_loop.reply(&request, Ok(json!({})));
                self.told_to("`quit`");
            }
            // Replies to a client come in the order of its requests.
            Some(waiting)
                if !is_query(&request)
                    || waiting.iter().any(|earlier| earlier.client == request.client) =>
            {
                self.wait_for_move(Box::new(request));
            }
            _ => self.ask(Box::new(request)),
        }
    }

    fn on_signal(&mut self) {
        self.finish(Exit::new(exit_code::SIGNAL, "SIGINT or SIGTERM"));
    }

    fn on_timeout(&mut self) {
        self.finish(Exit::new(exit_code::TIMEOUT, "--timeout has passed"));
    }

    fn on_alarm(&mut self) {
        if self.moving.is_none() && !self.ended.contains_key(&self.current.id()) {
            self.start_move();
        }
    }

    fn shut_down(&mut self) {
        self.console.detach();
        if self.moving.is_none() {
            self.current.quit(ENDING_PATIENCE);
        }
        let failed = match self.failures {
            0 => String::new(),
            failures => format!(", {failures} moves failed"),
        };
        let worst = self.worst.as_secs_f64() * 1e3;
        let text = format!("{MOVED} {} times, worst downtime {worst:.2} ms{failed}", self.moves);
        if self.user.config.host.quiet {
            log::info!("{text}");
        } else {
            say(text);
        }
    }
}
