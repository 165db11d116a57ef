//! What a test's end means. Pure: it is told how a process ended, and says whether that was expected.

use crate::exit_code;
use std::str::FromStr;
use std::time::Duration;

/// The exit code of a test that could not be run: it wrote 77, the skip code of Automake and kvm-unit-tests.
pub const SKIPPED: u8 = 77 << 1 | 1;
/// The exit code of a test that has passed: it wrote 0.
pub const PASSED: u8 = 1;

/// What a test is expected to end with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Expected {
    /// A pass; a skip is no surprise.
    #[default]
    Pass,
    /// A failure that the test itself reports, or a crash.
    Fail,
    /// A skip.
    Skip,
    /// This exit code.
    Code(u8),
}

impl FromStr for Expected {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "pass" => Ok(Self::Pass),
            "fail" => Ok(Self::Fail),
            "skip" => Ok(Self::Skip),
            _ => text.parse().map(Self::Code).map_err(|_| {
                format!("{text:?}: expected pass, fail, skip or an exit code from 0 to 255")
            }),
        }
    }
}

/// A test's name with its expected result: `NAME=fail`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedResult {
    /// The name.
    pub name: String,
    /// The result.
    pub expected: Expected,
}

impl FromStr for NamedResult {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, expected) =
            text.rsplit_once('=').ok_or_else(|| format!("{text:?}: expected TEST=RESULT"))?;
        Ok(Self { name: name.to_owned(), expected: expected.parse()? })
    }
}

/// How a test's process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With this exit code.
    Code(u8),
    /// By a signal, or not at all in time: the test has said nothing.
    Lost,
}

/// A test's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It says that all is well.
    Pass,
    /// It says that something is not, it crashed, or it did not end in time.
    Fail,
    /// It could not be run.
    Skip,
    /// Ferry could not run it, so nothing is known.
    Error,
}

/// Reads an end; `pass` are exit codes of a pass.
pub fn judge(end: End, pass: &[u8]) -> Verdict {
    match end {
        End::Code(code) if pass.contains(&code) => Verdict::Pass,
        End::Code(SKIPPED) => Verdict::Skip,
        End::Code(exit_code::CANNOT_RUN | exit_code::USAGE | exit_code::SIGNAL) | End::Lost => {
            Verdict::Error
        }
        End::Code(_) => Verdict::Fail,
    }
}

impl Expected {
    /// Whether this is what was expected.
    pub fn is(self, verdict: Verdict, end: Option<End>) -> bool {
        match self {
            Self::Pass => matches!(verdict, Verdict::Pass | Verdict::Skip),
            Self::Fail => verdict == Verdict::Fail,
            Self::Skip => verdict == Verdict::Skip,
            Self::Code(code) => end == Some(End::Code(code)),
        }
    }

    /// In words, for a test that did not end so.
    pub fn in_words(self) -> String {
        match self {
            Self::Pass => "a pass".to_owned(),
            Self::Fail => "a failure".to_owned(),
            Self::Skip => "a skip".to_owned(),
            Self::Code(code) => format!("exit code {code}"),
        }
    }
}

/// What is known of a test that has ended, or was not started.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Its result.
    pub verdict: Verdict,
    /// Whether that was expected.
    pub as_expected: bool,
    /// How it ended, or why it was not run; one line.
    pub why: String,
    /// What a summary line of its output says: `14 tests, 1 unexpected failures`.
    pub summary: Option<String>,
    /// From the start of its process to its end.
    pub time: Duration,
    /// How often it was migrated.
    pub moves: u64,
    /// The end of its output.
    pub tail: String,
}

impl Outcome {
    /// Of a test that is not run.
    pub fn skipped(why: impl Into<String>, expected: Expected) -> Self {
        Self::unstarted(Verdict::Skip, why, expected)
    }

    /// Of a test that cannot be run.
    pub fn error(why: impl Into<String>, expected: Expected) -> Self {
        Self::unstarted(Verdict::Error, why, expected)
    }

    fn unstarted(verdict: Verdict, why: impl Into<String>, expected: Expected) -> Self {
        Self {
            verdict,
            // A test that this host or this program skips is no failure, whatever it would have said.
            as_expected: verdict == Verdict::Skip || expected.is(verdict, None),
            why: why.into(),
            summary: None,
            time: Duration::ZERO,
            moves: 0,
            tail: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_read_as_kvm_unit_tests_does() {
        for (code, verdict) in [
            (1, Verdict::Pass),
            (155, Verdict::Skip),
            (3, Verdict::Fail),
            (0, Verdict::Fail),
            (124, Verdict::Fail),
            (134, Verdict::Fail),
            (126, Verdict::Error),
        ] {
            assert_eq!(judge(End::Code(code), &[PASSED]), verdict, "{code}");
        }
        assert_eq!(judge(End::Lost, &[PASSED]), Verdict::Error);
        assert_eq!(judge(End::Code(33), &[33]), Verdict::Pass);
        assert_eq!(judge(End::Code(1), &[33]), Verdict::Fail);
    }

    #[test]
    fn an_expected_failure_is_one_that_the_test_reports() {
        let is = |expected: Expected, code| {
            let end = End::Code(code);
            expected.is(judge(end, &[PASSED]), Some(end))
        };
        assert!(is(Expected::Fail, 3) && is(Expected::Fail, 134));
        assert!(!is(Expected::Fail, 1) && !is(Expected::Fail, 126));
        assert!(is(Expected::Code(134), 134) && !is(Expected::Code(134), 1));
        assert!(is(Expected::Pass, 155) && is(Expected::Skip, 155) && !is(Expected::Skip, 1));
        assert!(!Expected::Fail.is(Verdict::Error, Some(End::Lost)));
        let outcome = Outcome::skipped("i386 only", Expected::Code(3));
        assert!(outcome.as_expected);
    }

    #[test]
    fn results_are_read_by_name() {
        let read = |text: &str| text.parse::<NamedResult>().map(|it| (it.name, it.expected));
        assert_eq!(read("a=b=fail"), Ok(("a=b".into(), Expected::Fail)));
        assert_eq!(read("x=134"), Ok(("x".into(), Expected::Code(134))));
        for bad in ["x", "x=", "x=256", "x=maybe"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
