//! The format of kvm-unit-tests' `unittests.cfg`: sections of `key = value` lines. A value in `"""` may have
//! several lines. Keys of other architectures and VMMs are ignored, as there.
//!
//! Source: docs/unittests.txt and scripts/common.bash of kvm-unit-tests. The key `expected` is ours, and other
//! readers of the file ignore it.

use super::verdict::Expected;
use super::words::{self, WordsError};
use crate::config::parse_duration;
use std::time::Duration;

/// Most tests of a file.
const MAX_TESTS: usize = 10_000;
/// Encloses a value of several lines.
const LONG: &str = "\"\"\"";

/// A section of the file. Empty texts are keys that are not there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct UnitTest {
    pub name: String,
    /// The kernel, beside the file.
    pub file: String,
    /// CPUs: a number or `$MAX_SMP`.
    pub smp: String,
    /// Options of QEMU, as for a shell.
    pub params: String,
    /// The kernel's command line, as for a shell.
    pub test_args: String,
    pub groups: Vec<String>,
    pub arch: String,
    pub accel: String,
    /// 0 is none, as for timeout(1).
    pub timeout: Option<Duration>,
    /// `PATH=VALUE` each.
    pub checks: Vec<String>,
    pub expected: Option<Expected>,
}

/// Reads a file.
///
/// # Errors
/// Names the line.
pub(super) fn parse(text: &str) -> Result<Vec<UnitTest>, String> {
    let mut tests: Vec<UnitTest> = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        let at = |what: &str| format!("line {}: {what}", index + 1);
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            if tests.len() == MAX_TESTS {
                return Err(at(&format!("more than {MAX_TESTS} tests")));
            }
            tests.push(UnitTest { name: name.trim().to_owned(), ..UnitTest::default() });
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            return Err(at(&format!("{line:?} is neither a [name] nor KEY = VALUE")));
        };
        let (key, value) = (key.trim(), value.trim());
        let value = match value.strip_prefix(LONG) {
            None => value.to_owned(),
            Some(first) => {
                long(first, &mut lines).ok_or_else(|| at(&format!("{key}: no {LONG} ends it")))?
            }
        };
        let Some(test) = tests.last_mut() else {
            return Err(at(&format!("{key} is not of any [name]")));
        };
        set(test, key, value).map_err(|why| at(&why))?;
    }
    Ok(tests)
}

/// The rest of a long value that begins with `first`; `None` if nothing ends it.
fn long<'a>(first: &str, lines: &mut impl Iterator<Item = (usize, &'a str)>) -> Option<String> {
    if let Some(whole) = first.trim_end().strip_suffix(LONG) {
        return Some(whole.to_owned());
    }
    let mut value = first.to_owned();
    loop {
        let (_, line) = lines.next()?;
        value.push('\n');
        if let Some(last) = line.trim_end().strip_suffix(LONG) {
            value.push_str(last);
            return Some(value);
        }
        value.push_str(line);
    }
}

fn set(test: &mut UnitTest, key: &str, value: String) -> Result<(), String> {
    let words = |value: &str| value.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    match key {
        "file" => test.file = value,
        "smp" => test.smp = for_shell(key, value)?,
        "extra_params" | "qemu_params" => test.params = for_shell(key, value)?,
        "test_args" => test.test_args = for_shell(key, value)?,
        "groups" => test.groups = words(&value),
        "arch" => test.arch = value,
        "accel" => test.accel = value,
        "timeout" => {
            let timeout = parse_duration(&value).map_err(|error| format!("timeout: {error}"))?;
            test.timeout = Some(timeout);
        }
        // The last one counts there; each is meant.
        "check" => test.checks.extend(words(&value)),
        "expected" => {
            test.expected = Some(value.parse().map_err(|error| format!("expected: {error}"))?);
        }
        _ => log::info!("test {}: {key} is not known, and ignored", test.name),
    }
    Ok(())
}

/// A value that a shell could read; whether it needs one is a matter of that test alone.
fn for_shell(key: &str, value: String) -> Result<String, String> {
    match words::split(&value, 1) {
        Ok(_) | Err(WordsError::NeedsShell { .. }) => Ok(value),
        Err(error) => Err(format!("{key}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: &str = r#"
# a comment
[apic]
file = apic.flat
smp = 2
extra_params = -cpu qemu64,+x2apic -append "a = b"
arch = x86_64
timeout = 30
groups = a  b

[pmu]
file=pmu.flat
check = /a=1 /b=2
check = /c=3
accel = kvm
qemu_params = """-cpu max \
  -m 1G
-smp 2"""
test_args = "x y"
kvmtool_params = --nothing
expected = fail
  [last]
extra_params = """-x"""
"#;

    #[test]
    fn sections_are_read() {
        let tests = parse(FILE).unwrap();
        assert_eq!(tests.len(), 3);
        let apic = &tests[0];
        assert_eq!((apic.name.as_str(), apic.file.as_str()), ("apic", "apic.flat"));
        assert_eq!(apic.params, "-cpu qemu64,+x2apic -append \"a = b\"");
        assert_eq!((apic.groups.len(), apic.timeout), (2, Some(Duration::from_secs(30))));
        let pmu = &tests[1];
        assert_eq!(pmu.checks, ["/a=1", "/b=2", "/c=3"]);
        assert_eq!(pmu.params, "-cpu max \\\n  -m 1G\n-smp 2");
        assert_eq!((pmu.test_args.as_str(), pmu.expected), ("\"x y\"", Some(Expected::Fail)));
        assert_eq!((tests[2].name.as_str(), tests[2].params.as_str()), ("last", "-x"));
    }

    #[test]
    fn what_cannot_be_read_is_named_by_its_line() {
        for (text, line) in [
            ("file = x", "line 1"),
            ("[a]\nnonsense", "line 2"),
            ("[a]\nexpected = maybe", "line 2"),
            ("[a]\ntimeout = soon", "line 2"),
            ("[a]\nfile = a\ntest_args = 'b", "line 3"),
            ("[a]\nextra_params = \"\"\"\n-x", "line 2"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(line), "{error}");
        }
        assert!(parse(&"[a]\n".repeat(MAX_TESTS + 1)).is_err());
    }

    proptest! {
        #[test]
        fn no_file_makes_it_panic(text in "[\\[\\]a= \"\n#]{0,60}") {
            let _ = parse(&text);
        }
    }
}
