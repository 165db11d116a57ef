//! What a child process is started with: one value, written by the shuttle, or by `ferry test`, to the child's
//! standard input and read there by `ferry child`. The child gets the user's configuration whole and takes from it what is
//! its own, so that no hop can lose an option.

use crate::config::{ReceiveConfig, RunConfig};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::path::PathBuf;

/// A child's part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// It boots the guest; its control socket is `control`.
    Boot {
        /// Where.
        control: PathBuf,
    },
    /// It receives the guest on the Unix socket `address`.
    Receive {
        /// Where.
        address: PathBuf,
        /// Where its control socket is.
        control: PathBuf,
    },
    /// It runs the guest from start to end: a test.
    Whole,
}

/// What a child is started with.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChildConfig {
    /// How much it logs: the number of `-v`.
    pub verbose: u8,
    /// Its part.
    pub part: Part,
    /// The user's.
    pub config: RunConfig,
}

/// What a child does.
pub enum Work {
    /// As `ferry run`.
    Run(RunConfig),
    /// As `ferry receive`.
    Receive(ReceiveConfig),
}

impl ChildConfig {
    /// Writes it for a child.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        to.write_all(&serde_json::to_vec(self)?)
    }

    /// Reads it, to the end.
    pub fn read(mut from: impl Read) -> io::Result<Self> {
        let mut text = Vec::new();
        from.read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }

    /// The child's own configuration.
    pub fn into_work(self) -> Work {
        let Self { verbose: _, part, config } = self;
        match part {
            Part::Boot { control } => Work::Run(config.of_first_child(control)),
            Part::Receive { address, control } => {
                Work::Receive(config.of_next_child(address, control))
            }
            Part::Whole => Work::Run(config),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::nothing_by_default;

    #[test]
    fn a_child_reads_what_the_shuttle_wrote() {
        let sent = ChildConfig {
            verbose: 2,
            part: Part::Receive { address: "/migrate".into(), control: "/control".into() },
            config: nothing_by_default(),
        };
        let mut pipe = Vec::new();
        sent.write(&mut pipe).unwrap();
        let ChildConfig { verbose, part, config } = ChildConfig::read(&*pipe).unwrap();
        assert_eq!((verbose, part), (2, sent.part));
        let value = |config: &RunConfig| serde_json::to_value(config).unwrap();
        assert_eq!(value(&config), value(&sent.config));
        assert!(ChildConfig::read(&pipe[..pipe.len() - 1]).is_err(), "cut off");
    }
}
