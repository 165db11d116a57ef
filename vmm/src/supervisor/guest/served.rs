//! Images of an incoming guest's disks that are offered over NBD until the guest takes them: the source mirrors its
//! disks to them, and so needs no shared storage.
//!
//! ```text
//! source: mirror ─▶ NBD ─▶ export here ─▶ image      pause: the exports end ─▶ the guest's disk is locked ─▶ it runs
//! ```
//! An image is open twice, but locked once: its export has the lock until the guest's disk takes it.

use super::super::nbd::Nbd;
use super::super::tasks;
use crate::config::ReceiveConfig;
use crate::control::export::NbdAddress;
use crate::error::chain;
use devices::block::nbd::server::{Export, Limits};
use devices::block::qcow2::BackingChoice;
use devices::block::{BlockNode, open_image};
use migration::transport::Address;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long requests in flight may take when the exports end. The source has none by then.
const LAST_REQUESTS: Duration = Duration::from_secs(1);

/// Why images cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(
        "--nbd offers images that are there already, but {path} is not: create it, as large as the disk"
    )]
    NotThere { path: PathBuf },
    #[error("--nbd needs the images to offer: give them with --disk ID=PATH")]
    None,
    #[error("disk {id}")]
    Disk {
        id: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("--nbd {0} has no port: tcp:HOST:PORT")]
    NoPort(Address),
    #[error("--nbd: {0}")]
    Server(String),
}

/// The images, and their server as long as there is one.
#[derive(Default)]
pub struct ServedDisks {
    /// `None` if none are offered.
    address: Option<NbdAddress>,
    nodes: Vec<Arc<BlockNode>>,
    server: ServerHandle,
}

/// The server while there is one. For who ends the process and does not wait for the thread that receives the guest.
#[derive(Clone, Default)]
pub struct ServerHandle(Arc<Mutex<Option<Arc<Nbd>>>>);

impl ServerHandle {
    /// Refuses clients from now on, and removes the socket. Does not wait for requests in flight.
    pub fn abandon(&self) {
        if let Some(server) = self.take() {
            server.close();
            // A request that hangs would hold up who drops it.
            tasks::discard(server);
        }
    }

    fn take(&self) -> Option<Arc<Nbd>> {
        devices::lock(&self.0).take()
    }
}

impl ServedDisks {
    /// Opens the images, if `config` wants them offered, and offers them.
    pub fn open(config: &ReceiveConfig) -> Result<Self, ServeError> {
        let Some(address) = &config.nbd else { return Ok(Self::default()) };
        let address = Some(nbd_address(address)?);
        if config.disks.is_empty() {
            return Err(ServeError::None);
        }
        let mut nodes = Vec::with_capacity(config.disks.len());
        for disk in &config.disks {
            if !disk.path.exists() {
                return Err(ServeError::NotThere { path: disk.path.clone() });
            }
            let backing = disk.backing.clone().map(BackingChoice::Given).unwrap_or_default();
            let opened = open_image(&disk.path, disk.format, false, disk.cache, backing);
            let id = disk.id.clone();
            let opened =
                opened.map_err(|error| ServeError::Disk { id, source: Box::new(error) })?;
            nodes.push(Arc::new(BlockNode::new(disk.id.clone(), opened)));
        }
        let mut served = Self { address, nodes, server: ServerHandle::default() };
        served.offer()?;
        Ok(served)
    }

    /// Locks the images and offers them.
    fn offer(&mut self) -> Result<(), ServeError> {
        let Some(address) = &self.address else { return Ok(()) };
        for node in &self.nodes {
            let id = node.id().to_owned();
            node.lock().map_err(|error| ServeError::Disk { id, source: Box::new(error) })?;
        }
        let server = Nbd::start(address, Limits::default(), Arc::new(|_| {}));
        let server = Arc::new(server.map_err(|error| ServeError::Server(error.desc))?);
        for node in &self.nodes {
            let id = node.id().to_owned();
            let export = Export {
                id: id.clone(),
                name: id,
                description: String::new(),
                node: node.clone(),
                writable: true,
                bitmaps: Vec::new(),
            };
            server.add(export).map_err(|error| ServeError::Server(error.to_string()))?;
        }
        *devices::lock(&self.server.0) = Some(server);
        Ok(())
    }

    /// A handle to end the server from elsewhere.
    pub fn server(&self) -> ServerHandle {
        self.server.clone()
    }

    /// Ends the exports and gives the images back, for the guest's disks to lock.
    ///
    /// # Errors
    /// If a request does not end: somebody still writes to an image.
    pub fn close(&mut self) -> Result<(), ServeError> {
        let Some(server) = self.server.take() else { return Ok(()) };
        if !server.end(Instant::now() + LAST_REQUESTS) {
            tasks::discard(server);
            let why = "a request of a client does not end: an image does not respond";
            return Err(ServeError::Server(why.into()));
        }
        for node in &self.nodes {
            if let Err(error) = node.write_back() {
                let source = Box::new(error);
                return Err(ServeError::Disk { id: node.id().to_owned(), source });
            }
            node.unlock();
        }
        Ok(())
    }

    /// The guest has not taken its disks after all: offers them again, as far as that is possible.
    pub fn offer_again(&mut self) {
        if let Err(error) = self.offer() {
            log::error!("the images are not offered any more: {}", chain(&error));
            self.nodes.iter().for_each(|node| node.unlock());
        }
    }
}

fn nbd_address(address: &Address) -> Result<NbdAddress, ServeError> {
    let no_port = || ServeError::NoPort(address.clone());
    Ok(match address {
        Address::Unix(path) => NbdAddress::Unix(path.clone()),
        Address::Tcp(text) => {
            let (host, port) = text.rsplit_once(':').ok_or_else(no_port)?;
            let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
            NbdAddress::Inet { host, port: port.parse().map_err(|_| no_port())? }
        }
    })
}
