//! `ferry backup`: saves the disks of a running guest in a folder, whole the first time and afterwards what has changed.
//!
//! ```text
//! manifest ─▶ plan: full or incremental, per disk ─▶ one transaction: a new bitmap and a backup job for each disk
//!        ─▶ wait ─▶ SHA-256 ─▶ the new manifest replaces the old one ─▶ the old bitmaps go
//! ```
//! A bitmap records what is written since one backup, and has that backup's number in its name. The manifest says
//! which bitmap its last file needs. So whatever is killed, and when: either the manifest and its bitmap are there and
//! belong together, or the next backup is a full one.

mod digest;
mod follow;
mod manifest;
mod plan;
mod restore;
mod verify;

use super::{ClientError, QmpClient};
use crate::cli::BackupArgs;
use crate::error::chain;
use crate::exit_code;
use devices::block::raw::OpenError;
use digest::sha256;
use follow::follow;
use indicatif::HumanBytes;
use manifest::{Folder, Kind, Manifest, ManifestError, Saved};
use plan::Plan;
use serde_json::{Value, json};
use signal_hook::consts::SIGINT;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{SystemTime, UNIX_EPOCH};

/// Why there is no backup, or none that can be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("the guest has no writable disk")]
    NoDisks,
    #[error("the guest has no writable disk {0:?}")]
    UnknownDisk(String),
    #[error("{path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("disk {disk}: {why}")]
    Job { disk: String, why: String },
    #[error("cancelled; the earlier backups are as they were")]
    Cancelled,
    #[error(transparent)]
    Image(#[from] OpenError),
    #[error("cannot lock an image")]
    Lock(#[from] devices::block::backend::LockError),
    #[error("{0}")]
    Unusable(String),
}

/// Executes the command; returns the exit code.
pub fn run(args: &BackupArgs) -> u8 {
    let words: Vec<&str> = args.words.iter().map(String::as_str).collect();
    let done = match (&args.verify, &args.restore, words.as_slice()) {
        (Some(folder), None, []) => verify::run(folder),
        (None, Some(folder), images) if !images.is_empty() => {
            restore::run(folder, images, args.overwrite)
        }
        (None, None, [socket, folder]) => save(args, socket, Path::new(folder)),
        _ => {
            eprintln!(
                "ferry: expected SOCKET DIR, --verify DIR, or --restore DIR DISK=IMAGE[,format=qcow2]…"
            );
            return exit_code::USAGE;
        }
    };
    match done {
        Ok(()) => exit_code::OK,
        Err(error) => {
            eprintln!("ferry: {}", chain(&error));
            exit_code::COMMAND_FAILED
        }
    }
}

/// Makes one backup.
fn save(args: &BackupArgs, socket: &str, folder: &Path) -> Result<(), Error> {
    let cancelled = Arc::new(AtomicBool::new(false));
    if let Err(error) = signal_hook::flag::register(SIGINT, cancelled.clone()) {
        eprintln!("ferry: Ctrl-C will not cancel: {error}");
    }
    let mut client = QmpClient::connect(socket)?;
    let folder = Folder::open_to_write(folder)?;
    let mut manifest = folder.read_or_begin()?;
    end_earlier_jobs(&mut client, &manifest)?;
    let mut plans = plan::plan(&mut client, &folder, &manifest, args)?;
    remove_bitmaps(&mut client, &plans, |plan, name| plan.is_stray(name));
    let begun = begin(&mut client, args, &folder, &mut plans);
    let saved = begun.and_then(|()| follow(&mut client, &plans, &cancelled)).and_then(|()| {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        record(&folder, &mut manifest, &plans, time)
    });
    match saved {
        Ok(()) => {
            remove_bitmaps(&mut client, &plans, |plan, name| name != plan.bitmap);
            plans.iter().for_each(|plan| println!("{}", summary(plan, &manifest)));
            Ok(())
        }
        Err(error) => {
            // As if nothing had been begun. What cannot be removed now is removed by the next backup.
            let _ = end_earlier_jobs(&mut client, &manifest);
            remove_bitmaps(&mut client, &plans, |plan, name| name == plan.bitmap);
            for plan in &plans {
                let _ = std::fs::remove_file(folder.path(&plan.file));
            }
            Err(error)
        }
    }
}

/// Ends what a killed `ferry backup` to the same folder has left in the VMM.
fn end_earlier_jobs(client: &mut QmpClient, manifest: &Manifest) -> Result<(), Error> {
    let is_ours = |id: &&str| id.starts_with(&manifest.job_prefix());
    loop {
        let jobs = client.execute("query-jobs", json!({}))?;
        let jobs = jobs.as_array().cloned().unwrap_or_default();
        let ours: Vec<_> =
            jobs.iter().filter(|job| job["id"].as_str().as_ref().is_some_and(is_ours)).collect();
        if ours.is_empty() {
            return Ok(());
        }
        for job in ours {
            let verb = if job["status"] == "concluded" { "job-dismiss" } else { "job-cancel" };
            // It may have ended by itself meanwhile.
            match client.execute(verb, json!({"id": job["id"]})) {
                Ok(_) | Err(ClientError::Refused(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        client.event(Some(follow::INTERVAL))?;
    }
}

/// Removes those of a disk's bitmaps that are ours and `unwanted`. Whatever stays costs memory only.
fn remove_bitmaps(client: &mut QmpClient, plans: &[Plan], unwanted: impl Fn(&Plan, &str) -> bool) {
    let Ok(nodes) = client.execute("query-named-block-nodes", json!({})) else { return };
    for plan in plans {
        let node = nodes.as_array().into_iter().flatten();
        let mut node = node.filter(|node| node["node-name"] == plan.disk.as_str());
        let bitmaps = node.next().map(|node| node["dirty-bitmaps"].clone()).unwrap_or_default();
        for bitmap in bitmaps.as_array().into_iter().flatten() {
            let name = bitmap["name"].as_str().unwrap_or_default();
            if !name.starts_with(&plan.bitmap_prefix) || !unwanted(plan, name) {
                continue;
            }
            let arguments = json!({"node": plan.disk, "name": name});
            if let Err(error) = client.execute("block-dirty-bitmap-remove", arguments) {
                eprintln!("ferry: disk {}: bitmap {name} stays: {}", plan.disk, chain(&error));
            }
        }
    }
}

/// Starts all backups at one moment.
fn begin(
    client: &mut QmpClient,
    args: &BackupArgs,
    folder: &Folder,
    plans: &mut [Plan],
) -> Result<(), Error> {
    for plan in plans.iter() {
        plan.say_why();
        plan.create(folder)?;
    }
    loop {
        let actions: Vec<Value> =
            plans.iter().flat_map(|plan| plan.actions(folder, args.max_bandwidth)).collect();
        let refused = match client.execute("transaction", json!({"actions": actions})) {
            Ok(_) => return Ok(()),
            Err(ClientError::Refused(why)) => why,
            Err(error) => return Err(error.into()),
        };
        // Some disk has no place for bitmaps: they last as long as the process, then.
        let is_reason = |plan: &&mut Plan| {
            plan.persistent
                && refused.starts_with("Can't make bitmap")
                && refused.contains(&format!("persistent in '{}'", plan.disk))
        };
        let Some(plan) = plans.iter_mut().find(is_reason) else {
            return Err(ClientError::Refused(refused).into());
        };
        eprintln!(
            "ferry: disk {}: {refused}; the next backup is a full one if the guest's process ends before it",
            plan.disk
        );
        plan.persistent = false;
    }
}

/// Writes the manifest with the new files.
fn record(
    folder: &Folder,
    manifest: &mut Manifest,
    plans: &[Plan],
    time: u64,
) -> Result<(), Error> {
    let mut next = manifest.clone();
    next.runs += 1;
    for plan in plans {
        let path = folder.path(&plan.file);
        let (bytes, sha256) =
            sha256(&path).map_err(|source| Error::File { path: path.clone(), source })?;
        let kind = if plan.backing.is_some() { Kind::Incremental } else { Kind::Full };
        let (file, backing) = (plan.file.clone(), plan.backing.clone());
        let saved = Saved { file, kind, backing, bytes, sha256, time };
        let disk = next.disks.entry(plan.disk.clone()).or_default();
        (disk.size, disk.bitmap) = (plan.size, plan.bitmap.clone());
        disk.files.push(saved);
    }
    folder.write(&next)?;
    *manifest = next;
    Ok(())
}

fn summary(plan: &Plan, manifest: &Manifest) -> String {
    let saved = manifest.disks.get(&plan.disk).and_then(|disk| disk.files.last());
    let (kind, bytes) = saved.map_or(("", 0), |saved| (saved.kind.name(), saved.bytes));
    format!("{}: {kind} backup in {}, {}", plan.disk, plan.file, HumanBytes(bytes))
}
