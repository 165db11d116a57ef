//! A machine with a faithful KVM on any host: QEMU emulates an AMD CPU with its virtualisation, a stock
//! kernel's `kvm_amd` drives it. The calling program runs inside once more; this side reads what it says.
//!
//! ```text
//! host: cargo test -> QEMU (TCG) -> L1: Debian kernel, kvm_amd, this very test program, ferry -> L2: the guest
//!          ^                                  |
//!          +------- serial port: RESULT … ----+
//! ```
//! One machine serves all tests of a test program, or a whole benchmark: it takes seconds to start.

use super::cpio::Archive;
use super::modules::Modules;
use super::packages::Packages;
use super::{ASSETS, Assets, program, replace};
use crate::ferry;
use crate::lines::{Found, Lines};
use crate::process::Process;
use anyhow::{Context, Result, ensure};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

const EMULATOR: &str = "qemu-system-x86_64";
/// Longest time until a test's verdict, those that run before it included.
const LIMIT: Duration = Duration::from_secs(600);

/// Longest life of the machine.
const LIFETIME: Duration = Duration::from_secs(3600);

/// What runs in the machine, besides the calling program.
pub struct Payload {
    /// The program's arguments there.
    pub arguments: Vec<String>,
    /// Programs that it needs besides ferry and ext4's tools.
    pub programs: Vec<PathBuf>,
    /// Files that those need.
    pub files: Vec<PathBuf>,
}

/// The running machine.
pub struct Machine {
    output: Lines,
    /// What its kernel says.
    console: PathBuf,
}

impl Machine {
    /// Starts it; `assets` are what a Linux guest in it boots from.
    pub fn start(
        packages: &Packages,
        assets: &Assets,
        store: &Path,
        payload: &Payload,
    ) -> Result<Self> {
        let ramdisk = store.join("machine.cpio");
        replace(&ramdisk, &contents(packages, assets, payload)?)?;
        let console = store.join("machine.log");
        let mut command = Command::new(EMULATOR);
        command
            .args(["-accel", "tcg", "-cpu", "EPYC", "-M", "q35", "-m", "2048", "-smp", "2"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-serial", "stdio", "-serial"])
            .arg(format!("file:{}", console.display()))
            .args(["-append", "console=ttyS1 panic=-1 tsc=reliable"])
            .arg("-kernel")
            .arg(&packages.kernel)
            .arg("-initrd")
            .arg(&ramdisk);
        Ok(Self { output: start_for_good(command)?, console })
    }

    /// Waits for a line from line `from` on.
    pub fn wait_from(&self, from: usize, pattern: &str) -> Result<Found> {
        let found = self.output.wait_from(from, pattern, LIMIT);
        found.with_context(|| format!("its kernel: {}", self.console.display()))
    }

    /// Waits until `test` has ended in the machine; prints what it said there.
    pub fn verdict(&self, test: &str) -> Result<()> {
        let result = self.wait_from(0, &format!("^RESULT {test} "))?;
        let lines = self.output.from(0);
        let begin = lines.iter().rposition(|line| *line == format!("BEGIN {test}")).unwrap_or(0);
        for line in &lines[begin..=result.index] {
            println!("{line}");
        }
        ensure!(result.text.ends_with(" ok"), "{test} failed in the emulated machine, see above");
        Ok(())
    }
}

/// Starts a process that lives until it or this program ends: no test owns it, all use it.
fn start_for_good(mut command: Command) -> Result<Lines> {
    // SAFETY: the closure makes one system call, which is safe between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let (sender, started) = mpsc::channel();
    // The signal comes when the thread ends that started the process, so this one stays.
    std::thread::spawn(move || match Process::start(&mut command) {
        Ok(mut process) => {
            let _ = sender.send(Ok(process.out.clone()));
            let _ = process.wait(LIFETIME);
        }
        Err(error) => drop(sender.send(Err(error))),
    });
    started.recv()?
}

/// The machine's ramdisk.
fn contents(packages: &Packages, assets: &Assets, payload: &Payload) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["proc", "sys", "dev", "tmp"] {
        archive.folder(folder)?;
    }
    archive.copy("bin/busybox", &packages.busybox)?;
    let modules = Modules::of(&packages.modules)?.in_load_order(&["irqbypass", "kvm_amd"])?;
    for (index, module) in modules.iter().enumerate() {
        archive.file(&format!("modules/{index:02}-{}", module.name), &module.contents)?;
    }
    // Everything lies where it lies on the host, so paths in programs and variables stay true.
    let own = std::env::current_exe()?;
    let programs = [own.clone(), ferry::binary(), program("mke2fs")?, program("e2fsck")?];
    let mut files = payload.files.clone();
    for program in programs.iter().chain(&payload.programs) {
        files.extend(with_libraries(program)?);
    }
    files.sort();
    files.dedup();
    for file in files {
        archive.copy(path_text(&file)?, &file)?;
    }
    archive.copy(guest_images::KERNEL, Path::new(guest_images::KERNEL))?;
    archive.copy(path_text(&assets.kernel())?, &assets.kernel())?;
    archive.copy(path_text(&assets.initrd())?, &assets.initrd())?;
    archive.file("run-tests", run_tests(&own, assets, &payload.arguments)?.as_bytes())?;
    archive.file("init", include_bytes!("nested-init.sh"))?;
    archive.finish()
}

/// The script that runs the calling program in the machine.
fn run_tests(own: &Path, assets: &Assets, arguments: &[String]) -> Result<String> {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
    let mut script = String::from("export RUST_TEST_THREADS=1 RUST_TEST_NOCAPTURE=1 CI=true\n");
    for (name, value) in
        [(ASSETS, assets.folder.as_path()), ("FERRY_BIN", ferry::binary().as_path())]
    {
        script += &format!("export {name}={}\n", quoted(path_text(value)?));
    }
    script += &quoted(path_text(own)?);
    for argument in arguments {
        script += &format!(" {}", quoted(argument));
    }
    Ok(script + "\n")
}

fn path_text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// `program` and the shared libraries that it needs.
fn with_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let program = std::path::absolute(program)?;
    let output = Command::new("ldd").arg(&program).output().context("cannot start ldd")?;
    let mut files = vec![program];
    // `name => /path (address)`, `/path (address)`; a static program has none.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    files.extend(paths.map(|path| PathBuf::from(path.trim_end_matches(':'))));
    Ok(files)
}
