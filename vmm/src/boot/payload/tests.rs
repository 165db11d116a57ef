use super::super::{BootError, BootSource, elf, load, test_hardware, test_ram};
use super::file::PIECE_BYTES;
use super::*;
use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

const GO_ON: &dyn Fn() -> bool = &|| true;

fn write(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn kernel(folder: &tempfile::TempDir) -> PathBuf {
    write(folder, "kernel", &elf::tests::elf(0x10_0000, 16))
}

/// A flat Multiboot kernel for 1 MiB.
fn multiboot_kernel(folder: &tempfile::TempDir) -> PathBuf {
    let (magic, flags) = (0x1bad_b002u32, 1u32 << 16);
    let checksum = 0u32.wrapping_sub(magic.wrapping_add(flags));
    let words = [magic, flags, checksum, 0x10_0000, 0x10_0000, 0, 0, 0x10_0000];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    write(folder, "multiboot", &bytes)
}

fn hex(digest: [u8; 32]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn identity(role: Role, len_bytes: u64) -> FileIdentity {
    FileIdentity { len_bytes, sha256: [0; 32], role, arguments: String::new() }
}

/// Opens these on a thread of its own, so that an `open` that waits fails the test.
fn open_soon(kernel: PathBuf, initrd: Option<PathBuf>) -> Result<BootPayload, String> {
    let (done, result) = mpsc::channel();
    std::thread::spawn(move || {
        let payload = BootPayload::open(&kernel, initrd.as_deref());
        let _ = done.send(payload.map_err(|error| crate::error::chain(&error)));
    });
    result.recv_timeout(Duration::from_secs(20)).expect("opening waits for somebody")
}

#[test]
fn what_is_no_regular_file_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let at = rustix::fs::CWD;
    rustix::fs::mknodat(at, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let refused = |kernel: &Path, initrd: Option<&Path>, words: [&str; 2]| {
        let error = open_soon(kernel.into(), initrd.map(Path::to_owned)).unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{error:?} lacks {words:?}");
    };
    let name = fifo.to_str().unwrap();
    refused(&fifo, None, [&format!("kernel {name}"), "a FIFO"]);
    refused(&kernel(&folder), Some(&fifo), [&format!("--initrd {name}"), "a FIFO"]);
    let modules = PathBuf::from(format!("{name} and arguments"));
    refused(&multiboot_kernel(&folder), Some(&modules), [&format!("--initrd {name} is"), "a FIFO"]);
    refused(folder.path(), None, [folder.path().to_str().unwrap(), "a folder"]);
    refused(Path::new("/dev/null"), None, ["/dev/null", "a device"]);
    refused(Path::new("/nonexistent"), None, ["/nonexistent", "No such file"]);
}

#[test]
fn the_digest_is_that_of_sha256sum() {
    let folder = tempfile::tempdir().unwrap();
    // FIPS 180's examples, one of them longer than a piece.
    for (bytes, expected) in [
        (b"abc".to_vec(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (vec![b'a'; 1_000_000], "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
        (vec![], "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ] {
        let file = BootFile::open(Role::Kernel, &write(&folder, "file", &bytes)).unwrap();
        assert_eq!(hex(file.sha256(GO_ON).unwrap()), expected);
    }
}

#[test]
fn hashing_is_cancelled_between_pieces_and_done_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder, "file", &vec![1; 3 * PIECE_BYTES + 1]);
    let file = BootFile::open(Role::Kernel, &path).unwrap();
    let asked = Cell::new(0);
    let count = |most: usize| {
        asked.set(asked.get() + 1);
        asked.get() <= most
    };
    let cancelled = file.sha256(&|| count(2));
    assert!(matches!(cancelled, Err(PayloadError::Cancelled)), "{cancelled:?}");
    asked.set(0);
    let digest = file.sha256(&|| count(usize::MAX)).unwrap();
    assert_eq!(asked.get(), 4, "once for each piece");
    assert_eq!(file.sha256(&|| panic!("it was hashed already")).unwrap(), digest);
}

/// A change to a file on disk.
type Change = fn(&File);

/// Ways to change a file in place.
const CHANGES: [(&str, Change); 3] = [
    ("cut", |file| file.set_len(10).unwrap()),
    ("extended", |file| file.set_len(10 << 20).unwrap()),
    ("overwritten", |file| {
        file.write_all_at(b"other", 20).unwrap();
        // Clocks of file systems tick some 250 times a second.
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
    }),
];

#[test]
fn a_file_that_changes_while_it_is_hashed_is_named() {
    let folder = tempfile::tempdir().unwrap();
    for (how, change) in CHANGES {
        let path = write(&folder, how, &vec![1; 3 * PIECE_BYTES]);
        let file = BootFile::open(Role::Kernel, &path).unwrap();
        let other = File::options().write(true).open(&path).unwrap();
        let asked = Cell::new(0);
        let error = file
            .sha256(&|| {
                asked.set(asked.get() + 1);
                if asked.get() == 2 {
                    change(&other);
                }
                true
            })
            .unwrap_err();
        assert!(matches!(&error, PayloadError::Changed { file } if file.contains(how)), "{error}");
        assert!(file.check_unchanged().is_err(), "{how}");
    }
}

#[test]
fn a_digest_from_before_a_change_is_not_given_away() {
    let folder = tempfile::tempdir().unwrap();
    for (how, change) in CHANGES {
        let path = write(&folder, how, &[1; 100]);
        let file = BootFile::open(Role::Kernel, &path).unwrap();
        file.sha256(GO_ON).unwrap();
        change(&File::options().write(true).open(&path).unwrap());
        assert!(matches!(file.sha256(GO_ON), Err(PayloadError::Changed { .. })), "{how}");
    }
}

#[test]
fn an_initrd_that_changes_while_it_is_loaded_is_named() {
    let folder = tempfile::tempdir().unwrap();
    for (how, change) in CHANGES {
        let path = write(&folder, how, &vec![1; 3 * PIECE_BYTES]);
        let payload = BootPayload::open(&kernel(&folder), Some(&path)).unwrap();
        let (ram, layout) = test_ram(8 << 20);
        let other = File::options().write(true).open(&path).unwrap();
        let boot = |change: &dyn Fn()| {
            let go_on = || {
                change();
                true
            };
            let source = BootSource { payload: &payload, cmdline: "", go_on: &go_on };
            load(&source, &test_hardware(true), &ram, &layout)
        };
        boot(&|| {}).unwrap();
        let error = boot(&|| change(&other)).unwrap_err();
        let named = matches!(
            &error,
            BootError::Payload(PayloadError::Changed { file })
                if *file == format!("--initrd {}", path.display())
        );
        assert!(named, "{how}: {error}");
    }
}

#[test]
fn loading_can_be_cancelled_in_every_file() {
    let folder = tempfile::tempdir().unwrap();
    let initrd = write(&folder, "initrd", &vec![1; PIECE_BYTES + 1]);
    let payload = BootPayload::open(&kernel(&folder), Some(&initrd)).unwrap();
    let boot = |pieces: usize| {
        let (ram, layout) = test_ram(8 << 20);
        let asked = Cell::new(0);
        let go_on = || {
            asked.set(asked.get() + 1);
            asked.get() <= pieces
        };
        let source = BootSource { payload: &payload, cmdline: "", go_on: &go_on };
        let entry = load(&source, &test_hardware(true), &ram, &layout);
        (entry.map(drop), asked.get())
    };
    let (entry, whole) = boot(usize::MAX);
    entry.unwrap();
    assert_eq!(whole, 3, "the kernel's segment, and two pieces of the initrd");
    for pieces in 0..whole {
        let (entry, _) = boot(pieces);
        let cancelled = matches!(entry, Err(BootError::Payload(PayloadError::Cancelled)));
        assert!(cancelled, "after {pieces} of {whole}: {entry:?}");
    }
}

#[test]
fn a_file_that_is_replaced_on_disk_stays_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (kernel, initrd) = (kernel(&folder), write(&folder, "initrd", b"old content"));
    let payload = BootPayload::open(&kernel, Some(&initrd)).unwrap();
    for path in [&kernel, &initrd] {
        std::fs::rename(write(&folder, "new", b"new content"), path).unwrap();
    }
    let (ram, layout) = test_ram(4 << 20);
    for _ in 0..2 {
        let source = BootSource { payload: &payload, cmdline: "", go_on: GO_ON };
        load(&source, &test_hardware(true), &ram, &layout).unwrap();
    }
    let mut bytes = [0; 11];
    payload.read_at(1, 0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"old content");
    payload.identities(GO_ON).unwrap();
}

#[test]
fn reads_stay_within_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let payload = BootPayload::open(&write(&folder, "file", b"0123456789"), None).unwrap();
    let mut bytes = [0; 4];
    payload.read_at(0, 6, &mut bytes).unwrap();
    assert_eq!(&bytes, b"6789");
    for (index, offset_bytes) in [(0, 7), (0, u64::MAX), (1, 0)] {
        assert!(payload.read_at(index, offset_bytes, &mut bytes).is_err());
    }
}

#[test]
fn files_are_opened_as_their_kernel_takes_them() {
    let folder = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| write(&folder, name, name.as_bytes()));
    let list = format!("{} with arguments,{}", one.display(), two.display());
    let kernel = multiboot_kernel(&folder);
    let payload = BootPayload::open(&kernel, Some(Path::new(&list))).unwrap();
    let identities = payload.identities(GO_ON).unwrap();
    let text = |path: &Path| path.display().to_string();
    let described: Vec<_> =
        identities.iter().map(|file| (file.role, file.len_bytes, file.arguments.clone())).collect();
    assert_eq!(
        described,
        [
            (Role::Kernel, 32, text(&kernel)),
            (Role::Module, 3, text(&one) + " with arguments"),
            (Role::Module, 3, text(&two)),
        ]
    );
    for (index, identity) in identities.iter().enumerate() {
        let found = payload.find(identity, GO_ON).unwrap().unwrap();
        assert!(Arc::ptr_eq(&found, &payload.files()[index].file));
    }
    let other = FileIdentity { sha256: [7; 32], ..identities[1].clone() };
    assert!(payload.find(&other, GO_ON).unwrap().is_none());
    let many = vec![text(&one); MAX_FILES].join(",");
    let error = BootPayload::open(&kernel, Some(Path::new(&many))).unwrap_err();
    assert!(error.to_string().contains("more than 63 modules"), "{error}");
    // For another kernel the same text is the path of its initrd.
    assert!(BootPayload::open(&self::kernel(&folder), Some(Path::new(&list))).is_err());
}

#[test]
fn files_larger_than_any_loader_takes_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let sparse = |name: &str, len_bytes| {
        let path = write(&folder, name, b"");
        File::options().write(true).open(&path).unwrap().set_len(len_bytes).unwrap();
        path
    };
    let error = BootPayload::open(&sparse("large", MAX_KERNEL_BYTES + 1), None).unwrap_err();
    assert!(error.to_string().contains("large has 2147483649 bytes"), "{error}");
    let initrd = sparse("initrd", MAX_INITRD_BYTES + 1);
    let error = BootPayload::open(&kernel(&folder), Some(&initrd)).unwrap_err();
    assert!(error.to_string().contains("initrd has 4294967297 bytes"), "{error}");
}

#[test]
fn only_what_makes_a_payload_may_be_announced() {
    use Role::{Initrd, Kernel, Module};
    let of = |roles: &[Role]| roles.iter().map(|role| identity(*role, 1)).collect::<Vec<_>>();
    let full = [&[Kernel][..], &[Module; MAX_FILES - 1]].concat();
    for roles in [&[Kernel][..], &[Kernel, Initrd], &[Kernel, Module, Module], &full] {
        check_identities(&of(roles)).unwrap();
    }
    let mut wrong: Vec<Vec<FileIdentity>> = [
        &[][..],
        &[Initrd],
        &[Initrd, Kernel],
        &[Kernel, Kernel],
        &[Kernel, Initrd, Initrd],
        &[Kernel, Initrd, Module],
        &[&full[..], &[Module]].concat(),
    ]
    .into_iter()
    .map(of)
    .collect();
    let half = MAX_INITRD_BYTES / 2 + 1;
    wrong.push(vec![identity(Kernel, MAX_KERNEL_BYTES + 1)]);
    wrong.push(vec![identity(Kernel, 1), identity(Module, half), identity(Module, half)]);
    wrong.push(vec![identity(Kernel, 1), identity(Module, u64::MAX), identity(Module, u64::MAX)]);
    let long = "x".repeat(usize::try_from(MAX_ARGUMENTS_BYTES).unwrap() + 1);
    for arguments in [long, "a\0b".into()] {
        wrong.push(vec![FileIdentity { arguments, ..identity(Kernel, 1) }]);
    }
    for identities in wrong {
        assert!(check_identities(&identities).is_err(), "{identities:?}");
    }
}

#[test]
fn one_read_into_guest_memory_takes_more_than_a_piece() {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> =
        (0..PIECE_BYTES * 3 + 5).map(|at| u8::try_from(at % 251).expect("small")).collect();
    let file = BootFile::open(Role::Kernel, &write(&folder, "large", &bytes)).unwrap();
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
    // What linux-loader reads a bzImage with.
    let mut reader = file.reader(GO_ON);
    ram.read_exact_volatile_from(GuestAddress(7), &mut reader, bytes.len()).unwrap();
    let mut there = vec![0; bytes.len()];
    ram.read_slice(&mut there, GuestAddress(7)).unwrap();
    assert!(there == bytes);
}

#[test]
fn a_list_is_split_at_single_commas() {
    assert_eq!(split_list("a b,c,,d"), ["a b", "c,d"]);
    assert_eq!(split_list(""), [""]);
}
