//! A dirty bitmap as a set: the union with another one, a digest.

use super::{BITS, DirtyBitmap, index};
use sha2::{Digest, Sha256};
use std::sync::atomic::Ordering;

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
        let mut at = 0;
        while let Some(first) = other.next_in_summary(at) {
            let group = first / BITS;
            let (mut named, mut newly) = (0u64, 0u64);
            let mut word = Some(first);
            while let Some(here) = word.filter(|word| word / BITS == group) {
                newly += self.merge_word(here, other.words[index(here)].load(Ordering::SeqCst));
                named |= 1 << (here % BITS);
                word = other.next_in_summary(here + 1);
            }
            self.summary[index(group)].fetch_or(named, Ordering::SeqCst);
            self.count.fetch_add(newly, Ordering::SeqCst);
            at = (group + 1) * BITS;
        }
    }

    /// Marks `bits` of a word. Returns how many were clean. The caller marks the summary.
    pub(super) fn merge_word(&self, word: u64, bits: u64) -> u64 {
        if bits == 0 {
            return 0;
        }
        let before = self.words[index(word)].fetch_or(bits, Ordering::SeqCst);
        (bits & !before).count_ones().into()
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
