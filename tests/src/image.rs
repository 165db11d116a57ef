//! Disk images as a host sees them: filled, compared, weighed.

use anyhow::{Context, Result, bail, ensure};
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

const PIECE: usize = 1 << 20;

/// What to fill with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// What cannot be guessed or compressed.
    Random,
    /// Zeroes that take space.
    Zero,
    /// Lines of common words, numbered: a log.
    Text,
}

/// Fills part of a file, which is made if it is not there.
pub fn fill(path: &Path, offset: u64, len: u64, pattern: Pattern) -> Result<()> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    let mut random = File::open("/dev/urandom")?;
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < len {
        let now = usize::try_from(len - at)?.min(PIECE);
        match pattern {
            Pattern::Random => random.read_exact(&mut piece[..now])?,
            Pattern::Text => write_log(&mut piece[..now], at / PIECE as u64),
            Pattern::Zero => {}
        }
        file.write_all_at(&piece[..now], offset + at)?;
        at += now as u64;
    }
    Ok(())
}

/// Lines of a log, other ones in each piece.
fn write_log(piece: &mut [u8], number: u64) {
    const WORDS: [&str; 16] = [
        "connection",
        "from",
        "accepted",
        "request",
        "served",
        "in",
        "milliseconds",
        "session",
        "closed",
        "by",
        "peer",
        "user",
        "opened",
        "file",
        "warning:",
        "retry",
    ];
    let mut random = number + 1;
    let lines = (0u64..).map(|line| {
        let mut text = format!(
            "{:08}.{:06} host kernel[{}]:",
            number * 40 + line / 400,
            line * 7919 % 1_000_000,
            line % 97
        );
        for _ in 0..8 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let word = usize::try_from(random >> 60).unwrap_or(0);
            text.push(' ');
            text.push_str(WORDS[word]);
        }
        text.push('\n');
        text
    });
    for (to, byte) in piece.iter_mut().zip(lines.flat_map(String::into_bytes)) {
        *to = byte;
    }
}

/// Bytes that a file takes on its file system, as `du` counts.
pub fn allocated(path: &Path) -> Result<u64> {
    File::open(path)?.sync_all()?;
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

/// Compares two raw images byte by byte.
pub fn compare(one: &Path, other: &Path) -> Result<()> {
    let files = [File::open(one)?, File::open(other)?];
    let [here, there] = [files[0].metadata()?.len(), files[1].metadata()?.len()];
    ensure!(here == there, "{} has {here} bytes, {} has {there}", one.display(), other.display());
    let mut pieces = [vec![0; PIECE], vec![0; PIECE]];
    let mut at = 0;
    while at < here {
        let now = usize::try_from(here - at)?.min(PIECE);
        for (file, piece) in files.iter().zip(&mut pieces) {
            file.read_exact_at(&mut piece[..now], at)?;
        }
        let differs = (0..now).step_by(512).find(|sector| {
            let end = (sector + 512).min(now);
            pieces[0][*sector..end] != pieces[1][*sector..end]
        });
        if let Some(sector) = differs {
            bail!("they differ at byte {}", at + sector as u64);
        }
        at += now as u64;
    }
    Ok(())
}

/// Runs it to its end, which has to be a good one; returns what it printed.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaints = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {said}{complaints}");
    Ok(said)
}

/// Makes a qcow2 image that stands on a raw one.
pub fn overlay(path: &Path, base: &Path) -> Result<()> {
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    run(Command::new("qemu-img").args(create).args([base, path])).map(drop)
}

/// Has `qemu-img` compare two images of these formats, to which more of its options may be added, and
/// check those that have a map.
///
/// # Panics
/// If they differ, or one is damaged.
pub fn assert_same_as((one, one_format): (&Path, &str), (other, other_format): (&Path, &str)) {
    // Ours holds a lock, which keeps QEMU out unless it is told not to look.
    let unlocked = |path: &Path, format: &str| {
        let path = path.display();
        format!("driver={format},file.driver=file,file.locking=off,file.filename={path}")
    };
    let images = [unlocked(one, one_format), unlocked(other, other_format)];
    let same = run(Command::new("qemu-img").args(["compare", "-U", "--image-opts"]).args(&images));
    assert!(same.is_ok(), "{same:?}");
    for (image, format) in images.iter().zip([one_format, other_format]) {
        if format.starts_with("qcow2") {
            let check = ["check", "-U", "--image-opts"];
            let whole = run(Command::new("qemu-img").args(check).arg(image));
            assert!(whole.is_ok(), "{whole:?}");
        }
    }
}

/// Compares two raw images byte by byte, and has `qemu-img` do so too where it is installed.
///
/// # Panics
/// If they differ.
pub fn assert_same(one: &Path, other: &Path) {
    let same = compare(one, other);
    assert!(same.is_ok(), "{} and {}: {same:?}", one.display(), other.display());
    if Command::new("qemu-img").arg("--version").output().is_ok() {
        assert_same_as((one, "raw"), (other, "raw"));
    }
}

/// A file system in memory that fills up soon. Unmounted when dropped.
pub struct SmallFileSystem(PathBuf);

impl SmallFileSystem {
    /// Mounts one of `bytes` at `folder`.
    pub fn mount(folder: &Path, bytes: u64) -> Result<Self> {
        let size = format!("size={bytes}");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder))?;
        Ok(Self(folder.to_owned()))
    }

    /// Gives it another size.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        let size = format!("remount,size={bytes}");
        run(Command::new("mount").args(["-o", &size]).arg(&self.0)).map(drop)
    }

    /// Unmounts it now.
    pub fn unmount(&self) -> Result<()> {
        // Lazily: a process that just ended may still be leaving it.
        let status = Command::new("umount").arg("-l").arg(&self.0).status();
        ensure!(status.context("umount")?.success(), "cannot unmount {}", self.0.display());
        Ok(())
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            eprintln!("{error:#}");
        }
    }
}

/// A block device whose bytes are a file's. Detached when dropped.
pub struct LoopDevice(String);

impl LoopDevice {
    /// Makes one of `file`.
    pub fn attach(file: &Path) -> Result<Self> {
        let path = run(Command::new("losetup").args(["-f", "--show"]).arg(file))?;
        Ok(Self(path.trim().to_owned()))
    }

    /// Where it is.
    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Open descriptors keep it until then.
        if let Err(error) = run(Command::new("losetup").arg("-d").arg(&self.0)) {
            eprintln!("{error:#}");
        }
    }
}
