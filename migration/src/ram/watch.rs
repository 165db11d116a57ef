//! Counts, in the middle of a round, how many of its pages are dirty again. Called by `pace`; the counts
//! are interpreted by [`crate::policy`].

use super::dirty::PageBitmap;

/// Pages of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Sent.
    pub sent: u64,
    /// Sent and dirty again.
    pub again: u64,
    /// Dirty, but not part of this round.
    pub fresh: u64,
    /// Part of this round and not sent yet.
    pub left: u64,
}

/// Remembers the pages of a round.
#[derive(Debug, Default)]
pub struct Watch {
    in_round: Vec<u64>,
}

impl Watch {
    /// Starts a round over `pending`.
    pub fn begin(&mut self, pending: &PageBitmap) {
        self.in_round.clear();
        self.in_round.extend_from_slice(pending.words());
    }

    /// Counts pages. The words before `cursor` were sent; `pending` holds the pages dirty now.
    pub fn count(&self, pending: &PageBitmap, cursor: usize) -> Counts {
        let mut counts = Counts::default();
        let ones = |word: u64| u64::from(word.count_ones());
        for (index, (round, now)) in self.in_round.iter().zip(pending.words()).enumerate() {
            if index < cursor {
                counts.sent += ones(*round);
                counts.again += ones(round & now);
            } else {
                counts.left += ones(*round);
            }
            counts.fresh += ones(now & !round);
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::ram::PageIndex;

    #[test]
    fn pages_are_told_apart_by_round_and_cursor() {
        let mut pending = PageBitmap::new(256);
        pending.insert_run(PageIndex(0), 10);
        pending.insert_run(PageIndex(130), 20);
        let mut watch = Watch::default();
        watch.begin(&pending);
        // The first word was sent, and then some was written: of it, beside it, and further on.
        pending.words_mut()[0] = 0;
        pending.insert_run(PageIndex(8), 4);
        pending.insert_run(PageIndex(200), 3);
        let counts = watch.count(&pending, 1);
        assert_eq!(counts, Counts { sent: 10, again: 2, fresh: 5, left: 20 });
        assert_eq!(watch.count(&pending, 4).left, 0);
    }
}
