//! What the supervisor and the shuttle share of a process's start, and why it could not be: returned to `main`.

use crate::console::ConsoleError;
use crate::event_loop::EventLoopError;
use crate::kvm::KvmError;
use crate::machine::MachineError;
use devices::block::raw::OpenError;
use std::io;
use std::path::PathBuf;

/// Why the process could not start.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error(transparent)]
    Disk(#[from] OpenError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The migration address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        address: String,
        #[source]
        source: io::Error,
    },
    /// A file for fw_cfg that cannot be read.
    #[error("--fw-cfg {name}: cannot read {path}")]
    FwCfgFile {
        name: String,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The items for fw_cfg are too many.
    #[error("--fw-cfg: {0}")]
    FwCfg(String),
    #[error("cannot offer the images of disks")]
    Serve(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("cannot {what}")]
    Start {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

impl SetupError {
    /// Names what this host did not allow.
    pub fn start(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Start { what, source }
    }
}

/// Has the kernel kill this process when the thread that started it ends.
pub fn end_with_parent() -> Result<(), SetupError> {
    let kill = rustix::process::Signal::KILL;
    let set = rustix::process::set_parent_process_death_signal(Some(kill));
    set.map_err(io::Error::from).map_err(SetupError::start("end with the parent process"))
}
