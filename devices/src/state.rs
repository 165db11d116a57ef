//! How a device's state is saved, carried and checked: [`Persist`] and [`DeviceRecord`].
//!
//! State is plain data, encoded as JSON. Incoming state is untrusted until `restore` has checked it; a
//! record of the wrong kind or a newer version is refused.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// One device's saved state, as sent in the `device` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRecord {
    /// What the device is: [`Persist::KIND`].
    pub kind: String,
    /// Instance of that kind: a disk's id, a vCPU's number, or empty if there is only one.
    pub instance: String,
    /// Version of the layout of `state`.
    pub version: u16,
    /// The state in that layout.
    pub state: serde_json::Value,
}

/// A record that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The record is for another device.
    #[error("record is for {found:?}, expected {expected:?}")]
    WrongKind {
        found: String,
        /// Kind of the device that should load it.
        expected: &'static str,
    },
    /// The record was written by a newer Ferry.
    #[error(
        "{kind} {instance:?}: state version {found} is newer than {newest}, the newest known here"
    )]
    NewerVersion {
        kind: &'static str,
        instance: String,
        found: u16,
        /// Newest version this build loads.
        newest: u16,
    },
    /// The state does not match its version's layout.
    #[error("{kind} {instance:?}: malformed state")]
    Malformed {
        kind: &'static str,
        instance: String,
        /// The JSON error.
        #[source]
        source: serde_json::Error,
    },
    /// The state is well-formed but impossible for this device.
    #[error("{kind} {instance:?}: {reason}")]
    Invalid {
        kind: &'static str,
        instance: String,
        /// The reason, for the user.
        reason: String,
    },
}

/// A device whose state can be saved and restored.
pub trait Persist {
    /// Names the device type in records.
    const KIND: &'static str;
    /// Version of [`Persist::State`] that `save` writes.
    const VERSION: u16;
    /// Plain data; serialised as JSON.
    type State: Serialize + DeserializeOwned;

    /// Returns the current state. Pure; called only while the guest is paused.
    fn save(&self) -> Self::State;

    /// Checks `state` and loads it. On an error the device is unchanged or unusable, and the guest must not
    /// run. The reason is for the user.
    fn restore(&mut self, state: Self::State) -> Result<(), String>;

    /// Wraps [`Persist::save`] as a record.
    ///
    /// # Panics
    /// If the state does not serialise, which is a bug in its type.
    fn save_record(&self, instance: &str) -> DeviceRecord {
        DeviceRecord {
            kind: Self::KIND.to_owned(),
            instance: instance.to_owned(),
            version: Self::VERSION,
            state: serde_json::to_value(self.save()).expect("device state serialises"),
        }
    }

    /// Checks a record's kind and version, then restores from it.
    fn restore_record(&mut self, record: DeviceRecord) -> Result<(), RestoreError> {
        let (kind, newest) = (Self::KIND, Self::VERSION);
        if record.kind != kind {
            return Err(RestoreError::WrongKind { found: record.kind, expected: kind });
        }
        let instance = record.instance;
        if record.version > newest {
            return Err(RestoreError::NewerVersion {
                kind,
                instance,
                found: record.version,
                newest,
            });
        }
        match serde_json::from_value(record.state) {
            Err(source) => Err(RestoreError::Malformed { kind, instance, source }),
            Ok(state) => self.restore(state).map_err(|reason| RestoreError::Invalid {
                kind,
                instance,
                reason,
            }),
        }
    }
}
