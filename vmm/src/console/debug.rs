//! The host side of the debug console: nothing, standard output beside the serial console, or a file.

use super::output::{Output, Sink};
use super::{ConsoleError, Log, open_log};
use crate::config::DebugconConfig;
use devices::debug_console::DebugOutput;
use devices::transmitter::Transmitter;
use std::sync::Arc;

/// An open debug console. It outlives the machines that write to it in turn.
pub struct DebugBackend {
    output: DebugOutput,
    /// The thread that writes a file; sends what is left when it is dropped.
    _writer: Option<Output>,
}

impl DebugBackend {
    /// Opens what `config` names; `serial` is the serial console's output. A guest that `arrives` goes on in a file
    /// that it has begun elsewhere.
    pub fn open(
        config: &DebugconConfig,
        serial: Arc<Transmitter>,
        arrives: bool,
    ) -> Result<Self, ConsoleError> {
        let path = match config {
            DebugconConfig::Null => return Ok(Self { output: DebugOutput::Null, _writer: None }),
            DebugconConfig::Stdio => {
                return Ok(Self { output: DebugOutput::Shared(serial), _writer: None });
            }
            DebugconConfig::File(path) => path,
        };
        let what = "debug console's log";
        let log = Log { what, path, continues: arrives };
        let file = open_log(log)?;
        let sink = Sink::file(file).map_err(|source| ConsoleError::File {
            what,
            path: path.clone(),
            source,
        })?;
        let transmitter = Arc::new(Transmitter::new(None).map_err(ConsoleError::Start)?);
        let writer = Output::start(transmitter.clone(), Some(sink)).map_err(ConsoleError::Start)?;
        Ok(Self { output: DebugOutput::Own(transmitter), _writer: Some(writer) })
    }

    /// Where a machine's debug console writes.
    pub fn output(&self) -> DebugOutput {
        self.output.clone()
    }
}
