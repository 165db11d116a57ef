//! Reports of a suite: lines for people ([`text`]), TAP ([`tap`]), JUnit ([`junit`]).

pub mod junit;
pub mod tap;
pub mod text;

use super::verdict::{Outcome, Verdict};
use std::io;
use std::time::Duration;

/// Lines of a test's output that are shown if it did not end as expected.
pub(super) const SHOWN_LINES: usize = 10;
/// Bytes of such a line.
const SHOWN_BYTES: usize = 500;

/// A report that is written as tests end.
pub(super) trait Report {
    /// There are so many tests.
    fn begin(&mut self, count: usize) -> io::Result<()>;
    /// The test `name` has ended.
    fn ended(&mut self, name: &str, outcome: &Outcome) -> io::Result<()>;
    /// All have ended, or no more are run.
    fn finish(&mut self, totals: &Totals) -> io::Result<()>;
}

/// How many tests ended how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Totals {
    pub count: usize,
    pub passed: usize,
    pub skipped: usize,
    /// Failed, as they should.
    pub failed_as_expected: usize,
    /// Ended in a way that was not expected.
    pub unexpected: usize,
    /// Migrations of all.
    pub moves: u64,
    /// From the start of the first.
    pub time: Duration,
}

impl Totals {
    /// Counts one more.
    pub fn add(&mut self, outcome: &Outcome) {
        self.moves += outcome.moves;
        *match (outcome.as_expected, outcome.verdict) {
            (false, _) => &mut self.unexpected,
            (true, Verdict::Pass) => &mut self.passed,
            (true, Verdict::Skip) => &mut self.skipped,
            (true, Verdict::Fail | Verdict::Error) => &mut self.failed_as_expected,
        } += 1;
    }

    /// Tests that were not run to their end.
    pub fn missing(&self) -> usize {
        let ended = self.passed + self.skipped + self.failed_as_expected + self.unexpected;
        self.count.saturating_sub(ended)
    }

    /// One line.
    pub fn line(&self) -> String {
        let mut parts = vec![format!("{} passed", self.passed)];
        for (count, what) in [
            (self.failed_as_expected, "failed as expected"),
            (self.unexpected, "not as expected"),
            (self.skipped, "skipped"),
            (self.missing(), "not run"),
        ] {
            if count > 0 {
                parts.push(format!("{count} {what}"));
            }
        }
        let mut line = format!("{} tests: {} in {}", self.count, parts.join(", "), time(self.time));
        if self.moves > 0 {
            line += &format!("; {} migrations", self.moves);
        }
        line
    }
}

/// A time, as precise as is of use.
pub(super) fn time(time: Duration) -> String {
    match time.as_millis() {
        millis @ 0..1000 => format!("{millis} ms"),
        _ => format!("{:.1} s", time.as_secs_f64()),
    }
}

/// The last lines of an output, printable.
pub(super) fn last_lines(output: &str) -> Vec<String> {
    let lines: Vec<_> = output.trim_end().lines().collect();
    let from = lines.len().saturating_sub(SHOWN_LINES);
    lines[from..].iter().map(|line| printable(line)).collect()
}

/// One line without what would move a terminal's cursor, and not too long.
pub(super) fn printable(line: &str) -> String {
    let mut text = String::new();
    for char in line.chars() {
        if text.len() >= SHOWN_BYTES {
            return text + "…";
        }
        match char {
            '\t' => text.push(' '),
            _ if char.is_control() => text.extend(char.escape_default()),
            _ => text.push(char),
        }
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A report in memory.
    pub fn outcome(verdict: Verdict, as_expected: bool) -> Outcome {
        Outcome {
            verdict,
            as_expected,
            why: "exit 3: the guest wrote 1 to the debug-exit port".into(),
            summary: Some("14 tests, 1 unexpected failures".into()),
            time: Duration::from_millis(12),
            moves: 3,
            tail: "first\nFAIL: <x> & \u{1b}[31my\nlast\n".into(),
        }
    }

    #[test]
    fn totals_are_one_line() {
        let mut totals = Totals { count: 6, ..Totals::default() };
        totals.add(&outcome(Verdict::Pass, true));
        assert_eq!(totals.line(), "6 tests: 1 passed, 5 not run in 0 ms; 3 migrations");
        totals.add(&outcome(Verdict::Fail, true));
        totals.add(&outcome(Verdict::Fail, false));
        totals.add(&outcome(Verdict::Pass, false));
        totals.add(&outcome(Verdict::Skip, true));
        totals.add(&outcome(Verdict::Error, false));
        totals.time = Duration::from_millis(1234);
        let line = "6 tests: 1 passed, 1 failed as expected, 3 not as expected, 1 skipped in 1.2 s; \
                    18 migrations";
        assert_eq!(totals.line(), line);
    }

    #[test]
    fn what_a_guest_prints_does_not_reach_the_terminal_as_it_is() {
        assert_eq!(printable("a\u{1b}[2J\tb\u{7}"), "a\\u{1b}[2J b\\u{7}");
        assert!(printable(&"x".repeat(10_000)).len() < 600);
        let many: String = (0..50).map(|line| format!("{line}\n")).collect();
        assert_eq!(last_lines(&many).first().map(String::as_str), Some("40"));
        assert!(last_lines("").is_empty());
    }
}
