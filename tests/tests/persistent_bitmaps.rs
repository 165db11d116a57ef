//! Persistent dirty bitmaps in whole processes: recorded by a guest's writes, kept over the end of the process
//! and a move on shared storage, inconsistent after a crash.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use devices::block::bitmaps::{BitmapInfo, BitmapName, NewBitmap};
use ferry_tests::bitmaps::with_bitmaps;
use ferry_tests::ferry::{self, Guest};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::{disk, needs};
use serde_json::json;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const DISK_BYTES: u64 = 8 << 20;
const SECTOR: u64 = 512;

fn name(name: &str) -> BitmapName {
    BitmapName::new(name).unwrap()
}

/// A blank disk with two bitmaps, and a guest that writes to its first MiB only.
fn disk_and_guest(folder: &Path) -> (PathBuf, Guest) {
    let image = folder.join("disk.img");
    disk::create(&image, DISK_BYTES).unwrap();
    with_bitmaps(&image, |node| {
        for (text, granularity) in [("fine", SECTOR), ("coarse", 65_536)] {
            let (name, persistent, recording) = (name(text), true, true);
            let new = NewBitmap { name, granularity, persistent, recording };
            node.bitmaps().add(new).unwrap();
        }
    });
    let guest = Guest::new("work=disk disk_mb=1 hb_ms=20", 64).disk("root", &image);
    (image, guest)
}

/// That each granule is marked exactly if something was written there.
fn assert_exact(image: &Path) {
    let file = std::fs::File::open(image).unwrap();
    with_bitmaps(image, |node| {
        for text in ["fine", "coarse"] {
            let held = node.bitmaps().hold(&name(text)).unwrap();
            let mut bytes = vec![0; usize::try_from(held.granule_bytes()).unwrap()];
            for at in (0..DISK_BYTES).step_by(bytes.len()) {
                file.read_exact_at(&mut bytes, at).unwrap();
                let written = bytes.iter().any(|byte| *byte != 0);
                assert_eq!(held.is_marked(at), written, "{text}, at {at}");
            }
            assert!(held.marked_bytes() > 0 && held.marked_bytes() <= 1 << 20);
        }
    });
}

fn quit(vmm: &mut Vmm) {
    vmm.qmp().unwrap().execute("quit", json!({})).unwrap();
    vmm.process.wait(SOON).unwrap();
}

#[test]
#[needs(kvm)]
fn what_a_guest_writes_is_in_its_bitmaps_when_the_process_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let (image, guest) = disk_and_guest(folder.path());
    let mut vmm = ferry::run(&guest).unwrap();
    vmm.wait_line("^HB n=1 ").unwrap();
    quit(&mut vmm);
    assert_exact(&image);
    // A crash.
    let mut vmm = ferry::run(&guest).unwrap();
    vmm.wait_line("^HB n=1 ").unwrap();
    vmm.process.kill().unwrap();
    let inconsistent = |info: &BitmapInfo| info.inconsistent;
    assert!(with_bitmaps(&image, |node| node.bitmaps().info()).iter().all(inconsistent));
    // A guest does not start with a file that nobody can use; it says which.
    let file = folder.path().join("disk.img.bitmaps");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let disk = format!("path={},id=root", image.display());
    let (code, text) =
        ferry::end_of(["run", "--kernel", guest_images::KERNEL, "--disk", &disk]).unwrap();
    assert_eq!(code, 126, "{text}");
    let why = format!("disk root: the bitmaps in {} cannot be used: delete it", file.display());
    assert!(text.contains(&why), "{text}");
}

#[test]
#[needs(kvm)]
fn bitmaps_of_a_shared_disk_follow_the_guest_and_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (image, guest) = disk_and_guest(folder.path());
    let give = format!("root={}", image.display());
    let mut source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=1 ").unwrap();
    for _ in 0..3 {
        let destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
        ferry::migrate_well(&source, &destination.address, &[]).unwrap();
        source.process.wait(SOON).unwrap();
        source = destination.vmm;
        source.wait_line("^HB ").unwrap();
    }
    quit(&mut source);
    assert_exact(&image);
}
