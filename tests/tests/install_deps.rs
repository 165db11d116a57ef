//! `install-deps.sh` on hosts that lack something: what it installs, or asks for.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::process::{Process, SOON};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A host whose programs are these. What it is told to install goes into a file.
struct Host(tempfile::TempDir);

impl Host {
    fn new(user: u32) -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        for program in ["dirname", "env", "sh"] {
            symlink(Path::new("/usr/bin").join(program), host.path(program)).unwrap();
        }
        host.has("cargo", "");
        host.has("id", &format!("echo {user}"));
        host
    }

    fn path(&self, program: &str) -> PathBuf {
        self.0.path().join(program)
    }

    fn has(&self, program: &str, script: &str) {
        let path = self.path(program);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn has_apt(&self) {
        self.has("apt-get", &format!("echo \"$@\" >> {}", self.path("asked").display()));
    }

    /// Exit code, what the user was told, and what apt was asked for.
    fn install(&self, what: &str) -> (i32, String, String) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("install-deps.sh");
        let mut command = Command::new("/bin/sh");
        command.arg(script).arg(what).env("PATH", self.0.path());
        let mut process = Process::start(&mut command).unwrap();
        let code = process.exit_code(SOON).unwrap();
        // Nothing was asked for where there is no such file.
        let asked = std::fs::read_to_string(self.path("asked")).unwrap_or_default();
        (code, process.err.text(), asked)
    }
}

#[test]
fn root_installs_what_is_missing_and_nothing_a_second_time() {
    let host = Host::new(0);
    host.has_apt();
    let (code, told, asked) = host.install("linux");
    assert_eq!(code, 0, "{told}");
    let (update, install) = asked.split_once('\n').unwrap();
    assert!(update.starts_with("update"), "{asked}");
    for word in ["install", " gcc", " qemu-system-x86"] {
        assert!(install.contains(word), "{asked}");
    }
    host.has("cc", "");
    host.has("qemu-system-x86_64", "");
    host.has("mke2fs", "");
    assert_eq!(host.install("linux"), (0, String::new(), asked));
}

#[test]
fn a_user_who_cannot_become_root_is_told_what_is_missing() {
    let refuses = "echo a password is required >&2; exit 1";
    for sudo in [None, Some(refuses)] {
        let host = Host::new(1000);
        host.has_apt();
        if let Some(script) = sudo {
            host.has("sudo", script);
        }
        let (code, told, asked) = host.install("linux");
        assert_eq!((code, &*asked), (1, ""), "{told}");
        for word in ["only root", "apt-get install", " gcc", " qemu-system-x86"] {
            assert!(told.contains(word), "{word}: {told}");
        }
    }
}

#[test]
fn a_user_who_can_become_root_does() {
    let host = Host::new(1000);
    host.has_apt();
    host.has("sudo", "[ \"$1\" = -n ] || exec \"$@\"");
    let (code, told, asked) = host.install("build");
    assert_eq!(code, 0, "{told}");
    assert!(asked.contains("install") && asked.trim_end().ends_with(" gcc"), "{asked}");
}

#[test]
fn where_there_is_no_apt_the_packages_are_named() {
    let (code, told, _) = Host::new(0).install("build");
    assert_eq!(code, 1);
    assert_eq!(told, "please install: gcc\n");
}
