//! A line for each test, for people.

use super::{Report, Totals, Verdict, last_lines, printable, time};
use crate::suite::verdict::Outcome;
use std::io::{self, Write};

/// The report; the verdict is coloured if `colour`.
pub struct Text<W> {
    output: W,
    colour: bool,
}

impl<W: Write> Text<W> {
    pub fn new(output: W, colour: bool) -> Self {
        Self { output, colour }
    }
}

/// The verdict as a word, and its colour.
fn word(outcome: &Outcome) -> (&'static str, u8) {
    const GREEN: u8 = 32;
    const YELLOW: u8 = 33;
    const RED: u8 = 31;
    match (outcome.verdict, outcome.as_expected) {
        (Verdict::Pass, true) => ("PASS", GREEN),
        (Verdict::Pass, false) => ("XPASS", RED),
        (Verdict::Skip, true) => ("SKIP", YELLOW),
        (Verdict::Skip, false) => ("SKIP", RED),
        (Verdict::Fail, true) => ("XFAIL", GREEN),
        (Verdict::Fail, false) => ("FAIL", RED),
        (Verdict::Error, true) => ("XFAIL", GREEN),
        (Verdict::Error, false) => ("ERROR", RED),
    }
}

impl<W: Write> Report for Text<W> {
    fn begin(&mut self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn ended(&mut self, name: &str, outcome: &Outcome) -> io::Result<()> {
        let (word, colour) = word(outcome);
        let out = &mut self.output;
        if self.colour {
            write!(out, "\u{1b}[{colour}m{word:5}\u{1b}[0m {}", printable(name))?;
        } else {
            write!(out, "{word:5} {}", printable(name))?;
        }
        if outcome.verdict != Verdict::Skip || !outcome.time.is_zero() {
            write!(out, " {}", time(outcome.time))?;
        }
        if outcome.moves > 0 {
            write!(out, ", {} migrations", outcome.moves)?;
        }
        if let Some(summary) = &outcome.summary {
            write!(out, " ({})", printable(summary))?;
        }
        if outcome.verdict == Verdict::Pass && outcome.as_expected {
            return writeln!(out);
        }
        writeln!(out, ": {}", printable(&outcome.why))?;
        if !outcome.as_expected {
            for line in last_lines(&outcome.tail) {
                writeln!(out, "      | {line}")?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, totals: &Totals) -> io::Result<()> {
        writeln!(self.output, "{}", totals.line())?;
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::outcome;
    use super::*;

    #[test]
    fn a_line_each_and_the_last_output_of_what_was_not_expected() {
        let mut output = Vec::new();
        let mut report = Text::new(&mut output, false);
        report.ended("good", &outcome(Verdict::Pass, true)).unwrap();
        report.ended("bad", &outcome(Verdict::Fail, false)).unwrap();
        report.ended("known", &outcome(Verdict::Fail, true)).unwrap();
        let skipped =
            Outcome { summary: None, ..Outcome::skipped("i386 only", Default::default()) };
        report.ended("old", &skipped).unwrap();
        let text = String::from_utf8(output).unwrap();
        let why = "exit 3: the guest wrote 1 to the debug-exit port";
        let summary = "12 ms, 3 migrations (14 tests, 1 unexpected failures)";
        let expected = format!(
            "PASS  good {summary}\nFAIL  bad {summary}: {why}\n      | first\n      \
             | FAIL: <x> & \\u{{1b}}[31my\n      | last\nXFAIL known {summary}: {why}\nSKIP  old: i386 only\n"
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn verdicts_are_coloured_on_a_terminal() {
        let mut output = Vec::new();
        Text::new(&mut output, true).ended("x", &outcome(Verdict::Pass, true)).unwrap();
        assert!(String::from_utf8(output).unwrap().starts_with("\u{1b}[32mPASS \u{1b}[0m x"));
    }
}
