//! Mirrors of disks that a guest writes to: jobs over the control socket, and what the images hold afterwards.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry;
use ferry_tests::hosts::started;
use ferry_tests::image::{Pattern, SmallFileSystem, assert_same, assert_same_as, fill, overlay};
use ferry_tests::jobs::{Images, busy, full, job_event, refused, run};
use ferry_tests::process::{Process, SOON, Vmm};
use ferry_tests::qmp::Qmp;
use ferry_tests::{disk, needs};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;

fn mirror(target: &Path, more: Value) -> Value {
    full(target, &more)
}

/// The status changes and events of jobs up to `last`.
fn job_events(qmp: &mut Qmp, last: &str) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let (name, _) = job_event(qmp, None);
        let is_last = name == last;
        seen.push(name);
        if is_last {
            return seen;
        }
    }
}

fn let_write(vmm: &Vmm) {
    for _ in 0..3 {
        vmm.wait_next_line("^HB ").unwrap();
    }
}

fn jobs(qmp: &mut Qmp) -> Value {
    qmp.execute("query-block-jobs", json!({})).unwrap()
}

#[test]
#[needs(kvm)]
fn a_guest_goes_on_on_the_copy_that_its_disk_was_switched_over_to() {
    for (format, mode) in
        [("raw", "background"), ("qcow2", "background"), ("raw", "write-blocking")]
    {
        let images = Images::of(DISK);
        let image = images.blank("root");
        let mut vmm = started(&busy(&image));
        let mut qmp = vmm.qmp().unwrap();
        let copy = images.at("copy");
        run(&mut qmp, "drive-mirror", mirror(&copy, json!({"format": format, "copy-mode": mode})));
        // As QEMU emits them.
        assert_eq!(job_events(&mut qmp, "READY"), ["created", "running", "ready", "READY"]);
        let shown = jobs(&mut qmp);
        assert_eq!((&shown[0]["device"], &shown[0]["ready"]), (&json!("root"), &json!(true)));
        assert_eq!(shown[0]["type"], "mirror");
        let_write(&vmm);
        run(&mut qmp, "block-job-complete", json!({"device": "root"}));
        let end = ["waiting", "pending", "COMPLETED", "concluded", "null"];
        assert_eq!(job_events(&mut qmp, "null"), end, "{format} {mode}");
        let blocks = qmp.execute("query-block", json!({})).unwrap();
        assert_eq!(blocks[0]["inserted"]["file"], json!(copy));
        assert_eq!(blocks[0]["inserted"]["drv"], format);
        let frozen = std::fs::read(&image).unwrap();
        let_write(&vmm);
        // The guest compares all that it has written with what the disk holds.
        let check = vmm.check().unwrap();
        assert!(check.count > 0 && check.corrupt == 0, "{check:?}");
        assert!(frozen == std::fs::read(&image).unwrap(), "the old image is written no more");
    }
}

#[test]
#[needs(kvm)]
fn a_copy_that_is_left_is_equal_to_the_disk_of_that_moment() {
    let images = Images::of(DISK);
    let image = images.blank("root");
    let mut vmm = started(&busy(&image));
    let mut qmp = vmm.qmp().unwrap();
    let copy = images.at("copy");
    run(&mut qmp, "drive-mirror", mirror(&copy, json!({"format": "qcow2", "job-id": "m1"})));
    job_events(&mut qmp, "READY");
    let_write(&vmm);
    run(&mut qmp, "stop", json!({}));
    run(&mut qmp, "block-job-cancel", json!({"device": "m1"}));
    let end = ["waiting", "pending", "COMPLETED", "concluded", "null"];
    assert_eq!(job_events(&mut qmp, "null"), end);
    assert_eq!(jobs(&mut qmp), json!([]));
    // The stopped guest has written nothing since.
    vmm.process.kill().unwrap();
    assert_same_as((&image, "raw"), (&copy, "qcow2"));
}

#[test]
#[needs(kvm)]
fn nodes_can_be_added_mirrored_to_and_deleted() {
    let images = Images::of(DISK);
    let (image, copy) = (images.blank("root"), images.blank("copy"));
    let vmm = started(&busy(&image));
    let mut qmp = vmm.qmp().unwrap();
    let file = json!({"driver": "file", "filename": copy});
    let node = json!({"driver": "raw", "node-name": "there", "file": file});
    run(&mut qmp, "blockdev-add", node.clone());
    assert!(refused(&mut qmp, "blockdev-add", node).contains("Duplicate nodes"));
    let nodes = qmp.execute("query-named-block-nodes", json!({})).unwrap();
    assert_eq!(nodes[1]["node-name"], "there");
    let arguments = json!({"device": "root", "target": "there", "sync": "full", "job-id": "m"});
    run(&mut qmp, "blockdev-mirror", arguments.clone());
    job_events(&mut qmp, "READY");
    let again = json!({"device": "root", "target": "there", "sync": "full", "job-id": "n"});
    assert!(refused(&mut qmp, "blockdev-mirror", again).contains("is busy"));
    assert!(refused(&mut qmp, "blockdev-mirror", arguments).contains("already in use"));
    let delete = json!({"node-name": "there"});
    assert!(refused(&mut qmp, "blockdev-del", delete.clone()).contains("in use by block job"));
    run(&mut qmp, "job-cancel", json!({"id": "m"}));
    assert!(job_events(&mut qmp, "null").contains(&"CANCELLED".to_owned()));
    run(&mut qmp, "blockdev-del", delete.clone());
    assert!(refused(&mut qmp, "blockdev-del", delete).contains("Failed to find node"));
    let_write(&vmm);
}

#[test]
#[needs(kvm)]
fn what_cannot_be_mirrored_is_refused_by_name() {
    let images = Images::of(DISK);
    let image = images.blank("root");
    let vmm = started(&busy(&image));
    let mut qmp = vmm.qmp().unwrap();
    let (hard, soft, fifo) = (images.at("hard"), images.at("soft"), images.at("fifo"));
    std::fs::hard_link(&image, &hard).unwrap();
    std::os::unix::fs::symlink(&image, &soft).unwrap();
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    disk::create(&images.at("small"), DISK - MIB).unwrap();
    let existing =
        |name: &str| mirror(&images.at(name), json!({"mode": "existing", "format": "raw"}));
    for target in [&image, &hard, &soft] {
        let refusal = refused(&mut qmp, "drive-mirror", mirror(target, json!({})));
        assert!(refusal.contains("cannot be copied to itself"), "{refusal}");
    }
    for (arguments, expected) in [
        (existing("fifo"), "neither a regular file nor a block device"),
        (existing("small"), "different sizes"),
        (existing("nowhere"), "cannot open disk image"),
        (mirror(&images.at("no/such/folder"), json!({})), "cannot create disk image"),
        (mirror(&images.at("x"), json!({"granularity": 1000})), "power of 2"),
        (mirror(&images.at("x"), json!({"granularity": 256})), "range [512B, 64MB]"),
        (mirror(&images.at("x"), json!({"granularity": 1 << 30})), "range [512B, 64MB]"),
        (mirror(&images.at("x"), json!({"speed": -1})), "speed"),
        (mirror(&images.at("x"), json!({"job-id": "1 2"})), "Invalid job ID"),
        (mirror(&images.at("x"), json!({"device": "nope"})), "Cannot find device='nope'"),
        (mirror(&images.at("x"), json!({"sync": "incremental"})), "does not accept value"),
        (mirror(&images.at("x"), json!({"sync": "none", "format": "raw"})), "sync=none needs"),
    ] {
        let refusal = refused(&mut qmp, "drive-mirror", arguments.clone());
        assert!(refusal.contains(expected), "{arguments}: {refusal}");
    }
    for (command, arguments, class) in [
        ("block-job-complete", json!({"device": "nope"}), "DeviceNotActive"),
        ("job-complete", json!({"id": "nope"}), "GenericError"),
    ] {
        assert_eq!(qmp.refused(command, arguments).unwrap().class, class);
    }
    // None of them has harmed the guest, or its image.
    assert_eq!(jobs(&mut qmp), json!([]));
    let_write(&vmm);
}

#[test]
#[needs(kvm)]
fn a_paused_job_copies_nothing_and_a_slow_one_can_be_made_faster() {
    let images = Images::of(DISK);
    let image = images.blank("root");
    let mut vmm = started(&busy(&image));
    let mut qmp = vmm.qmp().unwrap();
    run(&mut qmp, "stop", json!({}));
    let slow = json!({"speed": 1 << 20, "auto-dismiss": false, "job-id": "s"});
    run(&mut qmp, "drive-mirror", mirror(&images.at("copy"), slow));
    assert_eq!(job_events(&mut qmp, "running"), ["created", "running"]);
    let refusal = refused(&mut qmp, "block-job-complete", json!({"device": "s"}));
    assert_eq!(refusal, "Job 's' in state 'running' cannot accept command verb 'complete'");
    run(&mut qmp, "block-job-pause", json!({"device": "s"}));
    assert_eq!(job_events(&mut qmp, "paused"), ["paused"]);
    assert_eq!(jobs(&mut qmp)[0]["paused"], true);
    assert_eq!(
        refused(&mut qmp, "block-job-pause", json!({"device": "s"})),
        "Job is already paused"
    );
    run(&mut qmp, "block-job-set-speed", json!({"device": "s", "speed": 0}));
    run(&mut qmp, "block-job-resume", json!({"device": "s"}));
    assert_eq!(job_events(&mut qmp, "READY"), ["running", "ready", "READY"]);
    run(&mut qmp, "block-job-cancel", json!({"device": "s"}));
    job_events(&mut qmp, "concluded");
    let shown = qmp.execute("query-jobs", json!({})).unwrap();
    assert_eq!((&shown[0]["id"], &shown[0]["status"]), (&json!("s"), &json!("concluded")));
    run(&mut qmp, "job-dismiss", json!({"id": "s"}));
    assert_eq!(job_events(&mut qmp, "null"), ["null"]);
    vmm.process.kill().unwrap();
    assert_same(&image, &images.at("copy"));
}

/// A destination on this host that gets its own copy of the disk.
fn receive(images: &Images) -> ferry::Destination {
    let give = format!("root={}", images.at("there").display());
    ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap()
}

#[test]
#[needs(kvm)]
fn a_copy_in_sync_has_all_that_the_guest_wrote_before_it_moved() {
    for mode in ["background", "write-blocking"] {
        let images = Images::of(DISK);
        let image = images.blank("root");
        let vmm = started(&busy(&image));
        let mut qmp = vmm.qmp().unwrap();
        let copy = images.at("copy");
        run(&mut qmp, "drive-mirror", mirror(&copy, json!({"copy-mode": mode})));
        job_events(&mut qmp, "READY");
        let destination = receive(&images);
        let keep = ["--disks", "full", "--keep-source"];
        let ended = ferry::migrate_well(&vmm, &destination.address, &keep).unwrap();
        assert_eq!(ended.summary["status"], "completed");
        // It ends by itself, and well: the guest writes here no more.
        let end = ["waiting", "pending", "COMPLETED", "concluded", "null"];
        assert_eq!(job_events(&mut qmp, "null"), end, "{mode}");
        // Each sector that the guest has written is whole and in both: the disk that it has left, and its copy.
        assert_eq!(disk::verify(&image).unwrap(), disk::verify(&copy).unwrap(), "{mode}");
        assert_same(&image, &copy);
        let mut moved = destination.vmm;
        assert_eq!(moved.check().unwrap().corrupt, 0);
    }
}

#[test]
#[needs(kvm)]
fn a_guest_does_not_move_while_a_copy_is_not_in_sync_nor_is_a_disk_switched_over_in_a_move() {
    let images = Images::of(DISK);
    let vmm = started(&busy(&images.blank("root")));
    let mut qmp = vmm.qmp().unwrap();
    let slow = json!({"speed": 1 << 20, "job-id": "s"});
    run(&mut qmp, "drive-mirror", mirror(&images.at("copy"), slow));
    let destination = receive(&images);
    let migrate = json!({"uri": destination.address, "blk": true});
    let refusal = refused(&mut qmp, "migrate", migrate.clone());
    assert!(refusal.contains("cannot move while job 's' is running"), "{refusal}");
    run(&mut qmp, "block-job-set-speed", json!({"device": "s", "speed": 0}));
    job_events(&mut qmp, "READY");
    run(&mut qmp, "migrate-set-parameters", json!({"max-bandwidth": 1 << 20}));
    run(&mut qmp, "migrate", migrate);
    let refusal = refused(&mut qmp, "block-job-complete", json!({"device": "s"}));
    assert!(refusal.contains("cannot switch a disk over now"), "{refusal}");
    run(&mut qmp, "migrate_cancel", json!({}));
    qmp.wait_info(|info| info["status"] == "cancelled").unwrap();
    run(&mut qmp, "block-job-complete", json!({"device": "s"}));
    job_events(&mut qmp, "null");
    let_write(&vmm);
}

#[test]
#[needs(kvm)]
fn a_guest_does_not_move_without_a_copy_that_has_ended_on_the_way() {
    let images = Images::of(DISK);
    let mut vmm = started(&busy(&images.blank("root")));
    let mut qmp = vmm.qmp().unwrap();
    run(&mut qmp, "drive-mirror", mirror(&images.at("copy"), json!({"job-id": "m"})));
    job_events(&mut qmp, "READY");
    let destination = receive(&images);
    run(&mut qmp, "migrate-set-parameters", json!({"max-bandwidth": 1 << 20}));
    run(&mut qmp, "migrate", json!({"uri": destination.address, "blk": true}));
    run(&mut qmp, "block-job-cancel", json!({"device": "m"}));
    job_events(&mut qmp, "null");
    run(&mut qmp, "migrate-set-parameters", json!({"max-bandwidth": 0}));
    let end = qmp.wait_info(|info| info["status"] == "failed").unwrap();
    let why = end["error-desc"].as_str().unwrap();
    assert!(
        why.contains("the mirror m of disk root has ended while the guest was moving"),
        "{why}"
    );
    let_write(&vmm);
    assert_eq!(vmm.check().unwrap().corrupt, 0);
}

#[test]
#[needs(kvm)]
fn a_process_that_waits_for_a_guest_takes_its_sockets_with_it() {
    let images = Images::of(DISK);
    let give = format!("root={}", images.blank("there").display());
    let (address, socket) = (images.at("migration.sock"), images.at("nbd.sock"));
    let [listen, offer] = [&address, &socket].map(|path| format!("unix:{}", path.display()));
    let mut waiting = ferry::receive_at(&listen, &["--disk", &give, "--nbd", &offer]).unwrap();
    // A client in the middle of its handshake does not keep it.
    let client = Qmp::connect_raw(&socket, SOON).unwrap();
    waiting.vmm.process.signal(libc::SIGTERM).unwrap();
    waiting.vmm.process.exit_code(SOON).unwrap();
    assert!(!address.exists() && !socket.exists(), "a socket is left behind");
    drop(client);
}

#[test]
#[needs(kvm)]
fn a_person_sees_how_far_it_is_and_how_it_ends() {
    let images = Images::of(DISK);
    let vmm = started(&busy(&images.blank("root")));
    let socket = format!("unix:{}", vmm.socket().display());
    let ctl = |words: &[&str]| {
        let all = [&["ctl", socket.as_str()], words].concat();
        let output = ferry::command(&all).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8_lossy(&said).into_owned())
    };
    let copy = images.at("copy");
    let copy = copy.to_str().unwrap();
    let (code, said) = ctl(&["mirror", "root", copy, "--format", "qcow2", "--wait"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("the copy is in sync"), "{said}");
    let (_, list) = ctl(&["job", "list"]);
    assert!(list.contains("root") && list.contains("ready"), "{list}");
    let (code, said) = ctl(&["job", "cancel", "root"]);
    assert_eq!(code, 0, "{said}");
    let (code, said) = ctl(&["job", "wait", "nope"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("there is no such job"), "{said}");
    let second = images.at("second");
    let (code, said) = ctl(&["mirror", "root", second.to_str().unwrap(), "--complete"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("completed"), "{said}");
    let_write(&vmm);
}

/// A `qemu-nbd` that serves a raw image, until it is dropped.
struct NbdServer {
    socket: PathBuf,
    process: Process,
}

impl NbdServer {
    fn start(images: &Images, image: &Path) -> Self {
        let socket = images.at("nbd.sock");
        // It does not lock the image: a guest may come to run on it.
        let options = format!(
            "driver=raw,file.driver=file,file.locking=off,file.filename={}",
            image.display()
        );
        let process = Process::start(
            Command::new("qemu-nbd")
                .args(["--persistent", "--shared=8", "--export-name=root", "--socket"])
                .arg(&socket)
                .args(["--image-opts", &options]),
        );
        let process = process.unwrap();
        drop(Qmp::connect_raw(&socket, SOON).unwrap());
        Self { socket, process }
    }

    fn url(&self) -> String {
        format!("nbd:unix:{}:exportname=root", self.socket.display())
    }
}

#[test]
#[needs(kvm, qemu_nbd)]
fn a_guest_that_moves_finds_its_disk_at_an_nbd_server_of_the_destination() {
    let images = Images::of(DISK);
    let (image, there) = (images.blank("root"), images.blank("there"));
    let server = NbdServer::start(&images, &there);
    let vmm = started(&busy(&image));
    let mut qmp = vmm.qmp().unwrap();
    let existing = json!({"mode": "existing", "format": "raw", "job-id": "m"});
    run(&mut qmp, "drive-mirror", mirror(Path::new(&server.url()), existing));
    job_events(&mut qmp, "READY");
    let_write(&vmm);
    // The destination's disk is what the server serves: as if it were shared.
    let destination = receive(&images);
    let shared = ["--disks", "none", "--keep-source"];
    let ended = ferry::migrate_well(&vmm, &destination.address, &shared).unwrap();
    assert_eq!(ended.summary["status"], "completed");
    job_events(&mut qmp, "null");
    let mut moved = destination.vmm;
    moved.wait_next_line("^HB ").unwrap();
    let check = moved.check().unwrap();
    assert!(check.count > 0 && check.corrupt == 0, "{check:?}");
    // What the guest has left is whole as well.
    disk::verify(&image).unwrap();
}

#[test]
#[needs(kvm)]
fn a_destination_offers_its_image_until_the_guest_takes_it() {
    for tcp in [false, true] {
        let images = Images::of(DISK);
        let (image, there) = (images.blank("root"), images.blank("there"));
        let vmm = started(&busy(&image));
        let mut qmp = vmm.qmp().unwrap();
        let socket = images.at("nbd.sock");
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (offer, target) = match tcp {
            true => (format!("tcp:127.0.0.1:{port}"), format!("nbd://127.0.0.1:{port}/root")),
            false => (
                format!("unix:{}", socket.display()),
                format!("nbd+unix:///root?socket={}", socket.display()),
            ),
        };
        let give = format!("root={}", there.display());
        let options = ["--disk", &give, "--nbd", &offer];
        let destination = ferry::receive_at("tcp:127.0.0.1:0", &options).unwrap();
        let existing = json!({"mode": "existing", "job-id": "m"});
        run(&mut qmp, "drive-mirror", mirror(Path::new(&target), existing));
        job_events(&mut qmp, "READY");
        let_write(&vmm);
        let shared = ["--disks", "none", "--keep-source"];
        let ended = ferry::migrate_well(&vmm, &destination.address, &shared).unwrap();
        assert_eq!(ended.summary["status"], "completed");
        let end = job_events(&mut qmp, "null");
        assert!(end.contains(&"COMPLETED".to_owned()), "{end:?}");
        let mut moved = destination.vmm;
        moved.wait_next_line("^HB ").unwrap();
        let check = moved.check().unwrap();
        assert!(check.count > 0 && check.corrupt == 0, "{check:?}");
        assert!(!socket.exists(), "the server has ended");
        disk::verify(&image).unwrap();
    }
    for (options, expected) in [
        (vec!["--nbd", "unix:/x"], "--nbd needs the images to offer"),
        (vec!["--nbd", "unix:/x", "--disk", "root=/no/such/image"], "is not: create it"),
    ] {
        let arguments = [&["receive", "tcp:127.0.0.1:0"], options.as_slice()].concat();
        let (code, said) = ferry::end_of(&arguments).unwrap();
        assert_eq!(code, 126, "{said}");
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
#[needs(kvm, qemu_nbd)]
fn a_server_that_dies_stops_or_comes_back_costs_the_guest_nothing() {
    let images = Images::of(DISK);
    let (image, there) = (images.blank("root"), images.blank("there"));
    let vmm = started(&busy(&image));
    let mut qmp = vmm.qmp().unwrap();
    let options = json!({
        "mode": "existing", "format": "raw", "job-id": "m", "on-target-error": "stop",
    });
    let server = NbdServer::start(&images, &there);
    run(&mut qmp, "drive-mirror", mirror(Path::new(&server.url()), options.clone()));
    job_events(&mut qmp, "READY");
    // Killed: the job rests, the guest goes on.
    drop(server);
    let stopped = job_events(&mut qmp, "standby");
    assert_eq!(stopped.first().map(String::as_str), Some("ERROR"), "{stopped:?}");
    assert_eq!(
        (&jobs(&mut qmp)[0]["paused"], &jobs(&mut qmp)[0]["ready"]),
        (&json!(true), &json!(false))
    );
    let_write(&vmm);
    // It is there again: the job goes on, with all that the old one may not have kept.
    std::fs::remove_file(images.at("nbd.sock")).ok();
    let mut server = NbdServer::start(&images, &there);
    let is_ready = |qmp: &mut Qmp| {
        let job = &jobs(qmp)[0];
        job["ready"] == true && job["status"] == "ready"
    };
    let deadline = Instant::now() + SOON;
    while !is_ready(&mut qmp) {
        assert!(Instant::now() < deadline, "{}", jobs(&mut qmp));
        // Reconnecting is tried at most once in a second: the first attempts may come too early.
        if jobs(&mut qmp)[0]["paused"] == true {
            run(&mut qmp, "block-job-resume", json!({"device": "m"}));
        }
        let_write(&vmm);
    }
    run(&mut qmp, "stop", json!({}));
    run(&mut qmp, "block-job-cancel", json!({"device": "m"}));
    assert!(job_events(&mut qmp, "null").contains(&"COMPLETED".to_owned()));
    assert_eq!(disk::verify(&image).unwrap(), disk::verify(&there).unwrap());
    run(&mut qmp, "cont", json!({}));

    // Stopped, so that it neither answers nor goes: a cancel ends the job nevertheless.
    run(&mut qmp, "drive-mirror", mirror(Path::new(&server.url()), options));
    job_events(&mut qmp, "READY");
    server.process.signal(libc::SIGSTOP).unwrap();
    let_write(&vmm);
    run(&mut qmp, "block-job-cancel", json!({"device": "m", "force": true}));
    assert!(job_events(&mut qmp, "null").contains(&"CANCELLED".to_owned()));
    let_write(&vmm);
}

#[test]
#[needs(kvm)]
fn the_end_of_a_vmm_in_the_middle_leaves_its_image_whole() {
    for turn in 0..3 {
        let images = Images::of(DISK);
        let image = images.blank("root");
        let mut vmm = started(&busy(&image));
        let mut qmp = vmm.qmp().unwrap();
        let slow = json!({"speed": if turn == 0 { 4 << 20 } else { 0 }});
        run(&mut qmp, "drive-mirror", mirror(&images.at("copy"), slow));
        let at = ["running", "ready", "waiting"][turn];
        if at == "waiting" {
            job_events(&mut qmp, "READY");
            run(&mut qmp, "block-job-complete", json!({"device": "root"}));
        }
        job_events(&mut qmp, at);
        vmm.process.kill().unwrap();
        // Either is whole if the device may have been on it.
        disk::verify(&image).unwrap();
        if at == "waiting" {
            disk::verify(&images.at("copy")).unwrap();
        }
    }
}

#[test]
#[needs(kvm)]
fn a_copy_of_the_top_layer_has_the_same_backing_file() {
    let images = Images::of(DISK);
    let base = images.blank("base");
    fill(&base, 32 * MIB, MIB, Pattern::Random).unwrap();
    let image = images.at("root");
    overlay(&image, &base).unwrap();
    let mut guest = busy(&image);
    guest.disks[0].push_str(",format=qcow2");
    let mut vmm = started(&guest);
    let mut qmp = vmm.qmp().unwrap();
    let copy = images.at("copy");
    run(&mut qmp, "drive-mirror", mirror(&copy, json!({"sync": "top", "format": "qcow2"})));
    job_events(&mut qmp, "READY");
    let_write(&vmm);
    run(&mut qmp, "block-job-complete", json!({"device": "root"}));
    assert!(job_events(&mut qmp, "null").contains(&"COMPLETED".to_owned()));
    let blocks = qmp.execute("query-block", json!({})).unwrap();
    assert_eq!(blocks[0]["inserted"]["file"], json!(copy));
    assert_eq!(blocks[0]["inserted"]["backing_file"], json!(base));
    let_write(&vmm);
    assert_eq!(vmm.check().unwrap().corrupt, 0);
}

#[test]
#[needs(kvm)]
fn a_copy_of_what_is_written_from_now_on_has_the_disk_as_its_backing_file() {
    // Writes of single sectors: the rest of their clusters comes from the disk.
    for more in [json!({}), json!({"granularity": 4096}), json!({"copy-mode": "write-blocking"})] {
        let images = Images::of(DISK);
        let image = images.blank("root");
        let mut vmm = started(&busy(&image));
        let mut qmp = vmm.qmp().unwrap();
        let copy = images.at("copy");
        let mut arguments = json!({"sync": "none", "format": "qcow2"});
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        run(&mut qmp, "drive-mirror", mirror(&copy, arguments));
        job_events(&mut qmp, "READY");
        let_write(&vmm);
        run(&mut qmp, "block-job-complete", json!({"device": "root"}));
        let end = ["waiting", "pending", "COMPLETED", "concluded", "null"];
        assert_eq!(job_events(&mut qmp, "null"), end, "{more}");
        let blocks = qmp.execute("query-block", json!({})).unwrap();
        assert_eq!(blocks[0]["inserted"]["backing_file"], json!(image));
        let frozen = std::fs::read(&image).unwrap();
        let_write(&vmm);
        assert_eq!(vmm.check().unwrap().corrupt, 0, "{more}");
        let now = std::fs::read(&image).unwrap();
        assert!(frozen == now, "the backing file is written no more");
    }
}

#[test]
#[needs(kvm, mounts)]
fn a_target_without_space_pauses_the_job_until_there_is_some() {
    let images = Images::of(DISK);
    let image = images.blank("root");
    let folder = images.at("small");
    std::fs::create_dir(&folder).unwrap();
    let small = SmallFileSystem::mount(&folder, DISK / 2).unwrap();
    let vmm = started(&busy(&image));
    let mut qmp = vmm.qmp().unwrap();
    let copy = folder.join("copy");
    let options = json!({"on-target-error": "enospc", "job-id": "m"});
    run(&mut qmp, "drive-mirror", mirror(&copy, options));
    let seen = job_events(&mut qmp, "paused");
    assert!(seen.contains(&"ERROR".to_owned()), "{seen:?}");
    let job = &jobs(&mut qmp)[0];
    assert_eq!((&job["io-status"], &job["status"]), (&json!("nospace"), &json!("paused")));
    let_write(&vmm);
    small.resize(2 * DISK).unwrap();
    run(&mut qmp, "block-job-resume", json!({"device": "m"}));
    let seen = job_events(&mut qmp, "READY");
    assert!(seen.ends_with(&["ready".to_owned(), "READY".to_owned()]), "{seen:?}");
    assert_eq!(jobs(&mut qmp)[0]["io-status"], "ok");
    run(&mut qmp, "block-job-complete", json!({"device": "m"}));
    job_events(&mut qmp, "null");
    let_write(&vmm);
}
