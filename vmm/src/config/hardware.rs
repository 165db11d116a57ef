//! Options for the devices that test kernels expect, in QEMU's words.

use crate::boot::payload::split_list;
use crate::machine::description::check_debug_exit;
use devices::fw_cfg::{MAX_USER_BYTES, USER_PREFIX, check_name, check_names};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::str::FromStr;

/// A file of fw_cfg: `name=NAME,file=PATH` or `name=NAME,string=TEXT`. As in QEMU, `name=` may be left out, and
/// a doubled comma is a comma.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FwCfgItem {
    /// Its name for the guest.
    pub name: String,
    /// Where its content comes from.
    pub source: FwCfgSource,
}

/// The content of a file of fw_cfg.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FwCfgSource {
    /// A file, read when the guest starts.
    File(PathBuf),
    /// The bytes of this text, without a NUL.
    Text(String),
}

impl FwCfgItem {
    /// Whether QEMU would warn about its name.
    pub fn is_outside_of_opt(&self) -> bool {
        !self.name.starts_with(USER_PREFIX)
    }
}

impl FromStr for FwCfgItem {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected name=NAME,file=PATH or name=NAME,string=TEXT";
        let (mut name, mut source) = (None, None);
        for (index, pair) in split_list(text).into_iter().enumerate() {
            let found = match pair.split_once('=') {
                Some(("name", value)) => name.replace(value.to_owned()).is_none(),
                Some(("file", value)) => {
                    source.replace(FwCfgSource::File(value.into())).is_none() && !value.is_empty()
                }
                Some(("string", value)) => {
                    source.replace(FwCfgSource::Text(value.to_owned())).is_none()
                }
                None if index == 0 => name.replace(pair.clone()).is_none(),
                _ => false,
            };
            if !found {
                return Err(format!("{pair:?} in {text:?}: {EXPECTED}"));
            }
        }
        let (Some(name), Some(source)) = (name, source) else {
            return Err(format!("{text:?}: {EXPECTED}"));
        };
        check_name(&name)?;
        Ok(Self { name, source })
    }
}

/// The isa-debug-exit device: `off`, or `iobase=0xf4,iosize=4`. What is left out is as in QEMU, 0x501 and 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum DebugExitConfig {
    /// There is none.
    Off,
    /// At these ports.
    At {
        /// The first of them.
        iobase: u16,
        /// How many.
        iosize: u16,
    },
}

impl Default for DebugExitConfig {
    /// Where test kernels look for it.
    fn default() -> Self {
        Self::At { iobase: 0xf4, iosize: 4 }
    }
}

impl FromStr for DebugExitConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::Off);
        }
        let (mut base, mut size) = (0x501, 2);
        for pair in text.split(',') {
            let (to, value) = match pair.split_once('=') {
                Some(("iobase", value)) => (&mut base, value),
                Some(("iosize", value)) => (&mut size, value),
                _ => {
                    return Err(format!("{pair:?} in {text:?}: expected off or iobase=N,iosize=N"));
                }
            };
            *to = parse_port(value).ok_or_else(|| format!("{pair:?}: 0 to 0xffff is possible"))?;
        }
        Ok(Self::At { iobase: base, iosize: size })
    }
}

fn parse_port(text: &str) -> Option<u16> {
    match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Where bytes go that the guest writes to the debug console, port 0xe9.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum DebugconConfig {
    /// Nowhere.
    #[default]
    Null,
    /// To standard output, between those of the serial console.
    Stdio,
    /// To a file.
    File(PathBuf),
}

impl FromStr for DebugconConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "null" => Ok(Self::Null),
            None if text == "stdio" => Ok(Self::Stdio),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(format!("{text:?}: expected null, stdio or file=PATH")),
        }
    }
}

/// The part of a guest's hardware that these options choose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HardwareConfig {
    /// Whether there is a pc-testdev.
    pub testdev: bool,
    /// Files of fw_cfg that the user adds.
    pub fw_cfg: Vec<FwCfgItem>,
    /// The debug-exit device.
    pub debug_exit: DebugExitConfig,
}

impl HardwareConfig {
    /// Adds every problem to `problems`, by option name.
    pub(super) fn check(&self, problems: &mut Vec<String>) {
        if let DebugExitConfig::At { iobase, iosize } = self.debug_exit
            && let Err(error) = check_debug_exit(iobase, iosize, self.testdev)
        {
            problems.push(format!("--debug-exit: {error}"));
        }
        let names = || self.fw_cfg.iter().map(|item| item.name.as_str());
        if let Err(error) = check_names(names()) {
            problems.push(format!("--fw-cfg: {error}"));
        }
        for item in &self.fw_cfg {
            if let FwCfgSource::Text(text) = &item.source
                && text.len() > MAX_USER_BYTES
            {
                let (name, len) = (&item.name, text.len());
                let most = MAX_USER_BYTES;
                problems.push(format!(
                    "--fw-cfg: {name:?} has {len} bytes, at most {most} are possible"
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::fw_cfg::MAX_NAME_BYTES;

    #[test]
    fn items_of_fw_cfg_are_read_as_qemu_reads_them() {
        let item = |text: &str| text.parse::<FwCfgItem>();
        let text = |text: &str| FwCfgSource::Text(text.into());
        let name = "opt/x".to_owned();
        assert_eq!(
            item("name=opt/x,string=a=b,,c"),
            Ok(FwCfgItem { name: name.clone(), source: text("a=b,c") })
        );
        assert_eq!(item("opt/x,string="), Ok(FwCfgItem { name: name.clone(), source: text("") }));
        let file = FwCfgSource::File("/f".into());
        assert_eq!(item("file=/f,name=opt/x"), Ok(FwCfgItem { name, source: file }));
        for bad in [
            "",
            "name=opt/x",
            "name=opt/x,file=",
            "name=opt/x,string=a,string=b",
            "string=a",
            "name=,string=a",
            "name=opt/x,string=a,b",
            "name=opt/x y,string=a",
            "name=opt/\u{e9},string=a",
        ] {
            assert!(item(bad).is_err(), "{bad}");
        }
        let longest = "o".repeat(MAX_NAME_BYTES);
        assert!(item(&format!("{longest},string=a")).is_ok());
        let error = item(&format!("{longest}o,string=a")).unwrap_err();
        assert!(error.contains("at most 55"), "{error}");
    }

    #[test]
    fn debug_exit_has_qemus_keys_and_defaults() {
        let at = |iobase, iosize| Ok(DebugExitConfig::At { iobase, iosize });
        assert_eq!("iobase=0xf4,iosize=0x04".parse(), at(0xf4, 4));
        assert_eq!("iobase=1281".parse(), at(0x501, 2));
        assert_eq!("off".parse(), Ok(DebugExitConfig::Off));
        for bad in ["", "on", "iobase=0x10000", "iobase=", "iobase=-1", "base=1"] {
            assert!(bad.parse::<DebugExitConfig>().is_err(), "{bad}");
        }
    }

    #[test]
    fn debug_consoles_are_read() {
        assert_eq!("file=/l".parse(), Ok(DebugconConfig::File("/l".into())));
        assert!("file=".parse::<DebugconConfig>().is_err());
    }
}
