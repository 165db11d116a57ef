//! The Test Anything Protocol, version 13. A test that ends as expected is `ok`, whatever that is; numbers are
//! those of the ends.

use super::{Report, Totals, Verdict, last_lines, printable};
use crate::suite::verdict::Outcome;
use std::io::{self, Write};

/// The report.
pub struct Tap<W> {
    output: W,
    number: usize,
}

impl<W: Write> Tap<W> {
    pub fn new(output: W) -> Self {
        Self { output, number: 0 }
    }
}

/// A text in which `#` begins no directive.
fn escaped(text: &str) -> String {
    printable(text).replace('\\', "\\\\").replace('#', "\\#")
}

/// A text in YAML's double quotes, of which JSON's are a part.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

impl<W: Write> Report for Tap<W> {
    fn begin(&mut self, count: usize) -> io::Result<()> {
        writeln!(self.output, "TAP version 13\n1..{count}")?;
        self.output.flush()
    }

    fn ended(&mut self, name: &str, outcome: &Outcome) -> io::Result<()> {
        self.number += 1;
        let out = &mut self.output;
        let ok = if outcome.as_expected { "ok" } else { "not ok" };
        write!(out, "{ok} {} - {}", self.number, escaped(name))?;
        match (outcome.verdict, outcome.as_expected) {
            (Verdict::Pass, true) => writeln!(out)?,
            (Verdict::Skip, true) => writeln!(out, " # SKIP {}", escaped(&outcome.why))?,
            (_, true) => writeln!(out, " (as expected: {})", escaped(&outcome.why))?,
            (_, false) => {
                writeln!(out, "\n  ---\n  message: {}", quoted(&outcome.why))?;
                if let Some(summary) = &outcome.summary {
                    writeln!(out, "  summary: {}", quoted(summary))?;
                }
                writeln!(out, "  duration_ms: {}", outcome.time.as_millis())?;
                writeln!(out, "  output: |")?;
                for line in last_lines(&outcome.tail) {
                    // Text that begins with spaces would set the block's indentation.
                    writeln!(out, "    > {line}")?;
                }
                writeln!(out, "  ...")?;
            }
        }
        out.flush()
    }

    fn finish(&mut self, totals: &Totals) -> io::Result<()> {
        if totals.missing() > 0 {
            writeln!(self.output, "Bail out! Interrupted")?;
        }
        writeln!(self.output, "# {}", totals.line())?;
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::outcome;
    use super::*;

    #[test]
    fn the_report_is_tap() {
        let mut output = Vec::new();
        let mut report = Tap::new(&mut output);
        report.begin(4).unwrap();
        report.ended("good", &outcome(Verdict::Pass, true)).unwrap();
        report.ended("bad # 2", &outcome(Verdict::Fail, false)).unwrap();
        report.ended("old", &Outcome::skipped("i386 only", Default::default())).unwrap();
        let known = Outcome { why: "exit 3".into(), ..outcome(Verdict::Fail, true) };
        report.ended("known", &known).unwrap();
        report.finish(&Totals { count: 5, passed: 4, ..Totals::default() }).unwrap();
        let expected = r#"TAP version 13
1..4
ok 1 - good
not ok 2 - bad \# 2
  ---
  message: "exit 3: the guest wrote 1 to the debug-exit port"
  summary: "14 tests, 1 unexpected failures"
  duration_ms: 12
  output: |
    > first
    > FAIL: <x> & \u{1b}[31my
    > last
  ...
ok 3 - old # SKIP i386 only
ok 4 - known (as expected: exit 3)
Bail out! Interrupted
# 5 tests: 4 passed, 1 not run in 0 ms
"#;
        assert_eq!(String::from_utf8(output).unwrap(), expected);
    }
}
