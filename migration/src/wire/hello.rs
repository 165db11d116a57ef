//! The first frame on every connection, in both directions: version, role and migration.
//!
//! ```text
//! Hello   magic "FERRYMIG" · version u16                 the same in every version
//!         role u8 (0 control, 1 data, 2 disks) · channel u16   index of a data or disk channel
//!         migration id, 16 bytes                         random: identifies the migration, and authorises its channels
//!         data channels u16                              how many the source will open
//!         capability count u8 · capability str8 …        what the source wants, what both can do
//! ```
//! The source sends first, on the control connection, with a random id. The destination answers with the
//! same id and the capabilities that it supports too. Then the source opens its channels; each sends Hello
//! with the same id and is answered. Disks have one channel, or as many as RAM if both sides can do
//! `disk-channels`.

use super::section::MAX_DATA_CHANNELS;
use super::{Decoder, Encoder, WireError};

/// First bytes of either side.
pub const MAGIC: &[u8; 8] = b"FERRYMIG";
/// Version of the stream.
pub const VERSION: u16 = 3;
/// Most capabilities that one side may name.
pub const MAX_CAPABILITIES: u8 = 32;
/// Longest name of a capability.
pub const MAX_CAPABILITY_BYTES: usize = 64;
/// Longest Hello.
pub const MAX_HELLO_BYTES: u32 = 8 + 2 + 3 + 16 + 2 + 1 + 32 * 65;
/// The source has disks to send, on connections of their own.
pub const DISKS: &str = "disks";
/// Disks travel over as many channels as RAM. Without it, over one.
pub const DISK_CHANNELS: &str = "disk-channels";
/// Chunks of disks may be compressed.
pub const DISK_PACKING: &str = "disk-packing";
/// The source says how much its disks will send.
pub const DISK_DATA: &str = "disk-data";
/// The source has the guest's boot payload to send.
pub const BOOT: &str = "boot";
/// The source has dirty bitmaps to send.
pub const BITMAPS: &str = "dirty-bitmaps";
/// Capabilities of this build that change the stream.
pub const CAPABILITIES: &[&str] = &[DISKS, DISK_CHANNELS, DISK_PACKING, DISK_DATA, BOOT, BITMAPS];

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The control connection: frames both ways.
    Control,
    /// Page frames, one way.
    Data {
        /// Index of the data channel, from 0.
        index: u16,
    },
    /// Chunks of disks one way, answers to marks the other.
    Disks {
        /// Index of the disk channel, from 0.
        index: u16,
    },
}

/// Identifies the migration that a connection belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MigrationId(pub [u8; 16]);

impl MigrationId {
    /// An unguessable id.
    pub fn random() -> Result<Self, WireError> {
        crate::bytes::random().map(Self).map_err(WireError::Lost)
    }
}

/// Introduces a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// What the connection is for.
    pub role: Role,
    /// Which migration it belongs to.
    pub id: MigrationId,
    /// Data channels of the migration.
    pub data_channels: u16,
    /// Capabilities that the sender wants to use.
    pub capabilities: Vec<String>,
}

impl Hello {
    /// A source's Hello.
    pub fn new(role: Role, id: MigrationId, data_channels: u16) -> Self {
        Self { role, id, data_channels, capabilities: Vec::new() }
    }

    /// The same, with a capability that the sender wants to use.
    #[must_use]
    pub fn wanting(mut self, capability: &str) -> Self {
        self.capabilities.push(capability.to_owned());
        self
    }

    /// Whether it names `capability`.
    pub fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|named| named == capability)
    }

    /// The destination's answer: the same, restricted to its own capabilities.
    pub fn answer(&self) -> Self {
        let mut answer = self.clone();
        answer.capabilities.retain(|wanted| CAPABILITIES.contains(&wanted.as_str()));
        answer
    }

    /// Checks the number of data channels; returns the reason if it is out of range.
    pub fn check_channels(&self) -> Result<(), String> {
        match self.data_channels {
            1..=MAX_DATA_CHANNELS => Ok(()),
            other => Err(format!("{other} data channels, 1 to {MAX_DATA_CHANNELS} are possible")),
        }
    }

    /// The payload of a Hello frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut encoder = Encoder::default();
        let (role, index) = match self.role {
            Role::Control => (0, 0),
            Role::Data { index } => (1, index),
            Role::Disks { index } => (2, index),
        };
        encoder.raw(MAGIC).u16(VERSION).u8(role).u16(index);
        encoder.raw(&self.id.0).u16(self.data_channels);
        // Ours are a handful of constants.
        let named = self.capabilities.iter().take(usize::from(MAX_CAPABILITIES));
        encoder.u8(u8::try_from(named.len()).unwrap_or(MAX_CAPABILITIES));
        for capability in named {
            encoder.str8(capability);
        }
        encoder.bytes().to_vec()
    }

    /// Decodes the payload of a Hello frame. Distinguishes another protocol, another version, and a malformed
    /// Hello.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut decoder = Decoder::new("hello", payload);
        if decoder.raw(MAGIC.len()).ok() != Some(MAGIC) {
            return Err(WireError::NotFerry);
        }
        let theirs = decoder.u16().map_err(|_| WireError::NotFerry)?;
        if theirs != VERSION {
            return Err(WireError::Version { theirs });
        }
        let role = match (decoder.u8()?, decoder.u16()?) {
            (0, 0) => Role::Control,
            (1, index) => Role::Data { index },
            (2, index) => Role::Disks { index },
            (role, index) => {
                return Err(decoder.malformed(format!("unknown role {role} with channel {index}")));
            }
        };
        let id = MigrationId(decoder.array()?);
        let data_channels = decoder.u16()?;
        let count = decoder.u8()?;
        if count > MAX_CAPABILITIES {
            return Err(decoder.malformed(format!("{count} capabilities")));
        }
        let mut capabilities = Vec::new();
        for _ in 0..count {
            let name = decoder.str8()?;
            if name.len() > MAX_CAPABILITY_BYTES {
                return Err(decoder.malformed("a capability's name is too long"));
            }
            capabilities.push(name.to_owned());
        }
        decoder.finish()?;
        Ok(Self { role, id, data_channels, capabilities })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> impl Strategy<Value = Hello> {
        let names = prop::collection::vec("[a-z-]{0,64}", 0..=32);
        let role = prop_oneof![
            Just(Role::Control),
            any::<u16>().prop_map(|index| Role::Disks { index }),
            any::<u16>().prop_map(|index| Role::Data { index })
        ];
        (role, any::<[u8; 16]>(), any::<u16>(), names).prop_map(
            |(role, id, data_channels, capabilities)| Hello {
                role,
                id: MigrationId(id),
                data_channels,
                capabilities,
            },
        )
    }

    proptest! {
        #[test]
        fn a_hello_reads_back_as_written(hello in hello()) {
            let payload = hello.encode();
            prop_assert!(payload.len() <= MAX_HELLO_BYTES as usize);
            prop_assert_eq!(Hello::decode(&payload).unwrap(), hello);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Hello::decode(&bytes);
            // Past the magic and the version.
            let mut ours = Hello::new(Role::Control, MigrationId([0; 16]), 1).encode();
            ours.truncate(MAGIC.len() + 2);
            ours.extend(bytes);
            let stopped_early = matches!(
                Hello::decode(&ours),
                Err(WireError::NotFerry | WireError::Version { .. })
            );
            prop_assert!(!stopped_early);
        }
    }

    #[test]
    fn another_version_and_another_program_are_told_apart() {
        let mut payload = Hello::new(Role::Control, MigrationId([7; 16]), 1).encode();
        payload[8] = 9;
        assert!(matches!(Hello::decode(&payload), Err(WireError::Version { theirs: 9 })));
        payload[0] = b'f';
        assert!(matches!(Hello::decode(&payload), Err(WireError::NotFerry)));
    }

    #[test]
    fn an_answer_names_only_what_both_can_do() {
        let mut hello = Hello::new(Role::Control, MigrationId([7; 16]), 1);
        assert!(!hello.has(DISKS));
        hello = hello.wanting("from-the-future").wanting(DISKS);
        assert_eq!(hello.answer().capabilities, [DISKS]);
        assert!(hello.answer().has(DISKS));
    }
}
