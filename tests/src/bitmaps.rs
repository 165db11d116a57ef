//! Dirty bitmaps over the control socket, compared with what has changed in the image.

use crate::disk::SECTOR_BYTES;
use crate::process::SOON;
use crate::qmp::Qmp;
use devices::block::BlockNode;
use devices::block::raw::{Cache, RawFile};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The arguments that name a bitmap of disk `root`.
pub fn named(name: &str) -> Value {
    json!({"node": "root", "name": name})
}

/// Where the persistent bitmaps of an image are.
pub fn file_of(image: &Path) -> PathBuf {
    let mut path = image.as_os_str().to_owned();
    path.push(".bitmaps");
    path.into()
}

/// Opens an image that no process has, as a VMM does, works with its bitmaps and closes it.
///
/// # Panics
/// If that fails.
pub fn with_bitmaps<T>(image: &Path, work: impl FnOnce(&Arc<BlockNode>) -> T) -> T {
    let backend = RawFile::open(image, false, Cache::Writeback).expect("an image");
    let node = Arc::new(BlockNode::new("root", Box::new(backend)));
    let deadline = Instant::now() + SOON;
    // The rings of a process that was killed give its files back a moment after its end; nothing announces that.
    while let Err(error) = node.lock() {
        assert!(Instant::now() < deadline, "{error}");
        std::thread::sleep(Duration::from_millis(1));
    }
    node.load_bitmaps().expect("a good file, or none");
    let result = work(&node);
    node.close_bitmaps().expect("it is written");
    node.unlock();
    result
}

/// Adds a bitmap to disk `root`.
///
/// # Panics
/// If it is refused.
pub fn add(qmp: &mut Qmp, name: &str, granularity: u64, disabled: bool) {
    let mut arguments = named(name);
    arguments["granularity"] = granularity.into();
    arguments["disabled"] = disabled.into();
    let answer = qmp.execute("block-dirty-bitmap-add", arguments);
    assert_eq!(answer.expect("it is added"), json!({}));
}

/// Adds one that records and is kept beside the image.
///
/// # Panics
/// If it is refused.
pub fn add_persistent(qmp: &mut Qmp, name: &str, granularity: u64) {
    let mut arguments = named(name);
    arguments["granularity"] = granularity.into();
    arguments["persistent"] = true.into();
    let answer = qmp.execute("block-dirty-bitmap-add", arguments);
    assert_eq!(answer.expect("it is added"), json!({}));
}

/// The bitmaps of disk `root` while the guest may write: as one query shows them at one moment.
///
/// # Panics
/// If the answer is none.
pub fn bitmaps_now(qmp: &mut Qmp) -> Vec<Value> {
    let answer = qmp.execute("query-block", json!({})).expect("an answer of the expected shape");
    let mut devices = answer.as_array().into_iter().flatten();
    let found = devices.find(|device| device["device"] == "root").expect("a disk `root`");
    found["inserted"]["dirty-bitmaps"].as_array().cloned().unwrap_or_default()
}

/// One of them.
///
/// # Panics
/// If there is none.
pub fn bitmap_now(qmp: &mut Qmp, name: &str) -> Value {
    let all = bitmaps_now(qmp);
    let found = all.iter().find(|bitmap| bitmap["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {all:?}")).clone()
}

/// The bitmaps of a disk, as both queries show them; nothing is written meanwhile.
///
/// # Panics
/// If the answer or the image is none.
pub fn bitmaps(qmp: &mut Qmp, id: &str) -> Value {
    let devices = qmp.execute("query-block", json!({})).expect("an answer of the expected shape");
    let nodes =
        qmp.execute("query-named-block-nodes", json!({})).expect("an answer of the expected shape");
    let all = devices
        .as_array()
        .expect("an answer of the expected shape")
        .iter()
        .zip(nodes.as_array().expect("an answer of the expected shape"));
    let (device, node) = all
        .into_iter()
        .find(|(device, _)| device["device"] == id)
        .expect("an answer of the expected shape");
    assert_eq!(node["node-name"], id);
    assert_eq!(device["inserted"]["dirty-bitmaps"], node["dirty-bitmaps"]);
    node["dirty-bitmaps"].clone()
}

/// A bitmap of disk `root`.
///
/// # Panics
/// If there is none.
pub fn bitmap(qmp: &mut Qmp, name: &str) -> Value {
    let all = bitmaps(qmp, "root");
    let found = all.as_array().into_iter().flatten().find(|bitmap| bitmap["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {all}")).clone()
}

/// A bitmap's digest.
///
/// # Panics
/// If there is none.
pub fn sha256(qmp: &mut Qmp, name: &str) -> String {
    let answer = qmp
        .execute("x-debug-block-dirty-bitmap-sha256", named(name))
        .expect("an answer of the expected shape");
    answer["sha256"].as_str().expect("an answer of the expected shape").to_owned()
}

/// Sectors of an image that differ from what it was.
///
/// # Panics
/// If the answer or the image is none.
pub fn changed(image: &Path, before: &[u8]) -> BTreeSet<u64> {
    let now = std::fs::read(image).expect("an answer of the expected shape");
    assert_eq!(now.len(), before.len());
    let sectors = now.chunks(512).zip(before.chunks(512)).zip(0..);
    sectors.filter(|((now, before), _)| now != before).map(|(_, sector)| sector).collect()
}

/// The count and the digest of a bitmap of these sectors, and nothing else.
///
/// # Panics
/// If the answer or the image is none.
pub fn expected(sectors: &BTreeSet<u64>, granularity: u64, disk_bytes: u64) -> (u64, String) {
    let granules: BTreeSet<u64> =
        sectors.iter().map(|sector| sector * SECTOR_BYTES / granularity).collect();
    let len = |granule: &u64| (disk_bytes - granule * granularity).min(granularity);
    let bits = disk_bytes.div_ceil(granularity);
    let mut bytes =
        vec![0u8; usize::try_from(bits.div_ceil(64) * 8).expect("an answer of the expected shape")];
    for granule in &granules {
        bytes[usize::try_from(granule / 8).expect("an answer of the expected shape")] |=
            1 << (granule % 8);
    }
    let digest = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    (granules.iter().map(len).sum(), digest)
}

/// Checks count and digest of a bitmap of disk `root` against the sectors that have changed.
///
/// # Panics
/// If they differ.
#[track_caller]
pub fn assert_has(qmp: &mut Qmp, name: &str, sectors: &BTreeSet<u64>, disk_bytes: u64) {
    let shown = bitmap(qmp, name);
    let granularity = shown["granularity"].as_u64().expect("an answer of the expected shape");
    let (count, digest) = expected(sectors, granularity, disk_bytes);
    assert_eq!(shown["count"], count, "{shown}");
    assert_eq!(sha256(qmp, name), digest, "{shown}");
}
