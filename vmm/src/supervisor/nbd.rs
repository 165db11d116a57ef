//! The NBD server of a process: what listens, and where. [`super::exports`] decides what it offers to whom,
//! [`super::guest::served`] has one of its own until a guest arrives.

use crate::control::QmpResult;
use crate::control::export::NbdAddress;
use crate::control::message::QmpError;
use crate::error::chain;
use devices::block::nbd::server::{
    Export, ExportError, ExportInfo, Limits, Listener, NbdServer, OnDeleted, RemoveMode,
};
use migration::transport::unix::{SocketFile, listen_unix};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Instant;

/// A server, and the path of its socket if it has one.
pub struct Nbd {
    server: NbdServer,
    file: Option<SocketFile>,
}

impl Nbd {
    pub(super) fn start(
        address: &NbdAddress,
        limits: Limits,
        on_deleted: OnDeleted,
    ) -> Result<Self, QmpError> {
        let (listener, file) = match address {
            NbdAddress::Unix(path) => {
                let (listener, file) =
                    listen_unix(path).map_err(|error| QmpError::generic(chain(&error)))?;
                log::info!("NBD server listens on {}", path.display());
                (Listener::Unix(listener), Some(file))
            }
            NbdAddress::Inet { host, port } => {
                let failed = |error: std::io::Error| {
                    QmpError::generic(format!("cannot listen on {host} port {port}: {error}"))
                };
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(failed)?;
                log::info!("NBD server listens on {}", listener.local_addr().map_err(failed)?);
                (Listener::Tcp(listener), None)
            }
        };
        let server = NbdServer::start(listener, limits, on_deleted);
        let failed = |error| QmpError::generic(format!("cannot start the NBD server: {error}"));
        Ok(Self { server: server.map_err(failed)?, file })
    }

    /// Ends all of it but requests in flight.
    pub(super) fn close(&self) {
        self.server.close();
        if let Some(file) = &self.file {
            file.remove();
        }
    }

    /// Ends all of it until `deadline`; returns whether nothing is left in flight. Dropping it would wait for that.
    pub(super) fn end(&self, deadline: Instant) -> bool {
        self.close();
        self.server.wait_closed(deadline)
    }

    /// Its exports.
    pub(super) fn exports(&self) -> Vec<ExportInfo> {
        self.server.exports()
    }

    /// Offers a disk.
    pub(super) fn add(&self, export: Export) -> Result<(), ExportError> {
        self.server.add(export)
    }

    /// Ends an export.
    pub(super) fn remove(&self, id: &str, mode: RemoveMode) -> Result<(), ExportError> {
        self.server.remove(id, mode)
    }

    /// Ends all exports, at once.
    pub(super) fn remove_all(&self) {
        self.server.remove_all();
    }
}

/// What a task has done.
pub enum ExportsDone {
    /// A server has started, or cannot.
    Started(Result<Arc<Nbd>, QmpError>),
    /// The reply to another request.
    Replied(QmpResult),
}
