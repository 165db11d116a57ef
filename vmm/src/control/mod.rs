//! The control socket: clients, negotiation, replies and events. Non-blocking and driven by file
//! descriptors; owned by the event loop.

mod arguments;
pub mod backup;
pub mod bitmap;
pub mod block;
pub mod command;
mod cpu_model;
pub mod event;
pub mod export;
pub mod job;
pub mod message;
pub mod options;
pub mod schema;

use command::Command;
pub use event::Event;
use message::{Framer, QmpError, greeting, line, reply};
use migration::transport::unix::{ListenError, SocketFile, listen_unix};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Limit of unread output; a client above it is disconnected.
const MAX_UNREAD_BYTES: usize = 4 << 20;
const MAX_CLIENTS: usize = 16;

/// Cannot listen on the control socket.
#[derive(Debug, thiserror::Error)]
#[error("control socket")]
pub struct ControlError(#[from] ListenError);

/// Identifies a client; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(pub u32);

/// A request that needs a reply.
#[derive(Debug, Clone, PartialEq)]
pub struct Incoming {
    /// Who asks.
    pub client: ClientId,
    /// To be echoed.
    pub id: Option<Value>,
    /// What is asked.
    pub command: Command,
    /// The request as received, for forwarding.
    pub request: message::Request,
}

/// A reply.
pub type QmpResult = Result<Value, QmpError>;

struct Client {
    stream: UnixStream,
    framer: Framer,
    negotiated: bool,
    unsent: Vec<u8>,
    closing: bool,
}

/// The listening socket and its clients.
pub struct ControlServer {
    listener: UnixListener,
    /// Removed when the server is dropped.
    _file: SocketFile,
    clients: BTreeMap<ClientId, Client>,
    next_id: u32,
    /// Streams of disconnected clients. They stay open until the event loop has removed their descriptors,
    /// so that the next client cannot get the same number earlier.
    gone: Vec<UnixStream>,
}

impl ControlServer {
    /// Listens at `path`, for this user only. Replaces a stale socket.
    pub fn bind(path: &Path) -> Result<Self, ControlError> {
        let (listener, file) = listen_unix(path)?;
        let failed = |source| ListenError::Host { path: path.to_owned(), source };
        listener.set_nonblocking(true).map_err(failed)?;
        let clients = BTreeMap::new();
        Ok(Self { listener, _file: file, clients, next_id: 0, gone: Vec::new() })
    }

    /// Readable when a client connects.
    pub fn fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// Accepts one client and sends the greeting.
    pub fn accept(&mut self) -> io::Result<Option<ClientId>> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        if self.clients.len() >= MAX_CLIENTS {
            log::warn!("control client refused: {MAX_CLIENTS} are connected");
            return Ok(None);
        }
        stream.set_nonblocking(true)?;
        let id = ClientId(self.next_id);
        self.next_id += 1;
        let client = Client {
            stream,
            framer: Framer::default(),
            negotiated: false,
            unsent: Vec::new(),
            closing: false,
        };
        self.clients.insert(id, client);
        self.send(id, &greeting());
        Ok(Some(id))
    }

    fn disconnect(&mut self, id: ClientId) {
        self.gone.extend(self.clients.remove(&id).map(|client| client.stream));
    }

    /// Closes the descriptors of disconnected clients; the event loop must have removed them.
    pub fn close_gone(&mut self) {
        self.gone.clear();
    }

    /// The client's descriptor, while it is connected.
    pub fn client_fd(&self, id: ClientId) -> Option<RawFd> {
        self.clients.get(&id).map(|client| client.stream.as_raw_fd())
    }

    /// Whether output is pending for the client.
    pub fn wants_write(&self, id: ClientId) -> bool {
        self.clients.get(&id).is_some_and(|client| !client.unsent.is_empty())
    }

    /// Reads available input. Returns requests; replies to malformed ones here.
    pub fn on_readable(&mut self, id: ClientId) -> Vec<Incoming> {
        let mut requests = Vec::new();
        let mut buffer = [0; 16 << 10];
        // One buffer at a time: a client that keeps sending must not starve the others.
        let Some(client) = self.clients.get_mut(&id) else { return requests };
        let found = match client.stream.read(&mut buffer) {
            Ok(0) => {
                self.disconnect(id);
                return requests;
            }
            Ok(count) => client.framer.push(&buffer[..count]),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                return requests;
            }
            Err(_) => {
                self.disconnect(id);
                return requests;
            }
        };
        for request in found {
            match request {
                Err(bad) => {
                    self.reply(id, bad.id, Err(bad.error));
                    if bad.fatal {
                        self.close_when_sent(id);
                    }
                }
                Ok(request) => match self.understand(id, &request) {
                    Ok(Some(command)) => {
                        let echoed = request.id.clone();
                        requests.push(Incoming { client: id, id: echoed, command, request });
                    }
                    Ok(None) => self.reply(id, request.id, Ok(json!({}))),
                    Err(error) => self.reply(id, request.id, Err(error)),
                },
            }
        }
        requests
    }

    /// `None` for the negotiation itself.
    fn understand(
        &mut self,
        id: ClientId,
        request: &message::Request,
    ) -> Result<Option<Command>, QmpError> {
        let Some(client) = self.clients.get_mut(&id) else { return Ok(None) };
        match (request.execute == command::NEGOTIATION, client.negotiated) {
            (true, false) => {
                Command::parse(request)?;
                client.negotiated = true;
                Ok(None)
            }
            (true, true) => {
                Err(QmpError::not_found("Capabilities negotiation is already complete"))
            }
            (false, false) => Err(QmpError::not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            )),
            (false, true) => Command::parse(request).map(Some),
        }
    }

    /// Replies to a request.
    pub fn reply(&mut self, client: ClientId, id: Option<Value>, result: QmpResult) {
        self.send(client, &reply(id, result));
    }

    /// Sends an event to every client that has negotiated.
    pub fn broadcast(&mut self, event: &Event) {
        let event = event.to_json();
        let listening = self.clients.iter().filter(|(_, client)| client.negotiated);
        for id in listening.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.send(id, &event);
        }
    }

    fn send(&mut self, id: ClientId, value: &Value) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if client.unsent.len() > MAX_UNREAD_BYTES {
            log::warn!("control client dropped: it does not read");
            self.disconnect(id);
            return;
        }
        client.unsent.extend_from_slice(&line(value));
        self.on_writable(id);
    }

    /// Writes as much as the socket accepts.
    pub fn on_writable(&mut self, id: ClientId) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        while !client.unsent.is_empty() {
            match client.stream.write(&client.unsent) {
                Ok(count) => drop(client.unsent.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.disconnect(id);
                    return;
                }
            }
        }
        if client.closing {
            self.disconnect(id);
        }
    }

    fn close_when_sent(&mut self, id: ClientId) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.closing = true;
            self.on_writable(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    fn connected() -> (tempfile::TempDir, ControlServer, BufReader<UnixStream>, ClientId) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let mut server = ControlServer::bind(&path).unwrap();
        let mut client = BufReader::new(UnixStream::connect(&path).unwrap());
        let id = server.accept().unwrap().unwrap();
        assert!(read(&mut client)["QMP"]["version"].is_object());
        (folder, server, client, id)
    }

    fn read(client: &mut BufReader<UnixStream>) -> Value {
        let mut line = String::new();
        client.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn nothing_but_negotiation_comes_first_and_no_event_before_it() {
        let (_folder, mut server, mut client, id) = connected();
        server.broadcast(&Event::plain("STOP"));
        client
            .get_mut()
            .write_all(br#"{"execute":"stop","id":1}{"execute":"qmp_capabilities"}"#)
            .unwrap();
        assert!(server.on_readable(id).is_empty());
        let refused = read(&mut client);
        assert_eq!(
            (&refused["error"]["class"], &refused["id"]),
            (&json!("CommandNotFound"), &json!(1))
        );
        assert_eq!(read(&mut client), json!({"return": {}}));
        server.broadcast(&Event::plain("RESUME"));
        assert_eq!(read(&mut client)["event"], "RESUME");
        client.get_mut().write_all(br#"{"execute":"stop","id":2}"#).unwrap();
        let incoming = server.on_readable(id);
        assert_eq!(incoming[0].command, Command::Stop);
    }

    #[test]
    fn a_capability_that_is_not_offered_is_refused_and_negotiation_goes_on() {
        let (_folder, mut server, mut client, id) = connected();
        for (arguments, refusal) in [
            (json!({"enable": ["oob"]}), "Capability oob not available"),
            (json!({"enable": ["x"]}), "Parameter 'enable' does not accept value 'x', only: oob"),
            (json!({"enable": "oob"}), "Invalid parameter type for 'enable', expected: array"),
            (json!({"enable": [], "disable": []}), "Parameter 'disable' is unexpected"),
        ] {
            let request = json!({"execute": "qmp_capabilities", "arguments": arguments});
            client.get_mut().write_all(request.to_string().as_bytes()).unwrap();
            client.get_mut().write_all(br#"{"execute":"stop"}"#).unwrap();
            assert!(server.on_readable(id).is_empty());
            let refused = read(&mut client);
            assert_eq!(refused["error"], json!({"class": "GenericError", "desc": refusal}));
            assert_eq!(read(&mut client)["error"]["class"], "CommandNotFound");
        }
        let none = br#"{"execute":"qmp_capabilities","arguments":{"enable":[]}}"#;
        client.get_mut().write_all(none).unwrap();
        assert!(server.on_readable(id).is_empty());
        assert_eq!(read(&mut client), json!({"return": {}}));
        client.get_mut().write_all(br#"{"execute":"stop"}"#).unwrap();
        assert_eq!(server.on_readable(id).len(), 1);
    }

    #[test]
    fn a_client_that_leaves_in_the_middle_is_forgotten() {
        let (_folder, mut server, client, id) = connected();
        client.get_ref().write_all(br#"{"exec"#).unwrap();
        assert!(server.on_readable(id).is_empty());
        drop(client);
        assert!(server.on_readable(id).is_empty());
        assert!(server.client_fd(id).is_none());
    }
}
