//! Replies to `query-block`, `query-named-block-nodes` and `query-blockstats`, in QEMU's format. Called by
//! the supervisor.

use devices::block::BlockNode;
use devices::block::bitmaps::BitmapInfo;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Allocated sizes of disks, as far as they are known, by id. Not queried here: the storage may hang.
pub type Sizes = BTreeMap<String, u64>;

/// QEMU's `BlockDeviceInfo`.
fn info(node: &BlockNode, sizes: &Sizes) -> Value {
    let mut image = json!({
        "filename": node.location(),
        "format": node.format(),
        "virtual-size": node.len_bytes(),
    });
    // Omitted if unknown.
    if let Some(bytes) = sizes.get(node.id()) {
        image["actual-size"] = (*bytes).into();
    }
    let direct = node.is_direct();
    let backing = node.backing().map_or_else(Vec::new, |chain| chain.files());
    if let Some(name) = backing.first() {
        image["backing-filename"] = name.as_str().into();
    }
    let mut info = json!({
        "file": node.location(),
        "node-name": node.id(),
        "ro": node.read_only(),
        "drv": node.format(),
        "backing_file_depth": backing.len(),
        "encrypted": false,
        "detect_zeroes": "off",
        "bps": 0, "bps_rd": 0, "bps_wr": 0,
        "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "write_threshold": 0,
        "image": image,
        "cache": {"writeback": true, "direct": direct, "no-flush": false},
    });
    if let Some(name) = backing.first() {
        info["backing_file"] = name.as_str().into();
    }
    let bitmaps = node.bitmaps().info();
    if !bitmaps.is_empty() {
        info["dirty-bitmaps"] = bitmaps.iter().map(bitmap).collect();
    }
    info
}

/// QEMU's `BlockDirtyInfo`.
fn bitmap(info: &BitmapInfo) -> Value {
    let mut shown = json!({
        "name": info.name.as_str(),
        "count": info.count_bytes,
        "granularity": info.granularity,
        "recording": info.recording,
        "busy": info.busy,
        "persistent": info.persistent,
    });
    if info.inconsistent {
        shown["inconsistent"] = true.into();
    }
    shown
}

/// The reply to `query-block`.
pub fn devices<'n>(nodes: impl Iterator<Item = &'n BlockNode>, sizes: &Sizes) -> Value {
    let device = |node: &BlockNode| {
        let policy = node.policy();
        json!({
            "device": node.id(),
            "qdev": node.id(),
            "type": "unknown",
            "removable": false,
            "locked": false,
            "io-status": if node.is_stopped() { "failed" } else { "ok" },
            "inserted": info(node, sizes),
            "x-rerror": policy.on_read.name(),
            "x-werror": policy.on_write.name(),
        })
    };
    nodes.map(device).collect()
}

/// The reply to `query-named-block-nodes`.
pub fn named_nodes<'n>(nodes: impl Iterator<Item = &'n BlockNode>, sizes: &Sizes) -> Value {
    nodes.map(|node| info(node, sizes)).collect()
}

/// The reply to `query-blockstats`, with every member that QEMU 7.2 always sends. Operations and their
/// bytes are counted; times, merged, failed and invalid requests are not, nor the highest offset written,
/// and these are 0.
pub fn stats<'n>(nodes: impl Iterator<Item = &'n BlockNode>) -> Value {
    let one = |node: &BlockNode| {
        let stats = node.stats();
        json!({
            "device": node.id(),
            "node-name": node.id(),
            "qdev": node.id(),
            "stats": {
                "rd_bytes": stats.read_bytes,
                "wr_bytes": stats.written_bytes,
                "unmap_bytes": stats.discarded_bytes,
                "rd_operations": stats.reads,
                "wr_operations": stats.writes,
                "flush_operations": stats.flushes,
                "unmap_operations": stats.discards,
                "rd_total_time_ns": 0,
                "wr_total_time_ns": 0,
                "flush_total_time_ns": 0,
                "unmap_total_time_ns": 0,
                "wr_highest_offset": 0,
                "rd_merged": 0,
                "wr_merged": 0,
                "unmap_merged": 0,
                "failed_rd_operations": 0,
                "failed_wr_operations": 0,
                "failed_flush_operations": 0,
                "failed_unmap_operations": 0,
                "invalid_rd_operations": 0,
                "invalid_wr_operations": 0,
                "invalid_flush_operations": 0,
                "invalid_unmap_operations": 0,
                "account_invalid": false,
                "account_failed": false,
                "timed_stats": [],
            },
        })
    };
    nodes.map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::block::bitmaps::{BitmapName, NewBitmap};
    use devices::block::memory::MemoryDisk;

    #[test]
    fn disks_are_described_in_qemus_words() {
        let node = BlockNode::new("root", Box::new(MemoryDisk::new(4096)));
        node.write_at(&[1; 512], 0).unwrap();
        let all = || std::iter::once(&node);
        let sizes = Sizes::from([("root".to_owned(), 512)]);
        let (devices, nodes, stats) =
            (devices(all(), &sizes), named_nodes(all(), &sizes), stats(all()));
        assert_eq!(devices[0]["device"], "root");
        assert_eq!(devices[0]["inserted"], nodes[0]);
        assert_eq!(nodes[0]["image"]["virtual-size"], 4096);
        assert_eq!(nodes[0]["image"]["actual-size"], 512);
        assert_eq!((&nodes[0]["drv"], &nodes[0]["ro"]), (&json!("memory"), &json!(false)));
        assert_eq!(stats[0]["stats"]["wr_bytes"], 512);
        assert_eq!(stats[0]["stats"]["wr_operations"], 1);
    }

    #[test]
    fn bitmaps_are_shown_as_qemu_shows_them() {
        let node = BlockNode::new("root", Box::new(MemoryDisk::new(1 << 20)));
        let sizes = Sizes::new();
        let shown = || {
            let (all, one) = (devices([&node].into_iter(), &sizes), [&node].into_iter());
            assert_eq!(all[0]["inserted"], named_nodes(one, &sizes)[0]);
            all[0]["inserted"].get("dirty-bitmaps").cloned()
        };
        assert_eq!(shown(), None);
        let name = |name| BitmapName::new(name).unwrap();
        let new =
            NewBitmap { name: name("b0"), granularity: 65_536, persistent: false, recording: true };
        node.bitmaps().add(new.clone()).unwrap();
        let off = NewBitmap { name: name("b1"), granularity: 512, recording: false, ..new };
        node.bitmaps().add(off).unwrap();
        let held = node.bitmaps().hold(&name("b1")).unwrap();
        node.write_at(&[1; 512], 70_000).unwrap();
        let all = json!([
            {
                "name": "b0", "count": 65_536, "granularity": 65_536,
                "recording": true, "busy": false, "persistent": false,
            },
            {
                "name": "b1", "count": 0, "granularity": 512,
                "recording": false, "busy": true, "persistent": false,
            },
        ]);
        assert_eq!(shown(), Some(all));
        drop(held);
        let lost = BitmapInfo { inconsistent: true, ..node.bitmaps().info().remove(0) };
        assert_eq!(bitmap(&lost)["inconsistent"], true);
    }

    #[test]
    fn block_statistics_have_every_mandatory_member_of_qemus() {
        let node = BlockNode::new("root", Box::new(MemoryDisk::new(4096)));
        let stats = stats(std::iter::once(&node));
        let stats = stats[0]["stats"].as_object().unwrap();
        for kind in ["rd", "wr", "flush", "unmap"] {
            let names = ["failed_{}_operations", "invalid_{}_operations", "{}_total_time_ns"];
            for name in names.map(|name| name.replace("{}", kind)) {
                assert_eq!(stats[&name], 0, "{name}");
            }
            assert!(stats[&format!("{kind}_operations")].is_u64(), "{kind}");
        }
        for kind in ["rd", "wr", "unmap"] {
            assert_eq!(stats[&format!("{kind}_merged")], 0, "{kind}");
            assert!(stats[&format!("{kind}_bytes")].is_u64(), "{kind}");
        }
        assert_eq!(stats["wr_highest_offset"], 0);
        assert_eq!(
            (&stats["account_failed"], &stats["account_invalid"]),
            (&json!(false), &json!(false))
        );
        assert_eq!((&stats["timed_stats"], stats.len()), (&json!([]), 26));
    }
}
