//! Pages that `disk` rewrites beside its sectors, so that RAM and disk change at the same time.

use crate::clock::{ticks, tsc};
use crate::heartbeat;
use crate::machine::Machine;
use crate::pages::{Content, Fill, WORDS, changing_words, next_random};

const PAGES_PER_MB: usize = 256;
/// Generations in one page of their table.
const ENTRIES: usize = 1024;
/// Rewritten at most before the disk has its turn again.
const AT_A_TIME: usize = 64;
/// Work missed for longer than this is not caught up.
const MOST_DEBT_US: u64 = 10_000;

/// How many pages of RAM the command line asks for, their table included.
pub fn pages_wanted(machine: &Machine) -> usize {
    let pages = (machine.number("ws_mb", 0) as usize).saturating_mul(PAGES_PER_MB);
    pages.div_ceil(ENTRIES).saturating_add(pages)
}

/// The pages, each of which has a generation that we know.
pub struct Beside<'m> {
    machine: &'m Machine,
    /// Of the table; the pages follow it.
    first: usize,
    pages: usize,
    content: Content,
    random: u64,
    ticks_per_page: u64,
    next: u64,
    pub rewritten: u64,
}

impl<'m> Beside<'m> {
    /// Fills as many pages as are wanted, from page `first` on.
    pub fn start(machine: &'m Machine, first: usize) -> Self {
        let pages = (machine.number("ws_mb", 0) as usize).saturating_mul(PAGES_PER_MB);
        let content = Content {
            fill: Fill::named(machine.text("fill")),
            changing_words: changing_words(machine.number("change_pct", 100)),
        };
        let rate = machine.number("ram_mbps", 50) * 1_000_000;
        let ticks_per_page = if rate == 0 { 0 } else { ticks(1_000_000) * 4096 / rate };
        let (random, next, rewritten) = (1, tsc(), 0);
        let beside =
            Self { machine, first, pages, content, random, ticks_per_page, next, rewritten };
        for page in 0..pages.div_ceil(ENTRIES) {
            // SAFETY: nothing else uses the pages from `first` on.
            unsafe { machine.page(first + page).write_bytes(0, WORDS) };
        }
        (0..pages).for_each(|index| content.fill(beside.page(index), index as u64));
        beside
    }

    pub fn pages(&self) -> usize {
        self.pages
    }

    fn page(&self, index: usize) -> *mut u64 {
        self.machine.page(self.first + self.pages.div_ceil(ENTRIES) + index)
    }

    fn generation(&self, index: usize) -> *mut u32 {
        let table = self.machine.page(self.first + index / ENTRIES).cast::<u32>();
        // SAFETY: a page has so many entries.
        unsafe { table.add(index % ENTRIES) }
    }

    /// Checks and rewrites what is due.
    pub fn work(&mut self, now: u64) {
        if self.pages == 0 || self.ticks_per_page == 0 {
            return;
        }
        for _ in 0..AT_A_TIME {
            if self.next > now {
                return;
            }
            self.random = next_random(self.random);
            self.rewrite((self.random >> 33) as usize % self.pages);
            self.next =
                (self.next + self.ticks_per_page).max(now.saturating_sub(ticks(MOST_DEBT_US)));
        }
    }

    fn rewrite(&mut self, index: usize) {
        let (page, entry) = (self.page(index), self.generation(index));
        // SAFETY: the table is ours, and `start` has cleared it.
        let old = unsafe { *entry };
        if !self.content.looks_right(page, index as u64, old.into()) {
            heartbeat::report_content("page", index, old.into(), unsafe { *page.add(2) });
        }
        self.content.rewrite(page, index as u64, u64::from(old) + 1);
        unsafe { *entry = old + 1 };
        self.rewritten += 1;
    }

    /// Checks every byte.
    pub fn check(&self) {
        for index in 0..self.pages {
            let (page, generation) = (self.page(index), unsafe { *self.generation(index) }.into());
            if !self.content.is_whole(page, index as u64, generation) {
                heartbeat::report_content("page", index, generation, unsafe { *page.add(2) });
            }
        }
    }
}
