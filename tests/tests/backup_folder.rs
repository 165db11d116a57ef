//! `ferry backup` as its user sees it: a folder of backups, how it is checked and restored, and what it survives.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::hosts::started;
use ferry_tests::process::{Process, SOON, Vmm};
use ferry_tests::{disk, needs};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const DISK: u64 = 8 << 20;

struct Case {
    files: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        let case = Self { files: tempfile::tempdir().unwrap() };
        disk::create(&case.image(), DISK).unwrap();
        case
    }

    fn at(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    fn image(&self) -> PathBuf {
        self.at("root.img")
    }

    fn folder(&self) -> PathBuf {
        self.at("backups")
    }

    fn start(&self) -> Vmm {
        started(&Guest::new("work=disk hb_ms=20", 64).disk("root", &self.image()))
    }

    fn save(&self, vmm: &Vmm, more: &[&str]) -> (i32, String) {
        let (socket, folder) = (vmm.socket().to_owned(), self.folder());
        let words = ["backup", text(&socket), text(&folder)];
        ferry::end_of([&words[..], more].concat()).unwrap()
    }

    fn saved(&self, vmm: &Vmm, kind: &str) -> String {
        let (code, said) = self.save(vmm, &[]);
        assert_eq!(code, 0, "{said}");
        assert!(said.contains(&format!("root: {kind} backup in root-")), "{said}");
        said
    }

    fn verify(&self) -> (i32, String) {
        ferry::end_of(["backup", "--verify", text(&self.folder())]).unwrap()
    }

    fn restore(&self, image: &Path, more: &[&str]) -> (i32, String) {
        let wanted = format!("root={}", image.display());
        let folder = self.folder();
        let words = ["backup", "--restore", text(&folder), wanted.as_str()];
        ferry::end_of([&words[..], more].concat()).unwrap()
    }

    fn manifest(&self) -> Value {
        let text = std::fs::read(self.folder().join("manifest.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn let_write(vmm: &Vmm) {
    for _ in 0..3 {
        vmm.wait_next_line("^HB ").unwrap();
    }
}

fn bitmaps(vmm: &Vmm) -> Vec<Value> {
    let blocks = vmm.qmp().unwrap().execute("query-block", json!({})).unwrap();
    blocks[0]["inserted"]["dirty-bitmaps"].as_array().cloned().unwrap_or_default()
}

#[test]
#[needs(kvm)]
fn what_is_restored_is_the_disk_of_the_newest_backup() {
    let case = Case::new();
    let mut vmm = case.start();
    case.saved(&vmm, "full");
    let mut generations = Vec::new();
    for turn in 1..3 {
        let_write(&vmm);
        case.saved(&vmm, "incremental");
        let image = case.at(&format!("restored{turn}"));
        let (code, said) = case.restore(&image, &[]);
        assert_eq!(code, 0, "{said}");
        // Every sector is whole, and what the guest has written since is not there.
        generations.push(disk::verify(&image).unwrap());
    }
    assert!(generations[0] < generations[1], "{generations:?}");
    // Of a guest that does not write, each byte is known.
    vmm.qmp().unwrap().execute("stop", json!({})).unwrap();
    case.saved(&vmm, "incremental");
    let (raw, qcow2) = (case.at("raw"), case.at("qcow2"));
    assert_eq!(case.restore(&raw, &[]).0, 0);
    assert!(std::fs::read(&raw).unwrap() == std::fs::read(case.image()).unwrap());
    let (code, said) = case.restore(&raw, &[]);
    assert!(code == 1 && said.contains("give --overwrite"), "{said}");
    assert_eq!(case.restore(&raw, &["--overwrite"]).0, 0);
    let wanted = format!("root={},format=qcow2", qcow2.display());
    let folder = case.folder();
    let (code, said) =
        ferry::end_of(["backup", "--restore", text(&folder), wanted.as_str()]).unwrap();
    assert_eq!(code, 0, "{said}");
    // One bitmap, the one that the manifest names.
    let left = bitmaps(&vmm);
    assert_eq!(left.len(), 1);
    let disk = &case.manifest()["disks"]["root"];
    assert_eq!((&left[0]["name"], &left[0]["persistent"]), (&disk["bitmap"], &json!(true)));
    assert_eq!(disk["files"].as_array().unwrap().len(), 4);
    assert_eq!(disk["files"][3]["backing"], "root-2.qcow2");
    // It survives the end of the process.
    vmm.qmp().unwrap().execute("quit", json!({})).unwrap();
    vmm.process.wait(SOON).unwrap();
    let vmm = case.start();
    case.saved(&vmm, "incremental");
    assert_eq!(case.verify().0, 0);
}

#[test]
#[needs(kvm)]
fn a_damaged_file_is_found_and_neither_restored_nor_built_on() {
    let case = Case::new();
    let vmm = case.start();
    let (code, said) = case.verify();
    assert!(code == 1 && said.contains("backups"), "{said}");
    case.saved(&vmm, "full");
    case.saved(&vmm, "incremental");
    let (code, said) = case.verify();
    assert!(code == 0 && said.contains("2 files of 1 disks"), "{said}");
    let full = case.folder().join("root-0.qcow2");
    let good = std::fs::read(&full).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    std::fs::write(&full, bad).unwrap();
    let (code, said) = case.verify();
    assert!(code == 1 && said.contains("root-0.qcow2: its SHA-256 is"), "{said}");
    let (code, said) = case.restore(&case.at("x"), &[]);
    assert!(code == 1 && said.contains("root-0.qcow2"), "{said}");
    assert!(!case.at("x").exists() && !case.at("x.partial").exists());
    // A chain that is broken by its length is seen before the next backup, which is a full one.
    std::fs::write(&full, &good[..good.len() - 1]).unwrap();
    let said = case.saved(&vmm, "full");
    assert!(said.contains("a full backup: root-0.qcow2 has"), "{said}");
    assert_eq!(case.restore(&case.at("y"), &[]).0, 0);
    disk::verify(&case.at("y")).unwrap();
}

#[test]
#[needs(kvm)]
fn a_vmm_that_is_killed_in_the_middle_leaves_the_earlier_backups_and_the_next_is_a_full_one() {
    let case = Case::new();
    let mut vmm = case.start();
    case.saved(&vmm, "full");
    let before = case.manifest();
    let_write(&vmm);
    let (socket, folder) = (vmm.socket().to_owned(), case.folder());
    let words = ["backup", text(&socket), text(&folder), "--max-bandwidth", "1"];
    let mut client = Process::start(&mut ferry::command(words)).unwrap();
    let mut qmp = vmm.qmp().unwrap();
    while qmp.execute("query-block-jobs", json!({})).unwrap() == json!([]) {
        qmp.wait_event("JOB_STATUS_CHANGE", SOON).unwrap();
    }
    vmm.process.kill().unwrap();
    assert_eq!(client.exit_code(SOON).unwrap(), 1);
    assert_eq!(case.manifest(), before);
    assert_eq!(case.verify().0, 0);
    let vmm = case.start();
    assert!(bitmaps(&vmm).iter().all(|bitmap| bitmap["inconsistent"] == true));
    let said = case.saved(&vmm, "full");
    assert!(said.contains("has missed writes"), "{said}");
    // What has missed writes is gone.
    assert_eq!(bitmaps(&vmm).len(), 1);
    let_write(&vmm);
    case.saved(&vmm, "incremental");
    assert_eq!(case.verify().0, 0);
}

#[test]
#[needs(kvm)]
fn a_client_that_is_killed_or_cancelled_leaves_nothing_that_harms_the_next_one() {
    let case = Case::new();
    let vmm = case.start();
    case.saved(&vmm, "full");
    let (socket, folder) = (vmm.socket().to_owned(), case.folder());
    let words = ["backup", text(&socket), text(&folder), "--max-bandwidth", "1"];
    for signal in [libc::SIGKILL, libc::SIGINT] {
        let_write(&vmm);
        let mut client = Process::start(&mut ferry::command(words)).unwrap();
        let mut qmp = vmm.qmp().unwrap();
        while qmp.execute("query-block-jobs", json!({})).unwrap() == json!([]) {
            qmp.wait_event("JOB_STATUS_CHANGE", SOON).unwrap();
        }
        let (code, said) = case.save(&vmm, &[]);
        assert!(code == 1 && said.contains("another `ferry backup` is using"), "{said}");
        client.signal(signal).unwrap();
        client.wait(SOON).unwrap();
        let said = case.saved(&vmm, "incremental");
        assert!(!said.contains("full"), "{said}");
        assert_eq!(bitmaps(&vmm).len(), 1);
        assert_eq!(vmm.qmp().unwrap().execute("query-jobs", json!({})).unwrap(), json!([]));
    }
    assert_eq!(case.verify().0, 0);
    assert_eq!(case.restore(&case.at("x"), &[]).0, 0);
    disk::verify(&case.at("x")).unwrap();
}

#[test]
#[needs(kvm)]
fn two_folders_have_bitmaps_of_their_own() {
    let case = Case::new();
    let vmm = case.start();
    case.saved(&vmm, "full");
    let other = Case { files: tempfile::tempdir().unwrap() };
    other.saved(&vmm, "full");
    assert_eq!(bitmaps(&vmm).len(), 2);
    let_write(&vmm);
    other.saved(&vmm, "incremental");
    case.saved(&vmm, "incremental");
    for case in [&case, &other] {
        assert_eq!(case.restore(&case.at("x"), &[]).0, 0);
        disk::verify(&case.at("x")).unwrap();
    }
    let (code, said) = case.save(&vmm, &["--disk", "nope"]);
    assert!(code == 1 && said.contains("no writable disk \"nope\""), "{said}");
    let (code, said) = case.save(&vmm, &["--full"]);
    assert!(code == 0 && said.contains("--full is given"), "{said}");
    let (code, _) = ferry::end_of(["backup", "only-one"]).unwrap();
    assert_eq!(code, 2);
}
