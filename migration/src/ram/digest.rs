//! Digests of pages by line, an eighth of the size of a copy: enough to tell which lines have changed.
//! With them XBZRLE covers a working set of eight times its cache, at the granularity of lines. Called by
//! `encode` for pages that have no place in the cache of copies. Pure.
//!
//! The digest of a line is NH, the universal hash of UMAC (RFC 4418, section 5.2), over words of 64
//! bits: any two different lines have the same digest under at most one key in 2⁶⁴. The key is random,
//! new for each migration and never sent, so a guest cannot search for collisions. An undetected change is
//! less likely than a memory error of the host.

use super::cache::Cache;
use super::page::{PAGE_BYTES, Page};
use super::xbzrle::{Encoded, RunWriter};
use std::io;

/// Bytes per digest.
const LINE_BYTES: usize = 128;
const LINES: usize = PAGE_BYTES / LINE_BYTES;
const LINE_WORDS: usize = LINE_BYTES / 8;

/// The digests of a page's lines.
pub type Digest = [u128; LINES];
/// Digests of pages, with ages.
pub type DigestCache = Cache<Digest>;

/// A secret key.
#[derive(Debug, Clone)]
pub struct Digester {
    key: [u64; LINE_WORDS],
    /// Digest of a zero page.
    zero: Digest,
}

impl Digester {
    /// Draws a random key.
    pub fn random() -> io::Result<Self> {
        Ok(Self::with_key(words(&crate::bytes::random()?)))
    }

    fn with_key(key: [u64; LINE_WORDS]) -> Self {
        let mut digester = Self { key, zero: [0; LINES] };
        digester.zero = digester.digest(&[0; PAGE_BYTES]);
        digester
    }

    /// The digest of a page of zeroes.
    pub fn zero(&self) -> &Digest {
        &self.zero
    }

    /// The digest of `page`.
    pub fn digest(&self, page: &Page) -> Digest {
        let mut digest = [0; LINES];
        for (sum, line) in digest.iter_mut().zip(page.as_chunks::<LINE_BYTES>().0) {
            let words = words(line);
            for (word, key) in words.as_chunks::<2>().0.iter().zip(self.key.as_chunks::<2>().0) {
                let factors = (word[0].wrapping_add(key[0]), word[1].wrapping_add(key[1]));
                *sum = u128::wrapping_add(*sum, u128::from(factors.0) * u128::from(factors.1));
            }
        }
        digest
    }
}

#[expect(clippy::host_endian_bytes, reason = "nobody else sees digests")]
fn words(line: &[u8; LINE_BYTES]) -> [u64; LINE_WORDS] {
    let mut words = [0; LINE_WORDS];
    for (word, bytes) in words.iter_mut().zip(line.as_chunks::<8>().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    words
}

/// Writes the lines of `page` whose digests differ between `old` and `new` to the start of `into`, as an
/// XBZRLE delta.
pub fn encode_lines(old: &Digest, new: &Digest, page: &Page, into: &mut [u8]) -> Encoded {
    let mut writer = RunWriter::new(page, into);
    let mut line = 0;
    while line < LINES {
        if old[line] == new[line] {
            line += 1;
            continue;
        }
        let start = line;
        while line < LINES && old[line] != new[line] {
            line += 1;
        }
        if !writer.changed(start * LINE_BYTES..line * LINE_BYTES) {
            return Encoded::Overflow;
        }
    }
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::super::xbzrle::decode;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nh_is_what_it_is_defined_as() {
        let digester = Digester::with_key(std::array::from_fn(|index| index as u64 + 1));
        let mut page = [0; PAGE_BYTES];
        assert_eq!(
            digester.digest(&page)[0],
            2 + 3 * 4 + 5 * 6 + 7 * 8 + 9 * 10 + 11 * 12 + 13 * 14 + 15 * 16
        );
        page[..8].fill(0xff);
        // −1 + 1 is 0, modulo 2⁶⁴.
        assert_eq!(
            digester.digest(&page)[0],
            3 * 4 + 5 * 6 + 7 * 8 + 9 * 10 + 11 * 12 + 13 * 14 + 15 * 16
        );
        assert_eq!(digester.digest(&page)[1], digester.zero()[1]);
    }

    proptest! {
        #[test]
        fn the_lines_that_have_changed_make_the_page_right(
            changes in prop::collection::vec((0..PAGE_BYTES, any::<u8>()), 0..60),
        ) {
            let digester = Digester::random().unwrap();
            let old: Page = std::array::from_fn(|index| u8::try_from(index % 251).unwrap());
            let mut new = old;
            changes.iter().for_each(|(at, byte)| new[*at] = *byte);
            let mut delta = [0; PAGE_BYTES];
            let encoded =
                encode_lines(&digester.digest(&old), &digester.digest(&new), &new, &mut delta);
            match encoded {
                Encoded::Unchanged => prop_assert!(old == new),
                Encoded::Overflow => prop_assert!(changes.len() >= LINES - 1),
                Encoded::Bytes(len) => {
                    let mut page = old;
                    decode(&delta[..len], &mut page).unwrap();
                    prop_assert!(page == new);
                }
            }
        }
    }
}
