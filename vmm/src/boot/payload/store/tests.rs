use super::super::Role;
use super::*;
use proptest::prelude::*;
use std::cell::RefCell;

const GO_ON: &dyn Fn() -> bool = &|| true;

fn identity(role: Role, bytes: &[u8]) -> FileIdentity {
    let sha256 = Sha256::digest(bytes).into();
    FileIdentity { len_bytes: bytes.len() as u64, sha256, role, arguments: String::new() }
}

/// A folder on disk with this much free space.
fn with_space<R>(free: u64, test: impl FnOnce(&Place<'_>, &Path) -> R) -> R {
    let folder = tempfile::tempdir().unwrap();
    let place = Place {
        candidates: vec![folder.path().into()],
        is_in_ram: &|_| Ok(false),
        free_bytes: &|_| Ok(free),
    };
    test(&place, folder.path())
}

fn store(identities: Vec<FileIdentity>, known: &[&BootPayload]) -> PayloadStore {
    with_space(1 << 20, |place, _| {
        PayloadStore::with_place(identities, known, place, GO_ON).unwrap()
    })
}

/// A payload of this kernel, as if from `--kernel`.
fn payload_of(kernel: &[u8]) -> (tempfile::TempDir, PathBuf, BootPayload) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kernel");
    std::fs::write(&path, kernel).unwrap();
    let payload = BootPayload::open(&path, None).unwrap();
    (folder, path, payload)
}

fn content(payload: &BootPayload, index: usize) -> Vec<u8> {
    let len = usize::try_from(payload.files()[index].file.len_bytes()).unwrap();
    let mut bytes = vec![0; len];
    payload.read_at(index, 0, &mut bytes).unwrap();
    bytes
}

#[test]
fn what_is_not_here_arrives_and_is_kept_without_a_name() {
    let (_folder, _, known) = payload_of(b"a kernel");
    let announced = vec![
        FileIdentity { arguments: "there/kernel".into(), ..identity(Role::Kernel, b"a kernel") },
        FileIdentity { arguments: "m one".into(), ..identity(Role::Module, b"module") },
        FileIdentity { arguments: "k".into(), ..identity(Role::Module, b"a kernel") },
        FileIdentity { arguments: "m two".into(), ..identity(Role::Module, b"module") },
        identity(Role::Module, b""),
    ];
    let payload = with_space(1 << 20, |place, folder| {
        let mut store =
            PayloadStore::with_place(announced.clone(), &[&known], place, GO_ON).unwrap();
        assert_eq!(store.missing(), [1, 4], "neither what is here nor what comes anyway");
        store.write(1, 0, b"mod").unwrap();
        store.write(1, 3, b"ule").unwrap();
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), 0, "it has no name");
        store.finish().unwrap()
    });
    assert_eq!(payload.identities(GO_ON).unwrap(), announced);
    assert_eq!(content(&payload, 0), b"a kernel");
    assert_eq!((content(&payload, 1), content(&payload, 3)), (b"module".into(), b"module".into()));
    assert_eq!(payload.files()[1].file.name(), "module from the source");
    payload.check_unchanged().unwrap();
    // At the next hop it is known.
    assert!(store(announced, &[&payload]).missing().is_empty());
}

#[test]
fn a_file_that_has_changed_on_disk_is_sent_anew() {
    let (_folder, path, known) = payload_of(b"a kernel");
    let announced = vec![identity(Role::Kernel, b"a kernel")];
    assert!(store(announced.clone(), &[&known]).missing().is_empty());
    std::fs::write(&path, b"a new kernel").unwrap();
    assert_eq!(store(announced, &[&known]).missing(), [0]);
}

#[test]
fn pieces_that_do_not_fit_are_refused_and_write_nothing() {
    let (_folder, _, known) = payload_of(b"a kernel");
    let announced = || vec![identity(Role::Kernel, b"a kernel"), identity(Role::Initrd, b"initrd")];
    let mut store = store(announced(), &[&known]);
    store.write(1, 0, b"ini").unwrap();
    let wrong: [(usize, u64, &[u8], &str); 7] = [
        (0, 0, b"a", "was not asked for"),
        (2, 0, b"a", "not announced"),
        (1, 0, b"ini", "offset 0, but 3 bytes"),
        (1, 2, b"itrd", "offset 2, but 3 bytes"),
        (1, 4, b"rd", "offset 4, but 3 bytes"),
        (1, 3, b"trds", "reach past its length of 6"),
        (1, u64::MAX, b"x", "offset 18446744073709551615"),
    ];
    for (index, offset_bytes, bytes, words) in wrong {
        let error = store.write(index, offset_bytes, bytes).unwrap_err().to_string();
        assert!(error.contains(words), "{error:?} lacks {words:?}");
    }
    store.write(1, 3, b"trd").unwrap();
    assert_eq!(content(&store.finish().unwrap(), 1), b"initrd");
}

#[test]
fn what_is_short_or_other_than_announced_is_refused() {
    for (arrives, words) in
        [(&b"a kerne"[..], "7 bytes have arrived, 8 were due"), (b"a KERNEL", "SHA-256")]
    {
        let mut store = store(vec![identity(Role::Kernel, b"a kernel")], &[]);
        store.write(0, 0, arrives).unwrap();
        let error = store.finish().unwrap_err().to_string();
        assert!(error.contains("kernel from the source") && error.contains(words), "{error}");
    }
}

#[test]
fn nothing_is_made_before_the_space_is_there() {
    let announced = vec![identity(Role::Kernel, &[1; 600]), identity(Role::Initrd, &[2; 500])];
    let refused = with_space(1099, |place, _| {
        PayloadStore::with_place(announced.clone(), &[], place, GO_ON).err().unwrap().to_string()
    });
    assert!(refused.contains("1100 bytes, 1099 are free"), "{refused}");
    let fits = |place: &Place<'_>, _: &Path| {
        PayloadStore::with_place(announced, &[], place, GO_ON).unwrap();
    };
    with_space(1100, fits);
    // Nor before the announcement has been checked.
    let huge = FileIdentity { len_bytes: u64::MAX, ..identity(Role::Kernel, b"") };
    let never = Place {
        candidates: vec![],
        is_in_ram: &|_| panic!("looked for a folder"),
        free_bytes: &|_| panic!("looked for space"),
    };
    let error = PayloadStore::with_place(vec![huge], &[], &never, GO_ON).err().unwrap();
    assert!(matches!(error, PayloadError::TooLarge { .. }), "{error}");
}

#[test]
fn a_file_system_that_fills_up_is_an_error() {
    let identity = identity(Role::Kernel, b"a kernel");
    let mut store = store(vec![identity.clone()], &[]);
    // Writing to this device fails as a full file system does.
    let full = File::options().write(true).open("/dev/full").unwrap();
    let received_bytes = 0;
    store.slots =
        vec![Slot::Arriving(Arriving { file: full, hash: Sha256::new(), received_bytes })];
    let error = store.write(0, 0, b"a kernel").unwrap_err();
    assert!(matches!(error, PayloadError::Write { .. }), "{error}");
    assert!(crate::error::chain(&error).contains("No space left"), "{error}");
    assert!(store.finish().is_err());
}

#[test]
fn copies_are_kept_on_disk_if_there_is_one() {
    let [disk, ram, small] = ["/disk", "/ram", "/small"].map(PathBuf::from);
    let looked_at = RefCell::new(Vec::new());
    let choose = |candidates: &[&PathBuf]| {
        let place = Place {
            candidates: candidates.iter().map(|path| path.to_path_buf()).collect(),
            is_in_ram: &|path| Ok(path == ram),
            free_bytes: &|path| {
                looked_at.borrow_mut().push(path.to_owned());
                match path.to_str() {
                    Some("/missing") => Err(io::ErrorKind::NotFound.into()),
                    Some("/small") => Ok(99),
                    _ => Ok(100),
                }
            },
        };
        place.folder(100)
    };
    let missing = PathBuf::from("/missing");
    assert_eq!(choose(&[&disk, &ram]).unwrap(), disk);
    assert_eq!(choose(&[&ram, &disk]).unwrap(), disk);
    assert_eq!(choose(&[&small, &disk]).unwrap(), disk);
    assert_eq!(choose(&[&missing, &disk]).unwrap(), disk);
    assert_eq!(choose(&[&ram, &small]).unwrap(), ram);
    assert!(matches!(choose(&[&missing, &small]), Err(PayloadError::NoSpace { .. })));
    assert!(matches!(choose(&[&missing]), Err(PayloadError::Create { .. })));
    assert!(choose(&[]).is_err());
}

#[test]
fn looking_for_what_is_here_can_be_cancelled() {
    let (_folder, _, known) = payload_of(b"a kernel");
    let announced = vec![identity(Role::Kernel, b"A KERNEL")];
    let cancelled = PayloadStore::new(announced, &[&known], &|| false);
    assert!(matches!(cancelled, Err(PayloadError::Cancelled)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn pieces_of_any_length_make_the_file(
        bytes in prop::collection::vec(any::<u8>(), 0..4000),
        cuts in prop::collection::vec(0usize..4000, 0..10),
    ) {
        let mut store = store(vec![identity(Role::Kernel, &bytes)], &[]);
        let mut ends: Vec<usize> = cuts.iter().map(|cut| *cut.min(&bytes.len())).collect();
        ends.push(bytes.len());
        ends.sort_unstable();
        let mut start = 0;
        for end in ends {
            store.write(0, start as u64, &bytes[start..end]).unwrap();
            start = end;
        }
        let payload = store.finish().unwrap();
        prop_assert_eq!(content(&payload, 0), bytes);
    }

    /// Whatever a peer sends: it ends with what was announced, or with an error.
    #[test]
    fn arbitrary_pieces_never_make_another_file(
        pieces in prop::collection::vec((0usize..3, 0u64..12, 0usize..12), 0..12),
    ) {
        let announced: Vec<_> =
            [(Role::Kernel, &b"a kernel"[..]), (Role::Initrd, b"an initrd")].into();
        let identities = announced.iter().map(|(role, bytes)| identity(*role, bytes)).collect();
        let mut store = store(identities, &[]);
        for (index, offset_bytes, len) in pieces {
            let source = announced.get(index).map_or(&b""[..], |(_, bytes)| bytes);
            let start = usize::try_from(offset_bytes).unwrap().min(source.len());
            let mut piece = source[start..source.len().min(start + len)].to_vec();
            piece.resize(len, b'?');
            let _ = store.write(index, offset_bytes, &piece);
        }
        if let Ok(payload) = store.finish() {
            for (index, (_, bytes)) in announced.iter().enumerate() {
                prop_assert_eq!(&content(&payload, index), bytes);
            }
        }
    }
}
