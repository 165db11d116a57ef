//! The guest's own lines (documented in `guest_images`), parsed and judged.

use crate::lines::Lines;
use anyhow::{Context, Result, bail, ensure};

/// The value of `key=…` in a line of words.
pub fn field(line: &str, key: &str) -> Option<u64> {
    line.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
}

/// A heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Its number, from 0.
    pub number: u64,
    /// The guest's time.
    pub time_us: u64,
    /// Pages or sectors rewritten so far.
    pub generation: u64,
    /// The largest gap that the guest saw since the last heartbeat.
    pub max_gap_us: u64,
    /// Mismatches found so far, in memory, disk, clock or registers.
    pub corrupt: u64,
    /// CPUs that made progress since the last heartbeat.
    pub alive: Option<u64>,
    /// Time by kvmclock, 0 where there is none.
    pub kvmclock_us: Option<u64>,
}

impl Heartbeat {
    /// Parses a whole line.
    pub fn parse(line: &str) -> Option<Self> {
        let rest = line.strip_prefix("HB ")?;
        Some(Self {
            number: field(rest, "n")?,
            time_us: field(rest, "t_us")?,
            generation: field(rest, "gen")?,
            max_gap_us: field(rest, "max_gap_us")?,
            corrupt: field(rest, "corrupt")?,
            alive: field(rest, "alive"),
            kvmclock_us: field(rest, "kvmclock_us"),
        })
    }
}

/// The answer to `c`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// Pages or sectors checked.
    pub count: u64,
    /// Mismatches among them.
    pub corrupt: u64,
}

impl Check {
    /// Parses a whole line.
    pub fn parse(line: &str) -> Option<Self> {
        let rest = line.strip_prefix("CHECK ")?;
        let count = field(rest, "pages").or_else(|| field(rest, "sectors"))?;
        Some(Self { count, corrupt: field(rest, "corrupt")? })
    }
}

/// One guest's serial output in the order in which the processes ran it.
pub struct Transcript(String);

impl Transcript {
    /// Joins what each process printed; a line that was cut by a handover is whole again.
    pub fn of<'a>(processes: impl IntoIterator<Item = &'a Lines>) -> Self {
        Self(processes.into_iter().map(Lines::text).collect())
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Every heartbeat; not one that the guest is still printing.
    pub fn heartbeats(&self) -> Vec<Heartbeat> {
        let whole = self.0.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().filter_map(Heartbeat::parse).collect()
    }

    /// Whether the guest lived one life: heartbeats numbered without a gap or repetition, its time and
    /// its work never going back, and nothing that must not happen. Returns the heartbeats.
    pub fn judge(&self) -> Result<Vec<Heartbeat>> {
        for line in self.0.lines() {
            for bad in ["CORRUPT", "FAULT", "PANIC", "ERROR", "DISK-ERROR"] {
                // The very first byte of a guest is a lone `F`.
                let line =
                    line.strip_prefix('F').filter(|_| !line.starts_with("FAULT")).unwrap_or(line);
                let word = line.strip_prefix(bad).is_some_and(|rest| rest.starts_with(' '));
                ensure!(!word, "the guest says: {line}");
            }
        }
        let beats = self.heartbeats();
        for pair in beats.windows(2) {
            let (before, after) = (pair[0], pair[1]);
            let goes_on = after.number == before.number + 1
                && after.time_us > before.time_us
                && after.generation >= before.generation;
            ensure!(goes_on, "the guest's life has a seam:\n{before:?}\n{after:?}");
        }
        if let Some(beat) = beats.iter().find(|beat| beat.corrupt > 0) {
            bail!("the guest found corruption: {beat:?}");
        }
        Ok(beats)
    }

    /// The guest's largest gap in the heartbeats numbered `from` and above.
    pub fn largest_gap_us(&self, from: u64) -> Result<u64> {
        let beats = self.heartbeats();
        let gaps = beats.iter().filter(|beat| beat.number >= from).map(|beat| beat.max_gap_us);
        gaps.max().with_context(|| format!("no heartbeat from number {from} on"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn transcript(parts: &[&'static str]) -> Transcript {
        let lines: Vec<_> = parts.iter().map(|part| Lines::collect(part.as_bytes())).collect();
        for part in &lines {
            part.wait_end(Duration::from_secs(5)).unwrap();
        }
        Transcript::of(&lines)
    }

    #[test]
    fn a_line_cut_by_a_handover_is_whole_again() {
        let life = transcript(&[
            "FERRY guest work=dirty\nREADY work=dirty\nHB n=0 t_us=10 gen=1 max_gap_us=4 mbps=1 corrupt=0 fpu=0\nHB n=1 t_u",
            "s=20 gen=2 max_gap_us=900 mbps=1 corrupt=0 fpu=0\n",
        ]);
        assert_eq!(life.judge().unwrap().len(), 2);
        assert_eq!(life.largest_gap_us(1).unwrap(), 900);
    }

    #[test]
    fn a_heartbeat_without_its_end_does_not_count_yet() {
        let life = transcript(&[
            "HB n=0 t_us=10 gen=1 max_gap_us=4 mbps=1 corrupt=0 fpu=0 alive=2 kvmclock_us=10\n",
            "HB n=1 t_us=20 gen=1 max_gap_us=4 mbps=1 corrupt=0 fpu=0 alive=2",
        ]);
        assert_eq!(life.judge().unwrap().len(), 1);
    }

    #[test]
    fn lost_repeated_and_corrupt_heartbeats_are_noticed() {
        let first = "HB n=0 t_us=10 gen=1 max_gap_us=4 mbps=1 corrupt=0 fpu=0\n";
        for second in [
            "HB n=2 t_us=20 gen=2 max_gap_us=4 mbps=1 corrupt=0 fpu=0\n",
            "HB n=0 t_us=20 gen=2 max_gap_us=4 mbps=1 corrupt=0 fpu=0\n",
            "HB n=1 t_us=9 gen=2 max_gap_us=4 mbps=1 corrupt=0 fpu=0\n",
            "HB n=1 t_us=20 gen=0 max_gap_us=4 mbps=1 corrupt=0 fpu=0\n",
            "HB n=1 t_us=20 gen=2 max_gap_us=4 mbps=1 corrupt=1 fpu=1\n",
            "CORRUPT page=7 expected_gen=1 found_gen=0\n",
            "FAULT vector=14 cr2=0 words=0,0\n",
        ] {
            assert!(transcript(&[first, second]).judge().is_err(), "{second}");
        }
    }

    #[test]
    fn checks_of_memory_and_disk_are_read() {
        assert_eq!(
            Check::parse("CHECK pages=9 corrupt=1 gen=3"),
            Some(Check { count: 9, corrupt: 1 })
        );
        assert_eq!(
            Check::parse("CHECK sectors=4 corrupt=0 gen=3 acknowledged=9"),
            Some(Check { count: 4, corrupt: 0 })
        );
        assert_eq!(Check::parse("CHECK pages="), None);
    }
}
