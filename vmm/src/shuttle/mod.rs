//! `ferry run --migrate-every`: the guest runs in a child process and is migrated to a new one again and
//! again, while this process keeps the console, control socket, timeout and exit code. Children are
//! ordinary `ferry run` and `ferry receive` processes.
//!
//! ```text
//! user ── console ─┬─ input ───────────▶ child n   (the guest)
//!                  └─ output ◀── pump ── child n, to its end, then child n+1
//! user ── control socket ── requests ──▶ child n; those that come during a move wait for its end
//! alarm ─▶ start child n+1, `migrate` to it on thread `hop` ─▶ child n+1 is the guest's
//! ```

mod child;
mod hop;

use crate::config::RunConfig;
use crate::console::{Console, ConsoleEvent};
use crate::control::command::Command;
use crate::control::message::QmpError;
use crate::control::{Event, Incoming, QmpResult};
use crate::error::chain;
use crate::event_loop::{self, EventLoop, Handler};
use crate::supervisor::{SetupError, exit_code};
use child::{Child, Connection, Pump};
use hop::HopError;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Messages from the shuttle's threads.
enum Message {
    /// An event of the console.
    Console(ConsoleEvent),
    /// A QMP event of a child.
    Event(ChildId, Value),
    /// A child has ended, with this exit code.
    Ended(ChildId, u8),
    /// All output of a child has been forwarded.
    Drained(ChildId),
    /// A move has ended; its downtime, if reported.
    Hopped(ChildId, Result<Option<Duration>, HopError>),
}

/// How long to wait for a child's end after its control socket has closed.
const ENDING_PATIENCE: Duration = Duration::from_secs(2);

/// Identifies a child.
type ChildId = u32;

/// A move in progress.
struct Move {
    to: Child,
    /// Requests to forward when it is over.
    waiting: Vec<Incoming>,
}

struct Shuttle {
    config: RunConfig,
    every: Duration,
    folder: tempfile::TempDir,
    console: Console,
    pump: Pump,
    current: Child,
    /// To the current child; `None` if that ended before it accepted.
    connection: Option<Connection>,
    last_id: ChildId,
    moving: Option<Move>,
    ended: BTreeMap<ChildId, u8>,
    drained: Option<ChildId>,
    moves: u32,
    failures: u32,
    worst: Duration,
    event_loop: EventLoop<Message>,
}

/// Boots a guest, moves it at the interval `every` until it ends, and returns the exit code.
pub fn run(config: RunConfig, every: Duration) -> Result<u8, SetupError> {
    let control = config.host.qmp.as_ref().map(|path| path.0.as_path());
    let mut event_loop = EventLoop::open(control, config.host.timeout)?;
    let expect = config.host.expect.as_deref().map(regex_lite::Regex::new).transpose();
    let to_us = event_loop.mailbox().clone();
    let console = Console::open(
        &config.host.serial,
        expect.map_err(SetupError::Expect)?,
        Arc::new(move |event| to_us.post(Message::Console(event))),
    )?;
    let folder = tempfile::Builder::new().prefix("ferry-").tempdir().map_err(SetupError::Thread)?;
    let pump =
        Pump::start(console.output(), event_loop.mailbox().clone()).map_err(SetupError::Thread)?;
    let mut current =
        Child::boot(&config, folder.path(), event_loop.mailbox()).map_err(SetupError::Thread)?;
    pump.follow(current.id(), current.take_output());
    // A child that refuses connections has ended: the event loop gets its exit code and its output.
    let connection = current.connect(event_loop.mailbox()).ok();
    if let Some(connection) = &connection {
        console.attach(connection.input.clone());
        event_loop.set_alarm(every);
    }
    event_loop::serve(Shuttle {
        config,
        every,
        folder,
        console,
        pump,
        current,
        connection,
        last_id: 1,
        moving: None,
        ended: BTreeMap::new(),
        drained: None,
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
        let started = Child::receive(id, &self.config, self.folder(), self.event_loop.mailbox());
        let mut to = match started {
            Ok(to) => to,
            Err(error) => return self.move_failed(&HopError::Start(error)),
        };
        self.pump.follow(id, to.take_output());
        // Input is kept for the guest at its destination.
        self.console.detach();
        hop::start(id, &self.current, &mut to, self.event_loop.mailbox().clone());
        self.moving = Some(Move { to, waiting: Vec::new() });
    }

    fn move_failed(&mut self, error: &HopError) {
        if matches!(error, HopError::Client(_))
            && let Some(code) = self.current.ended_within(ENDING_PATIENCE)
        {
            // The guest has ended, so the move did not fail; the message about its end follows.
            self.ended.insert(self.current.id(), code);
        }
        if !self.ended.contains_key(&self.current.id()) {
            self.failures += 1;
            eprintln!("ferry: move {} failed: {}", self.moves + 1, chain(error));
        }
    }

    fn finish_move(&mut self, result: Result<Option<Duration>, HopError>) {
        let Some(Move { to, waiting }) = self.moving.take() else { return };
        match result {
            Ok(downtime) => {
                self.moves += 1;
                match downtime {
                    Some(downtime) => {
                        self.worst = self.worst.max(downtime);
                        log::info!("move {}: downtime {downtime:.2?}", self.moves);
                    }
                    None => log::warn!("move {}: its downtime was not reported", self.moves),
                }
                // As after booting: a child that refuses connections has ended, and its exit code is the
                // guest's.
                self.connection = to.connect(self.event_loop.mailbox()).ok();
                self.current = to;
            }
            Err(error) => {
                self.move_failed(&error);
                if matches!(error, HopError::Unknown(_)) {
                    // Either child may have the guest: run neither.
                    self.finish(exit_code::GUEST_FAILED);
                }
            }
        }
        if let Some(connection) = &self.connection {
            self.console.attach(connection.input.clone());
        }
        for request in waiting {
            self.ask(&request);
        }
        if !self.end_if_over() {
            self.event_loop.set_alarm(self.every);
        }
    }

    fn ask(&mut self, request: &Incoming) {
        let arguments = Value::Object(request.request.arguments.clone());
        let result: QmpResult = match &request.command {
            Command::Migrate { .. } => {
                Err(QmpError::generic("The guest is migrated by --migrate-every only"))
            }
            _ => match &mut self.connection {
                None => Err(QmpError::generic("The guest has ended")),
                Some(connection) => connection
                    .client
                    .execute(&request.request.execute, arguments)
                    .map_err(|error| QmpError::generic(chain(&error))),
            },
        };
        // A child that quits may be gone before its reply.
        let quits = request.command == Command::Quit;
        self.event_loop.reply(request, if quits { Ok(json!({})) } else { result });
    }

    /// Ends with the current child, once all its output is forwarded.
    fn end_if_over(&mut self) -> bool {
        let Some(code) = self.ended.get(&self.current.id()).copied() else { return false };
        if self.moving.is_some() || self.drained < Some(self.current.id()) {
            return false;
        }
        let code = self.console.code_unless_expecting(code);
        self.finish(code);
        true
    }

    fn finish(&mut self, code: u8) {
        self.event_loop.end(code);
    }
}

impl Handler for Shuttle {
    type Message = Message;

    fn event_loop(&mut self) -> &mut EventLoop<Message> {
        &mut self.event_loop
    }

    fn on_message(&mut self, message: Message) {
        match message {
            Message::Console(ConsoleEvent::Expected | ConsoleEvent::Quit) => {
                self.finish(exit_code::OK);
            }
            Message::Event(id, event) => {
                // Hide the stop and resume of a move.
                let Some(name) = event["event"].as_str() else { return };
                let by_move = self.moving.is_some() && matches!(name, "STOP" | "RESUME");
                if id == self.current.id() && !by_move {
                    self.event_loop.broadcast(&Event::forwarded(name, event.get("data").cloned()));
                }
            }
            Message::Ended(id, code) => {
                self.ended.insert(id, code);
                self.end_if_over();
            }
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
        match &mut self.moving {
            Some(_) if request.command == Command::Quit => {
                self.event_loop.reply(&request, Ok(json!({})));
                self.finish(exit_code::OK);
            }
            Some(moving) => moving.waiting.push(request),
            None => self.ask(&request),
        }
    }

    fn on_signal(&mut self) {
        self.finish(exit_code::GUEST_FAILED);
    }

    fn on_timeout(&mut self) {
        eprintln!("ferry: --timeout has passed");
        self.finish(exit_code::TIMEOUT);
    }

    fn on_alarm(&mut self) {
        if self.moving.is_none() && !self.ended.contains_key(&self.current.id()) {
            self.start_move();
        }
    }

    fn shut_down(&mut self) {
        self.console.detach();
        if let (None, Some(connection)) = (&self.moving, &mut self.connection) {
            // Lets it flush its disks. Fails if it has just ended.
            let _ = connection.client.execute("quit", json!({}));
        }
        let failed = match self.failures {
            0 => String::new(),
            failures => format!(", {failures} moves failed"),
        };
        eprintln!(
            "ferry: moved {} times, worst downtime {:.2} ms{failed}",
            self.moves,
            self.worst.as_secs_f64() * 1e3
        );
    }
}
