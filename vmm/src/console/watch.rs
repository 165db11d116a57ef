//! Looks at the guest's output as it is written, whether or not it is read: for `--expect`, and to say what
//! a guest wrote last.

use super::expect::Expect;
use std::collections::VecDeque;

/// How much of the output is kept.
const TAIL_BYTES: usize = 120;

/// The observer of a guest's output.
pub(super) struct Watch {
    expect: Option<Expect>,
    tail: VecDeque<u8>,
}

impl Watch {
    pub fn new(expect: Option<Expect>) -> Self {
        Self { expect, tail: VecDeque::with_capacity(TAIL_BYTES) }
    }

    /// Processes more output.
    pub fn look(&mut self, bytes: &[u8]) {
        if let Some(expect) = &mut self.expect {
            expect.look(bytes);
        }
        let bytes = bytes.last_chunk::<TAIL_BYTES>().map_or(bytes, |last| &last[..]);
        let room = TAIL_BYTES - bytes.len();
        self.tail.drain(..self.tail.len().saturating_sub(room));
        self.tail.extend(bytes);
    }

    /// Whether `--expect` was given and has not matched.
    pub fn still_expects(&self) -> bool {
        self.expect.as_ref().is_some_and(|expect| !expect.has_matched())
    }

    /// The end of the output, quoted.
    pub fn last_output(&self) -> String {
        let tail: Vec<u8> = self.tail.iter().copied().collect();
        match String::from_utf8_lossy(&tail).trim() {
            "" => "no serial output".to_owned(),
            text => format!("last serial output {text:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_output_is_kept_and_quoted() {
        let mut watch = Watch::new(None);
        assert_eq!(watch.last_output(), "no serial output");
        for byte in b"one\n" {
            watch.look(&[*byte]);
        }
        watch.look(b"two \x1b\n");
        assert_eq!(watch.last_output(), r#"last serial output "one\ntwo \u{1b}""#);
        watch.look(&[b'x'; TAIL_BYTES - 1]);
        watch.look(b"yz");
        let kept = format!("{}yz", "x".repeat(TAIL_BYTES - 2));
        assert_eq!(watch.last_output(), format!("last serial output {kept:?}"));
        watch.look(&[b'z'; 3 * TAIL_BYTES]);
        assert_eq!(watch.tail.len(), TAIL_BYTES);
        assert!(!watch.still_expects());
    }
}
