//! A bitmap with one bit per page of RAM, walked by words and runs. Used by `outgoing` (pages to send) and
//! `page_receiver` (pages received). Dirty bits come from [`DirtySource`](crate::guest::DirtySource).

use devices::ram::PageIndex;
use std::ops::Range;

/// One bit per page of RAM.
#[derive(Debug, Clone)]
pub struct PageBitmap {
    words: Vec<u64>,
    page_count: u64,
}

impl PageBitmap {
    /// No page set.
    ///
    /// # Panics
    /// On a host that cannot address a bit per page.
    pub fn new(page_count: u64) -> Self {
        let words = usize::try_from(page_count.div_ceil(64)).expect("64-bit host");
        Self { words: vec![0; words], page_count }
    }

    /// Sets every page.
    pub fn set_all(&mut self) {
        self.words.fill(u64::MAX);
        let used = self.page_count % 64;
        if let (Some(last), true) = (self.words.last_mut(), used > 0) {
            *last = (1 << used) - 1;
        }
    }

    /// The words, 64 pages each.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The words, for a dirty log to be merged into.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Number of set pages.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether `page` is set.
    pub fn contains(&self, page: PageIndex) -> bool {
        let word = usize::try_from(page.0 / 64).ok().and_then(|at| self.words.get(at));
        word.is_some_and(|word| word >> (page.0 % 64) & 1 == 1)
    }

    /// Sets `page_count` pages from `first` on; those past the end are ignored.
    pub fn insert_run(&mut self, first: PageIndex, page_count: u64) {
        self.change_run(first, page_count, |word, mask| *word |= mask);
    }

    /// Clears `page_count` pages from `first` on; those past the end are ignored.
    pub fn remove_run(&mut self, first: PageIndex, page_count: u64) {
        self.change_run(first, page_count, |word, mask| *word &= !mask);
    }

    fn change_run(&mut self, first: PageIndex, page_count: u64, change: impl Fn(&mut u64, u64)) {
        let end = first.0.saturating_add(page_count).min(self.page_count);
        let mut at = first.0;
        while at < end {
            let in_word = (64 - at % 64).min(end - at);
            let mask = if in_word == 64 { u64::MAX } else { ((1 << in_word) - 1) << (at % 64) };
            if let Some(word) = usize::try_from(at / 64).ok().and_then(|at| self.words.get_mut(at))
            {
                change(word, mask);
            }
            at += in_word;
        }
    }

    /// Runs of set pages among the `page_count` from `first` on.
    pub fn runs_among(&self, first: PageIndex, page_count: u64) -> Runs<'_> {
        let end = first.0.saturating_add(page_count).min(self.page_count);
        Words { first_word: 0, words: &self.words }.runs_until(first.0, end)
    }

    /// Runs of set pages within the words `range`, whole words at a time.
    pub fn runs(&self, range: Range<usize>) -> Runs<'_> {
        let end = range.end.min(self.words.len());
        let all = Words { first_word: 0, words: &self.words };
        all.runs_until(range.start as u64 * 64, end as u64 * 64)
    }
}

/// Some words of such a bitmap.
#[derive(Debug, Clone, Copy)]
pub struct Words<'a> {
    /// Index of the first word in the bitmap.
    pub first_word: usize,
    /// The words, 64 pages each.
    pub words: &'a [u64],
}

impl<'a> Words<'a> {
    /// Runs of set pages.
    pub fn runs(self) -> Runs<'a> {
        let end = self.first_word + self.words.len();
        self.runs_until(self.first_word as u64 * 64, end as u64 * 64)
    }

    /// Runs of set pages among the `page_count` from `first` on, which these words hold.
    pub fn runs_among(self, first: PageIndex, page_count: u64) -> Runs<'a> {
        self.runs_until(first.0, first.0.saturating_add(page_count))
    }

    /// Whether `page` is set.
    pub fn contains(self, page: PageIndex) -> bool {
        self.word_of(page.0) >> (page.0 % 64) & 1 == 1
    }

    fn runs_until(self, at: u64, end: u64) -> Runs<'a> {
        Runs { bits: self, at, end }
    }

    /// The word with the bit of page `page`; 0 outside of these words.
    fn word_of(self, page: u64) -> u64 {
        let word = usize::try_from(page / 64).ok().and_then(|at| at.checked_sub(self.first_word));
        word.and_then(|at| self.words.get(at)).copied().unwrap_or(0)
    }
}

/// Iterator over `(first page, page count)`.
#[derive(Debug)]
pub struct Runs<'a> {
    bits: Words<'a>,
    at: u64,
    end: u64,
}

impl Runs<'_> {
    /// The next page from `self.at` on that is set, or is not; `self.end` if there is none.
    fn next_edge(&self, set: bool) -> u64 {
        let mut at = self.at;
        while at < self.end {
            let word = self.bits.word_of(at);
            let wanted = if set { word } else { !word } >> (at % 64);
            if wanted != 0 {
                return (at + u64::from(wanted.trailing_zeros())).min(self.end);
            }
            at = (at / 64 + 1) * 64;
        }
        self.end
    }
}

impl Iterator for Runs<'_> {
    type Item = (PageIndex, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let first = self.next_edge(true);
        if first >= self.end {
            return None;
        }
        self.at = first;
        self.at = self.next_edge(false);
        Some((PageIndex(first), self.at - first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_exactly_the_set_pages(words in prop::collection::vec(any::<u64>(), 1..9)) {
            let mut bitmap = PageBitmap::new(words.len() as u64 * 64);
            bitmap.words_mut().copy_from_slice(&words);
            let mut from_runs = Vec::new();
            for (first, count) in bitmap.runs(0..words.len()) {
                from_runs.extend(first.0..first.0 + count);
            }
            let set = |page: &u64| bitmap.contains(PageIndex(*page));
            let naive: Vec<_> = (0..words.len() as u64 * 64).filter(set).collect();
            prop_assert_eq!(from_runs.len() as u64, bitmap.count());
            prop_assert_eq!(from_runs, naive);
        }

        #[test]
        fn inserted_runs_are_what_comes_out(
            inserted in prop::collection::vec((0u64..300, 0u64..100), 0..6),
            window in (0u64..300, 0u64..300),
        ) {
            let mut bitmap = PageBitmap::new(256);
            for (first, count) in &inserted {
                bitmap.insert_run(PageIndex(*first), *count);
            }
            let within = |page: u64, run: (u64, u64)| (run.0..run.0 + run.1).contains(&page);
            let found: Vec<_> = bitmap
                .runs_among(PageIndex(window.0), window.1)
                .flat_map(|(first, count)| first.0..first.0 + count)
                .collect();
            let naive: Vec<_> = (0..256)
                .filter(|page| within(*page, window))
                .filter(|page| inserted.iter().any(|run| within(*page, *run)))
                .collect();
            prop_assert_eq!(found, naive);
        }
    }

    #[test]
    fn all_pages_are_one_run() {
        let mut bitmap = PageBitmap::new(200);
        bitmap.set_all();
        assert_eq!(bitmap.runs(0..4).collect::<Vec<_>>(), [(PageIndex(0), 200)]);
        assert_eq!(bitmap.count(), 200);
        bitmap.insert_run(PageIndex(150), 500);
        assert_eq!(bitmap.count(), 200);
    }
}
