//! A JUnit report, as CI systems read it: one `testsuite`, a `testcase` for each test.

use super::{Totals, Verdict};
use crate::suite::verdict::Outcome;
use std::fmt::Write;

/// The whole file. `suite` is the name of the tests together; a test without an outcome was not run.
pub(in crate::suite) fn file(
    suite: &str,
    tests: &[(&str, Option<&Outcome>)],
    totals: &Totals,
) -> String {
    let failures = count(tests, |outcome| element(outcome) == Element::Failure);
    let errors = count(tests, |outcome| element(outcome) == Element::Error);
    let skipped = tests.len() - count(tests, |outcome| element(outcome) != Element::Skipped);
    let counts = format!(
        "tests=\"{}\" failures=\"{failures}\" errors=\"{errors}\" skipped=\"{skipped}\" time=\"{:.3}\"",
        tests.len(),
        totals.time.as_secs_f64()
    );
    let suite = escaped(suite);
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    // Writing to a String does not fail.
    let _ = writeln!(xml, "<testsuites name=\"ferry test\" {counts}>");
    let _ = writeln!(xml, "  <testsuite name=\"{suite}\" {counts}>");
    for (name, outcome) in tests {
        let name = escaped(name);
        let seconds = outcome.map_or(0.0, |outcome| outcome.time.as_secs_f64());
        let _ = writeln!(
            xml,
            "    <testcase name=\"{name}\" classname=\"{suite}\" time=\"{seconds:.3}\">"
        );
        match outcome {
            None => xml.push_str("      <skipped message=\"not run\"/>\n"),
            Some(outcome) => content(&mut xml, outcome),
        }
        xml.push_str("    </testcase>\n");
    }
    xml.push_str("  </testsuite>\n</testsuites>\n");
    xml
}

fn count(tests: &[(&str, Option<&Outcome>)], is: impl Fn(&Outcome) -> bool) -> usize {
    tests.iter().filter(|(_, outcome)| outcome.is_some_and(&is)).count()
}

/// What a test is in the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    Nothing,
    Skipped,
    Failure,
    Error,
}

fn element(outcome: &Outcome) -> Element {
    match (outcome.as_expected, outcome.verdict) {
        (true, Verdict::Skip) => Element::Skipped,
        (true, _) => Element::Nothing,
        (false, Verdict::Error) => Element::Error,
        (false, _) => Element::Failure,
    }
}

fn content(xml: &mut String, outcome: &Outcome) {
    let why = escaped(&outcome.why);
    let _ = match element(outcome) {
        Element::Nothing => Ok(()),
        Element::Skipped => writeln!(xml, "      <skipped message=\"{why}\"/>"),
        Element::Failure => writeln!(xml, "      <failure message=\"{why}\"/>"),
        Element::Error => writeln!(xml, "      <error message=\"{why}\"/>"),
    };
    if !outcome.tail.is_empty() {
        let _ = writeln!(xml, "      <system-out>{}</system-out>", escaped(&outcome.tail));
    }
}

/// A text for an attribute or an element. Characters that XML 1.0 cannot have, not even by number (production
/// 2, Char), become U+FFFD.
fn escaped(text: &str) -> String {
    let mut xml = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => xml.push_str("&amp;"),
            '<' => xml.push_str("&lt;"),
            '>' => xml.push_str("&gt;"),
            '"' => xml.push_str("&quot;"),
            '\'' => xml.push_str("&apos;"),
            // As they are, an attribute would have spaces for them.
            '\n' | '\r' | '\t' => {
                let _ = write!(xml, "&#{};", u32::from(char));
            }
            '\0'..' ' | '\u{fffe}' | '\u{ffff}' => xml.push('\u{fffd}'),
            _ => xml.push(char),
        }
    }
    xml
}

#[cfg(test)]
mod tests {
    use super::super::tests::outcome;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_test_is_there_with_its_result_and_output() {
        let (good, bad) = (outcome(Verdict::Pass, true), outcome(Verdict::Fail, false));
        let lost = Outcome::error("killed by signal 9", Default::default());
        let old = Outcome::skipped("i386 only", Default::default());
        let tests = [
            ("good", Some(&good)),
            ("bad <1>", Some(&bad)),
            ("lost", Some(&lost)),
            ("old", Some(&old)),
            ("late", None),
        ];
        let xml = file("a&b", &tests, &Totals::default());
        for part in [
            "tests=\"5\" failures=\"1\" errors=\"1\" skipped=\"2\"",
            "<testsuite name=\"a&amp;b\"",
            "<testcase name=\"bad &lt;1&gt;\" classname=\"a&amp;b\" time=\"0.012\">",
            "<failure message=\"exit 3: the guest wrote 1 to the debug-exit port\"/>",
            "<error message=\"killed by signal 9\"/>",
            "<skipped message=\"i386 only\"/>",
            "<skipped message=\"not run\"/>",
            "FAIL: &lt;x&gt; &amp; \u{fffd}[31my&#10;last",
        ] {
            assert!(xml.contains(part), "{part}: {xml}");
        }
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_file(text in any::<String>()) {
            let escaped = escaped(&text);
            prop_assert!(!escaped.contains(['<', '>', '"', '\'', '\n']));
            prop_assert!(!escaped.chars().any(|char| char < ' '));
        }
    }
}
