//! Waits for backup jobs, and shows how far they are.

use super::Error;
use super::plan::Plan;
use crate::client::QmpClient;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often jobs are looked at, unless something happens.
pub const INTERVAL: Duration = Duration::from_millis(100);

/// Waits until all jobs have ended well, and dismisses them.
///
/// # Errors
/// If one has failed or was cancelled, or all are to be. The others may go on then.
pub fn follow(client: &mut QmpClient, plans: &[Plan], cancelled: &AtomicBool) -> Result<(), Error> {
    let bar = std::io::stderr().is_terminal().then(progress_bar);
    let began = Instant::now();
    loop {
        if cancelled.load(Ordering::SeqCst) {
            return Err(Error::Cancelled);
        }
        let jobs = client.execute("query-block-jobs", json!({}))?;
        let shown = plans.iter().map(|plan| find(&jobs, plan)).collect::<Result<Vec<_>, _>>()?;
        if shown.iter().all(|job| job["status"] == "concluded") {
            break;
        }
        if let Some(bar) = &bar {
            show(bar, &shown, began);
        }
        client.event(Some(INTERVAL))?;
    }
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    for plan in plans {
        client.execute("job-dismiss", json!({"id": plan.job}))?;
    }
    Ok(())
}

/// The job of a plan, unless it has failed.
fn find<'a>(jobs: &'a Value, plan: &Plan) -> Result<&'a Value, Error> {
    let failed = |why: &str| Error::Job { disk: plan.disk.clone(), why: why.to_owned() };
    let mut all = jobs.as_array().into_iter().flatten();
    let job = all.find(|job| job["device"] == plan.job.as_str());
    let job = job.ok_or_else(|| failed("its job has been dismissed by somebody else"))?;
    if let Some(why) = job["error"].as_str() {
        return Err(failed(why));
    }
    if job["status"] == "concluded" && job["offset"] != job["len"] || job["status"] == "aborting" {
        return Err(failed("its job was cancelled by somebody else"));
    }
    Ok(job)
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(1);
    let style = ProgressStyle::with_template("{bar:30} {percent:>3}% {msg}");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn show(bar: &ProgressBar, jobs: &[&Value], began: Instant) {
    let sum = |name: &str| jobs.iter().filter_map(|job| job[name].as_u64()).sum::<u64>();
    let (done, all) = (sum("offset"), sum("len"));
    bar.set_length(all.max(1));
    bar.set_position(done);
    let rate = done as f64 / 1e6 / began.elapsed().as_secs_f64().max(0.001);
    let left = HumanBytes(all.saturating_sub(done));
    bar.set_message(format!("saved {} · {left} left · {rate:.0} MB/s", HumanBytes(done)));
}
