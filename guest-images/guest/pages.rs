//! What stands in a page: its number and generation, and a body that follows from both, so that any
//! wrong, stale or misplaced byte shows.

pub const WORDS: usize = 512;
/// Magic, number, generation.
pub const HEAD_WORDS: usize = 3;
const MAGIC: u64 = 0x4645_5252_5950_4147;
/// Eight-letter pieces that text is made of.
const TEXT: &[u8; 256] = b"the ferry carries its guests across a river, and none of them sees \
the water move; on the far shore each page is counted, read aloud, held against the light, and \
found to be what it was: the same words, the same order, as if nobody had ever left the house.";

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    Random,
    Text,
    Zero,
}

impl Fill {
    pub fn named(name: Option<&str>) -> Self {
        match name {
            Some("text") => Self::Text,
            Some("zero") => Self::Zero,
            _ => Self::Random,
        }
    }

    #[inline(always)]
    fn word(self, seed: u64, at: usize) -> u64 {
        match self {
            Self::Random => {
                let mixed = seed.wrapping_add(at as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                mixed ^ mixed >> 31
            }
            Self::Text => {
                let piece = seed.wrapping_add(at as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 59;
                let start = piece as usize * 8;
                let mut bytes = [0; 8];
                bytes.copy_from_slice(&TEXT[start..start + 8]);
                u64::from_le_bytes(bytes)
            }
            Self::Zero => 0,
        }
    }
}

/// Words that a rewrite changes, its head included, for a share of the page.
pub fn changing_words(percent: u64) -> usize {
    (WORDS * percent.min(100) as usize / 100).max(HEAD_WORDS)
}

pub fn next_random(random: u64) -> u64 {
    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
}

fn seed(index: u64, generation: u64) -> u64 {
    (index << 32 ^ generation).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// What pages hold, and how much of one a rewrite changes.
#[derive(Clone, Copy)]
pub struct Content {
    pub fill: Fill,
    pub changing_words: usize,
}

/// Runs `$work` with the fill known to the compiler: its loops become vector code.
macro_rules! for_each_fill {
    ($fill:expr, $name:ident => $work:expr) => {
        match $fill {
            Fill::Random => {
                const $name: Fill = Fill::Random;
                $work
            }
            Fill::Text => {
                const $name: Fill = Fill::Text;
                $work
            }
            Fill::Zero => {
                const $name: Fill = Fill::Zero;
                $work
            }
        }
    };
}

impl Content {
    /// A page as it first is. Where pages are filled with zeroes, all of it is zero.
    pub fn fill(&self, page: *mut u64, index: u64) {
        let words = unsafe { core::slice::from_raw_parts_mut(page, WORDS) };
        if self.fill == Fill::Zero {
            return words.fill(0);
        }
        let seed = seed(index, 0);
        words[..HEAD_WORDS].copy_from_slice(&[MAGIC, index, 0]);
        for_each_fill!(self.fill, FILL => {
            for (at, word) in words.iter_mut().enumerate().skip(HEAD_WORDS) {
                *word = FILL.word(seed, at);
            }
        });
    }

    /// Writes the words that change from generation to generation.
    pub fn rewrite(&self, page: *mut u64, index: u64, generation: u64) {
        let words = unsafe { core::slice::from_raw_parts_mut(page, WORDS) };
        let seed = seed(index, generation);
        words[..HEAD_WORDS].copy_from_slice(&[MAGIC, index, generation]);
        let changing = &mut words[..self.changing_words];
        for_each_fill!(self.fill, FILL => {
            for (at, word) in changing.iter_mut().enumerate().skip(HEAD_WORDS) {
                *word = FILL.word(seed, at);
            }
        });
    }

    /// Number, generation and one word of the body.
    pub fn looks_right(&self, page: *const u64, index: u64, generation: u64) -> bool {
        let words = unsafe { core::slice::from_raw_parts(page, WORDS) };
        let sample = HEAD_WORDS + (generation as usize * 61) % (WORDS - HEAD_WORDS);
        self.head_is(words, index, generation)
            && words[sample] == self.body_word(index, generation, sample)
    }

    fn body_word(&self, index: u64, generation: u64, at: usize) -> u64 {
        let generation = if at < self.changing_words { generation } else { 0 };
        self.fill.word(seed(index, generation), at)
    }

    fn head_is(&self, words: &[u64], index: u64, generation: u64) -> bool {
        let is_blank = self.fill == Fill::Zero && generation == 0;
        let head = if is_blank { [0; HEAD_WORDS] } else { [MAGIC, index, generation] };
        words[..HEAD_WORDS] == head
    }

    /// Whether every byte is as it was written last.
    pub fn is_whole(&self, page: *const u64, index: u64, generation: u64) -> bool {
        let words = unsafe { core::slice::from_raw_parts(page, WORDS) };
        let (changing, first) = (seed(index, generation), seed(index, 0));
        let (new, old) = words.split_at(self.changing_words);
        let mut wrong = 0;
        for_each_fill!(self.fill, FILL => {
            for (at, word) in new.iter().enumerate().skip(HEAD_WORDS) {
                wrong |= word ^ FILL.word(changing, at);
            }
            for (at, word) in old.iter().enumerate() {
                wrong |= word ^ FILL.word(first, at + new.len());
            }
        });
        wrong == 0 && self.head_is(words, index, generation)
    }
}

/// Where a page that should be zero is not, and what is there.
pub fn first_non_zero(page: *const u64) -> Option<(usize, u64)> {
    let words = unsafe { core::slice::from_raw_parts(page, WORDS) };
    if words.iter().fold(0, |all, word| all | word) == 0 {
        return None;
    }
    words.iter().position(|word| *word != 0).map(|at| (at, words[at]))
}
