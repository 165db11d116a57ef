//! Block jobs in tests' words: images, commands, and events in short.

use crate::disk;
use crate::ferry::Guest;
use crate::process::SOON;
use crate::qmp::Qmp;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A folder with disk images of one size.
pub struct Images {
    folder: tempfile::TempDir,
    bytes: u64,
}

impl Images {
    /// Images of `bytes`.
    ///
    /// # Panics
    /// If there is no folder for them.
    pub fn of(bytes: u64) -> Self {
        Self { folder: tempfile::tempdir().expect("a folder"), bytes }
    }

    /// Where the file `name` is, or would be.
    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An empty image.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn blank(&self, name: &str) -> PathBuf {
        disk::create(&self.at(name), self.bytes).expect("an image");
        self.at(name)
    }
}

/// A guest that writes its disk `root`, verifies what it reads, and says so in heartbeats.
pub fn busy(image: &Path) -> Guest {
    Guest::new("work=disk hb_ms=20", 64).disk("root", image)
}

/// Executes a command that returns nothing.
///
/// # Panics
/// If it fails.
pub fn run(qmp: &mut Qmp, command: &str, arguments: Value) {
    let answer = qmp.execute(command, arguments).expect("an answer");
    assert_eq!(answer, json!({}), "{command}");
}

/// Why a command is refused.
///
/// # Panics
/// If it is not.
pub fn refused(qmp: &mut Qmp, command: &str, arguments: Value) -> String {
    qmp.refused(command, arguments).expect("a refusal").description
}

/// A complete copy of `root` to `target`, with more arguments or others.
///
/// # Panics
/// If `more` is no object.
pub fn full(target: &Path, more: &Value) -> Value {
    let mut arguments = json!({"device": "root", "target": target, "sync": "full"});
    let more = more.as_object().expect("an object").clone();
    arguments.as_object_mut().expect("an object").extend(more);
    arguments
}

/// The next event about a job, of the job `id` if one is given: in short, and whole.
///
/// # Panics
/// If there is none.
pub fn job_event(qmp: &mut Qmp, id: Option<&str>) -> (String, Value) {
    let wanted = |event: &Value| {
        let data = &event["data"];
        event["event"].as_str().is_some_and(|name| name.contains("JOB"))
            && id.is_none_or(|id| data["id"] == id || data["device"] == id)
    };
    let event = qmp.wait_event_where(SOON, wanted).expect("an event of a job");
    let name = match event["event"].as_str() {
        Some("JOB_STATUS_CHANGE") => event["data"]["status"].as_str().unwrap_or("no status"),
        Some(name) => name.trim_start_matches("BLOCK_JOB_"),
        None => "no name",
    };
    (name.to_owned(), event)
}
