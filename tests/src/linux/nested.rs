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
use crate::lines::Lines;
use crate::process::Process;
use crate::skip::say;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

const EMULATOR: &str = "qemu-system-x86_64";
/// Longest time until a test's verdict, those that run before it and machines that had to be replaced included: some
/// minutes each.
const LIMIT: Duration = Duration::from_secs(2100);

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

/// What its kernel says when one of its processors gets nowhere.
const STUCK: &str = "soft lockup";
/// How often a stuck machine is replaced.
const MOST_STARTS: u32 = 5;
/// A machine that says nothing for so long is stuck as a whole: a test gives up earlier.
const LONGEST_SILENCE: Duration = Duration::from_secs(200);
/// Between two looks at the kernel's messages.
const LOOK: Duration = Duration::from_secs(1);

/// What a machine is made of.
struct Plan {
    packages: Packages,
    assets: Assets,
    store: PathBuf,
    payload: Payload,
}

/// A machine that runs.
struct Run {
    output: Lines,
    process: u32,
    starts: u32,
    /// What the tests have printed that ended in earlier ones, by name.
    ended: BTreeMap<String, Vec<String>>,
}

/// How long a machine has said nothing.
struct Silence {
    said: usize,
    since: Instant,
}

impl Silence {
    fn new() -> Self {
        Self { said: 0, since: Instant::now() }
    }

    fn of(&mut self, output: &Lines) -> Duration {
        if output.count() != self.said {
            *self = Self { said: output.count(), since: Instant::now() };
        }
        self.since.elapsed()
    }
}

/// The machine. Now and then, mostly on a busy host, its own kernel stands still, which no program in it
/// can bring about by design: the tests that have not ended then start again in a new one, and that is
/// said. A test that has failed has failed.
pub struct Machine {
    plan: Plan,
    run: Mutex<Run>,
    /// What its kernel says.
    console: PathBuf,
}

impl Machine {
    /// Starts it; `assets` are what a Linux guest in it boots from.
    pub fn start(
        packages: &Packages,
        assets: &Assets,
        store: &Path,
        payload: Payload,
    ) -> Result<Self> {
        let (packages, assets) = (packages.clone(), assets.clone());
        let plan = Plan { packages, assets, store: store.to_owned(), payload };
        let (console, ended) = (store.join("machine.log"), BTreeMap::new());
        let (output, process) = plan.start(&console, &[])?;
        let run = Mutex::new(Run { output, process, starts: 1, ended });
        Ok(Self { plan, run, console })
    }

    fn run(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stuck(&self) -> bool {
        std::fs::read(&self.console)
            .is_ok_and(|text| String::from_utf8_lossy(&text).contains(STUCK))
    }

    /// Waits for a line from line `next` on, which is then the one behind it. A machine that is stuck, or
    /// says nothing for `longest_silence`, is replaced, and begins anew, as `next` does.
    pub fn next_line(
        &self,
        next: &mut usize,
        pattern: &str,
        longest_silence: Duration,
    ) -> Result<String> {
        let mut silence = Silence::new();
        loop {
            let (output, hopeless) = {
                let mut run = self.run();
                if self.mend(&mut run, &mut silence, longest_silence)? {
                    *next = 0;
                }
                let silent = silence.of(&run.output) > longest_silence;
                (run.output.clone(), silent || run.output.has_ended())
            };
            // Or time for a look.
            match output.wait_from(*next, pattern, LOOK) {
                Ok(found) => {
                    *next = found.index + 1;
                    return Ok(found.text);
                }
                Err(_) if !hopeless => {}
                Err(error) => {
                    return Err(error.context(format!("its kernel: {}", self.console.display())));
                }
            }
        }
    }

    /// Waits until `test` has ended in the machine; prints what it said there.
    pub fn verdict(&self, test: &str) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        let mut silence = Silence::new();
        let lines = loop {
            let (output, ended) = {
                let mut run = self.run();
                self.mend(&mut run, &mut silence, LONGEST_SILENCE)?;
                let (output, ended) = (run.output.clone(), run.output.has_ended());
                run.collect(&output);
                if let Some(lines) = run.ended.get(test) {
                    break lines.clone();
                }
                (output, ended)
            };
            let console = self.console.display();
            let waiting = !ended && Instant::now() < deadline;
            ensure!(waiting, "no verdict on {test}: {}; its kernel: {console}", output.tail());
            // Another line, or time for a look.
            let _ = output.wait_for(&format!("^RESULT {test} "), LOOK);
        };
        lines.iter().for_each(|line| println!("{line}"));
        let well = lines.last().is_some_and(|line| line.ends_with(" ok"));
        ensure!(well, "{test} failed in the emulated machine, see above");
        Ok(())
    }

    /// Replaces a machine that is stuck or has been silent for too long, unless that has happened too
    /// often; returns whether it did.
    fn mend(&self, run: &mut Run, silence: &mut Silence, longest: Duration) -> Result<bool> {
        let stuck = self.is_stuck() || silence.of(&run.output) > longest;
        if !stuck || run.starts >= MOST_STARTS {
            return Ok(false);
        }
        run.collect(&run.output.clone());
        let console = self.console.display();
        say(&format!("the emulated machine is stuck ({console}): another one"));
        self.start_again(run)?;
        *silence = Silence::new();
        Ok(true)
    }

    /// Replaces the machine by one for the tests that have not ended.
    fn start_again(&self, run: &mut Run) -> Result<()> {
        let skip: Vec<_> = run.ended.keys().cloned().collect();
        let process = libc::pid_t::try_from(run.process)?;
        // SAFETY: a system call without memory; the process is ours, and reaped by the thread that waits
        // for it, if at all only a moment ago.
        unsafe { libc::kill(process, libc::SIGKILL) };
        std::fs::rename(&self.console, self.console.with_extension("earlier.log"))?;
        (run.output, run.process) = self.plan.start(&self.console, &skip)?;
        run.starts += 1;
        Ok(())
    }
}

impl Run {
    /// Keeps what has ended: a test that fails in a stuck machine has not.
    fn collect(&mut self, output: &Lines) {
        let lines = output.from(0);
        let mut begin = 0;
        for (index, line) in lines.iter().enumerate() {
            if line.starts_with("BEGIN ") {
                begin = index;
            }
            let result = line.strip_prefix("RESULT ").and_then(|result| result.split_once(' '));
            if let Some((test, _)) = result {
                let said = || lines[begin..=index].to_vec();
                self.ended.entry(test.to_owned()).or_insert_with(said);
            }
        }
    }
}

impl Plan {
    /// Starts a machine whose tests are not those of `skip`; returns what it says, and its process.
    fn start(&self, console: &Path, skip: &[String]) -> Result<(Lines, u32)> {
        let ramdisk = self.store.join("machine.cpio");
        let mut arguments = self.payload.arguments.clone();
        arguments.extend(skip.iter().flat_map(|test| ["--skip".to_owned(), test.clone()]));
        let contents = contents(&self.packages, &self.assets, &self.payload, &arguments)?;
        replace(&ramdisk, &contents)?;
        let mut command = Command::new(EMULATOR);
        command
            // One processor: with two, more guests crashed or stood still, under QEMU as under Ferry, and
            // so did the machine. QEMU 7.2 changes a processor's pending interrupts without a lock when
            // that enters a guest; with one processor fewer threads can meet there.
            .args(["-accel", "tcg", "-cpu", "EPYC", "-M", "q35", "-m", "2048", "-smp", "1"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-serial", "stdio", "-serial"])
            .arg(format!("file:{}", console.display()))
            .args(["-append", "console=ttyS1 panic=-1 tsc=reliable"])
            .arg("-kernel")
            .arg(&self.packages.kernel)
            .arg("-initrd")
            .arg(&ramdisk);
        start_for_good(command)
    }
}

/// Starts a process that lives until it or this program ends: no test owns it, all use it.
fn start_for_good(mut command: Command) -> Result<(Lines, u32)> {
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
            let _ = sender.send(Ok((process.out.clone(), process.id())));
            let _ = process.wait(LIFETIME);
        }
        Err(error) => drop(sender.send(Err(error))),
    });
    started.recv()?
}

/// The machine's ramdisk.
fn contents(
    packages: &Packages,
    assets: &Assets,
    payload: &Payload,
    arguments: &[String],
) -> Result<Vec<u8>> {
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
    if assets.memtest().exists() {
        archive.copy(path_text(&assets.memtest())?, &assets.memtest())?;
    }
    archive.file("run-tests", run_tests(&own, assets, arguments)?.as_bytes())?;
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
