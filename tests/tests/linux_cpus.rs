//! `--cpu` on a KVM that can hide a feature of the host's CPU from a guest, and a stock kernel of others that a software
//! KVM cannot run.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use anyhow::{Context, Result, ensure};
use ferry_tests::ferry::{self, Guest};
use ferry_tests::linux::check;
use ferry_tests::linux::guest::{Disk, LIMIT, Life, guest};
use ferry_tests::skip::say;
use serde_json::Value;

/// The flags of `/proc/cpuinfo` that a line `FLAGS when …` has.
fn flags(life: &Life, when: &str) -> Result<Vec<String>> {
    let line = life.wait_line(&format!(r"^FLAGS {when} .* \.$"))?.text;
    Ok(line.split_whitespace().map(str::to_owned).collect())
}

/// The features of the host on which this runs.
fn host_features() -> Result<Vec<String>> {
    let (code, text) = ferry::end_of(["doctor", "--cpu-model"])?;
    ensure!(code == 0, "{text}");
    let model: Value = serde_json::from_str(&text)?;
    let features = model["features"].as_array().context("no features")?;
    Ok(features.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect())
}

#[test]
fn linux_sees_a_baseline_and_no_more_before_and_after_a_move() {
    check(|assets| {
        let host = host_features()?;
        let above: Vec<_> = ["bmi1", "bmi2", "avx2", "aes", "movbe", "rdseed"]
            .into_iter()
            .filter(|name| host.iter().any(|feature| feature == name))
            .collect();
        println!("the host has {above:?}, of which a guest of the second level sees nothing");
        ensure!(!above.is_empty(), "this host has nothing above the second level: {host:?}");
        let disk = Disk::new()?;
        let mut life =
            Life::begin(&guest(assets, "cpu", 1, &disk), &disk, &["--cpu", "x86-64-v2"])?;
        let before = flags(&life, "before")?;
        let has = |name: &str| before.iter().any(|flag| flag == name);
        for name in ["sse4_2", "popcnt", "ssse3", "cx16"] {
            ensure!(has(name), "{name} is missing: {before:?}");
        }
        for name in above {
            ensure!(!has(name), "{name} is there: {before:?}");
        }
        life.hop()?;
        life.guest.vmm.process.type_in("go\n")?;
        let after = flags(&life, "after")?;
        ensure!(before[2..] == after[2..], "{before:?} became {after:?}");
        life.end()?;
        disk.check()
    });
}

#[test]
fn linux_sees_svm_only_if_it_is_asked_for() {
    check(|assets| {
        for (cpu, expected) in [("host", false), ("host,+svm", true)] {
            let disk = Disk::new()?;
            let started = Life::begin(&guest(assets, "cpu", 1, &disk), &disk, &["--cpu", cpu]);
            let mut life = started?;
            let seen = match flags(&life, "before") {
                Ok(flags) => flags.iter().any(|flag| flag == "svm"),
                Err(error) => {
                    // A host without it says so.
                    let said = life.guest.vmm.process.err.text();
                    ensure!(expected && said.contains("this host lacks svm"), "{error:#}");
                    println!("this host has no SVM to offer");
                    continue;
                }
            };
            ensure!(seen == expected, "--cpu {cpu}: svm is {seen}");
            // It is offered, and not in use: the guest moves.
            life.hop()?;
            life.guest.vmm.process.type_in("go\n")?;
            ensure!(flags(&life, "after")?.iter().any(|flag| flag == "svm") == expected, "{cpu}");
            life.end()?;
        }
        Ok(())
    });
}

#[test]
fn memtest86_draws_its_screen_and_goes_on_while_it_moves() {
    check(|assets| {
        if !assets.memtest().exists() {
            say("memtest86+ is not unpacked: tests/install-deps.sh test, on Debian");
            return Ok(());
        }
        let mut guest = Guest::new("console=ttyS0,115200", 64);
        guest.kernel = assets.memtest();
        let vmm = ferry::run_with(&guest, &["-v", "--migrate-every", "2s"])?;
        let title = vmm.serial().wait_text(0, r"Memtest86\+ v6", LIMIT);
        title.with_context(|| vmm.process.err.tail())?;
        vmm.process.err.wait_for(r"\bmove 2: ", LIMIT)?;
        // It draws its clock, its spinner and its progress: what it draws after a move is new.
        vmm.serial().wait_text(vmm.serial().text().len(), ".", LIMIT)?;
        vmm.process.err.wait_for(r"\bmove 4: ", LIMIT)?;
        vmm.serial().wait_text(vmm.serial().text().len(), ".", LIMIT)?;
        Ok(())
    });
}
