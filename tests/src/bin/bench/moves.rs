//! Figures of guests that move.

use crate::alone::run;
use crate::figures::Figure;
use crate::memory::{self, Memory};
use crate::rows::Program;
use anyhow::{Context, Result, bail, ensure};
use ferry_tests::ferry::{self, Guest};
use ferry_tests::lines::Lines;
use ferry_tests::process::SOON;
use ferry_tests::qmp::Qmp;
use ferry_tests::verdict::{Heartbeat, Transcript};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How a guest is moved.
pub struct How {
    /// `downtime-limit`.
    pub downtime_limit_ms: u64,
    /// `max-bandwidth`; 0 for as fast as can be.
    pub max_bandwidth: u64,
    /// Data channels; Ferry's own choice, and QEMU's one, if nothing is said.
    pub channels: Option<u16>,
    /// `multifd-compression`.
    pub compression: Option<&'static str>,
    /// Capabilities to switch on.
    pub capabilities: &'static [&'static str],
    /// What does not end within this is given up.
    pub patience: Duration,
    /// For both of its sides.
    pub memory: Memory,
}

impl How {
    /// As fast as can be.
    pub fn fast(downtime_limit_ms: u64) -> Self {
        let patience = Duration::from_secs(60);
        Self {
            downtime_limit_ms,
            max_bandwidth: 0,
            channels: None,
            compression: None,
            capabilities: &[],
            patience,
            memory: Memory::Warm,
        }
    }
}

/// What became of it.
pub struct Moved {
    /// By this program's clock, from the command to the event that says it is over; patience, if none does.
    pub took: Duration,
    /// Whether one did.
    pub ended: bool,
    /// By the guest's own clock; as far as it is known, if it did not end.
    pub largest_gap_us: u64,
    /// What the guest wrote meanwhile, by its own count and clock, in 10^6 bytes per second.
    pub mbps: f64,
    /// Processor time of both processes from start to end, vCPUs included.
    pub processor_seconds: f64,
}

impl How {
    /// Says how many channels there are, and what they do. QEMU wants that on both sides.
    fn say_channels(&self, program: Program, qmp: &mut Qmp) -> Result<()> {
        let (Some(channels), true) =
            (self.channels, program == Program::Ferry || self.is_multifd())
        else {
            return Ok(());
        };
        let on = json!([{"capability": "multifd", "state": true}]);
        qmp.execute("migrate-set-capabilities", json!({"capabilities": on}))?;
        let method = self.compression.unwrap_or("none");
        let parameters = json!({"multifd-channels": channels, "multifd-compression": method});
        qmp.execute("migrate-set-parameters", parameters).map(drop)
    }

    /// QEMU's one channel is best without multifd.
    fn is_multifd(&self) -> bool {
        self.channels.is_some_and(|channels| channels > 1) || self.compression.is_some()
    }
}

/// User and system time of processes: fields 14 and 15 of proc_pid_stat(5), in ticks.
fn processor_seconds(processes: &[u32]) -> Result<f64> {
    let mut ticks = 0;
    for process in processes {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
        // The second field is a name, which may hold anything.
        let (_, fields) = stat.rsplit_once(')').context("a name in parentheses")?;
        let fields = fields.split_whitespace().skip(11).take(2);
        ticks += fields.map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    }
    // Linux's USER_HZ on x86.
    Ok(ticks as f64 / 100.0)
}

impl Moved {
    fn bounded(&self, value: f64) -> Figure {
        if self.ended { Figure::Is(value) } else { Figure::MoreThan(value) }
    }

    pub fn ms(&self) -> f64 {
        self.took.as_secs_f64() * 1e3
    }

    pub fn seconds(&self) -> Figure {
        self.bounded(self.took.as_secs_f64())
    }

    fn gap_ms(&self) -> Figure {
        self.bounded(self.largest_gap_us as f64 / 1e3)
    }
}

/// Boots `guest`, lets it settle, moves it over TCP, and hears what it says at the destination. What takes
/// longer than its patience is given up.
pub fn moved(program: Program, guest: &Guest, how: &How) -> Result<Moved> {
    if how.memory == Memory::Warm {
        // Its RAM exists twice in the end.
        memory::warm(2 * guest.memory_mb);
    }
    let source = run(program, guest)?;
    let (destination, address) = match program {
        Program::Ferry => {
            let destination = ferry::receive()?;
            (destination.vmm, destination.address)
        }
        Program::Qemu | Program::Newer => {
            program.qemu()?.receive(guest, |qmp| how.say_channels(program, qmp))?
        }
    };
    source.wait_line("READY ")?;
    // The first heartbeats hold the end of the fill; the guest is at its pace after a few.
    source.wait_line("^HB n=5 ")?;
    let mut qmp = source.qmp()?;
    qmp.want_migration_events()?;
    let on = |name: &&str| json!({"capability": name, "state": true});
    // Ferry always has a return path; QEMU waits for its destination only with one.
    let capabilities: Vec<_> = ["return-path"].iter().chain(how.capabilities).map(on).collect();
    qmp.execute("migrate-set-capabilities", json!({"capabilities": capabilities}))?;
    // QEMU's own cap of 128 MiB/s is lifted; Ferry has none.
    let most = if how.max_bandwidth == 0 { 10_000_000_000 } else { how.max_bandwidth };
    let parameters = json!({"max-bandwidth": most, "downtime-limit": how.downtime_limit_ms});
    qmp.execute("migrate-set-parameters", parameters)?;
    how.say_channels(program, &mut qmp)?;
    let settled = source.wait_next_line("^HB ")?;
    let processes = [source.process.id(), destination.process.id()];
    let used_before = processor_seconds(&processes)?;
    let before = Heartbeat::parse(&settled.text).context("a heartbeat")?.number;
    let began = Instant::now();
    qmp.execute("migrate", json!({"uri": address}))?;
    let end = qmp.wait_migration(&["completed", "failed", "cancelled"], how.patience);
    let took = began.elapsed();
    let processor_seconds = processor_seconds(&processes)? - used_before;
    let Ok(status) = end else {
        let info = qmp.execute("query-migrate", json!({}))?;
        if info["status"] != "active" {
            bail!("there is no end, and the migration is {info}");
        }
        // It still runs where it was.
        let largest_gap_us = Transcript::of([source.serial()]).largest_gap_us(before + 1)?;
        let (took, ended, mbps) = (how.patience, false, 0.0);
        return Ok(Moved { took, ended, largest_gap_us, mbps, processor_seconds });
    };
    if status != "completed" {
        bail!("the migration is {status}: {}", final_info(&mut qmp)?);
    }
    let first = destination.wait_line("^HB ")?;
    destination.serial().wait_from(first.index + 1, "^HB ", SOON)?;
    let parts: [&Lines; 2] = [source.serial(), destination.serial()];
    let life = Transcript::of(parts);
    // Where KVM is software, QEMU loses vector registers on the way, which the guest notices; that is
    // no reason to have nothing to compare with.
    if program == Program::Ferry {
        life.judge()?;
    }
    // From the last heartbeat before it to the first behind it: a slow guest may have none between.
    let beats = life.heartbeats();
    let start = beats.iter().find(|beat| beat.number == before).context("a heartbeat")?;
    let end = Heartbeat::parse(&first.text).context("a heartbeat")?;
    let bytes = end.generation.saturating_sub(start.generation) * 4096;
    let mbps = bytes as f64 / end.time_us.saturating_sub(start.time_us).max(1) as f64;
    let largest_gap_us = life.largest_gap_us(before + 1)?;
    Ok(Moved { took, ended: true, largest_gap_us, mbps, processor_seconds })
}

/// As [`moved`], for a guest that has to arrive.
pub fn moved_well(program: Program, guest: &Guest, how: &How) -> Result<Moved> {
    let moved = moved(program, guest, how)?;
    ensure!(moved.ended, "no end within {:?}", how.patience);
    Ok(moved)
}

/// What `query-migrate` says once all is said: QEMU sends the event before it takes the time.
pub fn final_info(qmp: &mut Qmp) -> Result<Value> {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        let info = qmp.execute("query-migrate", json!({}))?;
        let is_final = info["total-time"].as_u64().is_some_and(|ms| ms > 0);
        if is_final || info["status"] != "completed" || Instant::now() > deadline {
            return Ok(info);
        }
    }
}

/// GB of RAM per second over one channel, which is QEMU's own choice.
pub fn asleep(program: Program, memory: Memory) -> Result<f64> {
    let guest = Guest::new("work=dirty fill=random fill_pct=75 sleep=1", 1024);
    let how = How { memory, channels: Some(1), ..How::fast(300) };
    Ok((1u64 << 30) as f64 / 1e6 / moved_well(program, &guest, &how)?.ms())
}

/// Milliseconds.
pub fn gap_spinning(program: Program) -> Result<f64> {
    let guest = Guest::new("work=spin fill=random fill_pct=75", 1024);
    Ok(moved_well(program, &guest, &How::fast(20))?.largest_gap_us as f64 / 1e3)
}

/// Milliseconds.
pub fn gap_dirtying(program: Program) -> Result<f64> {
    let guest = Guest::new("work=dirty fill=random fill_pct=75 ws_mb=256 rate_mbps=500", 1024);
    Ok(moved_well(program, &guest, &How::fast(20))?.largest_gap_us as f64 / 1e3)
}

/// Milliseconds.
pub fn mostly_zero(program: Program) -> Result<f64> {
    Ok(moved_well(program, &Guest::new("work=idle", 1024), &How::fast(300))?.ms())
}

/// MB per second that a guest gets to write from the start of its move until it has arrived.
pub fn speed_while_moving(program: Program) -> Result<f64> {
    let work = "work=dirty fill=random fill_pct=75 ws_mb=256 rate_mbps=1000 hb_ms=20";
    Ok(moved_well(program, &Guest::new(work, 1024), &How::fast(300))?.mbps)
}

/// A capability.
pub const XBZRLE: &str = "xbzrle";
/// A capability.
pub const AUTO_CONVERGE: &str = "auto-converge";

/// What to look at.
#[derive(Clone, Copy)]
pub enum Look {
    /// How long the migration took.
    TotalSeconds,
    /// The guest's largest gap, from the start to its arrival.
    LargestGapMs,
}

/// A link of 1 Gb/s, and a guest that writes 500 MB/s of 256 MiB, with `capabilities`.
pub fn capped(
    program: Program,
    capabilities: &'static [&'static str],
    look: Look,
) -> Result<Figure> {
    let guest = Guest::new("work=dirty fill=random fill_pct=75 ws_mb=256 rate_mbps=500", 1024);
    let how = How { max_bandwidth: 125_000_000, capabilities, ..How::fast(300) };
    let moved = moved(program, &guest, &how)?;
    Ok(match look {
        Look::TotalSeconds => moved.seconds(),
        Look::LargestGapMs => moved.gap_ms(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_without_an_end_has_only_lower_bounds() {
        let (took, largest_gap_us) = (Duration::from_secs(60), 2500);
        let moved =
            |ended| Moved { took, ended, largest_gap_us, mbps: 0.0, processor_seconds: 0.0 };
        assert_eq!(moved(false).seconds(), Figure::MoreThan(60.0));
        assert_eq!(moved(false).gap_ms(), Figure::MoreThan(2.5));
        assert_eq!(moved(true).seconds(), Figure::Is(60.0));
        assert_eq!(moved(true).gap_ms(), Figure::Is(2.5));
    }
}
