//! Runs one test: a child process that is this program again, configured on its standard input. Whatever it
//! does, it ends: by its own `--timeout`, or it is killed a moment later.

use super::capture::{Log, Tail, drain};
use super::verdict::End;
use crate::config::RunConfig;
use crate::exit_code::{self, Exit};
use crate::shuttle::{ChildConfig, MOVED, Part};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How much longer than its `--timeout` a test may take before it is killed.
const TIMEOUT_SLACK: Duration = Duration::from_secs(10);
/// How long a test may take to end when all are to.
const STOP_PATIENCE: Duration = Duration::from_secs(3);
/// How long the last output of a process that has ended may take: another one may hold the pipe.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);
/// How often it is looked whether all are to end.
const STOP_INTERVAL: Duration = Duration::from_millis(100);

/// How a test's process ended.
pub(super) struct Ended {
    /// With which code, if any.
    pub end: End,
    /// In words.
    pub why: String,
    /// From its start.
    pub time: Duration,
    /// The end of what it printed.
    pub output: String,
    /// How often its guest was migrated.
    pub moves: u64,
    /// It was ended because all are to end.
    pub stopped: bool,
    /// Why its output is not all in the file.
    pub not_kept: Option<io::Error>,
}

/// Runs a test to its end, or until `stop` is set; writes what it prints to `log`.
pub(super) fn run(
    config: RunConfig,
    verbose: u8,
    log: Option<File>,
    stop: &AtomicBool,
) -> io::Result<Ended> {
    let started = Instant::now();
    let limit = config.host.timeout.map(|timeout| started + timeout + TIMEOUT_SLACK);
    let child = ChildConfig { verbose, part: Part::Whole, config };
    // Not by path: the file may have been replaced since this process started.
    let mut command = Command::new("/proc/self/exe");
    command.arg("child");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::start(&mut command)?;
    let log = Log::new(log);
    let missing = || io::Error::other("a child process without pipes");
    let output = collect(process.child.stdout.take().ok_or_else(missing)?, &log)?;
    let errors = collect(process.child.stderr.take().ok_or_else(missing)?, &log)?;
    let input = process.child.stdin.take().ok_or_else(missing)?;
    // It reads all of that before it does anything else; if it cannot, it says so.
    if let Err(error) = child.write(input) {
        log::debug!("a test did not take its configuration: {error}");
    }
    let (status, how) = process.wait(limit, stop)?;
    let time = started.elapsed();
    let (output, not_kept) = received(&output);
    let (said, _) = received(&errors);
    let said = said.text();
    let (end, why) = read_end(status, how, &said);
    Ok(Ended {
        end,
        why,
        time,
        output: output.text(),
        moves: moves(&said),
        stopped: how == How::Stopped,
        not_kept,
    })
}

/// Reads a stream on a thread of its own.
fn collect(
    stream: impl Read + Send + 'static,
    log: &Arc<Mutex<Log>>,
) -> io::Result<Receiver<(Tail, io::Result<()>)>> {
    let (sender, receiver) = channel();
    let log = log.clone();
    let thread = std::thread::Builder::new().name("output".into()).stack_size(128 << 10);
    // Fails if it took too long, and nobody waits any more.
    thread.spawn(move || drop(sender.send(drain(stream, &log))))?;
    Ok(receiver)
}

fn received(stream: &Receiver<(Tail, io::Result<()>)>) -> (Tail, Option<io::Error>) {
    match stream.recv_timeout(OUTPUT_PATIENCE) {
        Ok((tail, kept)) => (tail, kept.err()),
        Err(_) => (Tail::default(), Some(io::Error::other("its output goes on after its end"))),
    }
}

/// Why a process was waited for no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// It ended.
    ByItself,
    /// It was killed: it took too long.
    Late,
    /// All are to end.
    Stopped,
}

/// A child process. Killed when dropped.
struct Process {
    child: Child,
    pidfd: OwnedFd,
}

impl Process {
    fn start(command: &mut Command) -> io::Result<Self> {
        let mut child = command.spawn()?;
        // Not reaped yet, so the id is still its own.
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        match pidfd {
            Ok(pidfd) => Ok(Self { child, pidfd }),
            Err(error) => {
                // Nobody else would end it, or wait for it.
                child.kill().and_then(|()| child.wait())?;
                Err(error.into())
            }
        }
    }

    /// Waits for its end until `limit`, or until `stop` is set; then ends it.
    fn wait(&mut self, limit: Option<Instant>, stop: &AtomicBool) -> io::Result<(ExitStatus, How)> {
        loop {
            if stop.load(Ordering::Relaxed) {
                // Fails if it has just ended.
                let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
                if !self.has_ended_within(STOP_PATIENCE)? {
                    self.child.kill()?;
                }
                return Ok((self.child.wait()?, How::Stopped));
            }
            let left = limit.map(|limit| limit.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                self.child.kill()?;
                return Ok((self.child.wait()?, How::Late));
            }
            let patience = left.unwrap_or(STOP_INTERVAL).min(STOP_INTERVAL);
            if self.has_ended_within(patience)? {
                return Ok((self.child.wait()?, How::ByItself));
            }
        }
    }

    fn has_ended_within(&self, patience: Duration) -> io::Result<bool> {
        let mut fds = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        let timeout = Timespec {
            // At most seconds.
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            // A signal: the caller looks whether all are to end.
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            // It may have ended meanwhile; there is nobody to tell.
            let _ = self.child.kill().and_then(|()| self.child.wait());
        }
    }
}

/// The end of a process, and in words; `said` are its errors.
fn read_end(status: ExitStatus, how: How, said: &str) -> (End, String) {
    let last = said.lines().rev().find_map(Exit::parse);
    match (how, status.code().and_then(|code| u8::try_from(code).ok())) {
        (How::Late, _) => (End::Lost, "its process did not end, and was killed".to_owned()),
        (_, Some(code)) => {
            let why = match last.filter(|last| last.code == code) {
                Some(Exit { why, .. }) => why,
                // Its last words are not there: how did it come to that?
                None => last_line(said).to_owned(),
            };
            (End::Code(code), format!("exit {code}: {why}"))
        }
        (_, None) => {
            let signal = status.signal().unwrap_or_default();
            let last = last_line(said);
            (End::Lost, format!("its process was killed by signal {signal}: {last}"))
        }
    }
}

fn last_line(said: &str) -> &str {
    said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing")
}

/// How often a guest was moved, from what its shuttle says at the end.
fn moves(said: &str) -> u64 {
    let prefix = format!("ferry: {MOVED} ");
    let count = said
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix(&prefix)?.split_once(" times")?.0.parse().ok());
    // None: it was not to be moved, or ended in another way.
    count.unwrap_or(0)
}

/// Whether a test was ended by the user rather than by itself.
pub(super) fn was_interrupted(ended: &Ended) -> bool {
    ended.stopped || ended.end == End::Code(exit_code::SIGNAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::null());
        Process::start(&mut command).unwrap()
    }

    #[test]
    fn a_process_that_does_not_end_is_killed_and_one_that_is_stopped_is_asked_first() {
        let never = AtomicBool::new(false);
        let limit = Some(Instant::now() + Duration::from_millis(50));
        let (status, how) = shell("exec sleep 1000").wait(limit, &never).unwrap();
        assert_eq!((status.signal(), how), (Some(9), How::Late));
        let (status, how) = shell("exit 7").wait(None, &never).unwrap();
        assert_eq!((status.code(), how), (Some(7), How::ByItself));
        let now = AtomicBool::new(true);
        let (status, how) = shell("exec sleep 1000").wait(None, &now).unwrap();
        assert_eq!((status.signal(), how), (Some(15), How::Stopped));
    }

    #[test]
    fn ends_are_told_by_the_last_line() {
        let code = |code: i32| ExitStatus::from_raw(code << 8);
        let said =
            "ferry: moved 12 times, worst downtime 3.00 ms\nferry: exit 3: the guest wrote 1\n";
        let (end, why) = read_end(code(3), How::ByItself, said);
        assert_eq!((end, why.as_str()), (End::Code(3), "exit 3: the guest wrote 1"));
        assert_eq!(moves(said), 12);
        let (end, why) = read_end(code(2), How::ByItself, "ferry: no\n");
        assert_eq!((end, why.as_str()), (End::Code(2), "exit 2: ferry: no"));
        let (end, why) = read_end(ExitStatus::from_raw(9), How::ByItself, "");
        assert!(end == End::Lost && why.contains("signal 9"), "{why}");
        assert_eq!(read_end(ExitStatus::from_raw(9), How::Late, said).0, End::Lost);
        assert_eq!(moves("nothing"), 0);
    }
}
