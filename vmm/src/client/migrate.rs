//! `ferry migrate`: starts a migration over a control socket and shows its progress.

use super::{ClientError, QmpClient, number};
use crate::cli::MigrateArgs;
use crate::control::message::MIGRATION_IN_PROGRESS;
use crate::disk_selection::DiskMode;
use crate::error::chain;
use crate::exit_code;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use migration::bytes::random;
use serde_json::{Value, json};
use signal_hook::consts::SIGINT;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const MOVED: u8 = exit_code::OK;
const FAILED: u8 = exit_code::COMMAND_FAILED;
const UNKNOWN: u8 = exit_code::UNKNOWN;
const INCOMPLETE: u8 = exit_code::INCOMPLETE;
/// The guest runs at the destination, and what could wait is on its way.
const POSTCOPY: &str = "postcopy-active";
/// How often progress is shown.
const INTERVAL: Duration = Duration::from_millis(100);
/// Steps that follow each other faster are shown as one: a query costs the VMM time.
const STEP: Duration = Duration::from_millis(20);

/// Moves the guest; returns the exit code.
pub fn run(args: &MigrateArgs) -> u8 {
    let cancelled = Arc::new(AtomicBool::new(false));
    if let Err(error) = signal_hook::flag::register(SIGINT, cancelled.clone()) {
        eprintln!("ferry: Ctrl-C will not cancel: {error}");
    }
    let mut client = match QmpClient::connect(&args.socket) {
        Ok(client) => client,
        Err(error) => {
            eprintln!("ferry: {}", chain(&error));
            return FAILED;
        }
    };
    let id = match start(&mut client, args) {
        Ok(id) => id,
        Err(error) => {
            eprintln!("ferry: {}", chain(&error));
            return match error {
                ClientError::Refused(desc) if desc.starts_with(MIGRATION_IN_PROGRESS) => {
                    exit_code::BUSY
                }
                // The request was sent: the guest may move without this client.
                ClientError::Lost(_) | ClientError::Timeout => UNKNOWN,
                _ => FAILED,
            };
        }
    };
    let end = follow(&mut client, &id, args.json, &cancelled);
    let end = end.or_else(|error| match guest_had_ended(&mut client) {
        true => Ok(End::GuestEnded),
        false => Err(error),
    });
    let code = report(&mut client, &end, args.json);
    if matches!(code, MOVED | INCOMPLETE) && !args.keep_source {
        // It would end by itself once this client has gone, but then nobody would wait for that. It may be
        // gone before its reply is read.
        match client.execute("quit", json!({})) {
            Ok(_) | Err(ClientError::Lost(_)) => {}
            Err(error) => eprintln!("ferry: the source does not quit: {}", chain(&error)),
        }
    }
    code
}

/// Starts the migration; returns the id by which it is followed.
fn start(client: &mut QmpClient, args: &MigrateArgs) -> Result<String, ClientError> {
    let mut parameters = json!({});
    if let Some(limit) = args.downtime_limit {
        // Saturates: the source refuses far smaller limits.
        parameters["downtime-limit"] = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).into();
    }
    if let Some(rate) = args.max_bandwidth {
        parameters["max-bandwidth"] = rate.into();
    }
    if let Some(channels) = args.channels {
        parameters["multifd-channels"] = channels.into();
    }
    if let Some(bytes) = args.xbzrle_cache_size {
        parameters["xbzrle-cache-size"] = bytes.into();
    }
    if let Some((method, level)) = args.compress {
        parameters["multifd-compression"] = method.name().into();
        if let Some(level) = level {
            parameters[format!("multifd-{}-level", method.name())] = level.into();
        }
    }
    let wanted = [
        ("auto-converge", args.auto_converge),
        ("xbzrle", args.xbzrle),
        ("dirty-bitmaps", args.dirty_bitmaps.0),
    ];
    let on = wanted.iter().filter(|(_, wanted)| *wanted);
    let on: Vec<_> = on.map(|(name, _)| json!({"capability": name, "state": true})).collect();
    let no_id = |error| ClientError::Refused(format!("no random number for an id: {error}"));
    let id = random::<8>().map_err(no_id)?;
    let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut migrate = json!({
        "uri": args.address.to_string(),
        "x-id": id,
        "x-parameters": parameters,
        "x-capabilities": on,
        "x-end-source": !args.keep_source,
    });
    if let Some(selection) = &args.disks {
        match selection.others {
            // Whatever the capability `block` says.
            DiskMode::None if selection.named.is_empty() => migrate["x-disks"] = "none".into(),
            DiskMode::None => {}
            DiskMode::Top => migrate["inc"] = true.into(),
            DiskMode::Full => migrate["blk"] = true.into(),
        }
        for (id, mode) in &selection.named {
            migrate["x-disks"][id] = mode.name().into();
        }
    }
    for (name, number) in [("x-disk-reads", args.disk_reads), ("x-disk-buffers", args.disk_buffers)]
    {
        if let Some(number) = number {
            migrate[name] = number.into();
        }
    }
    client.execute("migrate", migrate)?;
    Ok(id)
}

/// How a migration has ended.
enum End {
    /// So the source says.
    Said(Value),
    /// The guest ended by itself at the source, so that none moves.
    GuestEnded,
}

/// Follows migration `id` until it has ended; an error means that the control socket was lost.
fn follow(
    client: &mut QmpClient,
    id: &str,
    json_lines: bool,
    cancelled: &AtomicBool,
) -> Result<End, ClientError> {
    let bar = (!json_lines && std::io::stderr().is_terminal()).then(progress_bar);
    let mut last_line = Value::Null;
    // What was said to be at fault: each once.
    let mut warned: Vec<Value> = Vec::new();
    let mut warned_of_loss = false;
    loop {
        let asked = Instant::now();
        let info = client.execute("query-migrate", json!({"x-id": id}))?;
        let status = info["status"].as_str().unwrap_or("none");
        if cancelled.swap(false, Ordering::SeqCst)
            && interrupt(client, status, &mut warned_of_loss)?
        {
            let warning = "ferry: the guest has moved, which cannot be cancelled any more; press Ctrl-C \
                           again to give up what has not arrived yet";
            match &bar {
                Some(bar) => bar.suspend(|| eprintln!("{warning}")),
                None => eprintln!("{warning}"),
            }
        }
        if matches!(status, "completed" | "failed" | "cancelled") {
            if let Some(bar) = &bar {
                bar.finish_and_clear();
            }
            return Ok(End::Said(info));
        }
        if let Some(facts) = info.get("x-not-converging")
            && !warned.contains(&facts["part"]["name"])
        {
            warned.push(facts["part"]["name"].clone());
            let warning = not_converging(client, facts)?;
            match &bar {
                Some(bar) => bar.suspend(|| eprintln!("{warning}")),
                None => eprintln!("{warning}"),
            }
        }
        if let Some(bar) = &bar {
            show(bar, &info);
        } else if json_lines {
            let disk = &info["disk"]["dirty-sync-count"];
            let line =
                json!([info["status"], info["ram"]["dirty-sync-count"], !warned.is_empty(), disk]);
            if line != last_line {
                println!("{}", without_rounds(info));
                last_line = line;
            }
        }
        if wait_for_step(client, id, asked, cancelled)? == Step::GuestEnded {
            return Ok(End::GuestEnded);
        }
    }
}

/// Ctrl-C: cancels the migration or, asked twice once the guest has moved, gives up what is left. Returns whether to
/// say that a second is needed.
fn interrupt(client: &mut QmpClient, status: &str, warned: &mut bool) -> Result<bool, ClientError> {
    if status != POSTCOPY {
        return match client.execute("migrate_cancel", json!({})) {
            // The guest has just moved.
            Err(ClientError::Refused(_)) => Ok(!std::mem::replace(warned, true)),
            result => result.map(|_| false),
        };
    }
    if !std::mem::replace(warned, true) {
        return Ok(true);
    }
    client.execute("x-migrate-give-up", json!({})).map(|_| false)
}

/// What may be new.
#[derive(PartialEq)]
enum Step {
    /// Something about the migration, or nothing.
    Migration,
    /// The guest has ended.
    GuestEnded,
}

/// Whether an event says that the guest has ended by itself.
fn is_guests_end(event: &Value) -> bool {
    event["event"] == "SHUTDOWN" && event["data"]["guest"] == true
}

/// Whether the last events on a socket that was lost say that the guest has ended.
fn guest_had_ended(client: &mut QmpClient) -> bool {
    while let Ok(Some(event)) = client.event(Some(INTERVAL)) {
        if is_guests_end(&event) {
            return true;
        }
    }
    false
}

/// Waits until there may be something new about migration `id`, of which was asked at `asked`.
fn wait_for_step(
    client: &mut QmpClient,
    id: &str,
    asked: Instant,
    cancelled: &AtomicBool,
) -> Result<Step, ClientError> {
    let mut until = asked + INTERVAL;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        // Zero would mean for ever.
        if left.is_zero() || cancelled.load(Ordering::SeqCst) {
            return Ok(Step::Migration);
        }
        let Some(event) = client.event(Some(left))? else { return Ok(Step::Migration) };
        if is_guests_end(&event) {
            return Ok(Step::GuestEnded);
        }
        if event["event"] == "x-migration" && event["data"]["x-id"] == id {
            if event["data"]["ended"] == true {
                return Ok(Step::Migration);
            }
            until = until.min(asked + STEP);
        }
    }
}

/// One step without the rounds, which only the summary has.
fn without_rounds(mut info: Value) -> Value {
    if let Some(info) = info.as_object_mut() {
        info.remove("x-rounds");
    }
    info
}

/// Why the migration does not converge, and which options would help.
fn not_converging(client: &mut QmpClient, facts: &Value) -> Result<String, ClientError> {
    if let Some(sentence) = part_at_fault(facts) {
        return Ok(sentence);
    }
    let parameters = client.execute("query-migrate-parameters", json!({}))?;
    let capabilities = client.execute("query-migrate-capabilities", json!({}))?;
    let is_off = |name: &str| {
        let mut entries = capabilities.as_array().into_iter().flatten();
        entries.any(|entry| entry["capability"] == name && entry["state"] == false)
    };
    let mut help = Vec::new();
    if is_off("auto-converge") {
        help.push("--auto-converge, which slows the guest down".to_owned());
    }
    if is_off("xbzrle") {
        help.push("--xbzrle, if it writes little of each page".to_owned());
    }
    let cap = number(&parameters["max-bandwidth"]);
    if cap > 0 {
        help.push(format!("a --max-bandwidth above the current {}/s", HumanBytes(cap)));
    }
    let expected = number(&facts["expected-downtime"]);
    help.push(format!("a --downtime-limit of {} ms or more", expected + expected / 10));
    Ok(format!(
        "ferry: the migration does not converge: the guest writes {}/s, {}/s are sent; the expected \
         downtime is {expected} ms, above the limit of {} ms. What would help: {}",
        HumanBytes(number(&facts["dirty-bytes-per-second"])),
        HumanBytes(number(&facts["bytes-per-second"])),
        number(&facts["downtime-limit"]),
        help.join("; or ")
    ))
}

/// The same, if one part of the pause is too long however little there is to send.
fn part_at_fault(facts: &Value) -> Option<String> {
    let (part, desc) = (facts.get("part")?, facts["desc"].as_str()?);
    let whole_ms = facts["expected-downtime"].as_u64();
    let part_ms = part["time-us"].as_u64().filter(|_| part["ended"] == true).map(|us| us / 1000);
    let needed_ms = whole_ms.zip(part_ms).map(|(whole, part)| whole.max(part));
    let at_least = needed_ms.map(|ms| format!(" of {} ms or more", ms + ms / 10));
    Some(format!(
        "ferry: the migration does not converge: {desc}: raise it with a --downtime-limit{}",
        at_least.unwrap_or_default()
    ))
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(1);
    let style = ProgressStyle::with_template("{bar:30} {percent:>3}% {msg}");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn show(bar: &ProgressBar, info: &Value) {
    if info["status"] == POSTCOPY {
        let (total, left) =
            (number(&info["x-postcopy"]["total"]), number(&info["x-postcopy"]["remaining"]));
        bar.set_length(total.max(1));
        bar.set_position(total.saturating_sub(left));
        let downtime = number(&info["x-downtime-us"]) as f64 / 1000.0;
        return bar.set_message(format!(
            "the guest has moved (downtime {downtime:.2} ms); what could wait: {} of {} left",
            HumanBytes(left),
            HumanBytes(total),
        ));
    }
    let (ram, disk) = (&info["ram"], &info["disk"]);
    let both = |key: &str| number(&ram[key]) + number(&disk[key]);
    let (total, remaining) = (both("total"), both("remaining"));
    bar.set_length(total.max(1));
    bar.set_position(total.saturating_sub(remaining));
    let expected = info["expected-downtime"].as_u64().map_or("?".into(), |ms| ms.to_string());
    let throttle = info["cpu-throttle-percentage"].as_u64();
    let throttle = throttle.map_or_else(String::new, |by| format!(" · guest throttled by {by} %"));
    bar.set_message(format!(
        "round {} · sent {} · remaining {} · {:.1} Gb/s · dirty {}/s · expected downtime {expected} ms{throttle}",
        number(&ram["dirty-sync-count"]),
        HumanBytes(both("transferred")),
        HumanBytes(remaining),
        ram["mbps"].as_f64().unwrap_or(0.0) / 1000.0,
        HumanBytes(number(&ram["dirty-pages-rate"]) * 4096),
    ) + &disk_percents(disk));
}

/// Progress of each disk.
fn disk_percents(disk: &Value) -> String {
    let one = |disk: &Value| {
        format!(" · {} {}%", disk["device"].as_str().unwrap_or("?"), disk["percent"])
    };
    disk["x-disks"].as_array().into_iter().flatten().map(one).collect()
}

fn report(client: &mut QmpClient, end: &Result<End, ClientError>, json_lines: bool) -> u8 {
    let info = match end {
        Ok(End::Said(info)) => info,
        Ok(End::GuestEnded) => {
            eprintln!("ferry: migration failed: the guest has ended at the source, which says how");
            return FAILED;
        }
        Err(error) => {
            eprintln!(
                "ferry: {} before the migration ended: look at both sides before you run the guest",
                chain(error)
            );
            return UNKNOWN;
        }
    };
    if json_lines {
        println!("{info}");
    }
    let error = info["error-desc"].as_str().unwrap_or("no reason given");
    match info["status"].as_str() {
        Some("completed") => {
            if !json_lines {
                println!("{}", summary(info));
                chains(info).for_each(|line| println!("{line}"));
            }
            let Some(missing) = info["x-incomplete"].as_str() else { return MOVED };
            eprintln!(
                "ferry: the guest runs at the destination; not everything has arrived: {missing}"
            );
            INCOMPLETE
        }
        Some("cancelled") => {
            eprintln!("ferry: cancelled; {}", what_holds(client));
            FAILED
        }
        _ if info["x-outcome"] == "unknown" => {
            eprintln!("ferry: outcome unknown: {error}");
            eprintln!(
                "ferry: if it does not run there, resume it here: ferry ctl SOCKET cont --force"
            );
            UNKNOWN
        }
        _ => {
            eprintln!("ferry: migration failed: {error}");
            eprintln!("ferry: {}", what_holds(client));
            FAILED
        }
    }
}

/// State of the guest after a failed migration.
fn what_holds(client: &mut QmpClient) -> String {
    match client.execute("query-status", json!({})) {
        Ok(status) if status["status"] == "running" => "the guest runs on at the source".to_owned(),
        Ok(status) => {
            let state = status["status"].as_str().unwrap_or("in an unknown state");
            format!("the guest is at the source and does not run: it is {state}")
        }
        Err(error) => format!("the state of the guest is unknown: {}", chain(&error)),
    }
}

/// For each disk that was read through backing files, which those were.
fn chains(info: &Value) -> impl Iterator<Item = String> {
    let disks = info["disk"]["x-disks"].as_array().into_iter().flatten();
    disks.filter_map(|disk| {
        let files: Vec<_> = disk["files"].as_array()?.iter().filter_map(Value::as_str).collect();
        let (image, below) = files.split_first().filter(|(_, below)| !below.is_empty())?;
        let name = disk["device"].as_str()?;
        Some(format!("disk {name}: all of {image} and of its backing files: {}", below.join(", ")))
    })
}

/// The summary for people, one line.
fn summary(info: &Value) -> String {
    let (ram, total_ms) = (&info["ram"], number(&info["total-time"]));
    let sent = number(&ram["transferred"]) + number(&info["disk"]["transferred"]);
    format!(
        "migrated in {total_ms} ms, downtime {:.2} ms, {} sent in {} rounds ({:.2} GB/s)",
        number(&info["x-downtime-us"]) as f64 / 1000.0,
        HumanBytes(sent),
        number(&ram["dirty-sync-count"]),
        sent as f64 / 1e6 / total_ms.max(1) as f64,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_takes_too_long_is_named_with_what_would_help() {
        let mut facts = json!({
            "desc": "draining disk `root` takes 30 ms, the downtime limit is 20 ms",
            "part": {"name": "draining disk `root`", "time-us": 30_000, "ended": true},
            "expected-downtime": 34,
        });
        assert_eq!(
            part_at_fault(&facts).unwrap(),
            "ferry: the migration does not converge: draining disk `root` takes 30 ms, the downtime limit is 20 ms: raise it \
             with a --downtime-limit of 37 ms or more"
        );
        facts["part"]["ended"] = false.into();
        assert!(part_at_fault(&facts).unwrap().ends_with("with a --downtime-limit"));
        assert_eq!(part_at_fault(&json!({"desc": "the guest dirties"})), None);
    }
}
