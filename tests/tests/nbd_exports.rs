//! A running guest's disks, exported over NBD to other people's programs.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::hosts::{started, text};
use ferry_tests::image::{Pattern, assert_same, fill};
use ferry_tests::process::{Process, SOON, Vmm};
use ferry_tests::qmp::Qmp;
use ferry_tests::{disk, needs};
use serde_json::{Value, json};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;

/// A guest that writes its disk `root`, and leaves its disk `data` alone.
struct Host {
    vmm: Vmm,
    qmp: Qmp,
    folder: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = |id: &str| folder.path().join(id);
        disk::create(&image("root"), 32 * MIB).unwrap();
        disk::create(&image("data"), 16 * MIB).unwrap();
        fill(&image("data"), MIB, MIB, Pattern::Random).unwrap();
        let guest = Guest::new("work=disk hb_ms=20", 64).disk("root", &image("root"));
        let vmm = started(&guest.disk("data", &image("data")));
        let qmp = vmm.qmp().unwrap();
        Self { vmm, qmp, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("nbd.sock").display())
    }

    fn run(&mut self, command: &str, arguments: Value) {
        assert_eq!(self.qmp.execute(command, arguments).unwrap(), json!({}), "{command}");
    }

    fn refused(&mut self, command: &str, arguments: Value) -> String {
        self.qmp.refused(command, arguments).unwrap().description
    }

    fn start(&mut self) {
        let addr = json!({"type": "unix", "data": {"path": self.path("nbd.sock")}});
        self.run("nbd-server-start", json!({"addr": addr}));
    }

    fn exports(&mut self) -> Value {
        self.qmp.execute("query-block-exports", json!({})).unwrap()
    }

    /// The guest writes on, and finds all as it left it.
    fn goes_on(&mut self) {
        for _ in 0..2 {
            self.vmm.wait_next_line("^HB ").unwrap();
        }
        assert_eq!(self.vmm.check().unwrap().corrupt, 0);
    }
}

fn add(id: &str, node: &str, more: Value) -> Value {
    let mut arguments = json!({"type": "nbd", "id": id, "node-name": node});
    arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    arguments
}

/// Runs a program that must succeed, and returns what it says.
fn tool(program: &str, arguments: &[&str]) -> String {
    let mut process = Process::start(Command::new(program).args(arguments)).unwrap();
    let code = process.exit_code(SOON).unwrap();
    let (out, err) = (process.out.text(), process.err.text());
    assert_eq!(code, 0, "{program} {arguments:?}: {out}{err}");
    out
}

#[test]
#[needs(kvm, nbd_tools, qemu_img)]
fn a_disk_is_copied_while_its_guest_writes_it() {
    let mut host = Host::new();
    host.start();
    host.run("block-export-add", add("e0", "root", json!({"name": "disk"})));
    let one = json!({"id": "e0", "type": "nbd", "node-name": "root", "shutting-down": false});
    assert_eq!(host.exports(), json!([one]));
    let said = tool("nbdinfo", &[&host.uri("disk")]);
    for line in ["export-size: 33554432", "base:allocation", "is_read_only: true"] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let copy = host.path("copy");
    tool("nbdcopy", &[&host.uri("disk"), text(&copy)]);
    // Sectors are written whole: each is in the copy as it once was.
    disk::verify(&copy).unwrap();
    host.goes_on();
    // While nobody writes, a copy is exact.
    host.run("stop", json!({}));
    tool("nbdcopy", &[&host.uri("disk"), text(&copy)]);
    assert_same(&host.path("root"), &copy);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", &host.uri("disk"), text(&copy)]);
    host.run("cont", json!({}));
    host.goes_on();
    // A reset keeps the disks, and so their exports.
    host.run("system_reset", json!({}));
    host.vmm.wait_next_line("^HB n=2 ").unwrap();
    tool("nbdcopy", &[&host.uri("disk"), text(&copy)]);
    let reads = host.qmp.execute("query-blockstats", json!({})).unwrap()[1]["stats"].clone();
    assert_eq!(reads["rd_operations"], 0, "the copies' reads are not the guest's: {reads}");
    host.run("block-export-del", json!({"id": "e0"}));
    let deleted = host.qmp.wait_event("BLOCK_EXPORT_DELETED", SOON).unwrap();
    assert_eq!(deleted["data"], json!({"id": "e0"}));
    assert_eq!(host.exports(), json!([]));
}

#[test]
#[needs(kvm, nbd_tools, qemu_img)]
fn what_a_bitmap_has_is_all_that_an_incremental_copy_needs() {
    let mut host = Host::new();
    host.start();
    host.run("stop", json!({}));
    let bitmap = |name: &str| json!({"node": "root", "name": name});
    host.run("block-dirty-bitmap-add", bitmap("monday"));
    host.run("block-export-add", add("full", "root", json!({})));
    let full = host.path("full");
    tool("nbdcopy", &[&host.uri("root"), text(&full)]);
    host.run("block-export-del", json!({"id": "full"}));
    host.run("cont", json!({}));
    host.goes_on();
    host.run("stop", json!({}));
    let with = json!({"bitmaps": ["monday"]});
    let refused = host.refused("block-export-add", add("inc", "root", with.clone()));
    assert_eq!(refused, "Enabled bitmap 'monday' incompatible with readonly export");
    let action = |verb: &str, name: &str| json!({"type": format!("block-dirty-bitmap-{verb}"), "data": bitmap(name)});
    let turn = json!({"actions": [action("disable", "monday"), action("add", "tuesday")]});
    host.run("transaction", turn);
    host.run("block-export-add", add("inc", "root", with));
    let busy = host.refused("block-dirty-bitmap-clear", bitmap("monday"));
    let in_use = "Bitmap 'monday' is currently in use by another operation and cannot be used";
    assert_eq!(busy, in_use);
    // As the README has it: read what is dirty into an overlay, then put the full copy below that.
    let (uri, delta) = (host.uri("root"), host.path("delta.qcow2"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &uri, "-F", "raw", text(&delta)]);
    let map = tool("nbdinfo", &["--map=qemu:dirty-bitmap:monday", &uri]);
    let mut reads = vec!["-C".to_owned(), "-f".into(), "qcow2".into()];
    let mut dirty = 0;
    for line in map.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        if words[2] == "1" {
            reads.extend(["-c".to_owned(), format!("read {} {}", words[0], words[1])]);
            dirty += words[1].parse::<u64>().unwrap();
        }
    }
    assert!(dirty > 0, "{map}");
    let count = bitmap_count(&mut host.qmp, "monday");
    assert_eq!(dirty, count, "the map is the bitmap");
    reads.push(text(&delta).to_owned());
    tool("qemu-io", &reads.iter().map(String::as_str).collect::<Vec<_>>());
    tool("qemu-img", &["rebase", "-u", "-b", text(&full), "-F", "raw", text(&delta)]);
    // QEMU does not open what Ferry has locked.
    let now = host.path("now");
    std::fs::copy(host.path("root"), &now).unwrap();
    tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&delta), text(&now)]);
    assert!(ferry_tests::image::compare(&full, &now).is_err(), "the guest has written");
    host.run("cont", json!({}));
    host.goes_on();
}

fn bitmap_count(qmp: &mut Qmp, name: &str) -> u64 {
    let mut all = ferry_tests::bitmaps::bitmaps_now(qmp).into_iter();
    all.find(|bitmap| bitmap["name"] == name).unwrap()["count"].as_u64().unwrap()
}

#[test]
#[needs(kvm, qemu_img)]
fn a_client_writes_where_it_may_and_the_guest_does_not_move_meanwhile() {
    let mut host = Host::new();
    let early = host.refused("nbd-server-add", json!({"device": "data"}));
    assert_eq!(early, "NBD server not running");
    host.start();
    let again = json!({"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}});
    assert_eq!(host.refused("nbd-server-start", again), "NBD server already running");
    host.run("nbd-server-add", json!({"device": "data", "writable": true}));
    let bad = add("x", "nope", json!({}));
    let refused = host.refused("block-export-add", bad);
    assert_eq!(refused, "Cannot find device='nope' nor node-name='nope'");
    let twice = host.refused("nbd-server-add", json!({"device": "data"}));
    assert_eq!(twice, "Block export id 'data' is already in use");
    host.run("block-dirty-bitmap-add", json!({"node": "data", "name": "b"}));
    let commands = ["write -P 0x5a 3M 64k", "write -z 1M 64k", "discard 1088k 64k", "flush"];
    let uri = host.uri("data");
    let mut arguments = vec!["-f", "raw"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(&uri);
    let said = tool("qemu-io", &arguments);
    assert!(!said.contains("failed"), "{said}");
    let image = std::fs::read(host.path("data")).unwrap();
    let at = |mib: u64| usize::try_from(mib * MIB).unwrap();
    assert!(image[at(3)..][..64 << 10].iter().all(|byte| *byte == 0x5a));
    assert!(image[at(1)..][..64 << 10].iter().all(|byte| *byte == 0));
    let blocks = host.qmp.execute("query-block", json!({})).unwrap();
    let bitmaps = &blocks[1]["inserted"]["dirty-bitmaps"];
    assert_eq!(bitmaps[0]["count"], 3 * (64 << 10), "{blocks}");
    let destination = ferry::receive().unwrap();
    let refused = host.refused("migrate", json!({"uri": destination.address}));
    assert!(refused.starts_with("Export 'data' lets others write to disk 'data'"), "{refused}");
    host.run("nbd-server-remove", json!({"name": "data"}));
    // The other way round.
    host.run("migrate-set-parameters", json!({"max-bandwidth": 1 << 20}));
    host.run("migrate", json!({"uri": destination.address}));
    let refused = host.refused("nbd-server-add", json!({"device": "data", "writable": true}));
    assert!(refused.starts_with("There's a migration process in progress"), "{refused}");
    host.run("nbd-server-add", json!({"device": "data"}));
    host.run("migrate_cancel", json!({}));
    assert_eq!(host.qmp.migration_end().unwrap()["status"], "cancelled");
    host.goes_on();
}

/// A client of libnbd's that has its export open until its input ends.
fn reader(uri: &str) -> Process {
    // It repeats the whole disk for ever.
    let script = format!("while nbdcopy '{uri}' null:; do echo copied; done");
    Process::start(Command::new("sh").args(["-c", &script])).unwrap()
}

#[test]
#[needs(kvm, nbd_tools)]
fn read_only_exports_end_when_the_guest_has_moved() {
    let mut host = Host::new();
    host.start();
    host.run("block-export-add", add("e", "root", json!({})));
    let mut reading = reader(&host.uri("root"));
    reading.out.wait_for("copied", SOON).unwrap();
    let mut destination = {
        let give = ["root", "data"].map(|id| format!("{id}={}", host.path(id).display()));
        let [root, data] = &give;
        ferry::receive_at("tcp:127.0.0.1:0", &["--disk", root, "--disk", data]).unwrap()
    };
    let options = ["--keep-source"];
    ferry::migrate_well(&host.vmm, &destination.address, &options).unwrap();
    let deleted = host.qmp.wait_event("BLOCK_EXPORT_DELETED", SOON).unwrap();
    assert_eq!(deleted["data"]["id"], "e");
    assert_eq!(reading.exit_code(SOON).unwrap(), 0, "the loop has ended: nothing is served");
    let refused = host.refused("block-export-add", add("f", "root", json!({})));
    assert_eq!(refused, "The guest is postmigrate: its disks are another's");
    ferry::verify_at(&mut destination.vmm, &[host.vmm.serial()]).unwrap();
}

/// Whether the server greets this client.
fn is_greeted(socket: &Path) -> Option<UnixStream> {
    let mut client = UnixStream::connect(socket).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client.read_exact(&mut [0; 18]).ok().map(|()| client)
}

#[test]
#[needs(kvm, nbd_tools)]
fn a_thousand_clients_and_a_stop_harm_neither_guest_nor_control_socket() {
    let mut host = Host::new();
    host.start();
    host.run("block-export-add", add("e", "root", json!({})));
    let socket = host.path("nbd.sock");
    let held: Vec<_> = (0..1000).filter_map(|_| is_greeted(&socket)).collect();
    assert_eq!(held.len(), 100);
    host.goes_on();
    drop(held);
    let mut reading = reader(&host.uri("root"));
    reading.out.wait_for("copied", SOON).unwrap();
    let in_use = host.qmp.refused("block-export-del", json!({"id": "e"}));
    // Between two copies, it may have no client.
    if let Ok(refusal) = in_use {
        assert_eq!(refusal.description, "export 'e' still in use");
        host.run("block-export-del", json!({"id": "e", "mode": "hard"}));
    }
    host.qmp.wait_event("BLOCK_EXPORT_DELETED", SOON).unwrap();
    reading.exit_code(SOON).unwrap();
    host.run("nbd-server-stop", json!({}));
    assert!(!socket.exists());
    assert_eq!(host.refused("nbd-server-stop", json!({})), "NBD server not running");
    // Where somebody else is, or a file, nothing is replaced.
    std::fs::write(&socket, "mine").unwrap();
    let addr = json!({"addr": {"type": "unix", "data": {"path": &socket}}});
    let refused = host.refused("nbd-server-start", addr);
    assert!(refused.contains("not a socket"), "{refused}");
    std::fs::remove_file(&socket).unwrap();
    host.start();
    host.run("block-export-add", add("e", "data", json!({"writable": true})));
    let client = is_greeted(&socket);
    assert!(client.is_some());
    host.goes_on();
    // The process ends in time with clients that say nothing.
    host.run("quit", json!({}));
    assert_eq!(host.vmm.process.exit_code(SOON).unwrap(), 0);
    assert!(!socket.exists());
}
