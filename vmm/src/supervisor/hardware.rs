//! Turns the options about test kernels' devices into a description, which has all that a destination needs.

use crate::config::{DebugExitConfig, FwCfgItem, FwCfgSource, HardwareConfig};
use crate::machine::description::{FwCfgFile, Platform, PortRange};
use crate::setup::SetupError;
use devices::fw_cfg::{MAX_USER_BYTES, check_lengths};
use devices::state::HexBytes;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The platform of a new guest, with the contents of the files that the user names.
///
/// # Errors
/// If one of them cannot be read, or there is too much in them.
pub(super) fn platform(config: &HardwareConfig) -> Result<Platform, SetupError> {
    let HardwareConfig { testdev, fw_cfg, debug_exit } = config;
    let files = fw_cfg.iter().map(file).collect::<Result<Vec<_>, _>>()?;
    check_lengths(files.iter().map(|file| file.content.0.len())).map_err(SetupError::FwCfg)?;
    let debug_exit = match *debug_exit {
        DebugExitConfig::Off => None,
        DebugExitConfig::At { iobase, iosize } => Some(PortRange { base: iobase, len: iosize }),
    };
    Ok(Platform { testdev: *testdev, fw_cfg: files, debug_exit })
}

fn file(item: &FwCfgItem) -> Result<FwCfgFile, SetupError> {
    if item.is_outside_of_opt() {
        log::warn!("--fw-cfg: {:?} does not begin with \"opt/\": such names are QEMU's", item.name);
    }
    let content = match &item.source {
        FwCfgSource::Text(text) => text.clone().into_bytes(),
        FwCfgSource::File(path) => read(path).map_err(|source| SetupError::FwCfgFile {
            name: item.name.clone(),
            path: path.clone(),
            source,
        })?,
    };
    Ok(FwCfgFile { name: item.name.clone(), content: HexBytes(content) })
}

/// Reads a regular file of at most [`MAX_USER_BYTES`]. Never waits, as opening a FIFO would.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut content = Vec::new();
    file.take(MAX_USER_BYTES as u64 + 1).read_to_end(&mut content)?;
    if content.len() > MAX_USER_BYTES {
        let reason = format!("it has more than {MAX_USER_BYTES} bytes");
        return Err(io::Error::new(ErrorKind::FileTooLarge, reason));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(items: &[String]) -> Result<Platform, String> {
        let fw_cfg = items.iter().map(|item| item.parse().unwrap()).collect();
        let debug_exit = DebugExitConfig::At { iobase: 0x501, iosize: 2 };
        let config = HardwareConfig { testdev: true, fw_cfg, debug_exit };
        platform(&config).map_err(|error| crate::error::chain(&error))
    }

    #[test]
    fn a_description_has_the_bytes_of_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, b"\0bytes").unwrap();
        let file = format!("name=opt/f,file={}", path.display());
        let platform = from(&[file, "name=opt/t,string=text".into()]).unwrap();
        let content = |at: usize| platform.fw_cfg[at].content.0.as_slice();
        assert_eq!((content(0), content(1)), (&b"\0bytes"[..], &b"text"[..]));
        assert_eq!(platform.debug_exit, Some(PortRange { base: 0x501, len: 2 }));
    }

    #[test]
    fn files_that_cannot_travel_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let file = |name: &str| format!("name=opt/{name},file={}", path.display());
        let refused = |items: &[String], words: &str| {
            let error = from(items).unwrap_err();
            assert!(error.contains(words), "{error}");
        };
        refused(&[file("a")], "opt/a");
        std::fs::write(&path, vec![0; MAX_USER_BYTES]).unwrap();
        assert!(from(&[file("a")]).is_ok());
        refused(&[file("a"), "name=opt/t,string=t".into()], "in all items together");
        std::fs::write(&path, vec![0; MAX_USER_BYTES + 1]).unwrap();
        refused(&[file("a")], "it has more than");
        refused(&["name=opt/d,file=/".into()], "not a regular file");
        refused(&["name=opt/z,file=/dev/zero".into()], "not a regular file");
    }
}
