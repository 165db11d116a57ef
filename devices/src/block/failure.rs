//! Error policy of a disk (QEMU's `werror` and `rerror`): a failed request is reported to the guest,
//! ignored, or kept for a retry while the guest is stopped. Owned by a [`super::BlockNode`]; the queue
//! worker asks it about each failure and keeps the requests.

use crate::lock;
use serde::{Deserialize, Serialize};
use std::io;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// What to do about an I/O error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// Report it to the guest.
    #[default]
    Report,
    /// Report success to the guest.
    Ignore,
    /// Stop the guest; retry the request when it resumes.
    Stop,
    /// Stop if there is no space left, report otherwise.
    Enospc,
}

impl FromStr for OnError {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "report" => Ok(Self::Report),
            "ignore" => Ok(Self::Ignore),
            "stop" => Ok(Self::Stop),
            "enospc" => Ok(Self::Enospc),
            other => Err(format!("{other:?} is none of report, ignore, stop and enospc")),
        }
    }
}

impl OnError {
    /// As it is given in options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
            Self::Enospc => "enospc",
        }
    }
}

/// The policy for reads and for writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorPolicy {
    /// `rerror`.
    pub on_read: OnError,
    /// `werror`: also of flushes, discards and zeroes.
    pub on_write: OnError,
}

/// What is done about one failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It is reported to the guest.
    Report,
    /// Success is reported to the guest.
    Ignore,
    /// The guest is stopped.
    Stop,
}

impl Action {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
        }
    }
}

/// A failed request, as `BLOCK_IO_ERROR` reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The disk's id.
    pub disk: String,
    /// Whether it was a read.
    pub is_read: bool,
    /// What was done about it.
    pub action: Action,
    /// Whether the storage was full.
    pub no_space: bool,
    /// The host's error text.
    pub reason: String,
}

type Tell = Arc<dyn Fn(Failure) + Send + Sync>;

/// Error policy and state of one disk.
#[derive(Default)]
pub(super) struct Failures {
    pub policy: ErrorPolicy,
    /// The guest must stop: failed requests are kept, new ones are not served.
    stopped: AtomicBool,
    /// Number of requests kept for a retry. They stay kept until the retry, so longer than `stopped` is
    /// set.
    kept: Arc<AtomicU64>,
    tell: Mutex<Option<Tell>>,
}

/// Counts one kept request. Dropped when that is retried or abandoned.
#[derive(Debug)]
pub struct Kept(Arc<AtomicU64>);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Failures {
    pub fn keep_failed(&self) -> Kept {
        self.kept.fetch_add(1, Ordering::SeqCst);
        Kept(self.kept.clone())
    }

    pub fn has_kept_requests(&self) -> bool {
        self.is_stopped() || self.kept.load(Ordering::SeqCst) > 0
    }

    pub fn set_tell(&self, tell: Tell) {
        *lock(&self.tell) = Some(tell);
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    pub fn retry_failed(&self) {
        self.stopped.store(false, Ordering::SeqCst);
    }

    pub fn decide(&self, disk: &str, is_read: bool, error: &io::Error) -> Action {
        let no_space = error.kind() == io::ErrorKind::StorageFull;
        let wanted = if is_read { self.policy.on_read } else { self.policy.on_write };
        let action = match wanted {
            OnError::Ignore => Action::Ignore,
            OnError::Stop => Action::Stop,
            OnError::Enospc if no_space => Action::Stop,
            OnError::Report | OnError::Enospc => Action::Report,
        };
        if action == Action::Stop {
            self.stopped.store(true, Ordering::SeqCst);
        }
        // Called without the lock: the callback is the VMM's and may block.
        let tell = lock(&self.tell).clone();
        if let Some(tell) = tell {
            let (disk, reason) = (disk.to_owned(), error.to_string());
            tell(Failure { disk, is_read, action, no_space, reason });
        }
        action
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_direction_has_its_own_word() {
        let policy = ErrorPolicy { on_read: OnError::Ignore, on_write: OnError::Enospc };
        let failures = Failures { policy, ..Default::default() };
        let (full, broken) =
            (io::Error::from_raw_os_error(libc::ENOSPC), io::Error::from_raw_os_error(libc::EIO));
        assert_eq!(failures.decide("d", true, &full), Action::Ignore);
        assert_eq!(failures.decide("d", false, &broken), Action::Report);
        assert!(!failures.is_stopped());
        let (sender, told) = std::sync::mpsc::channel();
        failures.set_tell(Arc::new(move |failure| sender.send(failure).unwrap()));
        assert_eq!(failures.decide("d", false, &full), Action::Stop);
        let failure = told.recv().unwrap();
        assert!(failures.is_stopped() && failure.no_space && !failure.is_read);
        failures.retry_failed();
        assert!(!failures.is_stopped());
        assert!("stop".parse::<OnError>().is_ok() && "retry".parse::<OnError>().is_err());
    }
}
