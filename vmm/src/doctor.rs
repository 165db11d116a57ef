//! `ferry doctor`: checks this host's KVM, one line per check, with advice. [`cpu`] is about CPU models.

pub mod cpu;

use crate::error::chain;
use crate::exit_code;
use crate::kvm::{Host, REQUIRED};
use kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
use kvm_ioctls::Cap;
use std::path::Path;

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Fine,
    Lacking,
    Fatal,
}

fn line(verdict: Verdict, what: &str, detail: &str) -> String {
    let mark = match verdict {
        Verdict::Fine => "ok  ",
        Verdict::Lacking => "warn",
        Verdict::Fatal => "FAIL",
    };
    format!("{mark}  {what}: {detail}")
}

/// Prints all checks; returns 0 if a guest can run here, 126 if not.
pub fn run() -> u8 {
    let host = match Host::open() {
        Ok(host) => host,
        Err(error) => {
            println!("{}", line(Verdict::Fatal, "KVM", &chain(&error)));
            return exit_code::CANNOT_RUN;
        }
    };
    println!("{}", line(Verdict::Fine, "KVM", "/dev/kvm opens, API version 12"));
    println!("{}", kind_of_kvm());
    for cap in REQUIRED {
        println!("{}", line(Verdict::Fine, &format!("{cap:?}"), "present"));
    }
    for (cap, what, without) in OPTIONAL {
        let (verdict, detail) = match host.kvm().check_extension(cap) {
            true => (Verdict::Fine, "present"),
            false => (Verdict::Lacking, without),
        };
        println!("{}", line(verdict, what, detail));
    }
    let dirty_log = host.kvm().check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    println!("{}", dirty_log_line(dirty_log));
    println!("{}", line(Verdict::Fine, "vCPUs", &format!("up to {}", host.kvm().get_max_vcpus())));
    println!("{}", huge_pages());
    exit_code::OK
}

const OPTIONAL: [(Cap, &str, &str); 3] = [
    (Cap::TscDeadlineTimer, "TSC deadline timer", "absent: guests use a coarser timer"),
    (
        Cap::KvmclockCtrl,
        "kvmclock control",
        "absent: guests may report a soft lockup after a pause",
    ),
    (Cap::Xsave2, "XSAVE2", "absent: guests do without the largest vector state"),
];

fn dirty_log_line(offered: i32) -> String {
    let what = "dirty log";
    match offered {
        3.. => {
            line(Verdict::Fine, what, "cleared by hand, initially set: migration starts at once")
        }
        1 | 2 => {
            line(Verdict::Lacking, what, "cleared by hand only: starting a migration takes ms")
        }
        _ => line(Verdict::Lacking, what, "cleared by reading: a newer kernel migrates faster"),
    }
}

fn kind_of_kvm() -> String {
    let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
    // Unreadable: no flag is known.
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| cpuinfo.split_whitespace().any(|word| word == flag);
    let what = "kind of KVM";
    match () {
        () if loaded("kvm_intel") && has("vmx") => line(Verdict::Fine, what, "Intel VMX"),
        () if loaded("kvm_amd") && has("svm") => line(Verdict::Fine, what, "AMD SVM"),
        () if loaded("kvm_pvm") => line(
            Verdict::Lacking,
            what,
            "software KVM (kvm_pvm): test kernels run, stock Linux does not",
        ),
        () => {
            line(Verdict::Lacking, what, "neither VMX nor SVM is visible: stock Linux may not run")
        }
    }
}

fn huge_pages() -> String {
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    // Unreadable: reported as unknown.
    let setting = std::fs::read_to_string(path).unwrap_or_default();
    let chosen = setting.split(['[', ']']).nth(1).unwrap_or("unknown");
    match chosen {
        "always" | "madvise" => line(Verdict::Fine, "transparent huge pages", chosen),
        other => line(
            Verdict::Lacking,
            "transparent huge pages",
            &format!("{other}: `echo madvise > {path}` makes guests and migration faster"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_is_said_with_what_follows() {
        assert!(dirty_log_line(3).starts_with("ok"));
        assert!(
            dirty_log_line(0).starts_with("warn") && dirty_log_line(0).contains("newer kernel")
        );
        assert!(line(Verdict::Fatal, "KVM", "gone").starts_with("FAIL  KVM"));
    }
}
