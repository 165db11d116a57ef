//! How a device's state is saved, carried and checked: [`Persist`] and [`DeviceRecord`].
//!
//! State is plain data, encoded as JSON. Incoming state is untrusted until `restore` has checked it; a
//! record of the wrong kind or a newer version, or a larger one than any device has, is refused. It stays
//! text until a device takes it ([`JsonText`]), and every sequence in it has a maximum ([`at_most`]).

mod bounded;
mod hex;

pub(crate) use bounded::AtMost;
pub use bounded::{JsonText, at_most, short_text};
pub use hex::{Hex, HexBytes, to_hex};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Most records of one machine: more than it can have devices and vCPUs.
pub const MAX_RECORDS: usize = 288;
/// Longest name of a kind or an instance.
pub const MAX_NAME_BYTES: usize = 64;
/// Longest text of one device's state. The longest that there are: a serial port's with 64 KiB of unsent
/// output, up to 4 bytes each, and a vCPU's with its XSAVE image.
pub const MAX_STATE_BYTES: usize = 512 << 10;

/// One device's saved state, as sent in the `device` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRecord {
    /// What the device is: [`Persist::KIND`].
    #[serde(deserialize_with = "short_text::<_, MAX_NAME_BYTES>")]
    pub kind: String,
    /// Instance of that kind: a disk's id, a vCPU's number, or empty if there is only one.
    #[serde(deserialize_with = "short_text::<_, MAX_NAME_BYTES>")]
    pub instance: String,
    /// Version of the layout of `state`.
    pub version: u16,
    /// The state in that layout.
    pub state: JsonText,
}

impl DeviceRecord {
    /// The records of a machine, from the JSON of a stream.
    ///
    /// # Errors
    /// If it is malformed, or there are more than [`MAX_RECORDS`].
    pub fn list_from_json(json: &[u8]) -> serde_json::Result<Vec<Self>> {
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        let records = at_most::<_, _, MAX_RECORDS>(&mut deserializer)?;
        deserializer.end().map(|()| records)
    }

    /// Decodes the state of a device of `kind`, in a version up to `newest`.
    pub fn open<T: DeserializeOwned>(
        self,
        kind: &'static str,
        newest: u16,
    ) -> Result<T, RestoreError> {
        let Self { kind: found, instance, version, state } = self;
        if found != kind {
            return Err(RestoreError::WrongKind { found, expected: kind });
        }
        if version > newest {
            return Err(RestoreError::NewerVersion { kind, instance, found: version, newest });
        }
        let len_bytes = state.len_bytes();
        if len_bytes > MAX_STATE_BYTES {
            return Err(RestoreError::TooLong { kind, instance, len_bytes });
        }
        state.decode().map_err(|source| RestoreError::Malformed { kind, instance, source })
    }
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
    /// No device has as much state.
    #[error(
        "{kind} {instance:?}: a state of {len_bytes} bytes, at most {MAX_STATE_BYTES} are possible"
    )]
    TooLong { kind: &'static str, instance: String, len_bytes: usize },
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
    fn save_record(&self, instance: &str) -> DeviceRecord {
        DeviceRecord {
            kind: Self::KIND.to_owned(),
            instance: instance.to_owned(),
            version: Self::VERSION,
            state: JsonText::of(&self.save()),
        }
    }

    /// Checks a record's kind and version, then restores from it.
    fn restore_record(&mut self, record: DeviceRecord) -> Result<(), RestoreError> {
        let instance = record.instance.clone();
        let state = record.open(Self::KIND, Self::VERSION)?;
        let kind = Self::KIND;
        self.restore(state).map_err(|reason| RestoreError::Invalid { kind, instance, reason })
    }
}
