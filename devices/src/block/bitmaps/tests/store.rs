//! Persistent bitmaps and their file: good, outdated, damaged, unwritable.

use super::*;
use crate::block::qcow2::{BackingChoice, Qcow2File};
use crate::block::raw::{Cache, RawFile};
use crate::block::{Format, open_image};
use std::error::Error;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

struct Image {
    _folder: tempfile::TempDir,
    path: PathBuf,
    format: Format,
}

impl Image {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        std::fs::write(&path, vec![0; usize::try_from(MIB).unwrap()]).unwrap();
        Self { _folder: folder, path, format: Format::Raw }
    }

    fn qcow2() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.qcow2");
        drop(Qcow2File::create(&path, &path, MIB, Cache::Writeback, None).unwrap());
        Self { _folder: folder, path, format: Format::Qcow2 }
    }

    fn file(&self) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(".bitmaps");
        path.into()
    }

    fn open(&self, read_only: bool) -> Arc<BlockNode> {
        let backing = BackingChoice::Recorded;
        let image = open_image(&self.path, self.format, read_only, Cache::Writeback, backing);
        let node = Arc::new(BlockNode::new("d", image.unwrap()));
        node.lock().unwrap();
        node
    }

    fn load(&self) -> Arc<BlockNode> {
        let node = self.open(false);
        node.load_bitmaps().unwrap();
        node.mark_bitmaps().unwrap();
        node
    }

    /// Two bitmaps: `on` with a sector at 64 KiB, `off` with one at 128 KiB.
    fn with_bitmaps(self) -> Self {
        let node = self.load();
        node.bitmaps().add(persistent("on", 512)).unwrap();
        node.bitmaps().add(persistent("off", 4096)).unwrap();
        node.bitmaps().add(new("temporary", 4096)).unwrap();
        node.bitmaps().disable(&name("on")).unwrap();
        write(&node, 131_072);
        node.bitmaps().disable(&name("off")).unwrap();
        node.bitmaps().enable(&name("on")).unwrap();
        write(&node, 65_536);
        close(&node);
        self
    }
}

fn persistent(text: &str, granularity: u64) -> NewBitmap {
    NewBitmap { persistent: true, ..new(text, granularity) }
}

fn close(node: &BlockNode) {
    node.write_back().unwrap();
    node.close_bitmaps().unwrap();
    node.unlock();
}

/// Names of those that are inconsistent.
fn inconsistent(node: &BlockNode) -> Vec<String> {
    let info = node.bitmaps().info().into_iter();
    info.filter(|info| info.inconsistent).map(|info| info.name.to_string()).collect()
}

/// All there is to say about why bitmaps cannot be loaded, and what to do.
fn refusal(image: &Image) -> String {
    refusal_to(&image.open(false))
}

fn refusal_to(node: &BlockNode) -> String {
    let error = node.load_bitmaps().unwrap_err();
    assert_eq!(node.bitmaps().info(), [], "nothing of it is believed");
    assert_eq!(node.writes.list().len(), 0);
    let causes = std::iter::successors(error.source(), |error| (*error).source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[test]
fn persistent_bitmaps_outlive_the_disk_and_go_on_recording() {
    for image in [Image::new(), Image::qcow2()] {
        let image = image.with_bitmaps();
        let mode = std::fs::metadata(image.file()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        for _ in 0..2 {
            let node = image.load();
            assert_eq!(shown(&node), ["on 512 recording", "off 4096"]);
            assert!(node.bitmaps().info().iter().all(|info| info.persistent));
            let entries = lock(&node.bitmaps().entries).clone();
            assert!(entries[0].bitmap.is_marked(65_536) && entries[1].bitmap.is_marked(131_072));
            close(&node);
        }
        let node = image.load();
        write(&node, 0);
        assert_eq!(shown(&node), ["on 1024 recording", "off 4096"]);
        node.bitmaps().remove(&name("on")).unwrap();
        node.bitmaps().remove(&name("off")).unwrap();
        close(&node);
        assert!(!image.file().exists(), "without bitmaps there is no file");
        assert_eq!(std::fs::read_dir(image.path.parent().unwrap()).unwrap().count(), 1);
    }
}

#[test]
fn after_a_crash_they_are_inconsistent_and_stay_so_until_they_are_removed() {
    let image = Image::new().with_bitmaps();
    drop(image.load());
    for _ in 0..2 {
        let node = image.load();
        assert_eq!(inconsistent(&node), ["on", "off"]);
        assert_eq!(shown(&node), ["on 0", "off 0"]);
        assert_eq!(node.writes.list().len(), 0);
        close(&node);
    }
    let node = image.load();
    node.bitmaps().remove(&name("on")).unwrap();
    node.bitmaps().add(persistent("on", 512)).unwrap();
    node.mark_added_bitmaps().unwrap();
    drop(node);
    let node = image.load();
    assert_eq!(inconsistent(&node), ["off", "on"], "also one that was never stored");
    node.bitmaps().remove(&name("on")).unwrap();
    node.bitmaps().add(persistent("on", 512)).unwrap();
    // Stored on request: the content is there, but a crash is a crash.
    node.save_bitmaps().unwrap();
    drop(node);
    let node = image.load();
    assert_eq!(inconsistent(&node), ["off", "on"]);
    node.bitmaps().remove(&name("on")).unwrap();
    node.bitmaps().remove(&name("off")).unwrap();
    close(&node);
    assert_eq!(image.load().bitmaps().info(), []);
}

#[test]
fn what_was_changed_replaced_or_copied_since_makes_them_inconsistent() {
    let stale = |change: &dyn Fn(&Image)| {
        let image = Image::new().with_bitmaps();
        change(&image);
        inconsistent(&image.load()).len()
    };
    assert_eq!(stale(&|_| {}), 0);
    let later = |image: &Image| {
        let file = std::fs::File::options().write(true).open(&image.path).unwrap();
        let at = file.metadata().unwrap().modified().unwrap();
        file.set_modified(at + std::time::Duration::from_nanos(1)).unwrap();
    };
    assert_eq!(stale(&later), 2);
    let copied = |image: &Image| {
        let (copy, at) = (image.path.with_extension("copy"), std::fs::metadata(&image.path));
        std::fs::copy(&image.path, &copy).unwrap();
        let file = std::fs::File::options().write(true).open(&copy).unwrap();
        file.set_modified(at.unwrap().modified().unwrap()).unwrap();
        std::fs::rename(&copy, &image.path).unwrap();
    };
    assert_eq!(stale(&copied), 2);
}

#[test]
fn a_read_only_disk_shows_its_bitmaps_and_writes_nothing() {
    let image = Image::new().with_bitmaps();
    let before = std::fs::read(image.file()).unwrap();
    let node = image.open(true);
    node.load_bitmaps().unwrap();
    assert_eq!(shown(&node), ["on 512 recording", "off 4096"]);
    let refused = node.bitmaps().clear(&name("on")).unwrap_err();
    assert_eq!(refused.to_string(), "Bitmap 'on' is readonly and cannot be modified");
    assert!(matches!(node.bitmaps().remove(&name("on")), Err(BitmapError::ReadOnly { .. })));
    let refused = node.bitmaps().add(persistent("b", 512)).unwrap_err();
    assert!(refused.to_string().ends_with("'d': the disk is read-only"), "{refused}");
    node.bitmaps().add(new("b", 4096)).unwrap();
    node.bitmaps().merge(&name("b"), vec![source("on")]).unwrap();
    node.save_bitmaps().unwrap();
    close(&node);
    assert_eq!(std::fs::read(image.file()).unwrap(), before);
    assert_eq!(inconsistent(&image.load()), Vec::<String>::new());
}

#[test]
fn a_file_truncated_anywhere_is_refused() {
    let image = Image::new().with_bitmaps();
    let whole = std::fs::read(image.file()).unwrap();
    let (node, file) = (image.open(false), std::fs::File::options().write(true).open(image.file()));
    let file = file.unwrap();
    for len in (0..whole.len()).rev() {
        file.set_len(len as u64).unwrap();
        let why = refusal_to(&node);
        assert!(why.contains("disk.img.bitmaps cannot be used: delete it to run without"), "{why}");
        assert!(why.contains("truncated or damaged") || len < 40, "{len}: {why}");
    }
    std::fs::write(image.file(), [whole.as_slice(), b"x"].concat()).unwrap();
    assert!(refusal_to(&node).contains("checksum is wrong"));
}

#[test]
fn a_file_with_any_bit_flipped_is_refused() {
    let image = Image::new().with_bitmaps();
    let whole = std::fs::read(image.file()).unwrap();
    let (node, file) = (image.open(false), std::fs::File::options().write(true).open(image.file()));
    let file = file.unwrap();
    for bit in 0..whole.len() * 8 {
        let (good, at) = (whole[bit / 8], bit as u64 / 8);
        file.write_all_at(&[good ^ 1 << (bit % 8)], at).unwrap();
        let why = refusal_to(&node);
        file.write_all_at(&[good], at).unwrap();
        let expected = match bit / 8 {
            0..8 => "does not hold bitmaps",
            8..12 => "and only version 1 is known",
            _ => "checksum is wrong",
        };
        assert!(why.contains(expected), "bit {bit}: {why}");
    }
    node.load_bitmaps().unwrap();
}

/// The file with another header or other chunks, and the checksum that belongs to it.
fn forged(image: &Image, change: impl FnOnce(String, Vec<u8>) -> (String, Vec<u8>)) {
    use sha2::{Digest, Sha256};
    let whole = std::fs::read(image.file()).unwrap();
    let len = usize::from(whole[12]) + usize::from(whole[13]) * 256;
    let header = String::from_utf8(whole[16..16 + len].to_vec()).unwrap();
    let chunks = whole[16 + len..whole.len() - 32].to_vec();
    let (header, chunks) = change(header, chunks);
    let len = u32::try_from(header.len()).unwrap();
    #[expect(clippy::little_endian_bytes, reason = "the codec")]
    let mut bytes = [&whole[..12], &len.to_le_bytes(), header.as_bytes(), &chunks].concat();
    bytes.extend(Sha256::digest(&bytes));
    std::fs::write(image.file(), bytes).unwrap();
}

#[test]
fn a_file_that_makes_no_sense_is_refused_though_its_checksum_is_right() {
    let good = Image::new().with_bitmaps();
    forged(&good, |header, chunks| (header, chunks));
    assert_eq!(shown(&good.load()).len(), 2);
    let header = |from: &str, to: &str| {
        let image = Image::new().with_bitmaps();
        forged(&image, |header, chunks| {
            assert!(header.contains(from), "{header}");
            (header.replacen(from, to, 1), chunks)
        });
        refusal(&image)
    };
    for (from, to, why) in [
        ("1048576", "1049088", "is of a disk of 1049088 bytes, and this one has 1048576"),
        ("\"off\"", "\"on\"", "Bitmap already exists: on"),
        ("\"off\"", "\"\"", "Bitmap name cannot be empty"),
        ("\"off\"", "\"a\\u0000\"", "has a control character"),
        ("4096", "4097", "Granularity must be power of 2"),
        ("4096", "134217728", "Granularity must be at most"),
        ("disk_bytes", "disk_sizes", "unknown field"),
        // The words are those of finer granules.
        ("4096", "65536", "a chunk of 32 bytes at 0 is not in a bitmap of 8 bytes"),
    ] {
        let got = header(from, to);
        assert!(got.contains(why), "{from} -> {to}: {got}");
    }
    let chunks = |change: &dyn Fn(&mut Vec<u8>)| {
        let image = Image::new().with_bitmaps();
        forged(&image, |header, mut chunks| {
            change(&mut chunks);
            (header, chunks)
        });
        refusal(&image)
    };
    assert!(chunks(&|all| all.push(0)).contains("something follows"));
    assert!(chunks(&|all| all.truncate(all.len() - 1)).contains("fill whole buffer"));
    assert!(chunks(&|all| all[0] = 4).contains("does not consist of words"));
    assert!(chunks(&|all| all[2] = 1).contains("is not in a bitmap of 256 bytes"));
    assert!(chunks(&|all| all[8..12].fill(0)).contains("out of order"));
    assert!(chunks(&|all| all[11] = 1).contains("is longer than 65536"));
    // The same chunk twice.
    let twice = |all: &mut Vec<u8>| drop(all.splice(0..0, all[..12 + 256].to_vec()));
    assert!(chunks(&twice).contains("out of order"));
    let many = |all: usize| {
        let image = Image::new().with_bitmaps();
        forged(&image, |header, chunks| {
            let (start, records) = header.split_at(header.find('[').unwrap() + 1);
            let record = &records[..=records.find('}').unwrap()];
            let records = (0..all).map(|at| record.replacen("on", &format!("b{at}"), 1) + ",");
            let header = format!("{start}{}{record}]}}", records.collect::<String>());
            (header, [vec![255; 8 * (all + 1)], chunks].concat())
        });
        refusal(&image)
    };
    assert!(many(MAX_BITMAPS).contains("a disk has at most 1024 bitmaps"));
    assert!(many(20_000).contains("more than 1048576"));
}

#[test]
fn what_is_no_file_is_neither_followed_nor_waited_for() {
    let image = Image::new();
    std::fs::create_dir(image.file()).unwrap();
    assert!(refusal(&image).contains("is not a regular file"));
    std::fs::remove_dir(image.file()).unwrap();
    std::os::unix::fs::symlink("/dev/zero", image.file()).unwrap();
    assert!(refusal(&image).contains("is not a regular file"));
    std::fs::remove_file(image.file()).unwrap();
    let fifo = rustix::fs::CWD;
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mknodat(fifo, image.file(), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert!(refusal(&image).contains("is not a regular file"));
}

/// Makes the file at `path` unwritable for anybody, root included: a folder is in the way.
fn obstruct(path: &Path) -> PathBuf {
    let mut partial = path.to_owned().into_os_string();
    partial.push(".partial");
    std::fs::create_dir(&partial).unwrap();
    partial.into()
}

#[test]
fn what_cannot_be_stored_at_close_is_named_and_inconsistent_at_the_next_start() {
    let image = Image::new().with_bitmaps();
    let node = image.load();
    let obstacle = obstruct(&image.file());
    let error = node.close_bitmaps().unwrap_err().to_string();
    assert!(error.starts_with("cannot store bitmaps in /"), "{error}");
    assert!(error.ends_with("will be inconsistent at the next start: on, off"), "{error}");
    // Nor can a disk be used whose file cannot say so.
    drop(node);
    let node = image.open(false);
    node.load_bitmaps().unwrap();
    assert!(matches!(node.mark_bitmaps(), Err(StoreError::Mark { .. })));
    drop(node);
    std::fs::remove_dir(obstacle).unwrap();
    assert_eq!(inconsistent(&image.load()), ["on", "off"]);
}

#[test]
fn a_disk_that_comes_back_keeps_its_bitmaps_unless_another_program_wrote_to_it() {
    let image = Image::new().with_bitmaps();
    let node = image.load();
    node.bitmaps().add(new("temporary", 512)).unwrap();
    let leaving = node.bitmaps().hold(&name("on")).unwrap();
    leaving.will_leave();
    node.leave_bitmaps(&AtomicBool::new(false)).unwrap();
    node.unlock();
    // Another process meanwhile: those that travel are not in the file.
    let other = image.load();
    assert_eq!(shown(&other), ["off 4096"]);
    close(&other);
    // A guest that comes back must run, marked file or not: see the last part.
    let obstacle = obstruct(&image.file());
    node.lock().unwrap();
    assert!(node.load_bitmaps().unwrap());
    node.mark_or_remove_bitmaps();
    assert!(!image.file().exists(), "it says what is not true any more");
    std::fs::remove_dir(obstacle).unwrap();
    drop(leaving);
    node.mark_bitmaps().unwrap();
    write(&node, 0);
    assert_eq!(shown(&node), ["on 1024 recording", "off 4096", "temporary 512 recording"]);
    // While it is here, a crash would be noticed.
    let copy = std::fs::read(image.file()).unwrap();
    assert!(String::from_utf8_lossy(&copy).contains("\"in_use\":true"));
    close(&node);
    let other = image.load();
    // Clocks have ticks.
    let written = || std::fs::metadata(&image.path).unwrap().modified().unwrap();
    let before = written();
    while written() == before {
        write(&other, 0);
    }
    close(&other);
    node.lock().unwrap();
    node.load_bitmaps().unwrap();
    assert_eq!(inconsistent(&node), ["on", "off", "temporary"]);
    assert_eq!(node.writes.list().len(), 0);
}

#[test]
fn one_that_has_arrived_under_the_same_name_is_a_conflict() {
    let image = Image::new().with_bitmaps();
    let node = image.open(false);
    let arriving = node.bitmaps().arrive(&persistent("on", 512)).unwrap();
    let error = node.load_bitmaps().unwrap_err();
    assert!(error.to_string().contains("do not fit those that are here already"), "{error}");
    assert_eq!(error.source().unwrap().to_string(), "Bitmap already exists: on");
    drop(arriving);
    // Nothing has happened to the file.
    node.load_bitmaps().unwrap();
    assert_eq!(shown(&node), ["on 512 recording", "off 4096"]);
    // One that arrives is stored like others.
    node.bitmaps().arrive(&persistent("new", 512)).unwrap().finish();
    close(&node);
    drop(node);
    assert_eq!(image.load().bitmaps().info().len(), 3);
}

#[test]
fn a_disk_without_a_file_has_no_persistent_bitmaps_and_writes_none() {
    let node = disk(MIB);
    node.load_bitmaps().unwrap();
    node.save_bitmaps().unwrap();
    node.close_bitmaps().unwrap();
    let image = Image::new();
    let node = image.load();
    node.bitmaps().add(new("b", 512)).unwrap();
    close(&node);
    assert!(!image.file().exists());
    drop(RawFile::open(&image.path, true, Cache::Writeback).unwrap());
}

#[test]
fn a_bitmap_that_has_not_arrived_whole_is_not_stored() {
    let image = Image::new();
    let node = image.load();
    let arriving = |text| node.bitmaps().arrive(&persistent(text, 512)).unwrap();
    let (whole, half) = (arriving("whole"), arriving("half"));
    write(&node, 0);
    whole.finish();
    close(&node);
    drop(half);
    assert_eq!(shown(&image.load()), ["whole 512 recording"]);
}

/// All that a destination does up to the handover.
fn borrow(image: &Image) -> Arc<BlockNode> {
    let node = image.open(false);
    node.load_bitmaps().unwrap();
    node
}

#[test]
fn a_destination_that_gives_the_image_back_has_changed_nothing_and_reads_it_again() {
    let image = Image::new().with_bitmaps();
    let source = image.load();
    let leave = || {
        source.leave_bitmaps(&AtomicBool::new(false)).unwrap();
        source.unlock();
    };
    leave();
    let stored = std::fs::read(image.file()).unwrap();
    let destination = borrow(&image);
    let arriving = destination.bitmaps().arrive(&persistent("arriving", 512)).unwrap();
    destination.forget_bitmaps();
    destination.unlock();
    assert_eq!(std::fs::read(image.file()).unwrap(), stored);
    let left: Vec<_> = destination.bitmaps().info().into_iter().map(|info| info.name).collect();
    assert_eq!(left, [name("arriving")]);
    assert_eq!(destination.writes.list().len(), 1);
    // The stop was called off: the guest runs at the source.
    source.lock().unwrap();
    assert!(source.load_bitmaps().unwrap());
    source.mark_bitmaps().unwrap();
    write(&source, 0);
    source.bitmaps().add(persistent("later", 512)).unwrap();
    leave();
    // The next stop is not.
    destination.lock().unwrap();
    assert!(!destination.load_bitmaps().unwrap());
    assert_eq!(inconsistent(&destination), Vec::<String>::new());
    drop(arriving);
    assert_eq!(shown(&destination), ["on 1024 recording", "off 4096", "later 0 recording"]);
    // It ends before it has marked them, and has written.
    write(&destination, 512);
    drop(destination);
    assert_eq!(inconsistent(&image.load()), ["on", "off", "later"]);
}

#[test]
fn the_end_of_a_process_stores_what_was_about_to_leave() {
    let image = Image::new().with_bitmaps();
    let node = image.load();
    let held = node.bitmaps().hold(&name("on")).unwrap();
    held.will_leave();
    close(&node);
    assert_eq!(shown(&image.load()), ["on 512 recording", "off 4096"]);
}

#[test]
fn a_store_that_is_called_off_leaves_the_file_alone() {
    let image = Image::new().with_bitmaps();
    let node = image.load();
    let before = std::fs::read(image.file()).unwrap();
    let path = image.file();
    let entries = lock(&node.bitmaps().entries).clone();
    let identity = file::Identity::of(&std::fs::File::open(&image.path).unwrap()).unwrap();
    let late = file::write(&path, MIB, &entries, identity, (false, true), &|| false);
    assert_eq!(late.unwrap_err().kind(), std::io::ErrorKind::Interrupted);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    // One that is done just before is not believed in: it is stored again.
    node.leave_bitmaps(&AtomicBool::new(false)).unwrap();
    node.keep_bitmaps();
    write(&node, 0);
    node.leave_bitmaps(&AtomicBool::new(true)).unwrap();
    close(&node);
    assert_eq!(shown(&image.load()), ["on 1024 recording", "off 4096"]);
}

#[test]
fn a_new_image_has_nothing_to_do_with_the_file_of_the_one_that_it_replaces() {
    let image = Image::new().with_bitmaps();
    let node = image.open(false);
    node.image_is_new();
    let arriving = node.bitmaps().arrive(&persistent("on", 512)).unwrap();
    node.load_bitmaps().unwrap();
    assert!(image.file().exists(), "the guest may not come");
    node.mark_bitmaps().unwrap();
    assert!(!image.file().exists());
    arriving.finish();
    node.mark_bitmaps().unwrap();
    close(&node);
    assert_eq!(shown(&image.load()), ["on 0 recording"]);
}

#[test]
fn a_symlink_to_the_image_shows_the_same_bitmaps() {
    let image = Image::new().with_bitmaps();
    let link = image.path.with_file_name("link");
    std::os::unix::fs::symlink(&image.path, &link).unwrap();
    let backend = RawFile::open(&link, false, Cache::Writeback).unwrap();
    let node = Arc::new(BlockNode::new("d", Box::new(backend)));
    node.lock().unwrap();
    node.load_bitmaps().unwrap();
    assert_eq!(shown(&node), ["on 512 recording", "off 4096"]);
}

#[test]
fn persistent_bitmaps_cannot_be_changed_once_they_are_given_up() {
    let image = Image::new().with_bitmaps();
    let node = image.load();
    node.bitmaps().add(new("temporary", 512)).unwrap();
    node.leave_bitmaps(&AtomicBool::new(false)).unwrap();
    let refused = |result: Result<(), BitmapError>| result.unwrap_err().to_string();
    let bitmaps = node.bitmaps();
    let given_up =
        "Bitmap 'on' cannot be modified: its disk has been given up, and the bitmap with it";
    assert_eq!(refused(bitmaps.clear(&name("on"))), given_up);
    assert_eq!(refused(bitmaps.remove(&name("on"))), given_up);
    assert!(refused(bitmaps.add(persistent("new", 512))).contains("has been given up"));
    bitmaps.clear(&name("temporary")).unwrap();
    // The guest stays after all.
    node.load_bitmaps().unwrap();
    bitmaps.clear(&name("on")).unwrap();
}

#[test]
fn a_store_waits_for_a_transaction_so_that_it_misses_no_write() {
    let image = Image::new().with_bitmaps();
    let node = image.load();
    // As one that merges: it has the turn.
    let turn = lock(&node.bitmaps().turn);
    let (tell, told) = std::sync::mpsc::channel();
    let closing = {
        let node = node.clone();
        std::thread::spawn(move || {
            tell.send(()).unwrap();
            node.close_bitmaps().unwrap();
        })
    };
    told.recv().unwrap();
    // It holds the file now, or will in a moment, and has to wait.
    write(&node, 0);
    drop(turn);
    closing.join().unwrap();
    node.unlock();
    assert_eq!(shown(&image.load()), ["on 1024 recording", "off 4096"]);
}

#[test]
fn one_that_arrives_while_others_are_stored_on_request_is_named_when_it_is_whole() {
    let image = Image::new().with_bitmaps();
    let node = image.load();
    let arriving = node.bitmaps().arrive(&persistent("new", 512)).unwrap();
    node.save_bitmaps().unwrap();
    arriving.finish();
    node.mark_bitmaps().unwrap();
    drop(node);
    assert_eq!(inconsistent(&image.load()), ["on", "off", "new"]);
}
