//! A dirty bitmap as a set: the union with another one, a copy, a digest.

use super::DirtyBitmap;
use sha2::{Digest, Sha256};
use std::sync::atomic::{AtomicU64, Ordering};

/// Marks `bits` of `word`, and returns how many were clean. The caller marks the summary and counts.
pub(super) fn merge_word(word: &AtomicU64, bits: u64) -> u64 {
    // Often there is nothing to add, and a load is cheaper.
    let before = word.load(Ordering::SeqCst);
    if bits & !before == 0 {
        return 0;
    }
    let before = word.fetch_or(bits, Ordering::SeqCst);
    (bits & !before).count_ones().into()
}

impl DirtyBitmap {
    /// Marks what is marked in `other`, a bitmap of a disk of the same size, perhaps with other granules:
    /// every granule that one of `other` touches. Marks that `other` gets meanwhile may be missed.
    pub fn merge_from(&self, other: &DirtyBitmap) {
        if other.granule_shift == self.granule_shift {
            self.merge_words(other);
        } else {
            for run in other.runs() {
                self.mark(run);
            }
        }
    }

    /// The same, word by word. A summary word's worth at a time: words first, as in `mark`.
    fn merge_words(&self, other: &DirtyBitmap) {
        let groups = self.words.chunks(64).zip(other.words.chunks(64));
        for ((to, from), (words, others)) in self.summary.iter().zip(&other.summary).zip(groups) {
            let (named, mut newly) = (from.load(Ordering::SeqCst), 0);
            let mut left = named;
            while left != 0 {
                let at = left.trailing_zeros() as usize;
                newly += merge_word(&words[at], others[at].load(Ordering::SeqCst));
                left &= left - 1;
            }
            if named != 0 {
                to.fetch_or(named, Ordering::SeqCst);
                self.count.fetch_add(newly, Ordering::SeqCst);
            }
        }
    }

    /// A copy. Marks set meanwhile may be missed. `None` if there is no memory for it.
    pub fn copy(&self) -> Option<Self> {
        let mut copy = Self::new(self.len_bytes, self.granule_bytes())?;
        let groups = copy.words.chunks_mut(64).zip(self.words.chunks(64));
        for ((to, from), (words, others)) in copy.summary.iter_mut().zip(&self.summary).zip(groups)
        {
            let named = from.load(Ordering::SeqCst);
            *to.get_mut() = named;
            let mut left = named;
            while left != 0 {
                let at = left.trailing_zeros() as usize;
                let bits = others[at].load(Ordering::SeqCst);
                *words[at].get_mut() = bits;
                *copy.count.get_mut() += u64::from(bits.count_ones());
                left &= left - 1;
            }
        }
        Some(copy)
    }

    /// SHA-256 of all words, first to last, each as eight little-endian bytes, in hexadecimal digits. Reads
    /// all of it: for tests and debugging. QEMU's digest covers its own tree of levels and differs.
    #[expect(clippy::little_endian_bytes, reason = "the digest's definition")]
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        let mut bytes = Vec::new();
        for group in self.words.chunks(1024) {
            bytes.clear();
            bytes.extend(group.iter().flat_map(|word| word.load(Ordering::SeqCst).to_le_bytes()));
            hash.update(&bytes);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
