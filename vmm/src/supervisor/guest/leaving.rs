//! An outgoing guest, served on the thread `mig-out`: waits for requests in flight, flushes disks, releases
//! their locks and retakes them after a failure.

use super::super::messages::Mailbox;
use super::super::tasks::{DiskWork, longest, spawn, wait_in_steps};
use super::ask;
use super::request::GuestRequest;
use crate::error::chain;
use crate::machine::{MachineError, lock_disks};
use devices::block::job::Job;
use devices::block::{BlockNode, Format};
use devices::state::DeviceRecord;
use migration::cancel::CancelToken;
use migration::guest::{GuestControl, GuestError, PartTime, Stopped};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a drain that missed its deadline is observed after the guest has resumed, to measure its real
/// duration.
const DRAIN_AFTERMATH: Duration = Duration::from_secs(1);
/// How long to retry locking the disks. A destination that failed releases them when its connection closes,
/// which may
/// take a moment; one whose link died notices after its patience.
const RELOCK_LIMIT: Duration = Duration::from_secs(15);
/// Interval of the retries.
const RELOCK_EVERY: Duration = Duration::from_millis(50);

/// Reported if there was nothing to flush.
const NO_FLUSH: &str = "flushing disks";

/// Serves a migration's source.
pub struct LeavingGuest {
    mailbox: Mailbox,
    cancel: CancelToken,
    nodes: Vec<Arc<BlockNode>>,
    /// Ids of migrated disks, which need no flush: the destination has its own copy.
    migrated: Vec<String>,
    flushes: DiskWork<Result<(), String>>,
    /// Of bitmaps that stay.
    storing: DiskWork<Result<(), String>>,
    /// Whose copies must have all that the guest has written before it runs elsewhere.
    mirrors: Vec<Arc<Job>>,
    /// The locks were let go of.
    released: bool,
}

impl LeavingGuest {
    /// A guest with these disks, in a migration that `cancel` cancels.
    pub fn new(
        mailbox: Mailbox,
        cancel: CancelToken,
        nodes: Vec<Arc<BlockNode>>,
        migrated: Vec<String>,
        mirrors: Vec<Arc<Job>>,
    ) -> Self {
        let writable: Vec<_> = nodes.iter().filter(|node| !node.read_only()).cloned().collect();
        let flushes = DiskWork::new("flushing", writable.clone());
        let storing = DiskWork::new("storing the bitmaps of", writable);
        Self { mailbox, cancel, nodes, migrated, flushes, storing, mirrors, released: false }
    }

    /// Runs `work` on each writable disk that `wanted` selects, until `deadline`.
    fn flush(
        &mut self,
        wanted: impl Fn(&BlockNode, bool) -> bool,
        work: impl Fn(&BlockNode, bool) -> io::Result<()> + Clone + Send + 'static,
        deadline: Instant,
    ) -> Result<PartTime, GuestError> {
        let migrated = self.migrated.clone();
        let stays = move |node: &BlockNode| !migrated.iter().any(|id| id == node.id());
        let stays_too = stays.clone();
        let work =
            move |node: &BlockNode| work(node, stays_too(node)).map_err(|error| error.to_string());
        run(&mut self.flushes, &self.cancel, |node| wanted(node, stays(node)), work, deadline)
    }

    /// Has every mirror copy what is left, until `deadline`.
    fn sync_mirrors(&self, deadline: Instant) -> Result<(), GuestError> {
        for mirror in &self.mirrors {
            let began = Instant::now();
            if mirror.sync_by(deadline) {
                continue;
            }
            let id = mirror.id();
            if mirror.has_ended() {
                return Err(GuestError::new(format!(
                    "the mirror {id} of disk {} has ended while the guest was moving: its copy may lack what the \
                     guest has written since; mirror it again, or migrate without it",
                    mirror.device()
                )));
            }
            if !mirror.info().ready {
                return Err(GuestError::new(format!(
                    "the mirror {id} of disk {} is not in sync: see query-block-jobs",
                    mirror.device()
                )));
            }
            let part = PartTime::not_ended(format!("syncing mirror `{id}`"), began.elapsed());
            return Err(GuestError::Overdue(part));
        }
        Ok(())
    }

    /// Stores the bitmaps that stay with their disks, until `deadline`. If that fails or is late, the guest
    /// stays with them.
    fn store_bitmaps(&mut self, deadline: Instant) -> Result<PartTime, GuestError> {
        let called_off = Arc::new(AtomicBool::new(false));
        let flag = called_off.clone();
        let stored = run(
            &mut self.storing,
            &self.cancel,
            |node| node.bitmaps().leaving_takes_time(),
            move |node| node.leave_bitmaps(&flag).map_err(|error| chain(&error)),
            deadline,
        );
        if !matches!(&stored, Ok(took) if took.ended) {
            called_off.store(true, Ordering::SeqCst);
            self.nodes.iter().for_each(|node| node.keep_bitmaps());
        }
        stored
    }
}

/// Runs `work` on each disk that `wanted` selects, until `deadline`; returns what took longest.
fn run(
    on: &mut DiskWork<Result<(), String>>,
    cancel: &CancelToken,
    wanted: impl Fn(&BlockNode) -> bool,
    work: impl Fn(&BlockNode) -> Result<(), String> + Clone + Send + 'static,
    deadline: Instant,
) -> Result<PartTime, GuestError> {
    let done = on.run(wanted, work, deadline, &|| !cancel.is_cancelled());
    let done = done.map_err(|error| GuestError::new(format!("cannot start a thread: {error}")))?;
    for disk in &done {
        if let Some(Err(error)) = &disk.result {
            return Err(GuestError::new(format!("{}: {error}", disk.time.part)));
        }
    }
    Ok(longest(&done, NO_FLUSH))
}

impl Drop for LeavingGuest {
    /// Bitmaps that were to leave, and are here after all, are in use again for those who find their file.
    fn drop(&mut self) {
        // Their disks' locks are with somebody else, or with nobody.
        if self.released {
            return;
        }
        let mut nodes = std::mem::take(&mut self.nodes);
        nodes.retain(|node| node.bitmaps().has_persistent());
        if nodes.is_empty() {
            return;
        }
        let mark = move || nodes.iter().for_each(|node| node.mark_or_remove_bitmaps());
        if let Err(error) = spawn("mark-bitmaps", mark) {
            log::error!("cannot start a thread: {error}");
        }
    }
}

impl GuestControl for LeavingGuest {
    fn flush_ahead(&mut self, deadline: Instant) -> Result<PartTime, GuestError> {
        // Their file as well, if all of a disk's bitmaps leave: it is not the pause's business.
        let work = |node: &BlockNode, stays: bool| {
            node.remove_bitmaps_ahead()?;
            // A copied disk as well, if bitmaps that stay with it have to be stored in the pause.
            if stays || node.bitmaps().leaving_takes_time() { node.sync() } else { Ok(()) }
        };
        let has_work = |node: &BlockNode, stays| stays || node.bitmaps().leaving_takes_time();
        self.flush(has_work, work, deadline)
    }

    fn pause(&mut self, deadline: Instant) -> Result<Stopped, GuestError> {
        let mut drains = ask(&self.mailbox, GuestRequest::BeginPause)?;
        let cancel = self.cancel.clone();
        let go_on = || !cancel.is_cancelled();
        if wait_in_steps(deadline, &go_on, &mut |until| drains.wait_until(until)) {
            let stopped = ask(&self.mailbox, GuestRequest::FinishPause)?;
            return Ok(Stopped { drains: drains.times(), ..stopped });
        }
        ask(&self.mailbox, GuestRequest::CallOffPause)?;
        // The guest has resumed. The measured time tells what the next attempt needs.
        let aftermath = Instant::now() + DRAIN_AFTERMATH;
        wait_in_steps(aftermath, &go_on, &mut |until| drains.wait_until(until));
        Err(GuestError::Overdue(drains.longest()))
    }

    fn save_records(&mut self) -> Result<Vec<DeviceRecord>, GuestError> {
        ask(&self.mailbox, GuestRequest::SaveRecords)
    }

    fn release_disks(&mut self, deadline: Instant) -> Result<PartTime, GuestError> {
        self.sync_mirrors(deadline)?;
        // Nothing may be written after unlocking, not even by a late flush: write everything back first; a
        // thread that is late keeps the lock.
        let flush = |node: &BlockNode, stays: bool| {
            if stays {
                node.sync()?;
            }
            node.write_back()
        };
        // A raw file that travels has nothing to write back: the destination has it on its own storage. Nor has
        // one to which nothing was written since it was flushed ahead.
        let has_work = |node: &BlockNode, stays| {
            node.format() != Format::Raw.name() || stays && node.has_unsynced_writes()
        };
        let took = self.flush(has_work, flush, deadline)?;
        if !took.ended {
            return Err(GuestError::Overdue(took));
        }
        let stored = self.store_bitmaps(deadline)?;
        if !stored.ended {
            return Err(GuestError::Overdue(stored));
        }
        self.released = true;
        for node in &self.nodes {
            // Of most there is nothing to store.
            let left = node.leave_bitmaps(&AtomicBool::new(false));
            left.map_err(|error| {
                GuestError::new(format!("disk {}: {}", node.id(), chain(&error)))
            })?;
        }
        self.nodes.iter().for_each(|node| node.unlock());
        Ok(match stored.took.is_zero() {
            true => took,
            false => PartTime::new(stored.part, took.took + stored.took),
        })
    }

    fn resume(&mut self, stopped: Stopped) -> Result<(), GuestError> {
        let locked = match std::mem::take(&mut self.released) {
            true => relock(&self.nodes).map_err(|error| chain(&error)),
            false => Ok(()),
        };
        ask(&self.mailbox, |reply| GuestRequest::Resume(stopped, locked, reply))
    }

    fn surrendered(&mut self) {
        if let Err(error) = ask(&self.mailbox, GuestRequest::Surrendered) {
            log::debug!("{error}");
        }
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        ask(&self.mailbox, |reply| GuestRequest::Throttle(percent, reply))
    }
}

/// Locks the disks again.
fn relock(nodes: &[Arc<BlockNode>]) -> Result<(), MachineError> {
    let deadline = Instant::now() + RELOCK_LIMIT;
    loop {
        let result = lock_disks(nodes);
        if result.is_ok() || Instant::now() >= deadline {
            return result;
        }
        // Releasing a lock signals no event: poll.
        std::thread::sleep(RELOCK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::unlock_disks;
    use devices::block::backend::BlockBackend;
    use devices::block::bitmaps::{BitmapName, NewBitmap};
    use devices::block::memory::{MemoryDisk, Script};
    use devices::block::raw::{Cache, RawFile};
    use std::path::{Path, PathBuf};

    fn guest(nodes: Vec<Arc<BlockNode>>, migrated: &[&str]) -> LeavingGuest {
        let (mailbox, _) = crate::event_loop::mailbox_for_test();
        let migrated = migrated.iter().map(|id| (*id).to_owned()).collect();
        LeavingGuest::new(mailbox, CancelToken::new(), nodes, migrated, Vec::new())
    }

    fn in_a_moment() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    fn late() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn disks_that_stay_are_flushed_ahead_and_one_that_hangs_is_named() {
        let disks = ["stays", "hangs", "travels"].map(|id| (id, MemoryDisk::new(512)));
        let [stays, hangs, travels] = [0, 1, 2].map(|index| disks[index].1.script());
        let nodes = disks.map(|(id, disk)| Arc::new(BlockNode::new(id, Box::new(disk))));
        let mut guest = guest(nodes.to_vec(), &["travels"]);
        hangs.hold(true);
        let took = guest.flush_ahead(in_a_moment()).unwrap();
        assert_eq!((took.part.as_str(), took.ended), ("flushing disk `hangs`", false));
        assert_eq!((stays.flush_count(), travels.flush_count()), (1, 0));
        hangs.hold(false);
        let took = guest.flush_ahead(late()).unwrap();
        assert!(took.ended, "{took}");
        hangs.fail(true);
        let error = guest.flush_ahead(late()).unwrap_err();
        assert_eq!(error.to_string(), "flushing disk `hangs`: scripted fault");
    }

    #[test]
    fn no_lock_is_let_go_of_before_every_flush_has_ended() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(512).unwrap();
        let open = || RawFile::open(file.path(), false, Cache::Writeback).unwrap();
        let slow = MemoryDisk::new(512);
        let script = slow.script();
        let disks: [(&str, Box<dyn BlockBackend>); 2] =
            [("locked", Box::new(open())), ("slow", Box::new(slow))];
        let nodes = disks.map(|(id, disk)| Arc::new(BlockNode::new(id, disk)));
        lock_disks(&nodes).unwrap();
        let mut guest = guest(nodes.to_vec(), &[]);
        script.hold(true);
        let overdue = guest.release_disks(in_a_moment()).unwrap_err();
        assert!(
            matches!(&overdue, GuestError::Overdue(time) if time.part == "flushing disk `slow`")
        );
        assert!(open().lock().is_err(), "the other one's lock is kept as well");
        // The late flush does not release it either.
        script.hold(false);
        while script.flush_count() == 0 {
            std::thread::yield_now();
        }
        assert!(open().lock().is_err());
        assert!(guest.release_disks(late()).unwrap().ended);
        assert!(open().lock().is_ok());
    }

    #[test]
    fn a_cancel_ends_the_wait_for_a_disk() {
        let disk = MemoryDisk::new(512);
        let script = disk.script();
        let mut guest = guest(vec![Arc::new(BlockNode::new("d", Box::new(disk)))], &[]);
        script.hold(true);
        let cancel = guest.cancel.clone();
        let cancels = std::thread::spawn(move || {
            script.wait_until_held();
            cancel.cancel();
            script
        });
        let never = Instant::now() + Duration::from_secs(3600);
        assert!(matches!(guest.release_disks(never), Err(GuestError::Overdue(_))));
        cancels.join().unwrap().hold(false);
    }

    /// A disk with a persistent bitmap, whose accesses `Script` controls, and its bitmaps' file.
    fn disk_with_bitmap(folder: &Path) -> (Arc<BlockNode>, Arc<Script>, PathBuf) {
        let path = folder.join("image");
        std::fs::write(&path, [0; 1024]).unwrap();
        let disk = MemoryDisk::new(1024).with_image(&path).unwrap();
        let script = disk.script();
        let node = Arc::new(BlockNode::new("d", Box::new(disk)));
        lock_disks(std::slice::from_ref(&node)).unwrap();
        let name = BitmapName::new("b").unwrap();
        let new = NewBitmap { name, granularity: 512, persistent: true, recording: true };
        node.bitmaps().add(new).unwrap();
        node.save_bitmaps().unwrap();
        (node, script, folder.join("image.bitmaps"))
    }

    /// Waits for what another thread is about to do.
    fn wait_until(what: impl Fn() -> bool) {
        let limit = Instant::now() + Duration::from_secs(30);
        while !what() {
            assert!(Instant::now() < limit);
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_file_of_bitmaps_that_leave_goes_before_the_pause_and_comes_back_if_they_stay() {
        let folder = tempfile::tempdir().unwrap();
        let (node, _, file) = disk_with_bitmap(folder.path());
        let held = node.bitmaps().hold(&BitmapName::new("b").unwrap()).unwrap();
        let mut leaving = guest(vec![node.clone()], &[]);
        assert!(leaving.flush_ahead(late()).unwrap().ended);
        assert!(file.exists(), "it was not said to leave");
        held.will_leave();
        assert!(leaving.flush_ahead(late()).unwrap().ended);
        assert!(!file.exists());
        assert!(!node.bitmaps().leaving_takes_time());
        // The migration fails.
        drop(held);
        drop(leaving);
        wait_until(|| file.exists());
        wait_until(|| node.bitmaps().leaving_takes_time());
        // The next one does not.
        let mut leaving = guest(vec![node.clone()], &[]);
        let held = node.bitmaps().hold(&BitmapName::new("b").unwrap()).unwrap();
        held.will_leave();
        leaving.flush_ahead(late()).unwrap();
        assert!(leaving.release_disks(late()).unwrap().ended);
        held.leave();
        drop(leaving);
        assert!(!file.exists());
    }

    #[test]
    fn bitmaps_that_stay_and_cannot_be_stored_in_time_are_in_use_again() {
        let folder = tempfile::tempdir().unwrap();
        let (node, script, _) = disk_with_bitmap(folder.path());
        let mut guest = guest(vec![node.clone()], &[]);
        // The flush passes, and the one before the file is written hangs.
        script.hold_after(1);
        let overdue = guest.release_disks(in_a_moment()).unwrap_err();
        let GuestError::Overdue(time) = &overdue else { panic!("{overdue}") };
        assert_eq!(time.part, "storing the bitmaps of disk `d`");
        // It ends while the guest runs, and says that the bitmaps are whole, which they soon are not.
        script.hold(false);
        node.write_at(&[1; 512], 512).unwrap();
        // The next attempt stores what the guest has written since.
        assert!(guest.release_disks(late()).unwrap().ended);
        drop(node);
        let other = MemoryDisk::new(1024).with_image(&folder.path().join("image")).unwrap();
        let other = Arc::new(BlockNode::new("d", Box::new(other)));
        lock_disks(std::slice::from_ref(&other)).unwrap();
        let info = other.bitmaps().info().remove(0);
        assert_eq!((info.count_bytes, info.inconsistent), (512, false));
    }

    #[test]
    fn bitmaps_are_stored_before_the_locks_are_let_go_of_and_in_use_again_after_a_failure() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [0; 1024]).unwrap();
        let open = || {
            let image = RawFile::open(&path, false, Cache::Writeback).unwrap();
            Arc::new(BlockNode::new("d", Box::new(image)))
        };
        let name = BitmapName::new("b").unwrap();
        let node = open();
        lock_disks(std::slice::from_ref(&node)).unwrap();
        let (persistent, recording) = (true, true);
        let new = NewBitmap { name: name.clone(), granularity: 512, persistent, recording };
        node.bitmaps().add(new).unwrap();
        let mut guest = guest(vec![node.clone()], &[]);
        // A folder in the place of the new file: it cannot be written.
        let obstacle = folder.path().join("image.bitmaps.partial");
        std::fs::create_dir(&obstacle).unwrap();
        let error = guest.release_disks(late()).unwrap_err().to_string();
        assert!(
            error.starts_with("storing the bitmaps of disk `d`: cannot store bitmaps in"),
            "{error}"
        );
        assert!(open().lock().is_err(), "the guest stays");
        std::fs::remove_dir(&obstacle).unwrap();
        relock(&guest.nodes).unwrap();
        node.write_at(&[1; 512], 512).unwrap();
        guest.release_disks(late()).unwrap();
        let other = [open()];
        lock_disks(&other).unwrap();
        let info = other[0].bitmaps().info().remove(0);
        assert_eq!((info.count_bytes, info.recording, info.inconsistent), (512, true, false));
        // It gives the disk back, as a destination does that fails.
        unlock_disks(&other);
        drop(other);
        relock(&guest.nodes).unwrap();
        node.write_at(&[1; 512], 0).unwrap();
        let info = node.bitmaps().info().remove(0);
        assert_eq!((info.count_bytes, info.inconsistent), (1024, false));
        // A crash now is noticed.
        drop((guest, node));
        let other = [open()];
        lock_disks(&other).unwrap();
        assert!(other[0].bitmaps().info()[0].inconsistent);
        unlock_disks(&other);
        // What cannot be used is refused, and the disk not locked.
        std::fs::write(folder.path().join("image.bitmaps"), "FERRY").unwrap();
        let error = chain(&lock_disks(&[open()]).unwrap_err());
        assert!(error.starts_with("disk d: the bitmaps in "), "{error}");
        open().lock().unwrap();
    }
}
