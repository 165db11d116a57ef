//! A blocking QMP client for control sockets.

pub mod ctl;
pub mod migrate;

use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Timeout of a reply: longer than the slowest command, a reset, may take.
const PATIENCE: Duration = Duration::from_secs(40);

/// A failed request over a control socket.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot connect to control socket {path}: is a ferry running with --qmp unix:{path}?")]
    Connect {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("the control socket was closed")]
    Lost(#[source] io::Error),
    #[error("no answer on the control socket in time")]
    Timeout,
    #[error("the control socket does not speak QMP: {0:?}")]
    NotQmp(String),
    /// The command failed; QMP's `desc`.
    #[error("{0}")]
    Refused(String),
}

/// A connection in command mode.
pub struct QmpClient {
    stream: BufReader<UnixStream>,
    /// The id of the last request: a reply to an earlier one may come after it was given up.
    last_id: u64,
}

impl QmpClient {
    /// Connects to `path`, with or without `unix:` before it.
    pub fn connect(path: &str) -> Result<Self, ClientError> {
        Self::connect_with(path, PATIENCE)
    }

    /// The same; each reply may take `patience`.
    pub fn connect_with(path: &str, patience: Duration) -> Result<Self, ClientError> {
        let path = path.strip_prefix("unix:").unwrap_or(path);
        let connect = || {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(patience))?;
            stream.set_write_timeout(Some(patience))?;
            Ok(stream)
        };
        let stream =
            connect().map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let mut client = Self { stream: BufReader::new(stream), last_id: 0 };
        let greeting = client.read()?;
        if greeting.get("QMP").is_none() {
            return Err(ClientError::NotQmp(greeting.to_string()));
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    fn read(&mut self) -> Result<Value, ClientError> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Err(ClientError::Lost(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => serde_json::from_str(&line).map_err(|_| ClientError::NotQmp(line)),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
            {
                Err(ClientError::Timeout)
            }
            Err(error) => Err(ClientError::Lost(error)),
        }
    }

    /// Waits, however long, for the next event.
    pub fn event(&mut self) -> Result<Value, ClientError> {
        self.stream.get_ref().set_read_timeout(None).map_err(ClientError::Lost)?;
        loop {
            let message = self.read()?;
            if message.get("event").is_some() {
                return Ok(message);
            }
        }
    }

    /// Sends a command and waits for its reply, skipping events.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        self.last_id += 1;
        let request = json!({"execute": command, "arguments": arguments, "id": self.last_id});
        let mut line = request.to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).map_err(ClientError::Lost)?;
        loop {
            let mut answer = self.read()?;
            if answer.get("id").is_some_and(|id| *id != self.last_id) {
                continue;
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let desc = error.get("desc").and_then(Value::as_str).unwrap_or("unknown error");
                return Err(ClientError::Refused(desc.to_owned()));
            }
        }
    }
}
