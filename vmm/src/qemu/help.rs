//! What `--help`, `--version` and lists of devices, machines and so on print. Runners search them.

use super::hardware;
use super::table::{Fate, OPTIONS, Topic};
use crate::machine::cpu::config::CpuModel;
use std::fmt::Write;

/// The QEMU whose options and exit codes these are. Runners take numbers from this line.
const VERSION: &str = concat!(
    "QEMU emulator version 7.2.0 (its command line only: this is Ferry ",
    env!("CARGO_PKG_VERSION"),
    ")\n"
);

const INTRODUCTION: &str = "\
usage: ferry qemu [-v] OPTION…       or through a link that is called qemu-system-x86_64

Takes the command line of qemu-system-x86_64 as test runners write it. What changes nothing that a guest or a
runner could see is ignored, and said with -v; what would change what is tested is refused by name (exit code 2).
FERRY_MIGRATE_EVERY=200ms in the environment migrates the guest to a new process at that interval.

Exit codes are QEMU's where both have them: 0, and (v << 1) | 1 for isa-debug-exit. 2 usage, 126 the guest
cannot be run here, 130 SIGINT or SIGTERM, 134 the guest crashed. Nothing is printed if the guest ends by itself.
";

/// Whether a value asks for a list.
pub(super) fn is_wanted(value: &str) -> bool {
    matches!(value, "help" | "?")
}

/// The text about `topic`.
pub(super) fn text(topic: Topic) -> String {
    match topic {
        Topic::Options => options(),
        Topic::Version => VERSION.to_owned(),
        Topic::Devices => hardware::help(),
        Topic::Machines => "Supported machines are:\nmicrovm  Ferry's own machine (default)\n\
                            pc       the same\nq35      the same\n"
            .to_owned(),
        Topic::Cpus => {
            let names = CpuModel::ALL.map(|model| format!("  {}\n", model.name()));
            format!("Available CPUs:\n{}  max\n", names.concat())
        }
        Topic::Accelerators => "Accelerators supported in QEMU binary:\nkvm\n".to_owned(),
    }
}

fn options() -> String {
    let mut text = format!("{VERSION}\n{INTRODUCTION}");
    let mut part = |title: &str, wanted: fn(&Fate) -> Option<&'static str>| {
        text.push_str(title);
        for option in OPTIONS {
            if let Some(why) = wanted(&option.fate) {
                let names: Vec<_> = option.names.iter().map(|name| format!("-{name}")).collect();
                let value = if option.takes_value { " …" } else { "" };
                let names = format!("{}{value}", names.join("/"));
                // Writing to a String does not fail.
                let _ = writeln!(text, "  {names:28} {why}");
            }
        }
    };
    part("\nTranslated:\n", |fate| matches!(fate, Fate::Means(_) | Fate::Lists(..)).then_some(""));
    part("\nIgnored:\n", |fate| match fate {
        Fate::Harmless(why) => Some(why),
        _ => None,
    });
    part("\nRefused:\n", |fate| match fate {
        Fate::Refused(why) => Some(why),
        _ => None,
    });
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runners_find_what_they_look_for() {
        let help = text(Topic::Options);
        let first: Vec<_> = help.lines().next().unwrap().split([' ', '.']).collect();
        assert_eq!(first[3..6], ["7", "2", "0"]);
        assert!(help.contains("  -machine/-M …\n") && help.contains("-bios …"));
        let devices = text(Topic::Devices);
        assert!(devices.contains("name \"pc-testdev\", bus ISA"));
        assert!(!devices.contains("pci-testdev"));
        assert!(text(Topic::Cpus).contains("  host\n"));
    }
}
