//! What some tests cannot do without, and not every host or user has: the words of `#[needs(…)]`. Each looks
//! by trying, and its error says why it is not to be had.

use crate::hanging::HangingImage;
use crate::image::{LoopDevice, SmallFileSystem};
use crate::process::Process;
use crate::skip;
use anyhow::{Context, Result, ensure};
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One of them.
pub type Need = fn() -> Result<()>;

/// Whether all are met. If not, the calling test is skipped as [`skip::skip`] says.
pub fn are_met(needs: &[Need]) -> bool {
    match needs.iter().try_for_each(|need| need()) {
        Ok(()) => true,
        Err(reason) => {
            skip::skip(&format!("{reason:#}"));
            false
        }
    }
}

/// Guests.
pub fn kvm() -> Result<()> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.map(drop).context("no guest can run here, /dev/kvm")
}

/// QEMU's tool for images.
pub fn qemu_img() -> Result<()> {
    let mut command = Command::new("qemu-img");
    let found = command.arg("--version").output().is_ok_and(|output| output.status.success());
    ensure!(found, "qemu-img is not installed (package qemu-utils)");
    Ok(())
}

/// QEMU's NBD server.
pub fn qemu_nbd() -> Result<()> {
    let mut command = Command::new("qemu-nbd");
    let found = command.arg("--version").output().is_ok_and(|output| output.status.success());
    ensure!(found, "qemu-nbd is not installed (package qemu-utils)");
    Ok(())
}

/// libnbd's tools.
pub fn nbd_tools() -> Result<()> {
    for tool in ["nbdinfo", "nbdcopy"] {
        let found = Command::new(tool).arg("--version").output();
        let found = found.is_ok_and(|output| output.status.success());
        ensure!(found, "{tool} is not installed (package libnbd-bin)");
    }
    Ok(())
}

/// A server of others' disks.
pub fn nbdkit() -> Result<()> {
    let found = Command::new("nbdkit").arg("--version").output();
    ensure!(found.is_ok_and(|output| output.status.success()), "nbdkit is not installed");
    Ok(())
}

/// Perl's reader of TAP.
pub fn prove() -> Result<()> {
    let found = Command::new("prove").arg("--version").output();
    ensure!(
        found.is_ok_and(|output| output.status.success()),
        "prove is not installed (package perl)"
    );
    Ok(())
}

/// Kernels of others, as `tests/install-deps.sh` unpacks them.
pub fn foreign_kernels() -> Result<()> {
    let found = foreign_kernel("boot/ipxe.lkrn").exists();
    ensure!(found, "no kernels of others are unpacked: tests/install-deps.sh test, on Debian");
    Ok(())
}

/// The path of one of them; its name is its path in its package.
pub fn foreign_kernel(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/foreign-kernels").join(name)
}

/// Python's own client of control sockets.
pub fn qemu_qmp() -> Result<()> {
    ensure!(qmp_python().exists(), "qemu.qmp is not installed: tests/install-deps.sh test");
    Ok(())
}

/// The Python that has it.
pub fn qmp_python() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/qmp-venv/bin/python")
}

/// A file system of the test's own, as root can mount.
pub fn mounts() -> Result<()> {
    let folder = tempfile::tempdir()?;
    SmallFileSystem::mount(folder.path(), 4096).map(drop).context("only root can mount")
}

/// A file system that the test itself serves.
pub fn fuse() -> Result<()> {
    let folder = tempfile::tempdir()?;
    HangingImage::mount(folder.path(), 4096).map(drop).context("only root can mount, with FUSE")
}

/// Block devices made of files.
pub fn loop_devices() -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    file.as_file().set_len(4096)?;
    LoopDevice::attach(file.path()).map(drop).context("only root can make loop devices")
}

/// A `/dev` that hides this host's.
pub fn own_dev() -> Result<()> {
    let mut command = Command::new("unshare");
    command.args(["-rm", "mount", "-t", "tmpfs", "none", "/dev"]);
    succeeds(&mut command).context("no user namespaces here to hide /dev in")
}

/// To be another user, with a `/dev` of that user's.
pub fn other_users() -> Result<()> {
    let mut command = Command::new("unshare");
    let nobody = "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && setpriv --reuid 65534 true";
    command.args(["-m", "sh", "-c", nobody]);
    succeeds(&mut command).context("only root can be another user")
}

fn succeeds(command: &mut Command) -> Result<()> {
    let mut process = Process::start(command)?;
    let code = process.exit_code(crate::process::SOON)?;
    ensure!(code == 0, "{}", process.err.text().trim_end());
    Ok(())
}
