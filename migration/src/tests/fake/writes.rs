//! Guests that write their RAM while they move, at fixed moments or all the time, and the log of it.

use super::machine::{Fail, Machine, step};
use crate::guest::{DirtySource, GuestError};
use devices::ram::{GuestAddress, GuestRam, PAGE_SIZE, PageIndex};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestMemoryBackend};

/// What was written through vm-memory, as it marks it. Manual: a bit stays until it is cleared.
pub struct FakeDirty {
    pub ram: GuestRam,
    pub log: Vec<u64>,
    pub fail: Fail,
    pub script: Option<Script>,
    /// The pass that runs.
    pub pass: Arc<AtomicU64>,
    /// A lively guest, which writes all its pages in each of so many passes.
    pub lively: Option<(Arc<Progress>, u64)>,
    /// So many pages of a running guest are always dirty again, less those that throttling prevents.
    pub hot_pages: u64,
    pub machine: Arc<Machine>,
}

impl FakeDirty {
    fn collect_hot(&mut self) {
        if self.machine.running.load(SeqCst) {
            let throttle = self.machine.throttles.lock().unwrap().last().copied().unwrap_or(0);
            let hot = self.hot_pages * u64::from(100 - throttle) / 100;
            for page in 16..16 + hot {
                self.log[usize::try_from(page / 64).unwrap()] |= 1 << (page % 64);
            }
        }
    }

    fn collect(&mut self) {
        let mut words = self.log.as_mut_slice();
        for region in self.ram.iter() {
            let marks = region.get_mmap().bitmap().get_and_reset();
            let (here, rest) = words.split_at_mut(marks.len());
            here.iter_mut().zip(marks).for_each(|(word, marks)| *word |= marks);
            words = rest;
        }
    }
}

impl DirtySource for FakeDirty {
    fn start(&mut self) -> Result<(), GuestError> {
        step(self.fail, Fail::Track)?;
        self.log.fill(u64::MAX);
        Ok(())
    }

    fn drain_into(&mut self, bitmap: &mut [u64]) -> Result<(), GuestError> {
        self.collect();
        self.collect_hot();
        bitmap.iter_mut().zip(&self.log).for_each(|(word, log)| *word |= log);
        Ok(())
    }

    fn clear(&mut self, first: PageIndex, mask: &[u64]) -> Result<(), GuestError> {
        assert!(first.0.is_multiple_of(64));
        // Marks that are collected only now came before the clear, and so before the copy.
        self.collect();
        let log = &mut self.log[usize::try_from(first.0 / 64).unwrap()..];
        assert!(mask.len() <= log.len());
        log.iter_mut().zip(mask).for_each(|(log, mask)| *log &= !mask);
        let pass = self.pass.load(SeqCst);
        if let Some(script) = self.script.as_ref().filter(|script| pass <= script.passes) {
            script.write(&self.ram, pass);
        }
        if let Some((progress, _)) = self.lively.as_ref().filter(|(_, passes)| pass <= *passes) {
            progress.wait();
        }
        Ok(())
    }

    fn stop(&mut self) {}
}

/// Kinds of writes: each makes pages travel in a way of its own.
pub const KINDS: u64 = 5;
/// What a script writes when the guest is paused.
pub const LAST_VERSION: u64 = 1000;

/// Writes `page` as guests do.
fn write_kind(ram: &GuestRam, page: u64, kind: u64, version: u64) {
    const BYTES: usize = 4096;
    let start = page * PAGE_SIZE;
    let write = |bytes: &[u8], offset| ram.write_slice(bytes, GuestAddress(start + offset));
    match kind % KINDS {
        // A little of it changes: a delta.
        0 => [8, 4088]
            .into_iter()
            .try_for_each(|at| ram.write_obj(version, GuestAddress(start + at))),
        // It is written and stays as it is.
        1 => write(&[0xa5; 64], 100),
        // It becomes zero, and something again.
        2 if version % 2 == 1 => write(&[0; BYTES], 0),
        2 => write(format!("something again: {version}").as_bytes(), 1000),
        // Text, which can be compressed.
        3 => {
            let text = format!("page {page} goes on with its story in part {version}; ");
            let text: Vec<u8> = text.bytes().cycle().take(BYTES).collect();
            write(&text, 0)
        }
        // Noise, which cannot.
        _ => {
            let mut state = page << 32 | version;
            let noise: Vec<u8> = (0..BYTES)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    u8::try_from(state >> 56).unwrap()
                })
                .collect();
            write(&noise, 0)
        }
    }
    .unwrap();
}

/// Writes of a guest at fixed moments: in each pass after its pages are clear in the log, and in the
/// pause. So whatever is sent is the same in every run.
#[derive(Debug, Clone)]
pub struct Script {
    /// Pages of each kind in each huge page.
    pub pages: u64,
    /// Which kinds.
    pub kinds: std::ops::Range<u64>,
    /// In how many passes the guest writes.
    pub passes: u64,
}

impl Script {
    pub fn write(&self, ram: &GuestRam, version: u64) {
        const HUGE: u64 = 512;
        for huge in 0..ram.last_addr().0 / PAGE_SIZE / HUGE + 1 {
            for kind in self.kinds.clone() {
                let first = huge * HUGE + 16 + kind * self.pages;
                (first..first + self.pages).for_each(|page| write_kind(ram, page, kind, version));
            }
        }
    }
}

/// How often a guest has written all its pages.
#[derive(Default)]
pub struct Progress(Mutex<u64>, Condvar);

impl Progress {
    fn add(&self) {
        *self.0.lock().unwrap() += 1;
        self.1.notify_all();
    }

    /// Waits until all pages have been written from now on.
    fn wait(&self) {
        let count = self.0.lock().unwrap();
        let end = *count + 2;
        let waited = self.1.wait_timeout_while(count, Duration::from_secs(5), |now| *now < end);
        assert!(!waited.unwrap().1.timed_out(), "the guest does not get on");
    }
}

/// A guest that writes its RAM: pages in turn, each with an ever growing number.
pub struct Mutator {
    stop: Arc<AtomicBool>,
    pub progress: Arc<Progress>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Mutator {
    /// Writes all of `pages` about once every `gap`. On return they
    /// have been written. A `lively` one writes in every kind of way, else in two.
    pub fn start(ram: GuestRam, pages: std::ops::Range<u64>, gap: Duration, lively: bool) -> Self {
        const PIECES: u32 = 8;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let progress = Arc::<Progress>::default();
        let gets_on = progress.clone();
        let piece = (pages.end - pages.start).div_ceil(PIECES.into()).max(1);
        let thread = std::thread::spawn(move || {
            let (mut number, mut version) = (1u64, 1);
            while !stopped.load(SeqCst) {
                for (index, page) in (0..).zip(pages.clone()) {
                    if index % piece == 0 {
                        let end = Instant::now() + gap / PIECES;
                        while let left = end.saturating_duration_since(Instant::now())
                            && !left.is_zero()
                            && number > pages.end - pages.start
                            && !stopped.load(SeqCst)
                        {
                            if left > Duration::from_millis(1) {
                                // Other tests need the CPU too, and then let this one have it in time.
                                std::thread::sleep(left.min(Duration::from_millis(10)));
                            }
                        }
                    }
                    if lively {
                        write_kind(&ram, page, page, version);
                        number += 1;
                        continue;
                    }
                    // Now and then a page becomes zero again.
                    let value = if number.is_multiple_of(7) { 0 } else { number };
                    for offset in [8, 4088] {
                        ram.write_obj(value, GuestAddress(page * PAGE_SIZE + offset)).unwrap();
                    }
                    number += 1;
                }
                version += 1;
                gets_on.add();
            }
        });
        progress.wait();
        Self { stop, progress, thread: Some(thread) }
    }

    pub fn stop(&mut self) {
        self.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Mutator {
    fn drop(&mut self) {
        self.stop();
    }
}
