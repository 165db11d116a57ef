//! What becomes of files when a guest arrives, or does not.

use super::*;
use crate::machine::description::Travels;

fn disk(id: &str, len_bytes: u64, data_bytes: u64) -> DiskDescription {
    let travels = Some(Travels { backing: None, data_bytes });
    DiskDescription { id: id.into(), len_bytes, read_only: false, queues: 1, travels }
}

fn config(more: &[&str]) -> ReceiveConfig {
    use clap::Parser;
    let arguments = ["ferry", "receive", "unix:/x"].iter().chain(more);
    match crate::cli::Cli::parse_from(arguments).command {
        crate::cli::Command::Receive(args) => args.into_config().unwrap(),
        _ => unreachable!(),
    }
}

fn prepare(disks: &[DiskDescription], config: &ReceiveConfig) -> Result<Images, MachineError> {
    Images::prepare(disks, config, &|| true)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn images_get_their_names_at_the_end_or_go() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let disks = [disk("root", 3 << 20, 0), disk("data", 512, 0)];
    let config = config(&["--disk-dir", path]);
    let images = prepare(&disks, &config).unwrap();
    assert_eq!(names(folder.path()), ["data.img.partial", "root.img.partial"]);
    assert_eq!(images.arriving().len(), 2);
    // Nobody else writes there meanwhile.
    let other = prepare(&disks, &config).err().unwrap();
    assert!(crate::error::chain(&other).contains("in use by another"), "{other:?}");
    drop(images);
    assert_eq!(names(folder.path()), [""; 0]);
    let mut images = prepare(&disks, &config).unwrap();
    images.rename_into_place().unwrap();
    assert_eq!(names(folder.path()), ["data.img", "root.img"]);
    drop(images);
    assert_eq!(names(folder.path()), [""; 0], "the guest did not start after all");
    let mut images = prepare(&disks, &config).unwrap();
    images.nodes[0].fill_at(&[1; 512], 512).unwrap();
    images.rename_into_place().unwrap();
    images.commit();
    images.clean_up();
    assert!(images.nodes[0].location().ends_with("/root.img"));
    drop(images);
    assert_eq!(names(folder.path()), ["data.img", "root.img"]);
    let meta = std::fs::metadata(folder.path().join("root.img")).unwrap();
    assert_eq!(meta.len(), 3 << 20);
    assert!(meta.blocks() * 512 <= 64 << 10, "it is sparse");
}

#[test]
fn an_image_that_is_there_is_replaced_only_on_request_and_only_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.img");
    std::fs::write(&path, vec![7; 1024]).unwrap();
    let give = format!("root={}", path.display());
    let disks = [disk("root", 512, 0)];
    let error = prepare(&disks, &config(&["--disk", &give])).err().unwrap();
    assert!(crate::error::chain(&error).contains("--overwrite"), "{error:?}");
    let config = config(&["--disk", &give, "--overwrite"]);
    drop(prepare(&disks, &config).unwrap());
    assert_eq!(std::fs::read(&path).unwrap(), vec![7; 1024], "it stays until then");
    // What another machine uses is not replaced.
    let used = RawFile::open(&path, false, Cache::Writeback).unwrap();
    used.lock().unwrap();
    let error = prepare(&disks, &config).err().unwrap();
    assert!(crate::error::chain(&error).contains("in use by another"), "{error:?}");
    drop(used);
    let mut images = prepare(&disks, &config).unwrap();
    images.rename_into_place().unwrap();
    images.commit();
    // The guest runs; what was replaced goes when nobody waits for that any more.
    assert_eq!(names(folder.path()), ["x.img", "x.img.partial"]);
    images.clean_up();
    drop(images);
    assert_eq!(std::fs::read(&path).unwrap(), vec![0; 512]);
    assert_eq!(names(folder.path()), ["x.img"]);
    // A file without content is nobody's image.
    std::fs::write(&path, "").unwrap();
    assert!(prepare(&disks, &self::config(&["--disk", &give])).is_ok());
}

#[test]
fn what_cannot_be_made_is_refused_by_name_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let refuse = |disks: &[DiskDescription], more: &[&str], expected: &str| {
        let error = prepare(disks, &config(more)).err().unwrap();
        let text = crate::error::chain(&error);
        assert!(text.contains(expected), "{text:?} lacks {expected:?}");
    };
    for trick in ["../root", "/etc/x", "..", "", "a/b", "a\0b", ".hidden"] {
        refuse(&[disk(trick, 512, 0)], &["--disk-dir", path], "the stream names a disk");
    }
    refuse(&[disk("root", 512, 0)], &[], "--disk root=PATH");
    let missing = folder.path().join("none/at/all");
    refuse(&[disk("root", 512, 0)], &["--disk-dir", missing.to_str().unwrap()], "none/at/all");
    refuse(&[disk("root", 512, 0)], &["--disk-dir", "/proc"], "/proc/root.img");
    refuse(&[disk("a", 512, 0), disk("b", 512, u64::MAX / 2)], &["--disk-dir", path], "bytes free");
    let same = [format!("a={path}/x"), format!("b={path}/x")];
    let same = ["--disk", &same[0], "--disk", &same[1]];
    refuse(&[disk("a", 512, 0), disk("b", 512, 0)], &same, "given for two disks");
    let is_folder = format!("root={path}");
    refuse(&[disk("root", 512, 0)], &["--disk", &is_folder], "neither a file nor a block device");
    refuse(&[disk("root", 1 << 62, 0)], &["--disk-dir", path], "root.img");
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn what_comes_to_its_place_meanwhile_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.img");
    let give = format!("root={}", path.display());
    let disks = [disk("other", 512, 0), disk("root", 512, 0)];
    let other = format!("other={}", folder.path().join("other.img").display());
    let given = ["--disk", &give, "--disk", &other];
    let refuse = |images: &mut Images, expected: &str| {
        let text = crate::error::chain(&images.rename_into_place().unwrap_err());
        assert!(text.contains(expected), "{text:?} lacks {expected:?}");
    };
    // Nothing was there.
    let mut images = prepare(&disks, &config(&given)).unwrap();
    std::fs::write(&path, "mine").unwrap();
    refuse(&mut images, "give --overwrite");
    drop(images);
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    // An empty file was there, and somebody fills it.
    std::fs::write(&path, "").unwrap();
    let mut images = prepare(&disks, &config(&given)).unwrap();
    std::fs::write(&path, "mine too").unwrap();
    refuse(&mut images, "give --overwrite");
    drop(images);
    assert_eq!(std::fs::read(&path).unwrap(), b"mine too");
    // It may be replaced, but somebody else has done so.
    let overwrite = [&given[..], &["--overwrite"]].concat();
    let mut images = prepare(&disks, &config(&overwrite)).unwrap();
    let new = folder.path().join("new");
    std::fs::write(&new, "new").unwrap();
    std::fs::rename(&new, &path).unwrap();
    refuse(&mut images, "not the file any more");
    drop(images);
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    assert_eq!(names(folder.path()), ["x.img"]);
}

#[test]
fn an_image_that_was_to_be_replaced_comes_back_if_the_guest_does_not_start() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.img");
    std::fs::write(&path, vec![7; 1024]).unwrap();
    let give = format!("root={}", path.display());
    let disks = [disk("root", 512, 0)];
    let config = config(&["--disk", &give, "--overwrite"]);
    let mut images = prepare(&disks, &config).unwrap();
    images.rename_into_place().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 512);
    drop(images);
    assert_eq!(std::fs::read(&path).unwrap(), vec![7; 1024]);
    assert_eq!(names(folder.path()), ["x.img"]);
}

#[test]
fn attempts_that_follow_each_other_closely_never_lose_their_file() {
    let folder = tempfile::tempdir().unwrap();
    let disks = [disk("root", 512, 0)];
    let config = config(&["--disk-dir", folder.path().to_str().unwrap()]);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut made = 0;
                while made < 200 {
                    let attempt = prepare(&disks, &config);
                    made += u32::from(attempt.is_ok());
                    // The other one may get the name between this one's look at it and its own turn.
                    match attempt.and_then(|mut images| images.rename_into_place()) {
                        Ok(()) => {}
                        Err(error) => {
                            let text = crate::error::chain(&error);
                            let another = ["in use by another", "holds an image already"];
                            assert!(another.iter().any(|said| text.contains(said)), "{text}");
                        }
                    }
                }
            });
        }
    });
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn no_disk_has_the_name_of_another_ones_unfinished_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let given = [format!("a={path}/x.partial"), format!("b={path}/x")];
    for order in [["a", "b"], ["b", "a"]] {
        let disks = order.map(|id| disk(id, 512, 0));
        let config = config(&["--disk", &given[0], "--disk", &given[1]]);
        let error = prepare(&disks, &config).err().unwrap();
        assert!(crate::error::chain(&error).contains("given for two disks"), "{error:?}");
        assert_eq!(names(folder.path()), [""; 0]);
    }
}

#[test]
fn a_device_is_not_made_blank_when_nobody_wants_it_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device");
    // More than a piece.
    let len_bytes = BLANK_BYTES * 3;
    std::fs::write(&path, [7; 512]).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(len_bytes).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 512], len_bytes - 512).unwrap();
    let device = RawFile::open(&path, false, Cache::Writeback).unwrap();
    let asked = std::sync::atomic::AtomicU64::new(0);
    let once = || asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < 1;
    let error = blank(&device, &once).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    let mut byte = [1; 512];
    device.read_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [0; 512], "the first piece");
    device.read_at(&mut byte, len_bytes - 512).unwrap();
    assert_eq!(byte, [7; 512], "nothing after it");
    blank(&device, &|| true).unwrap();
    device.read_at(&mut byte, len_bytes - 512).unwrap();
    assert_eq!(byte, [0; 512]);
}
