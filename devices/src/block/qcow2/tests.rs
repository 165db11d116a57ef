//! What a qcow2 image has to do as a disk.

use super::*;

fn base(folder: &Path, name: &str, byte: u8) -> Backing {
    let path = folder.join(name);
    std::fs::write(&path, vec![byte; 256 << 10]).unwrap();
    Backing { path, format: Format::Raw }
}

fn made(folder: &Path, backing: Option<&Backing>) -> (PathBuf, Qcow2File) {
    let (partial, path) = (folder.join("x.partial"), folder.join("x"));
    let image = Qcow2File::create(&partial, &path, 512 << 10, Cache::Writeback, backing).unwrap();
    image.lock().unwrap();
    std::fs::rename(partial, &path).unwrap();
    (path, image)
}

fn opened(path: &Path, read_only: bool) -> Qcow2File {
    let image =
        Qcow2File::open(path, read_only, Cache::Writeback, BackingChoice::Recorded).unwrap();
    image.lock().unwrap();
    image
}

fn bytes(image: &Qcow2File, at: u64) -> u8 {
    let mut sector = [0; 512];
    image.read_at(&mut sector, at).unwrap();
    assert!(sector.iter().all(|byte| *byte == sector[0]));
    sector[0]
}

#[test]
fn what_is_written_is_read_also_after_it_was_closed() {
    let folder = tempfile::tempdir().unwrap();
    let (path, image) = made(folder.path(), None);
    assert_eq!((image.len_bytes(), image.location()), (512 << 10, path.display().to_string()));
    assert_eq!(image.extent_at(0).unwrap().content, Content::Zero);
    image.write_at(&[7; 512], 512).unwrap();
    image.write_at(&[8; 70_000 / 512 * 512], 128 << 10).unwrap();
    assert_eq!(image.extent_at(512).unwrap().content, Content::Data);
    image.write_zeroes(128 << 10, 64 << 10, true).unwrap();
    image.flush().unwrap();
    drop(image);
    let image = opened(&path, false);
    assert_eq!([0, 512, 128 << 10, 192 << 10].map(|at| bytes(&image, at)), [0, 7, 0, 8]);
    assert!(image.backing().is_none());
}

#[test]
fn what_lies_on_a_backing_file_is_told_from_what_lies_above_it() {
    let folder = tempfile::tempdir().unwrap();
    let backing = base(folder.path(), "base", 3);
    let (path, image) = made(folder.path(), Some(&backing));
    assert_eq!(image.backing().unwrap().files(), [backing.path.display().to_string()]);
    assert_eq!([bytes(&image, 0), bytes(&image, 300 << 10)], [3, 0], "the base is shorter");
    assert_eq!(image.extent_at(0).unwrap().content, Content::Backing);
    image.write_at(&[9; 512], 64 << 10).unwrap();
    image.discard(128 << 10, 64 << 10).unwrap();
    assert_eq!(image.extent_at(64 << 10).unwrap().content, Content::Data);
    assert_eq!(image.extent_at(128 << 10).unwrap().content, Content::Zero);
    assert_eq!(
        [bytes(&image, 64 << 10), bytes(&image, 65 << 10), bytes(&image, 128 << 10)],
        [9, 3, 0]
    );
    image.flush().unwrap();
    // Nobody may write the base meanwhile, many may stand on it.
    image.lock().unwrap();
    let writer = super::super::raw::RawFile::open(&backing.path, false, Cache::Writeback).unwrap();
    assert!(writer.lock().is_err());
    image.unlock();
    writer.lock().unwrap();
    assert!(image.lock().is_err());
    drop((image, writer));
    let image = opened(&path, true);
    assert_eq!([bytes(&image, 64 << 10), bytes(&image, 0)], [9, 3]);
}

#[test]
fn a_backing_file_is_told_from_another_by_any_byte_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let identity = |backing: &Backing| {
        let (_, image) = made(folder.path(), Some(backing));
        image.lock().unwrap();
        let chain = image.backing().unwrap();
        (chain.len_bytes(), chain.digest(&|| true).unwrap())
    };
    let (one, same) = (base(folder.path(), "a", 1), base(folder.path(), "b", 1));
    // What `sha256sum` says of it.
    let said = "f317dd9d6ba01c465d82e4c4d55d01d270dda69db4a01a64c587a5593ac6084d";
    assert_eq!(identity(&one), (256 << 10, said.to_owned()));
    assert_eq!(identity(&one), identity(&same));
    // Large enough that samples would leave most of it out.
    for name in ["a", "c"] {
        let file = File::create(folder.path().join(name)).unwrap();
        file.set_len(64 << 20).unwrap();
    }
    let other = Backing { path: folder.path().join("c"), format: Format::Raw };
    assert_eq!(identity(&one), identity(&other));
    let file = OpenOptions::new().write(true).open(&other.path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[2], (33 << 20) + 6789).unwrap();
    assert_ne!(identity(&one), identity(&other));
}

#[test]
fn a_digest_is_remembered_while_the_image_is_locked_and_can_be_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let backing = base(folder.path(), "a", 1);
    let (_, image) = made(folder.path(), Some(&backing));
    image.lock().unwrap();
    let chain = image.backing().unwrap();
    let error = chain.digest(&|| false).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    let digest = chain.digest(&|| true).unwrap();
    assert_eq!(chain.digest(&|| panic!("it is known")).unwrap(), digest);
    image.unlock();
    assert!(chain.digest(&|| false).is_err(), "others may have written it");
}

#[test]
fn an_old_image_that_knows_no_zeroes_has_them_written() {
    let folder = tempfile::tempdir().unwrap();
    let (path, image) = made(folder.path(), None);
    image.write_at(&[7; 256 << 10], 0).unwrap();
    image.flush().unwrap();
    drop(image);
    // Version 2 is version 3 without what follows the 72 bytes of its header.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0, 0, 0, 2], 4).unwrap();
    let image = opened(&path, false);
    image.discard(0, 64 << 10).unwrap();
    for (at, may_unmap) in [(64 << 10, true), (128 << 10, false)] {
        image.write_zeroes(at, 64 << 10, may_unmap).unwrap();
        assert_eq!([bytes(&image, at), bytes(&image, at + 65_024)], [0, 0]);
    }
    assert_eq!(bytes(&image, 192 << 10), 7);
}

#[test]
fn what_was_written_back_is_there_for_who_opens_it_next() {
    let folder = tempfile::tempdir().unwrap();
    let (path, image) = made(folder.path(), None);
    image.write_at(&[7; 512], 300 << 10).unwrap();
    image.write_back().unwrap();
    image.unlock();
    let other = opened(&path, true);
    assert_eq!(bytes(&other, 300 << 10), 7);
}

#[test]
fn two_programs_that_take_turns_see_each_others_clusters_and_allocate_none_twice() {
    let folder = tempfile::tempdir().unwrap();
    let backing = base(folder.path(), "base", 3);
    let (path, one) = made(folder.path(), Some(&backing));
    // Opened while the other one still writes: what it knew then would be stale.
    let other = Qcow2File::open(&path, false, Cache::Writeback, BackingChoice::Recorded).unwrap();
    assert!(other.read_at(&mut [0; 512], 0).is_err(), "it is the other one's");
    assert!(matches!(other.lock(), Err(LockError::Held { .. })));
    let mut at = 0;
    for turn in 1..=4_u8 {
        let (mine, theirs) = if turn % 2 == 1 { (&one, &other) } else { (&other, &one) };
        mine.lock().unwrap();
        assert!(theirs.write_at(&[0; 512], 0).is_err());
        mine.write_at(&[turn; 512], at).unwrap();
        at += 64 << 10;
        mine.write_back().unwrap();
        for earlier in 1..=turn {
            let cluster = u64::from(earlier - 1) * (64 << 10);
            assert_eq!([bytes(mine, cluster), bytes(mine, cluster + 512)], [earlier, 3]);
        }
        mine.unlock();
    }
    // What has become another image in between is not taken for the same.
    let (path, image) = made(folder.path(), None);
    drop(image);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0, 0, 0, 0, 0, 0x10, 0, 0], 24).unwrap();
    let reopened =
        Qcow2File::open(&path, false, Cache::Writeback, BackingChoice::Recorded).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0, 0, 0, 0, 0, 8, 0, 0], 24).unwrap();
    assert!(matches!(reopened.lock(), Err(LockError::Unreadable { .. })));
    opened(&path, false);
}

#[test]
fn an_image_or_backing_file_that_is_a_fifo_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let refused = |path: &Path| {
        let error =
            Qcow2File::open(path, true, Cache::Writeback, BackingChoice::Recorded).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("neither a regular file nor a block device"), "{source}");
    };
    refused(&fifo);
    let backing = base(folder.path(), "base", 3);
    let (path, image) = made(folder.path(), Some(&backing));
    drop(image);
    std::fs::rename(&fifo, &backing.path).unwrap();
    refused(&path);
}

#[test]
fn what_is_no_image_or_stands_on_nothing_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let raw = base(folder.path(), "raw", 0);
    let refuse = |path: &Path, expected: &str| {
        let error =
            Qcow2File::open(path, false, Cache::Writeback, BackingChoice::Recorded).unwrap_err();
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        let text = format!("{error}: {source}");
        assert!(text.contains(expected), "{text:?} lacks {expected:?}");
    };
    refuse(&raw.path, "raw");
    refuse(Path::new("/nonexistent"), "/nonexistent");
    let backing = base(folder.path(), "base", 1);
    let (path, image) = made(folder.path(), Some(&backing));
    drop(image);
    std::fs::remove_file(&backing.path).unwrap();
    refuse(&path, "backing file");
    // An image that stands on itself.
    let own = Backing { path: folder.path().join("x"), format: Format::Qcow2 };
    let partial = folder.path().join("loop");
    let made = Qcow2File::create(&partial, &own.path, 512 << 10, Cache::Writeback, Some(&own));
    assert!(made.is_err() && !partial.exists());
    let made = Qcow2File::create(&partial, &own.path, 700, Cache::Writeback, None);
    assert!(matches!(made, Err(OpenError::OddSize { .. })));
}

#[test]
fn a_recorded_backing_file_can_be_overruled_or_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let backing = base(folder.path(), "base", 3);
    let (path, image) = made(folder.path(), Some(&backing));
    drop(image);
    let other = base(folder.path(), "other", 5);
    let first_byte = |choice: BackingChoice| {
        let image = Qcow2File::open(&path, false, Cache::Writeback, choice.clone()).unwrap();
        image.lock().unwrap();
        assert_eq!(image.overrules_backing(), choice != BackingChoice::Recorded);
        (bytes(&image, 0), image.backing().map(|chain| chain.files()))
    };
    let name = |backing: &Backing| Some(vec![backing.path.display().to_string()]);
    assert_eq!(first_byte(BackingChoice::Recorded), (3, name(&backing)));
    assert_eq!(first_byte(BackingChoice::Given(other.clone())), (5, name(&other)));
    assert_eq!(first_byte(BackingChoice::None), (0, None));
    // It is not even looked at.
    std::fs::remove_file(&backing.path).unwrap();
    assert_eq!(first_byte(BackingChoice::None), (0, None));
}

#[test]
fn an_unlock_does_not_wait_for_a_reader_that_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let image =
        Qcow2File::create(&folder.path().join("new"), &path, 1 << 20, Cache::Writeback, None);
    let image = image.unwrap();
    std::fs::rename(folder.path().join("new"), &path).unwrap();
    image.lock().unwrap();
    image.write_at(&[7; 512], 0).unwrap();
    image.write_back().unwrap();
    let (image, other) = (
        std::sync::Arc::new(image),
        Qcow2File::open(&path, false, Cache::Writeback, BackingChoice::Recorded).unwrap(),
    );
    let (reading, is_reading) = std::sync::mpsc::channel();
    let (go_on, goes_on) = std::sync::mpsc::channel::<()>();
    let same = image.clone();
    let reader = std::thread::spawn(move || {
        same.with(|_| {
            reading.send(()).unwrap();
            // As a read whose storage hangs.
            let _ = goes_on.recv();
            Ok(())
        })
    });
    is_reading.recv().unwrap();
    let (tell, unlocked) = std::sync::mpsc::channel();
    let same = image.clone();
    let unlocker = std::thread::spawn(move || {
        same.unlock();
        tell.send(()).unwrap();
    });
    unlocked.recv_timeout(std::time::Duration::from_secs(20)).expect("it waits for the reader");
    other.lock().unwrap();
    assert!(image.read_at(&mut [0; 512], 0).is_err(), "not locked");
    other.unlock();
    // It can be had back while the old reader still hangs.
    image.lock().unwrap();
    let mut sector = [0; 512];
    image.read_at(&mut sector, 0).unwrap();
    assert_eq!(sector, [7; 512]);
    drop(go_on);
    reader.join().unwrap().unwrap();
    unlocker.join().unwrap();
}
