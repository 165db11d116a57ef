//! Other people's clients: libnbd's tools, QEMU's and nbdkit.

use super::*;
use crate::block::qcow2::{BackingChoice, Qcow2File};
use ferry_tests::needs;
use ferry_tests::process::Process;
use std::process::Command;

/// Runs a program that must succeed, and returns what it says.
fn run(program: &str, arguments: &[&str]) -> String {
    let mut process = Process::start(Command::new(program).args(arguments)).unwrap();
    let code = process.exit_code(SOON).unwrap();
    let (out, err) = (process.out.text(), process.err.text());
    assert_eq!(code, 0, "{program} {arguments:?}: {out}{err}");
    out
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A server with the writable export `d` of a raw file of 16 MiB with some data, and its bitmap `b`.
fn some_disk() -> (Fixture, Arc<BlockNode>) {
    let fixture = Fixture::new();
    let node = fixture.image("d.raw", 16 * MIB);
    let bitmap = add_bitmap(&node, "b", true);
    node.write_at(&pattern(1 << 20), MIB).unwrap();
    node.write_at(&pattern(64 << 10), 9 * MIB).unwrap();
    let with = Export { bitmaps: vec![bitmap], ..export("d", &node, true) };
    fixture.server().add(with).unwrap();
    (fixture, node)
}

#[test]
#[needs(nbd_tools)]
fn nbdinfo_describes_the_export_and_prints_both_maps() {
    let (fixture, node) = some_disk();
    let described = Export { description: "the same".into(), ..export("e", &node, false) };
    fixture.server().add(described).unwrap();
    let said = run("nbdinfo", &[&fixture.uri("d")]);
    for line in [
        "using structured packets",
        "export-size: 16777216",
        "base:allocation",
        "qemu:dirty-bitmap:b",
        "is_read_only: false",
        "can_multi_conn: true",
        "can_df: true",
        "can_fua: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 512",
        "block_size_maximum: 33554432",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let list = run("nbdinfo", &["--list", &fixture.uri("")]);
    for line in ["export=\"d\"", "export=\"e\"", "description: the same", "is_read_only: true"] {
        assert!(list.contains(line), "{line}: {list}");
    }
    let map = |context: &str| {
        let said = run("nbdinfo", &[&format!("--map={context}"), &fixture.uri("d")]);
        let numbers = |line: &str| {
            let mut words = line.split_whitespace().map(|word| word.parse().unwrap_or(u64::MAX));
            [words.next().unwrap(), words.next().unwrap(), words.next().unwrap()]
        };
        said.lines().map(numbers).collect::<Vec<_>>()
    };
    let (one, end) = (MIB, 16 * MIB);
    let rest = 9 * MIB + 64 * KIB;
    let expected = |hole: u64, data: u64| {
        [
            [0, one, hole],
            [one, one, data],
            [2 * one, 7 * one, hole],
            [9 * one, 64 * KIB, data],
            [rest, end - rest, hole],
        ]
    };
    assert_eq!(map("base:allocation"), expected(3, 0));
    assert_eq!(map("qemu:dirty-bitmap:b"), expected(0, 1));
}

#[test]
#[needs(nbd_tools)]
fn nbdcopy_copies_a_disk_out_and_in() {
    let (fixture, node) = some_disk();
    let copy = fixture.path("copy");
    run("nbdcopy", &[&fixture.uri("d"), text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(fixture.path("d.raw")).unwrap());
    let new = pattern(16 << 20);
    std::fs::write(&copy, &new).unwrap();
    run("nbdcopy", &["--flush", text(&copy), &fixture.uri("d")]);
    assert!(std::fs::read(fixture.path("d.raw")).unwrap() == new);
    assert!(!node.has_unsynced_writes());
    assert_eq!(node.bitmaps().info()[0].count_bytes, 16 * MIB);
    fixture.wait_for_connections(0);
}

#[test]
#[needs(qemu_img)]
fn qemu_img_converts_compares_and_maps() {
    let (fixture, _) = some_disk();
    let (nbd, copy) = (fixture.uri("d"), fixture.path("copy.qcow2"));
    run("qemu-img", &["convert", "-O", "qcow2", &nbd, text(&copy)]);
    run("qemu-img", &["compare", &nbd, text(&copy)]);
    let map = run("qemu-img", &["map", "--output=json", &nbd]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let data = |map: &serde_json::Value| {
        let extents = map.as_array().unwrap().iter().filter(|extent| extent["data"] == true);
        let range = |extent: &serde_json::Value| {
            (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap())
        };
        extents.map(range).collect::<Vec<_>>()
    };
    assert_eq!(data(&map), [(MIB, MIB), (9 * MIB, 64 * KIB)]);
    // QEMU's own way to read a bitmap: dirty is what it calls no data.
    let options = format!(
        "driver=nbd,export=d,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:b",
        fixture.socket().display()
    );
    let map = run("qemu-img", &["map", "--output=json", "--image-opts", &options]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let expected = [(0, MIB), (2 * MIB, 7 * MIB), (9 * MIB + 64 * KIB, 7 * MIB - 64 * KIB)];
    assert_eq!(data(&map), expected);
}

#[test]
#[needs(qemu_img)]
fn a_qcow2_image_with_a_backing_file_is_exported_as_the_disk_that_it_is() {
    let fixture = Fixture::new();
    let (base, top) = (fixture.path("base.raw"), fixture.path("top.qcow2"));
    std::fs::write(&base, pattern(8 << 20)).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&base), text(&top)]);
    let backing = BackingChoice::Recorded;
    let qcow2 = Qcow2File::open(&top, false, Cache::Writeback, backing).unwrap();
    let node = Arc::new(BlockNode::new("d", Box::new(qcow2)));
    node.lock().unwrap();
    fixture.server().add(export("d", &node, true)).unwrap();
    let nbd = fixture.uri("d");
    let writes = ["-c", "write -P 0x5a 1M 64k", "-c", "write -z 2M 1M", "-c", "flush"];
    run("qemu-io", &[&["-f", "raw"][..], &writes, &[&nbd]].concat());
    let mut expected = pattern(8 << 20);
    expected[1 << 20..][..64 << 10].fill(0x5a);
    expected[2 << 20..][..1 << 20].fill(0);
    let copy = fixture.path("copy.raw");
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &nbd, text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == expected);
}

#[test]
#[needs(qemu_img)]
fn qemu_io_writes_discards_and_flushes() {
    let (fixture, node) = some_disk();
    let tracking = node.track(64 * KIB).unwrap();
    let commands = [
        "write -P 0x5a 3M 128k",
        "write -f -P 0x5b 4M 512",
        "write -z 1M 64k",
        "write -z -u 9M 64k",
        "discard 1216k 64k",
        "flush",
        "read -P 0x5a 3M 128k",
        "read -P 0x5b 4M 512",
        "read -P 0 1M 64k",
        "read -P 0 9M 64k",
    ];
    let nbd = fixture.uri("d");
    let mut arguments = vec!["-f", "raw"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(&nbd);
    let said = run("qemu-io", &arguments);
    assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    let mut found = [0; 512];
    node.copy_at(&mut found, 4 * MIB).unwrap();
    assert_eq!(found, [0x5b; 512]);
    let marked: Vec<_> =
        tracking.runs().map(|run| (run.offset_bytes / KIB, run.len_bytes / KIB)).collect();
    assert_eq!(marked, [(1024, 64), (1216, 64), (3072, 128), (4096, 64), (9216, 64)]);
    assert!(!node.has_unsynced_writes());
}

#[test]
#[needs(nbd_tools, nbdkit)]
fn nbdkit_passes_the_export_on() {
    let (fixture, _) = some_disk();
    let (copy, uri) = (fixture.path("copy"), format!("uri={}", fixture.uri("d")));
    // In it, `$uri` is nbdkit's own.
    let copying = format!("nbdcopy \"$uri\" {}", copy.display());
    run("nbdkit", &["-r", "-U", "-", "nbd", &uri, "--run", &copying]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(fixture.path("d.raw")).unwrap());
}

#[test]
#[needs(nbd_tools)]
fn a_disk_that_is_written_meanwhile_can_be_copied() {
    let (fixture, node) = some_disk();
    let copy = fixture.path("copy");
    let mut command = Command::new("nbdcopy");
    let mut copying = Process::start(command.args([&fixture.uri("d"), text(&copy)])).unwrap();
    let (mut written, data) = (0, pattern(64 << 10));
    while copying.is_running() {
        node.write_at(&data, written * 192 * KIB % (16 * MIB)).unwrap();
        written += 1;
    }
    assert_eq!(copying.exit_code(SOON).unwrap(), 0, "{}", copying.err.text());
    assert!(written > 0);
    // Now that nobody writes, a second copy is exact.
    run("nbdcopy", &[&fixture.uri("d"), text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(fixture.path("d.raw")).unwrap());
}
