//! Two hosts that share no storage, as two folders: where a guest's disks lie before a move and after.

use crate::disk;
use crate::ferry::{self, Destination, Ended, Guest, Migration};
use crate::image::{Pattern, fill};
use crate::process::{SOON, Vmm};
use crate::verdict::Transcript;
use std::path::{Path, PathBuf};

/// A path as an argument.
///
/// # Panics
/// If it is not UTF-8.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path is UTF-8")
}

/// A folder per host: `a` and `b`.
pub struct Hosts {
    folder: tempfile::TempDir,
}

impl Default for Hosts {
    fn default() -> Self {
        Self::new()
    }
}

impl Hosts {
    /// Empty ones.
    ///
    /// # Panics
    /// As every function here: if the host of the tests does not give what they need.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        for host in ["a", "b"] {
            std::fs::create_dir(folder.path().join(host)).expect("a folder in it");
        }
        Self { folder }
    }

    /// Where `name` lies on `host`.
    pub fn at(&self, host: &str, name: &str) -> PathBuf {
        self.folder.path().join(host).join(name)
    }

    /// What lies in a host's folder.
    pub fn files(&self, host: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path().join(host)).expect("the folder");
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.expect("an entry").file_name().into_string().expect("UTF-8")
        };
        let mut names: Vec<_> = entries.map(name).collect();
        names.sort();
        names
    }

    /// An image of zeroes on host a.
    pub fn blank(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.at("a", name);
        disk::create(&path, bytes).expect("an image");
        path
    }

    /// An image of random bytes on host a.
    pub fn random(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.blank(name, bytes);
        fill(&path, 0, bytes, Pattern::Random).expect("an image");
        path
    }

    /// A process on `host` that waits for a guest, and puts its disks into the folder.
    pub fn receive_on(&self, host: &str, more: &[&str]) -> Destination {
        let folder = self.at(host, "");
        let options = [&["--disk-dir", text(&folder)], more].concat();
        ferry::receive_at("tcp:127.0.0.1:0", &options).expect("it listens")
    }

    /// The same on host b.
    pub fn receive(&self) -> Destination {
        self.receive_on("b", &[])
    }

    /// A guest on host a with a busy disk `root` of 24 MiB.
    pub fn busy(&self) -> Vmm {
        let path = self.blank("root", 24 << 20);
        started(&Guest::new("work=disk", 64).disk("root", &path))
    }
}

/// A guest that runs and has written all that it begins with.
///
/// # Panics
/// If it does not.
pub fn started(guest: &Guest) -> Vmm {
    let vmm = ferry::run(guest).expect("it runs");
    vmm.wait_line("^HB n=2 ").expect("a heartbeat");
    vmm
}

/// A migration that has begun to send.
///
/// # Panics
/// If it does not.
pub fn moving(source: &Vmm, address: &str, options: &[&str]) -> Migration {
    let migration = ferry::start_migrate(source, address, options).expect("it starts");
    migration.client.out.wait_for("\"active\"", SOON).expect("it is active");
    migration
}

/// The guest goes on here, whole, after a migration that did not happen.
///
/// # Panics
/// If it does not.
pub fn assert_goes_on(source: &mut Vmm) {
    let mut qmp = source.qmp().expect("a control socket");
    assert_eq!(qmp.run_state().expect("an answer"), "running");
    for _ in 0..2 {
        source.wait_next_line("^HB ").expect("a heartbeat");
    }
    assert_eq!(source.check().expect("a check").corrupt, 0);
    Transcript::of([source.serial()]).judge().expect("one life");
}

/// The migration has failed, for this reason.
///
/// # Panics
/// If not.
pub fn assert_failed(ended: &Ended, expected: &str) {
    assert_eq!(ended.code, 1, "{expected}: {}", ended.summary);
    assert!(ended.errors.contains(expected), "{:?} lacks {expected:?}", ended.errors);
}
