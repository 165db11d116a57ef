//! `--expect`: matches the guest's output as it is written, whether or not it is read.

use super::{ConsoleEvent, ConsoleSink};
use regex_lite::Regex;

/// Longest line that is matched.
const LINE_BYTES: usize = 16 << 10;
/// Lines up to this length are matched with each byte; longer ones once they are complete.
const PROMPT_BYTES: usize = 200;

/// A pattern, and the line that may match it.
pub(super) struct Expect {
    pattern: Regex,
    line: Vec<u8>,
    matched: bool,
    tell: ConsoleSink,
}

impl Expect {
    /// Calls `tell` once when a line matches `pattern`.
    pub fn new(pattern: Regex, tell: ConsoleSink) -> Self {
        Self { pattern, line: Vec::new(), matched: false, tell }
    }

    /// Whether a line has matched.
    pub fn has_matched(&self) -> bool {
        self.matched
    }

    /// Processes more output.
    pub fn look(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if self.matched {
                return;
            }
            if *byte == b'\n' {
                self.compare();
                self.line.clear();
                continue;
            }
            if self.line.len() == LINE_BYTES {
                self.line.drain(..LINE_BYTES / 2);
            }
            self.line.push(*byte);
        }
        // A prompt has no newline, but it is short.
        if !self.matched && self.line.len() <= PROMPT_BYTES {
            self.compare();
        }
    }

    fn compare(&mut self) {
        if self.pattern.is_match(&String::from_utf8_lossy(&self.line)) {
            self.matched = true;
            (self.tell)(ConsoleEvent::Expected);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_match_is_told_once_at_a_prompt_or_at_the_end_of_a_line() {
        let told = Arc::new(AtomicUsize::new(0));
        let count = told.clone();
        let sink: ConsoleSink = Arc::new(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let expect = |pattern: &str| Expect::new(Regex::new(pattern).unwrap(), sink.clone());
        let mut prompt = expect("login: $");
        for byte in b"boot\nlogin: login: " {
            prompt.look(&[*byte]);
        }
        assert!(prompt.has_matched());
        assert_eq!(told.load(Ordering::SeqCst), 1);
        let mut long = expect("end$");
        long.look(&[b'x'; 3 * LINE_BYTES]);
        long.look(b"end");
        assert!(!long.has_matched(), "a long line is looked at when it is complete");
        long.look(b"\n");
        assert!(long.has_matched());
    }
}
