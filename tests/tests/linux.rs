//! A stock Linux kernel as a guest: it boots, mounts ext4, moves while it works, reboots, and is asked
//! to power off.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use anyhow::{Context, Result, ensure};
use ferry_tests::linux::guest::{Disk, LIMIT, Life, guest, value};
use ferry_tests::linux::{Assets, check};
use serde_json::json;
use std::time::Instant;

fn boots(assets: &Assets, cpus: u8) -> Result<()> {
    let disk = Disk::new()?;
    let mut life = Life::begin(&guest(assets, "boot", cpus, &disk), &disk, &[])?;
    life.wait_line("^SHELL ")?;
    let shell = life.guest.vmm.process.started().elapsed();
    let text = life.end()?;
    println!(
        "{cpus} vCPUs: shell after {shell:.1?}, end {:.1?}",
        life.guest.vmm.process.started().elapsed()
    );
    ensure!(value(&text, "END", "cpus")? == cpus.to_string(), "{text}");
    disk.check()
}

#[test]
fn boots_to_a_root_disk_and_powers_off_with_1_vcpu() {
    check(|assets| boots(assets, 1));
}

#[test]
fn boots_to_a_root_disk_and_powers_off_with_4_vcpus() {
    check(|assets| boots(assets, 4));
}

#[test]
fn moves_5_times_while_it_writes_and_checks_its_disk() {
    check(|assets| {
        let disk = Disk::new()?;
        let mut life = Life::begin(&guest(assets, "churn", 2, &disk), &disk, &[])?;
        life.wait_line("^ROUND 1 ")?;
        let first_round = Instant::now();
        for _ in 0..5 {
            let (downtime, total) = life.hop()?;
            println!("moved: downtime {downtime} ms, in all {total} ms");
            // A round that began before the move ends, and a whole one.
            let ended = life.wait_line(" uptime=")?;
            life.wait_line_from(ended.index + 1, "^ROUND ")?;
        }
        life.guest.vmm.process.type_in("stop\n")?;
        life.wait_line("^STOPPED by stop$")?;
        life.wait_line("^END ")?;
        let elapsed = first_round.elapsed();
        let text = life.end()?;
        let uptimes: Vec<f64> = text
            .lines()
            .filter(|line| line.starts_with("ROUND "))
            .map(|line| Ok(value(line, "ROUND", "uptime")?.parse()?))
            .collect::<Result<_>>()?;
        ensure!(uptimes.is_sorted(), "time went back: {uptimes:?}");
        let uptime: f64 = value(&text, "END", "uptime")?.parse()?;
        let by_guest = uptime - uptimes.first().context("no round")?;
        println!("{} rounds; {by_guest:.1} s by its clock, {elapsed:.1?} by ours", uptimes.len());
        let difference = by_guest - elapsed.as_secs_f64();
        ensure!(difference.abs() < 2.0, "{by_guest} s by its clock, {elapsed:?} by ours");
        let (before, after) = (value(&text, "SHELL", "clock")?, value(&text, "END", "clock")?);
        ensure!(before == after, "the clock source was {before} and is {after}");
        disk.check()
    });
}

#[test]
fn reboots_from_the_copy_that_its_busy_root_disk_was_switched_over_to() {
    check(|assets| {
        let disk = Disk::new()?;
        let mut life = Life::begin(&guest(assets, "churn", 2, &disk), &disk, &[])?;
        life.wait_line("^ROUND 1 ")?;
        let mut qmp = life.guest.vmm.qmp()?;
        let copy = disk.copy_path();
        let mirror = json!({"device": "root", "target": copy, "sync": "full", "format": "raw"});
        qmp.execute("drive-mirror", mirror)?;
        qmp.wait_event("BLOCK_JOB_READY", LIMIT)?;
        qmp.execute("block-job-complete", json!({"device": "root"}))?;
        let completed = qmp.wait_event("BLOCK_JOB_COMPLETED", LIMIT)?;
        ensure!(completed["data"].get("error").is_none(), "{completed}");
        let left = std::fs::read(disk.path())?;
        // A round that began before the switch ends, and a whole one; then it boots from the copy.
        let ended = life.wait_line_from(life.guest.vmm.serial().count(), " uptime=")?;
        life.wait_line_from(ended.index + 1, "^ROUND ")?;
        life.guest.vmm.process.type_in("reboot\n")?;
        let stopped = life.wait_line("^STOPPED by reboot$")?;
        life.wait_line_from(stopped.index, "^ROUND 1 ")?;
        life.guest.vmm.process.type_in("stop\n")?;
        life.end()?;
        ensure!(left == std::fs::read(disk.path())?, "the disk that was left has been written");
        Disk::check_at(&copy)
    });
}

#[test]
fn a_reboot_ends_the_vm_where_reboots_are_not_wanted() {
    check(|assets| {
        let disk = Disk::new()?;
        let mut life = Life::begin(&guest(assets, "reboot", 1, &disk), &disk, &["--no-reboot"])?;
        let text = life.end()?;
        ensure!(text.contains("\nREBOOTING"), "{text}");
        ensure!(text.matches("SHELL ").count() == 1, "it booted again: {text}");
        disk.check()
    });
}

#[test]
fn a_reboot_boots_again_with_the_same_disk() {
    check(|assets| {
        let disk = Disk::new()?;
        let mut life = Life::begin(&guest(assets, "reboot", 1, &disk), &disk, &[])?;
        let text = life.end()?;
        ensure!(text.contains("\nREBOOTING") && text.contains("\nAGAIN"), "{text}");
        disk.check()
    });
}

#[test]
fn the_power_button_is_pressed_before_and_after_a_move() {
    check(|assets| {
        // Linux's numbers: a key event, KEY_POWER, down; then up, with a report after each.
        let press = "01 00 74 00 01 00 00 00";
        let disk = Disk::new()?;
        let mut life = Life::begin(&guest(assets, "button", 1, &disk), &disk, &[])?;
        life.wait_line("^READY")?;
        life.guest.vmm.qmp()?.execute("system_powerdown", json!({}))?;
        life.wait_line(&format!("^BUTTON 1 *{press}"))?;
        life.hop()?;
        life.guest.vmm.qmp()?.execute("system_powerdown", json!({}))?;
        life.guest.vmm.serial().wait_for(&format!("^BUTTON 2 *{press}"), LIMIT)?;
        life.end()?;
        disk.check()
    });
}
