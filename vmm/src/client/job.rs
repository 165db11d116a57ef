//! `ferry ctl SOCKET mirror …` and `job …`: block jobs, for people. Translates words into QMP for `ctl`, shows what
//! comes back, and follows a job until its copy is in sync or it has ended.

use super::request::{Follow, Request};
use super::{ClientError, QmpClient, number};
use crate::config::parse_size;
use crate::error::chain;
use crate::exit_code;
use clap::{Parser, ValueEnum};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use signal_hook::consts::SIGINT;
use std::collections::VecDeque;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often progress is shown.
const INTERVAL: Duration = Duration::from_millis(200);
/// The rate is that of the last few seconds.
const RATE_OVER: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Sync {
    /// Everything
    Full,
    /// What the image holds itself, not its backing files
    Top,
    /// Only what is written from now on
    None,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
}

/// Copy a disk elsewhere while the guest writes to it
#[derive(Debug, Parser)]
#[command(name = "mirror", bin_name = "ferry ctl SOCKET mirror")]
struct Mirror {
    /// The disk
    disk: String,
    /// An image to create, or an NBD server: nbd://HOST/EXPORT or nbd:unix:PATH:exportname=NAME
    target: String,
    /// Format of the image [default: that of the disk]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// What is copied at first
    #[arg(long, value_enum, default_value = "full")]
    sync: Sync,
    /// The target is there already, and as large as the disk
    #[arg(long)]
    existing: bool,
    /// Writes of the guest wait for the copy
    #[arg(long)]
    write_blocking: bool,
    /// Most bytes per second until the copy is in sync
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| parse_size(text, 1))]
    speed: Option<u64>,
    /// The job's id [default: the disk]
    #[arg(long, value_name = "ID")]
    job_id: Option<String>,
    /// Show progress until the copy is in sync
    #[arg(long)]
    wait: bool,
    /// Switch the disk over to the copy when it is in sync; shows progress as well
    #[arg(long)]
    complete: bool,
}

/// Block jobs
#[derive(Debug, Parser)]
#[command(name = "job", bin_name = "ferry ctl SOCKET job")]
enum Job {
    /// Show all jobs
    List,
    /// Show a job's progress until its copy is in sync, or it has ended
    Wait { id: String },
    /// Switch the disk over to its copy, which must be in sync
    Complete { id: String },
    /// End a job: a copy in sync stays as a copy of this moment
    Cancel {
        id: String,
        /// At once, without a consistent copy
        #[arg(long)]
        force: bool,
    },
    /// Have a job rest
    Pause { id: String },
    /// Have a job go on, also one that an error has paused
    Resume { id: String },
    /// Change a job's speed limit: bytes per second, 0 for none
    Speed {
        id: String,
        #[arg(value_parser = |text: &str| parse_size(text, 1))]
        speed: u64,
    },
}

fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// The request that `words`, the first of which is `mirror`, stand for.
pub fn mirror(words: &[&str]) -> Result<Request, clap::Error> {
    let mirror = Mirror::try_parse_from(words)?;
    let mut arguments = json!({
        "device": mirror.disk,
        "target": absolute(&mirror.target),
        "sync": word(mirror.sync),
        "mode": if mirror.existing { "existing" } else { "absolute-paths" },
        "copy-mode": if mirror.write_blocking { "write-blocking" } else { "background" },
    });
    if let Some(format) = mirror.format {
        arguments["format"] = word(format).into();
    }
    if let Some(speed) = mirror.speed {
        arguments["speed"] = speed.into();
    }
    if let Some(id) = &mirror.job_id {
        arguments["job-id"] = id.as_str().into();
    }
    let follow = (mirror.wait || mirror.complete)
        .then(|| Follow { id: mirror.job_id.unwrap_or(mirror.disk), complete: mirror.complete });
    Ok(Request { follow, ..Request::new("drive-mirror", arguments) })
}

/// A path as the VMM understands it, which may have been started elsewhere.
fn absolute(target: &str) -> String {
    if target.starts_with("nbd:") || target.starts_with("nbd+") {
        return target.to_owned();
    }
    let path = std::path::absolute(target);
    path.map_or_else(|_| target.to_owned(), |path| path.display().to_string())
}

/// The request that `words`, the first of which is `job`, stand for.
pub fn job(words: &[&str]) -> Result<Request, clap::Error> {
    let of = |command: &str, id: &str| Request::new(command, json!({"device": id}));
    Ok(match Job::try_parse_from(words)? {
        Job::List => Request { show: table, ..Request::new("query-block-jobs", json!({})) },
        Job::Wait { id } => {
            let follow = Some(Follow { id, complete: false });
            Request {
                follow,
                show: |_| String::new(),
                ..Request::new("query-block-jobs", json!({}))
            }
        }
        Job::Complete { id } => of("block-job-complete", &id),
        Job::Cancel { id, force } => {
            Request::new("block-job-cancel", json!({"device": id, "force": force}))
        }
        Job::Pause { id } => of("block-job-pause", &id),
        Job::Resume { id } => of("block-job-resume", &id),
        Job::Speed { id, speed } => {
            Request::new("block-job-set-speed", json!({"device": id, "speed": speed}))
        }
    })
}

/// What `job list` prints: a line per job.
fn table(jobs: &Value) -> String {
    let line = |job: &Value| {
        let (offset, len) = (number(&job["offset"]), number(&job["len"]));
        let text = |name: &str| job[name].as_str().unwrap_or_default().to_owned();
        let status = match job["io-status"].as_str() {
            Some("ok") | None => text("status"),
            Some(trouble) => format!("{} ({trouble})", text("status")),
        };
        let percent = if len == 0 { 100 } else { u128::from(offset) * 100 / u128::from(len) };
        format!(
            "{:12}  {:8}  {:18}  {percent:>3}%  {} of {}",
            text("device"),
            text("type"),
            status,
            HumanBytes(offset),
            HumanBytes(len)
        )
    };
    let lines: Vec<_> = jobs.as_array().into_iter().flatten().map(line).collect();
    if lines.is_empty() { "no jobs".to_owned() } else { lines.join("\n") }
}

/// The rate over the last seconds, from what was done when.
#[derive(Default)]
struct Rate(VecDeque<(Instant, u64)>);

impl Rate {
    fn per_sec(&mut self, now: Instant, done: u64) -> u64 {
        self.0.push_back((now, done));
        while self.0.front().is_some_and(|(then, _)| now - *then > RATE_OVER) && self.0.len() > 2 {
            self.0.pop_front();
        }
        let Some((then, before)) = self.0.front() else { return 0 };
        let millis = (now - *then).as_millis().max(1);
        let bytes = u128::from(done.saturating_sub(*before));
        u64::try_from(bytes * 1000 / millis).unwrap_or(u64::MAX)
    }
}

/// How a job that is followed has come to an end.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Ready,
    Completed,
    Cancelled,
    Failed(String),
}

/// Follows a job until its copy is in sync, or until it has ended; returns the exit code. Ctrl-C cancels it.
pub fn follow(client: &mut QmpClient, follow: &Follow) -> u8 {
    let interrupted = Arc::new(AtomicBool::new(false));
    if let Err(error) = signal_hook::flag::register(SIGINT, interrupted.clone()) {
        eprintln!("ferry: Ctrl-C will not cancel: {error}");
    }
    let id = &follow.id;
    match watch(client, follow, &interrupted) {
        Ok(End::Ready) => {
            println!(
                "job {id}: the copy is in sync; `job complete {id}` switches over, `job cancel {id}` ends it"
            );
            exit_code::OK
        }
        Ok(End::Completed) => {
            println!("job {id}: completed");
            exit_code::OK
        }
        Ok(End::Cancelled) => {
            eprintln!("ferry: job {id} was cancelled");
            exit_code::COMMAND_FAILED
        }
        Ok(End::Failed(why)) => {
            eprintln!("ferry: job {id} has failed: {why}");
            exit_code::COMMAND_FAILED
        }
        Err(error) => {
            let error = chain(&error);
            eprintln!(
                "ferry: {error}: how job {id} ends is not known here, so do not use its copy"
            );
            exit_code::COMMAND_FAILED
        }
    }
}

fn watch(
    client: &mut QmpClient,
    follow: &Follow,
    interrupted: &AtomicBool,
) -> Result<End, ClientError> {
    let bar = std::io::stderr().is_terminal().then(|| {
        let style = ProgressStyle::with_template("{bar:30} {percent:>3}% {msg}");
        ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    });
    let (mut rate, mut completing, mut was_there) = (Rate::default(), false, false);
    loop {
        if interrupted.swap(false, Ordering::SeqCst) {
            let force = json!({"device": follow.id, "force": true});
            client.execute("block-job-cancel", force)?;
        }
        let jobs = client.execute("query-block-jobs", json!({}))?;
        let job = jobs.as_array().into_iter().flatten().find(|job| job["device"] == *follow.id);
        if let Some(job) = job {
            was_there = true;
            if let Some(bar) = &bar {
                show(bar, job, &mut rate);
            }
            if job["ready"] == true && !follow.complete {
                return Ok(End::Ready);
            }
            if job["status"] == "ready" && follow.complete && !completing {
                completing = true;
                client.execute("block-job-complete", json!({"device": follow.id}))?;
            }
        }
        let asked = Instant::now();
        while let Some(event) = client.event(Some(rest(asked)))? {
            if let Some(end) = end_of(&event, &follow.id) {
                return Ok(end);
            }
            if interrupted.load(Ordering::SeqCst) || asked.elapsed() >= INTERVAL {
                break;
            }
        }
        if job.is_none() {
            // Its end may have been told before this client came.
            let why = if was_there { "it is gone" } else { "there is no such job" };
            return Ok(End::Failed(why.to_owned()));
        }
    }
}

/// What is left of an interval. Not zero, which would mean for ever.
fn rest(since: Instant) -> Duration {
    INTERVAL.saturating_sub(since.elapsed()).max(Duration::from_millis(1))
}

fn end_of(event: &Value, id: &str) -> Option<End> {
    let data = &event["data"];
    if data["device"] != id {
        return None;
    }
    match event["event"].as_str()? {
        "BLOCK_JOB_CANCELLED" => Some(End::Cancelled),
        "BLOCK_JOB_COMPLETED" => Some(match data["error"].as_str() {
            Some(error) => End::Failed(error.to_owned()),
            None => End::Completed,
        }),
        _ => None,
    }
}

fn show(bar: &ProgressBar, job: &Value, rate: &mut Rate) {
    let (offset, len) = (number(&job["offset"]), number(&job["len"]));
    bar.set_length(len.max(1));
    bar.set_position(offset);
    let left = len.saturating_sub(offset);
    bar.set_message(format!(
        "{} · {}/s · {} left",
        job["status"].as_str().unwrap_or("?"),
        HumanBytes(rate.per_sec(Instant::now(), offset)),
        HumanBytes(left)
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<&str> {
        text.split(' ').collect()
    }

    #[test]
    fn words_become_commands() {
        let request =
            mirror(&words("mirror root /copy --format qcow2 --speed 10M --wait")).unwrap();
        assert_eq!(request.command, "drive-mirror");
        let expected = json!({
            "device": "root", "target": "/copy", "sync": "full", "mode": "absolute-paths",
            "copy-mode": "background", "format": "qcow2", "speed": 10 << 20,
        });
        assert_eq!(request.arguments, expected);
        assert_eq!(request.follow, Some(Follow { id: "root".into(), complete: false }));
        let text =
            "mirror root nbd://h/x --existing --sync top --write-blocking --job-id m --complete";
        let request = mirror(&words(text)).unwrap();
        assert_eq!(request.arguments["target"], "nbd://h/x");
        assert_eq!(request.arguments["copy-mode"], "write-blocking");
        assert_eq!(request.follow, Some(Follow { id: "m".into(), complete: true }));
        assert!(mirror(&words("mirror root")).is_err());
        assert!(mirror(&words("mirror root x --sync half")).is_err());
        for (text, command) in [
            ("job list", "query-block-jobs"),
            ("job complete m", "block-job-complete"),
            ("job cancel m --force", "block-job-cancel"),
            ("job pause m", "block-job-pause"),
            ("job resume m", "block-job-resume"),
            ("job speed m 1M", "block-job-set-speed"),
        ] {
            assert_eq!(job(&words(text)).unwrap().command, command);
        }
        assert_eq!(job(&words("job speed m 1M")).unwrap().arguments["speed"], 1 << 20);
        assert!(job(&words("job complete")).is_err());
    }

    #[test]
    fn jobs_are_listed_in_lines_and_their_ends_are_known() {
        assert_eq!(table(&json!([])), "no jobs");
        let shown = table(&json!([{
            "device": "root", "type": "mirror", "status": "paused", "io-status": "nospace",
            "offset": 512, "len": 1024,
        }]));
        assert!(shown.contains("paused (nospace)") && shown.contains("50%"), "{shown}");
        let event = |name: &str, data| json!({"event": name, "data": data});
        let ended = |event| end_of(&event, "m");
        assert_eq!(ended(event("BLOCK_JOB_COMPLETED", json!({"device": "other"}))), None);
        assert_eq!(
            ended(event("BLOCK_JOB_COMPLETED", json!({"device": "m"}))),
            Some(End::Completed)
        );
        assert_eq!(
            ended(event("BLOCK_JOB_CANCELLED", json!({"device": "m"}))),
            Some(End::Cancelled)
        );
        let failed = ended(event("BLOCK_JOB_COMPLETED", json!({"device": "m", "error": "why"})));
        assert_eq!(failed, Some(End::Failed("why".into())));
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let (mut rate, start) = (Rate::default(), Instant::now());
        rate.per_sec(start, 0);
        assert_eq!(rate.per_sec(start + Duration::from_secs(1), 1000), 1000);
        for second in 2..20 {
            rate.per_sec(start + Duration::from_secs(second), 1000);
        }
        assert_eq!(rate.per_sec(start + Duration::from_secs(20), 1000), 0);
    }
}
