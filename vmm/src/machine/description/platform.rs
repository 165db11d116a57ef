//! The part of a machine description that test kernels look at: fw_cfg, the debug-exit device, the test device.

use crate::boot::layout::{DEBUG_EXIT_PORT, DEBUG_EXIT_PORTS, PORTS, PORTS_OF_TESTDEV};
use devices::fw_cfg::{
    MAX_NAME_BYTES, MAX_USER_BYTES, MAX_USER_ITEMS, UserItem, check_lengths, check_names,
};
use devices::state::{HexBytes, at_most, short_text};
use serde::{Deserialize, Serialize};

/// Devices beside console, disks and virtio-rng. All guests have fw_cfg, pvpanic, a debug console and system control
/// port A, except those of older Ferrys, whose descriptions have none of this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Platform {
    /// Whether there is a pc-testdev.
    pub testdev: bool,
    /// The user's files in fw_cfg, with their contents.
    #[serde(deserialize_with = "at_most::<_, _, MAX_USER_ITEMS>")]
    pub fw_cfg: Vec<FwCfgFile>,
    /// The debug-exit device's ports, if there is one.
    pub debug_exit: Option<PortRange>,
}

/// A user's file in fw_cfg.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FwCfgFile {
    /// Its name for the guest.
    #[serde(deserialize_with = "short_text::<_, MAX_NAME_BYTES>")]
    pub name: String,
    /// Its content.
    pub content: HexBytes<MAX_USER_BYTES>,
}

/// I/O ports of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortRange {
    /// The first.
    pub base: u16,
    /// How many.
    pub len: u16,
}

impl PortRange {
    /// The debug-exit device's, where older guests have it.
    pub const DEBUG_EXIT: Self = Self { base: DEBUG_EXIT_PORT, len: DEBUG_EXIT_PORTS };
}

impl Default for Platform {
    fn default() -> Self {
        Self { testdev: false, fw_cfg: Vec::new(), debug_exit: Some(PortRange::DEBUG_EXIT) }
    }
}

impl Platform {
    /// Whether a machine can have all of this.
    ///
    /// # Errors
    /// Names what it cannot have.
    pub(super) fn validate(&self) -> Result<(), String> {
        if let Some(PortRange { base, len }) = self.debug_exit {
            check_debug_exit(base, len, self.testdev)
                .map_err(|error| format!("debug-exit device: {error}"))?;
        }
        check_names(self.fw_cfg.iter().map(|file| file.name.as_str()))
            .and_then(|()| check_lengths(self.fw_cfg.iter().map(|file| file.content.0.len())))
            .map_err(|error| format!("fw_cfg: {error}"))
    }

    /// The user's files as the device takes them.
    pub fn user_items(&self) -> Vec<UserItem> {
        let item = |FwCfgFile { name, content }: &FwCfgFile| UserItem {
            name: name.clone(),
            content: content.0.as_slice().into(),
        };
        self.fw_cfg.iter().map(item).collect()
    }
}

/// Whether the debug-exit device can have these ports.
///
/// # Errors
/// Names the device that has one of them.
pub fn check_debug_exit(base: u16, len: u16, testdev: bool) -> Result<(), String> {
    let end = u32::from(base) + u32::from(len);
    if len == 0 || end > 1 << 16 {
        return Err(format!("{len} ports from {base:#x}: at least one, up to 0xffff, is possible"));
    }
    let of_testdev = PORTS_OF_TESTDEV.iter().filter(|_| testdev);
    let mut taken = PORTS.iter().chain(of_testdev);
    let overlapping = taken.find(|ports| {
        let from = u32::from(ports.base);
        from < end && u32::from(base) < from + u32::from(ports.len)
    });
    match overlapping {
        None => Ok(()),
        Some(other) => Err(format!("{len} ports from {base:#x} overlap those of the {}", other.of)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_debug_exit_device_may_be_anywhere_where_nothing_else_is() {
        for (base, len) in [(0xf4, 4), (0x501, 2), (0x501, 4), (0, 1), (0xffff, 1), (0x2000, 4)] {
            assert_eq!(check_debug_exit(base, len, false), Ok(()), "{base:#x}");
        }
        for (base, len, why) in [
            (0xf4, 0, "at least one"),
            (0xffff, 2, "at least one"),
            (0x20, 1, "first interrupt controller"),
            (0x3f5, 4, "serial port"),
            (0x3ff, 1, "serial port"),
            (0x501, 5, "pvpanic"),
            (0x501, 0x20, "pvpanic"),
            (0x51b, 1, "fw_cfg"),
            (0, 0xffff, "first interrupt controller"),
        ] {
            let error = check_debug_exit(base, len, false).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        assert!(check_debug_exit(0x2000, 4, true).unwrap_err().contains("test device"));
    }
}
