//! How a process ends: its exit code, and a sentence that says why. The README has the same table.
//!
//! A test kernel's own code, `(value << 1) | 1`, is odd: see [`debug_exit`]. All codes of `ferry run` and
//! `ferry receive` that are not the guest's are even, so that a crash is never taken for a test's result.

use std::fmt;

/// The guest powered off, `--expect` matched, or the user told it to quit.
pub const OK: u8 = 0;
/// `ferry migrate` and `ferry ctl`: the command failed.
pub const COMMAND_FAILED: u8 = 1;
/// Usage error.
pub const USAGE: u8 = 2;
/// It ended, and `--expect` never matched.
pub const UNMATCHED: u8 = 4;
/// `ferry migrate`: the answer to the handover was lost.
pub const UNKNOWN: u8 = 4;
/// `ferry migrate`: another migration of this guest is under way.
pub const BUSY: u8 = 5;
/// `ferry migrate`: the guest has moved, but not all that could wait for the handover has arrived.
pub const INCOMPLETE: u8 = 6;
/// `--timeout`.
pub const TIMEOUT: u8 = 124;
/// This host or these files cannot run the guest.
pub const CANNOT_RUN: u8 = 126;
/// SIGINT or SIGTERM: the shell's code for the former.
pub const SIGNAL: u8 = 130;
/// The guest crashed, or has panicked. The shell's code for SIGABRT.
pub const CRASHED: u8 = 134;

/// The table for `--help` of `ferry run` and `ferry receive`.
pub const HELP: &str = "\
Exit codes (odd ones are the guest's alone; the last line on standard error says why):
  0             the guest powered off, --expect matched, or a user ended it
  (v << 1) | 1  the guest wrote v to port 0xf4 (QEMU's isa-debug-exit), or where --debug-exit says
  2             usage
  4             --expect never matched
  124           --timeout has passed
  126           this host or these files cannot run the guest, or none arrived
  130           SIGINT or SIGTERM
  134           the guest crashed, or said through pvpanic that it has panicked";

/// The same for `ferry test`.
pub const TEST_HELP: &str = "\
A test passes if it ends with exit code 1 (it wrote 0 to the debug-exit port) or with one of --pass, is skipped with
155 (it wrote 77), and fails with any other. Each runs with --no-reboot, and for at most 90 s unless --timeout or the
file says otherwise. Names and groups of a file's tests are those of kvm-unit-tests' run_tests.sh.

Exit codes:
  0    every test ended as expected
  1    some did not, or a report cannot be written
  2    usage
  130  SIGINT or SIGTERM: what had ended is reported";

/// The code of a guest that wrote `value` to the debug-exit port. QEMU's `exit()` keeps 8 bits, too.
#[expect(clippy::cast_possible_truncation, reason = "an exit code has 8 bits")]
pub fn debug_exit(value: u32) -> u8 {
    (value << 1 | 1) as u8
}

/// How a process ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code.
    pub code: u8,
    /// One line.
    pub why: String,
}

impl Exit {
    pub fn new(code: u8, why: impl Into<String>) -> Self {
        Self { code, why: why.into() }
    }

    /// Reads what [`Exit`]'s `Display` has written.
    pub fn parse(line: &str) -> Option<Self> {
        let (code, why) = line.strip_prefix(PREFIX)?.split_once(": ")?;
        Some(Self::new(code.parse().ok()?, why))
    }

    /// Whether the guest has ended by itself, as it wanted to.
    pub fn is_guests_own(&self) -> bool {
        self.code == OK || self.code % 2 == 1
    }

    /// Adds where the guest was to a failure.
    pub fn at(mut self, place: Option<String>) -> Self {
        if let Some(place) = place {
            self.why = format!("{}; {place}", self.why);
        }
        self
    }
}

const PREFIX: &str = "ferry: exit ";

impl fmt::Display for Exit {
    /// The last line on standard error.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}: {}", self.code, self.why.replace('\n', " "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_guests_codes_are_odd() {
        assert_eq!([0, 1, 16, 127, 128].map(debug_exit), [1, 3, 33, 255, 1]);
        for ours in [OK, USAGE, UNMATCHED, TIMEOUT, CANNOT_RUN, SIGNAL, CRASHED] {
            assert_eq!(ours % 2, 0, "{ours}");
        }
    }

    #[test]
    fn the_last_line_is_one_line_and_can_be_read_again() {
        let exit = Exit::new(CRASHED, "the guest crashed: 1:\n2").at(Some("rip 0x10".into()));
        let line = exit.to_string();
        assert_eq!(line, "ferry: exit 134: the guest crashed: 1: 2; rip 0x10");
        assert_eq!(Exit::parse(&line).unwrap().to_string(), line);
        for other in ["ferry: exit", "ferry: exit 300: x", "ferry: exits", "exit 1: x"] {
            assert_eq!(Exit::parse(other), None, "{other}");
        }
    }
}
