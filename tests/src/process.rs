//! One VMM process: its pipes, its control socket, and its end.

use crate::lines::{Found, Lines};
use crate::qmp::Qmp;
use crate::verdict::Check;
use anyhow::{Context, Result, bail};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A generous limit for anything that should take moments: a loaded host must not fail a test.
pub const SOON: Duration = Duration::from_secs(30);

/// A child process with its output collected. Killed, by its id, when dropped.
pub struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    started: Instant,
    /// Standard output: for a VMM the guest's serial line.
    pub out: Lines,
    /// Standard error.
    pub err: Lines,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` with all three pipes.
    pub fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let out = Lines::collect(child.stdout.take().context("no standard output")?);
        let err = Lines::collect(child.stderr.take().context("no standard error")?);
        let stdin = child.stdin.take();
        Ok(Self { child, stdin, started, out, err, status: None })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// When it was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Writes to its standard input: for a VMM, the guest's serial line.
    pub fn type_in(&mut self, text: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        stdin.write_all(text.as_bytes())?;
        stdin.flush()?;
        Ok(())
    }

    /// Closes its standard input.
    pub fn close_input(&mut self) {
        self.stdin = None;
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        // Its end closes its output; that can be waited for with a limit, `wait` itself cannot.
        self.out.wait_end(limit).with_context(|| format!("errors:\n{}", self.err.tail()))?;
        self.err.wait_end(limit)?;
        let status = self.child.wait()?;
        self.status = Some(status);
        Ok(status)
    }

    /// Waits for its end and gives the exit code, or 128 and the signal's number as a shell does.
    pub fn exit_code(&mut self, limit: Duration) -> Result<i32> {
        let status = self.wait(limit)?;
        let of_signal = || status.signal().map(|signal| 128 + signal);
        status.code().or_else(of_signal).with_context(|| format!("it has not ended: {status}"))
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.status.is_none() && matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal to it alone. Does nothing if it has ended.
    pub fn signal(&mut self, signal: i32) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        let pid = i32::try_from(self.id())?;
        // SAFETY: no memory is involved; the child has not been reaped, so its id is still its own.
        let result = unsafe { libc::kill(pid, signal) };
        if result != 0 {
            return Err(std::io::Error::last_os_error()).context("cannot signal the process");
        }
        Ok(())
    }

    /// Kills it at once, as a crash or power loss would, and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(libc::SIGKILL)?;
        self.status = Some(self.child.wait()?);
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_running() {
            // It may have ended meanwhile; there is nobody to tell.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A process that runs, or waits for, a guest.
pub struct Vmm {
    /// The process; its output is the guest's serial line.
    pub process: Process,
    socket: PathBuf,
    /// Holds the control socket; removed last.
    _folder: TempDir,
}

impl Vmm {
    /// Wraps a started process whose control socket is `socket` in `folder`.
    pub fn new(process: Process, socket: PathBuf, folder: TempDir) -> Self {
        Self { process, socket, _folder: folder }
    }

    /// Path of its control socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A new client of its control socket.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.socket, SOON)
            .with_context(|| format!("errors of the VMM:\n{}", self.process.err.tail()))
    }

    /// The guest's serial output.
    pub fn serial(&self) -> &Lines {
        &self.process.out
    }

    /// Waits for a serial line; errors show what the VMM said.
    pub fn wait_line(&self, pattern: &str) -> Result<Found> {
        self.serial().wait_for(pattern, SOON).with_context(|| self.complaint())
    }

    /// Waits for a serial line that comes after this call.
    pub fn wait_next_line(&self, pattern: &str) -> Result<Found> {
        self.serial().wait_next(pattern, SOON).with_context(|| self.complaint())
    }

    fn complaint(&self) -> String {
        format!("errors of the VMM:\n{}", self.process.err.tail())
    }

    /// Asks the guest for a full check of its memory or disk and waits for the verdict.
    pub fn check(&mut self) -> Result<Check> {
        let from = self.serial().count();
        self.process.type_in("c")?;
        let found = self.serial().wait_from(from, "CHECK .* corrupt=.* gen=", SOON);
        let line = found.with_context(|| self.complaint())?.text;
        match Check::parse(&line) {
            Some(check) => Ok(check),
            None => bail!("not a verdict: {line:?}"),
        }
    }
}
