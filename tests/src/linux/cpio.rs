//! Initial ramdisks: a writer of the kernel's "newc" archives. Not compressed: nobody stores them.

use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::path::Path;

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// An archive that grows.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    folders: BTreeSet<String>,
}

impl Archive {
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8]) -> Result<()> {
        self.entries += 1;
        let len = u32::try_from(contents.len()).context("an archive's files end at 4 GiB")?;
        let name_len = u32::try_from(name.len() + 1)?;
        // Inode, mode, uid, gid, links, mtime, size, device 2×, device of a node 2×, name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, len, 0, 0, 0, 0, name_len, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
        Ok(())
    }

    /// Adds a folder, with those above it; a second time it does nothing.
    pub fn folder(&mut self, path: &str) -> Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || !self.folders.insert(path.to_owned()) {
            return Ok(());
        }
        self.folder(path.rsplit_once('/').map_or("", |(above, _)| above))?;
        self.entry(path, FOLDER, &[])
    }

    /// Adds a file that may be executed, and the folders above it.
    pub fn file(&mut self, path: &str, contents: &[u8]) -> Result<()> {
        let path = path.trim_matches('/');
        self.folder(path.rsplit_once('/').map_or("", |(above, _)| above))?;
        self.entry(path, PROGRAM, contents)
    }

    /// Adds a copy of a file of this host.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let contents =
            std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(path, &contents)
    }

    /// The whole archive.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_once_before_their_files_and_all_is_aligned() {
        let mut archive = Archive::default();
        archive.file("/bin/sh", b"12345").unwrap();
        archive.file("bin/ls", b"").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8(bytes).unwrap();
        let place = |name: &str| text.find(name).unwrap();
        assert!(place("bin\0") < place("bin/sh\0") && place("bin/sh\0") < place("bin/ls\0"));
        assert_eq!(text.matches("070701").count(), 4, "a folder, two files and the trailer");
        assert!(text.contains(&["12345", "\0\0\0", "070701"].concat()), "contents are padded");
    }
}
