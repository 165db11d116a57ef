//! What a QEMU command line has said so far. Options may refer to what comes later, so devices, drives and
//! character devices are collected here first; the files that read them put them together at the end.

use super::lists::List;
use crate::config::{DebugExitConfig, RunOptions, Switch};
use devices::block::Format;
use devices::block::failure::ErrorPolicy;
use devices::block::raw::Cache;
use std::path::PathBuf;

/// A device of the command line.
pub(super) struct Device {
    /// What it is.
    pub driver: String,
    /// As it was written.
    pub text: String,
    /// Its other properties.
    pub list: List,
}

/// An image that a device may use.
pub(super) struct Image {
    /// Its drive's id, or its node's name.
    pub id: Option<String>,
    pub path: PathBuf,
    pub format: Format,
    pub read_only: bool,
    pub cache: Cache,
    pub errors: ErrorPolicy,
    /// Whether writes are thrown away.
    pub snapshot: bool,
}

/// A node of `-blockdev` that is a file.
pub(super) struct FileNode {
    pub name: String,
    pub path: PathBuf,
    pub read_only: bool,
    pub cache: Cache,
}

/// Images of the command line.
#[derive(Default)]
pub(super) struct Images {
    /// Those that a device may name.
    pub named: Vec<Image>,
    /// Those that an image may be in.
    pub files: Vec<FileNode>,
    /// Those of disks, with the number of queues.
    pub used: Vec<(Image, u16)>,
}

/// Where bytes go to and come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Backend {
    Stdio,
    Null,
    File(PathBuf),
    Socket(PathBuf),
}

/// A `-chardev`.
pub(super) struct Chardev {
    pub id: String,
    pub backend: Backend,
}

/// A control socket: its backend, and the option that has it.
pub(super) struct Monitor {
    pub option: String,
    pub text: String,
}

/// An unfinished translation.
pub(super) struct Draft {
    /// What is known of Ferry's options.
    pub options: RunOptions,
    /// What was ignored, and why.
    pub remarks: Vec<String>,
    /// The number of `-v`.
    pub verbose: u8,
    /// Accelerators in order of preference.
    pub accelerators: Vec<String>,
    /// Of `-device`.
    pub devices: Vec<Device>,
    /// Of `-drive` and `-blockdev`.
    pub images: Images,
    /// Of `-chardev`.
    pub chardevs: Vec<Chardev>,
    /// Of `-mon` and `-qmp`.
    pub monitors: Vec<Monitor>,
    /// Of `-serial`.
    pub serials: Vec<String>,
    /// Of `-debugcon`, and of an isa-debugcon.
    pub debugcons: Vec<String>,
    nographic: bool,
    nodefaults: bool,
    snapshot: bool,
}

impl Default for Draft {
    fn default() -> Self {
        // QEMU's machine has such a device only if it is asked for.
        let debug_exit = Some(DebugExitConfig::Off);
        Self {
            options: RunOptions { debug_exit, ..RunOptions::default() },
            remarks: Vec::new(),
            verbose: 0,
            accelerators: Vec::new(),
            devices: Vec::new(),
            images: Images::default(),
            chardevs: Vec::new(),
            monitors: Vec::new(),
            serials: Vec::new(),
            debugcons: Vec::new(),
            nographic: false,
            nodefaults: false,
            snapshot: false,
        }
    }
}

impl Draft {
    /// Notes what is ignored.
    pub fn remark(&mut self, text: String) {
        self.remarks.push(text);
    }

    pub fn set_kernel(&mut self, path: &str) -> Result<(), String> {
        self.options.kernel = Some(path.into());
        Ok(())
    }

    pub fn set_initrd(&mut self, path: &str) -> Result<(), String> {
        self.options.initrd = Some(path.into());
        Ok(())
    }

    pub fn set_cmdline(&mut self, text: &str) -> Result<(), String> {
        self.options.cmdline = Some(text.to_owned());
        Ok(())
    }

    pub fn set_acpi(&mut self, on: bool) -> Result<(), String> {
        self.options.acpi = Some(Switch(on));
        Ok(())
    }

    pub fn set_no_reboot(&mut self) -> Result<(), String> {
        self.options.host.no_reboot = true;
        Ok(())
    }

    pub fn set_paused(&mut self) -> Result<(), String> {
        self.options.paused = true;
        Ok(())
    }

    pub fn set_nographic(&mut self) -> Result<(), String> {
        self.nographic = true;
        Ok(())
    }

    pub fn set_nodefaults(&mut self) -> Result<(), String> {
        self.nodefaults = true;
        Ok(())
    }

    pub fn snapshot_all(&mut self) -> Result<(), String> {
        self.snapshot = true;
        Ok(())
    }

    pub fn set_verbose(&mut self) -> Result<(), String> {
        self.verbose = self.verbose.saturating_add(1);
        Ok(())
    }

    pub fn add_serial(&mut self, text: &str) -> Result<(), String> {
        self.serials.push(text.to_owned());
        Ok(())
    }

    /// Whether the first serial port is the terminal unless something else is said.
    pub fn serial_by_default(&self) -> bool {
        self.nographic && !self.nodefaults
    }

    /// Whether writes to any disk are thrown away.
    pub fn is_snapshot(&self) -> bool {
        self.snapshot
    }
}
