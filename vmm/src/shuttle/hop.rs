//! One move, on its own thread: migrates the guest through the children's control sockets.

use super::child::{Child, listen};
use super::{ChildId, Message};
use crate::client::{ClientError, QmpClient};
use crate::event_loop::Mailbox;
use serde_json::{Value, json};
use std::io;
use std::time::{Duration, Instant};

/// A move that takes longer is cancelled: it does not converge.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a destination whose source is gone may take to run the guest.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(5);
/// Polling interval.
const INTERVAL: Duration = Duration::from_millis(5);

/// Why a move has failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum HopError {
    #[error("cannot start a process")]
    Start(#[source] io::Error),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{0}")]
    Failed(String),
    #[error("the guest may run in either process: {0}")]
    Unknown(String),
}

/// Moves the guest from `from` to `to`.
pub(super) fn start(id: ChildId, from: &Child, to: &mut Child, mailbox: Mailbox<Message>) {
    let control = from.control().to_string_lossy().into_owned();
    let uri = format!("unix:{}", to.address().display());
    let target = to.control().to_string_lossy().into_owned();
    let (wait_until_ready, answer) = (to.take_readiness(), mailbox.clone());
    let builder = std::thread::Builder::new().name("hop".into()).stack_size(256 << 10);
    let spawned = builder.spawn(move || {
        wait_until_ready();
        // Before the guest is there: it may say its last words at once.
        listen(id, QmpClient::connect(&target), &answer);
        answer.post(Message::Hopped(id, hop(&control, &uri, &target)));
    });
    if let Err(error) = spawned {
        mailbox.post(Message::Silent(id));
        mailbox.post(Message::Hopped(id, Err(HopError::Start(error))));
    }
}

/// Migrates; returns how long the guest was stopped, if the source reported it.
fn hop(control: &str, uri: &str, target: &str) -> Result<Option<Duration>, HopError> {
    let mut source = QmpClient::connect(control)?;
    let bitmaps = json!([{"capability": "dirty-bitmaps", "state": true}]);
    source.execute("migrate", json!({"uri": uri, "x-capabilities": bitmaps}))?;
    match follow(&mut source) {
        // The source's process has ended or hangs: the destination's knows whether the guest is there.
        Err(HopError::Client(_)) if has_arrived(target) => Ok(None),
        result => result,
    }
}

/// A destination that was handed nothing ends by itself; one that was needs a moment to say so.
fn has_arrived(target: &str) -> bool {
    let deadline = Instant::now() + ARRIVAL_PATIENCE;
    loop {
        let status = QmpClient::connect(target)
            .and_then(|mut target| target.execute("query-status", json!({})));
        match status {
            Ok(status) if status["status"] != "inmigrate" => return true,
            Ok(_) if Instant::now() < deadline => std::thread::sleep(INTERVAL),
            _ => return false,
        }
    }
}

/// Waits for the end of the migration.
fn follow(source: &mut QmpClient) -> Result<Option<Duration>, HopError> {
    let began = Instant::now();
    let mut cancelled = false;
    let info = loop {
        let info = source.execute("query-migrate", json!({}))?;
        if matches!(info["status"].as_str(), Some("completed" | "failed" | "cancelled")) {
            break info;
        }
        if !cancelled && began.elapsed() > PATIENCE {
            source.execute("migrate_cancel", json!({}))?;
            cancelled = true;
        }
        std::thread::sleep(INTERVAL);
    };
    let reason = info["error-desc"].as_str().unwrap_or("no reason given").to_owned();
    match info["status"].as_str() {
        Some("completed") => {
            if let Some(missing) = info["x-incomplete"].as_str() {
                log::warn!("the guest has moved, but not everything has arrived: {missing}");
            }
            // It may be gone before its reply.
            let _: Result<Value, ClientError> = source.execute("quit", json!({}));
            Ok(info["x-downtime-us"].as_u64().map(Duration::from_micros))
        }
        // Not by us: the guest has ended, and its process is about to.
        Some("cancelled") if !cancelled => {
            Err(ClientError::Lost(io::ErrorKind::ConnectionAborted.into()).into())
        }
        Some("cancelled") => {
            let seconds = PATIENCE.as_secs();
            Err(HopError::Failed(format!("cancelled after {seconds} s: the guest writes too fast")))
        }
        _ if info["x-outcome"] == "unknown" => Err(HopError::Unknown(reason)),
        // It has ended just as it was to stop: that is why.
        _ if has_ended(source) => {
            Err(ClientError::Lost(io::ErrorKind::ConnectionAborted.into()).into())
        }
        _ => Err(HopError::Failed(reason)),
    }
}

/// Whether the guest of this process has ended, so that the process is about to.
fn has_ended(source: &mut QmpClient) -> bool {
    let status = source.execute("query-status", json!({}));
    status
        .is_ok_and(|status| status["status"] == "shutdown" || status["status"] == "internal-error")
}
