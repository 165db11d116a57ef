//! `make demo`: boots a guest that keeps writing its memory, moves it to another process over TCP while
//! it does, and asks the guest itself whether anything was lost.

use anyhow::{Context, Result, ensure};
use ferry_tests::ferry::{self, Guest};
use ferry_tests::process::SOON;
use ferry_tests::verdict::{Heartbeat, Transcript, field};
use std::process::ExitCode;

const MEMORY_MB: u64 = 1024;
const WORKING_SET_MB: u64 = 128;
const RATE_MBPS: u64 = 300;

fn demo() -> Result<()> {
    let cmdline =
        format!("work=dirty fill=random fill_pct=75 ws_mb={WORKING_SET_MB} rate_mbps={RATE_MBPS}");
    println!(
        "1. boot      {MEMORY_MB} MiB guest that rewrites {WORKING_SET_MB} MiB at {RATE_MBPS} MB/s"
    );
    let guest = Guest::new(&cmdline, MEMORY_MB);
    println!("             ferry run --kernel … --memory {MEMORY_MB}M --cmdline '{cmdline}'");
    let source = ferry::run(&guest)?;
    let ready = source.wait_line("READY ")?;
    let pages = field(&ready.text, "pages").context("READY without pages")?;
    println!("             the guest filled {pages} pages and counts generations in each");

    println!("2. receive   a second process waits for a guest");
    let mut destination = ferry::receive()?;
    println!("             ferry receive {}", destination.address);
    let last = Heartbeat::parse(&source.wait_line("^HB n=5 ")?.text).context("not a heartbeat")?;
    println!(
        "             source       heartbeat {}, {} pages rewritten",
        last.number, last.generation
    );

    println!("3. migrate   while the guest runs and writes");
    println!("             ferry migrate … {} --downtime-limit 20ms", destination.address);
    let ended = ferry::migrate_well(&source, &destination.address, &["--downtime-limit", "20ms"])?;

    let arrived = destination.vmm.wait_line("^HB n=[0-9]+ t_us=.* gen=")?;
    destination.vmm.serial().wait_from(arrived.index + 2, "^HB ", SOON)?;
    let life = Transcript::of([source.serial(), destination.vmm.serial()]);
    let beats = life.judge()?;
    let newest = beats.last().context("no heartbeat")?;
    println!(
        "             destination  heartbeat {}, {} pages rewritten",
        newest.number, newest.generation
    );

    println!("4. verify    the guest reads every byte of its memory");
    let check = destination.vmm.check()?;
    Transcript::of([source.serial(), destination.vmm.serial()]).judge()?;

    let info = &ended.summary;
    let number = |part: &serde_json::Value, name: &str| {
        part[name].as_u64().with_context(|| format!("the summary lacks {name}: {info}"))
    };
    println!(
        "\ntotal {} ms, downtime {:.2} ms, guest's own largest gap {:.2} ms, {:.0} MB sent in {} rounds",
        number(info, "total-time")?,
        number(info, "x-downtime-us")? as f64 / 1e3,
        life.largest_gap_us(last.number + 1)? as f64 / 1e3,
        number(&info["ram"], "transferred")? as f64 / 1e6,
        number(&info["ram"], "dirty-sync-count")?,
    );
    println!("guest verified at the destination: {} pages, {} corrupt", check.count, check.corrupt);
    ensure!(check.corrupt == 0, "the guest found corruption");
    ensure!(check.count == pages, "only {} of {pages} pages were checked", check.count);
    Ok(())
}

fn main() -> ExitCode {
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
