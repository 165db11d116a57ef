//! Backups of scripted disks that a guest writes all the time.
#![allow(clippy::big_endian_bytes, reason = "counters in sectors")]

mod ends;

use super::super::tests::{busy, content, options, short, until};
use super::super::{Cancel, CopyMode, JobEvent, JobKind, JobOptions, NewJob};
use super::*;
use crate::block::BlockNode;
use crate::block::bitmaps::{Action, NewBitmap};
use crate::block::memory::{MemoryDisk, Script};
use std::sync::atomic::{AtomicBool, Ordering};

const LEN: u64 = 8 << 20;
const SOON: Duration = Duration::from_secs(30);
const CLUSTER: u64 = MIN_CLUSTER_BYTES;

struct Case {
    pair: Pair,
    source: Arc<Script>,
    target: Arc<Script>,
}

impl Case {
    fn new() -> Self {
        Self::of(LEN)
    }

    fn of(len_bytes: u64) -> Self {
        let (one, other) = (MemoryDisk::new(len_bytes), MemoryDisk::new(len_bytes));
        let (source, target) = (one.script(), other.script());
        let pair = Pair {
            source: Arc::new(BlockNode::new("disk", Box::new(one))),
            target: Arc::new(BlockNode::new("copy", Box::new(other))),
            unmap: true,
        };
        Self { pair, source, target }
    }

    fn options(&self, sync: BackupSync) -> BackupOptions {
        BackupOptions {
            pair: self.pair.clone(),
            sync,
            bitmap: None,
            target_is_blank: true,
            owns_target: false,
        }
    }

    fn with_bitmap(&self, sync: BackupSync, mode: BitmapMode) -> BackupOptions {
        BackupOptions { bitmap: Some((name("b"), mode)), ..self.options(sync) }
    }

    fn add_bitmap(&self) {
        let new =
            NewBitmap { name: name("b"), granularity: 4096, persistent: false, recording: true };
        self.pair.source.bitmaps().add(new).unwrap();
    }

    /// Marked bytes of the bitmap, and whether it is busy.
    fn bitmap(&self) -> (u64, bool) {
        let info = self.pair.source.bitmaps().info();
        (info[0].count_bytes, info[0].busy)
    }

    /// A disk of data, which no hole shortens.
    fn filled() -> Self {
        let case = Self::new();
        case.pair.source.fill_at(&vec![1; usize::try_from(LEN).unwrap()], 0).unwrap();
        case
    }

    fn is_marked(&self, offset_bytes: u64) -> bool {
        let action = Action::Freeze { name: name("b"), may_clear: false };
        let frozen = crate::block::bitmaps::execute(&[(self.pair.source.clone(), action)]).unwrap();
        frozen[0].marks().is_marked(offset_bytes)
    }
}

fn name(text: &str) -> BitmapName {
    BitmapName::new(text).unwrap()
}

/// Begins a backup, and returns what the disk held at that moment.
fn begin_one(options: BackupOptions) -> (Backup, Vec<u8>) {
    let source = options.pair.source.clone();
    let section = source.gate().close();
    assert!(section.wait_until(Instant::now() + SOON));
    let was = content(&source);
    let mut begun = begin(&[Step::Backup(options)]).unwrap();
    drop(section);
    (begun.pop().unwrap(), was)
}

fn run(backup: Backup, job: JobOptions) -> (Arc<Job>, Receiver<JobEvent>) {
    let (tell, events) = channel();
    let first = tell.clone();
    let tell = move |event| drop(tell.send(event));
    let new = NewJob {
        kind: JobKind::Backup,
        options: job,
        device: backup.device().to_owned(),
        target: Some(backup.target().to_owned()),
        copy_mode: CopyMode::default(),
    };
    let first = &mut move |event| drop(first.send(event));
    (Job::start(new, first, tell, backup).unwrap(), events)
}

fn start(options: BackupOptions, job: JobOptions) -> (Arc<Job>, Receiver<JobEvent>, Vec<u8>) {
    let (backup, was) = begin_one(options);
    let (job, events) = run(backup, job);
    (job, events, was)
}

/// Guests that write one disk all the time.
struct Guests {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<u64>>,
}

impl Guests {
    fn on(node: &Arc<BlockNode>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (1..3).map(|seed| busy(node.clone(), seed * 91, stop.clone())).collect();
        Self { stop, threads }
    }

    /// Returns how many writes there were; all have succeeded.
    fn end(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().map(|guest| guest.join().unwrap()).sum()
    }
}

const GOOD: [&str; 7] =
    ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"];

#[test]
fn a_full_backup_is_the_disk_of_the_moment_at_which_it_began() {
    for is_blank in [true, false] {
        let case = Case::new();
        case.pair.source.fill_at(&[1; 1 << 20], 3 << 20).unwrap();
        if !is_blank {
            case.pair.target.fill_at(&[5; 1 << 20], 0).unwrap();
        }
        let guests = Guests::on(&case.pair.source);
        let wanted = BackupOptions { target_is_blank: is_blank, ..case.options(BackupSync::Full) };
        let (job, events, was) = start(wanted, options("b"));
        assert_eq!(until(&events, "null"), GOOD);
        assert!(content(&case.pair.target) == was, "blank: {is_blank}");
        assert!(guests.end() > 20);
        assert!(content(&case.pair.target) == was, "nothing is written after the end");
        let info = job.info();
        assert_eq!((info.offset_bytes, info.error), (info.len_bytes, None));
        assert!(case.target.flush_count() > 0, "it is durable");
    }
}

#[test]
fn a_chain_of_incremental_backups_is_the_disk_at_each_of_the_moments() {
    let case = Case::filled();
    case.add_bitmap();
    let guests = Guests::on(&case.pair.source);
    // Each starts from the one before, as an image on a backing file does.
    let full = case.with_bitmap(BackupSync::Full, BitmapMode::OnSuccess);
    let (_job, events, was) = start(full, options("b"));
    assert_eq!(until(&events, "null"), GOOD);
    assert!(content(&case.pair.target) == was);
    for turn in 0..5 {
        let part = case.with_bitmap(BackupSync::Bitmap, BitmapMode::OnSuccess);
        let (job, events, was) = start(part, options("b"));
        assert_eq!(until(&events, "null"), GOOD);
        assert!(content(&case.pair.target) == was, "{turn}");
        assert!(!case.bitmap().1);
        assert_eq!(job.info().error, None);
    }
    guests.end();
}

#[test]
fn a_disk_whose_last_cluster_is_short_is_saved_to_its_end() {
    for len_bytes in [512, CLUSTER + 512, 5 * CLUSTER - 512, (1 << 20) + 3 * 512] {
        let case = Case::of(len_bytes);
        let bytes = vec![3; usize::try_from(len_bytes).unwrap()];
        case.pair.source.fill_at(&bytes, 0).unwrap();
        let guests = Guests::on(&case.pair.source);
        let (_job, events, was) = start(case.options(BackupSync::Full), options("b"));
        assert_eq!(until(&events, "null"), GOOD, "{len_bytes}");
        assert!(content(&case.pair.target) == was, "{len_bytes}");
        guests.end();
    }
}

#[test]
fn clusters_of_the_target_may_be_larger_than_an_operation() {
    let case = Case::filled();
    let to_read = DirtyBitmap::new(LEN, 2 << 20).unwrap();
    to_read.mark_all();
    let backup = Backup::new(case.options(BackupSync::Full), Arc::new(to_read));
    let (job, events) = run(backup, options("b"));
    assert_eq!(until(&events, "null"), GOOD);
    assert_eq!(
        (content(&case.pair.target) == content(&case.pair.source), job.info().error),
        (true, None)
    );
}

#[test]
fn only_what_is_marked_is_copied() {
    let case = Case::filled();
    case.add_bitmap();
    case.pair.source.write_at(&[2; 512], CLUSTER).unwrap();
    case.pair.source.write_at(&[2; 512], LEN - 512).unwrap();
    let part = case.with_bitmap(BackupSync::Bitmap, BitmapMode::OnSuccess);
    let (job, events, _) = start(part, options("b"));
    assert_eq!(until(&events, "null"), GOOD);
    let written: Vec<_> = case.target.accesses().iter().map(|it| it.offset_bytes).collect();
    let mut sorted = written.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, [CLUSTER, LEN - CLUSTER]);
    assert_eq!(job.info().offset_bytes, 2 * CLUSTER);
    assert_eq!(case.bitmap(), (0, false));
}

#[test]
fn without_a_copy_in_the_background_only_what_is_overwritten_is_saved() {
    let case = Case::filled();
    let (job, events, was) = start(case.options(BackupSync::None), options("b"));
    assert_eq!(case.target.accesses(), []);
    let node = &case.pair.source;
    node.write_at(&[2; 512], CLUSTER + 512).unwrap();
    node.discard(4 * CLUSTER, CLUSTER).unwrap();
    node.write_zeroes(6 * CLUSTER - 512, 1024, true).unwrap();
    let saved = 4 * CLUSTER;
    assert!(job.wait_until(SOON, |info| info.offset_bytes == saved && info.len_bytes == saved));
    // A second write to the same place saves nothing.
    let count = case.target.accesses().len();
    node.write_at(&[3; 512], CLUSTER).unwrap();
    job.cancel(Cancel::Soft).unwrap();
    let end = ["created", "running", "aborting", "CANCELLED", "concluded", "null"];
    assert_eq!(until(&events, "null"), end);
    assert_eq!(case.target.accesses().len(), count);
    let copy = content(&case.pair.target);
    for cluster in 0..LEN / CLUSTER {
        let at = usize::try_from(cluster * CLUSTER).unwrap();
        let range = at..at + usize::try_from(CLUSTER).unwrap();
        let is_saved = [1, 4, 5, 6].contains(&cluster);
        let expected = if is_saved { &was[range.clone()] } else { &vec![0; range.len()][..] };
        assert!(copy[range] == *expected, "cluster {cluster}");
    }
}

#[test]
fn several_disks_are_saved_at_one_moment() {
    let cases = [Case::new(), Case::new()];
    let nodes = [0, 1].map(|at| cases[at].pair.source.clone());
    // Two counters that the guest raises one after the other: they never differ by more than one.
    let stop = Arc::new(AtomicBool::new(false));
    let guest = std::thread::spawn({
        let (nodes, stop) = (nodes.clone(), stop.clone());
        move || {
            let mut turn = 0u64;
            while !stop.load(Ordering::SeqCst) {
                turn += 1;
                let mut sector = [0; 512];
                sector[..8].copy_from_slice(&turn.to_be_bytes());
                nodes[0].write_at(&sector, 0).unwrap();
                nodes[1].write_at(&sector, LEN - 512).unwrap();
            }
        }
    });
    for _ in 0..20 {
        let steps: Vec<_> =
            cases.iter().map(|case| Step::Backup(case.options(BackupSync::Full))).collect();
        let begun = begin(&steps).unwrap();
        let jobs: Vec<_> = begun.into_iter().map(|backup| run(backup, options("b"))).collect();
        for (_, events) in &jobs {
            assert_eq!(until(events, "null"), GOOD);
        }
        let counter = |case: &Case, at: u64| {
            let mut sector = [0; 512];
            case.pair.target.copy_at(&mut sector, at).unwrap();
            u64::from_be_bytes(sector[..8].try_into().unwrap())
        };
        let (first, second) = (counter(&cases[0], 0), counter(&cases[1], LEN - 512));
        assert!(first == second || first == second + 1, "{first} and {second}");
        // As an image is blank again.
        for case in &cases {
            case.pair.target.fill_zeroes(0, LEN, true).unwrap();
        }
    }
    stop.store(true, Ordering::SeqCst);
    guest.join().unwrap();
}

#[test]
fn changes_of_bitmaps_happen_at_the_same_moment_in_their_order_or_not_at_all() {
    let case = Case::filled();
    case.add_bitmap();
    let node = &case.pair.source;
    node.write_at(&[2; 512], 0).unwrap();
    let new = NewBitmap { name: name("c"), granularity: 4096, persistent: false, recording: true };
    let add = Step::Bitmap(node.clone(), Action::Add(new));
    let clear = Step::Bitmap(node.clone(), Action::Clear(name("b")));
    let part = Step::Backup(case.with_bitmap(BackupSync::Bitmap, BitmapMode::Never));
    // Frozen: it cannot be cleared any more.
    let error = begin(&[add.clone(), part.clone(), clear.clone()]).map(drop).unwrap_err();
    assert!(matches!(error, BeginError::Bitmap(_)), "{error}");
    assert_eq!((node.bitmaps().info().len(), case.bitmap()), (1, (4096, false)));
    node.write_at(&[2; 512], 4096).unwrap();
    assert_eq!(case.bitmap(), (8192, false));
    let begun = begin(&[add, part]).unwrap().pop().unwrap();
    assert_eq!(case.bitmap(), (8192, true));
    let (_job, events) = run(begun, options("b"));
    assert_eq!(until(&events, "null"), GOOD);
    assert_eq!(case.bitmap(), (8192, false), "it stays as it is");
    assert_eq!(node.bitmaps().info()[1].count_bytes, 0);
    let begun = begin(&[clear]).unwrap();
    assert!(begun.is_empty() && case.bitmap() == (0, false));
}

#[test]
fn what_cannot_be_saved_is_refused_and_nothing_has_happened() {
    let case = Case::new();
    let refused = |change: &dyn Fn(&mut BackupOptions)| {
        let mut options = case.options(BackupSync::Full);
        change(&mut options);
        begin(&[Step::Backup(case.options(BackupSync::Full)), Step::Backup(options)])
            .map(drop)
            .unwrap_err()
            .to_string()
    };
    let node = |disk: MemoryDisk| Arc::new(BlockNode::new("copy", Box::new(disk)));
    let error = refused(&|options| options.pair.target = options.pair.source.clone());
    assert!(error.contains("cannot be the same"), "{error}");
    let error = refused(&|options| options.pair.target = node(MemoryDisk::new(LEN - 512)));
    assert!(error.contains("different sizes"), "{error}");
    let read_only = || node(MemoryDisk::new(LEN).into_read_only());
    let error = refused(&|options| options.pair.target = read_only());
    assert!(error.contains("read-only"), "{error}");
    let error = refused(&|options| options.sync = BackupSync::Bitmap);
    assert!(error.contains("valid bitmap name"), "{error}");
    let error = refused(&|options| options.bitmap = Some((name("b"), BitmapMode::OnSuccess)));
    assert!(error.contains("'b' not found"), "{error}");
    // A request that does not end.
    let pass = case.pair.source.gate().enter().unwrap();
    let error = refused(&|_| {});
    assert!(error.contains("have not ended"), "{error}");
    drop(pass);
    // Writes are not seen by anybody.
    case.target.hold(true);
    case.pair.source.write_at(&[1; 512], 0).unwrap();
    case.target.hold(false);
    assert_eq!(case.target.accesses(), []);
}
