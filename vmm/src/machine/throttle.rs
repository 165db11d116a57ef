//! Slows a guest down while it writes faster than a migration sends: each vCPU sleeps a part of the time
//! that it uses, in turns of a few milliseconds, so that the guest gets slow and never stands still.
//!
//! ```text
//! throttled by 80 %:  ▇▁▁▁▁▇▁▁▁▁▇▁▁▁▁   1 ms in the guest, 4 ms asleep
//!              99 %:  ▏▁▁▁▁▁▁▁▁▁▁▏▁▁▁   0.1 ms in the guest, 10 ms asleep
//! ```
//! [`Throttle`] is the wish, shared by all vCPU threads; a [`Brake`] is one thread's way to follow it. An
//! [`Alarm`] ends a vCPU's turn with a kick; then it sleeps in proportion to the CPU time that it has
//! used, so that a vCPU that waits for interrupts is left alone. It sleeps on its mailbox: a pause does
//! not wait for it. Called by `vcpus`; who asks for how much is the business of a migration.

use crate::kvm::alarm::{Alarm, thread_cpu_time};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// A turn in the guest and the sleep after it, where both have room in it.
const PERIOD: Duration = Duration::from_millis(5);
/// A turn is no shorter, or its kick costs more than it…
const SHORTEST_TURN: Duration = Duration::from_micros(200);
/// …unless the sleep after it would become longer than this.
const LONGEST_SLEEP: Duration = Duration::from_millis(10);
/// What a turn that the host ended late may add to the sleep.
const LATE: Duration = Duration::from_millis(3);
/// A vCPU that hardly uses its turns is looked at only so often.
const IDLE_LOOK: Duration = Duration::from_millis(2);

/// How far all vCPUs of a machine are slowed down, in percent. Clones are one.
#[derive(Debug, Clone, Default)]
pub struct Throttle(Arc<AtomicU8>);

impl Throttle {
    /// Most that a guest can be slowed down.
    pub const MOST: u8 = 99;

    /// From the next look of each vCPU on: who sets it kicks them.
    pub fn set(&self, percent: u8) {
        self.0.store(percent.min(Self::MOST), Ordering::Release);
    }

    /// How far they are slowed down.
    pub fn percent(&self) -> u8 {
        self.0.load(Ordering::Acquire)
    }
}

/// How long a vCPU may run at a time.
fn turn(percent: u8) -> Duration {
    let runs = u32::from(100 - percent.min(Throttle::MOST));
    let shortest = SHORTEST_TURN.min(LONGEST_SLEEP * runs / (100 - runs).max(1));
    (PERIOD * runs / 100).max(shortest)
}

/// How long it sleeps when it has used `used` of the CPU.
fn sleep(percent: u8, used: Duration) -> Duration {
    let sleeps = u32::from(percent.min(Throttle::MOST));
    (used * sleeps / (100 - sleeps)).min(LONGEST_SLEEP + LATE)
}

/// A turn that has begun.
#[derive(Debug, Clone, Copy)]
struct Turn {
    /// The wish it began with: another one ends it.
    percent: u8,
    began: Instant,
    /// The thread's CPU time from which its use is counted.
    used: Duration,
    length: Duration,
}

/// One vCPU thread's share in the throttling.
#[derive(Debug)]
pub struct Brake {
    throttle: Throttle,
    alarm: Option<Alarm>,
    turn: Option<Turn>,
}

impl Brake {
    /// Follows `throttle`. To be used on one thread.
    pub fn new(throttle: Throttle) -> Self {
        Self { throttle, alarm: None, turn: None }
    }

    /// Before each entry into the guest: sleep so long first, and ask again; or enter.
    pub fn before_entry(&mut self) -> Option<Duration> {
        let percent = self.throttle.percent();
        if percent == 0 {
            if self.turn.is_some() {
                self.release();
            }
            return None;
        }
        let Some(turn) = self.turn else {
            self.begin_turn(percent, thread_cpu_time(), turn(percent));
            return None;
        };
        // Kicked for another reason: the turn goes on.
        if turn.began.elapsed() < turn.length && turn.percent == percent {
            return None;
        }
        let used = thread_cpu_time().saturating_sub(turn.used);
        let whole = self::turn(percent);
        if used < whole / 2 {
            // It waits for interrupts most of the time. What it has used so far is not forgotten.
            let length = (turn.length * 2).min(IDLE_LOOK.max(whole));
            self.begin_turn(percent, turn.used, length);
            return None;
        }
        self.turn = None;
        Some(sleep(percent, used))
    }

    /// The CPU time `used` is where its use is counted from.
    fn begin_turn(&mut self, percent: u8, used: Duration, length: Duration) {
        if let Err(error) = self.set_alarm(length) {
            // Without an end of its turn the vCPU runs freely, which harms nobody.
            log::warn!("a vCPU cannot be throttled: {}", crate::error::chain(&error));
            return;
        }
        self.turn = Some(Turn { percent, began: Instant::now(), used, length });
    }

    fn set_alarm(&mut self, delay: Duration) -> Result<(), crate::kvm::KvmError> {
        if self.alarm.is_none() {
            self.alarm = Some(Alarm::for_this_thread()?);
        }
        self.alarm.as_ref().map_or(Ok(()), |alarm| alarm.set(delay))
    }

    /// The vCPU stops running, or runs freely: no alarm disturbs it.
    pub fn release(&mut self) {
        self.turn = None;
        if self.alarm.is_some()
            && let Err(error) = self.set_alarm(Duration::ZERO)
        {
            log::warn!("{}", crate::error::chain(&error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_gets_its_share_and_no_gap_is_long() {
        for percent in 1..=99 {
            let turn = turn(percent);
            let sleep = sleep(percent, turn);
            let share = sleep.as_secs_f64() / (turn + sleep).as_secs_f64() * 100.0;
            assert!((share - f64::from(percent)).abs() < 0.1, "{share} of {percent} %");
            assert!(sleep <= LONGEST_SLEEP + Duration::from_micros(1), "{sleep:?} at {percent} %");
            let least = Duration::from_micros(100);
            assert!((least..=PERIOD).contains(&turn), "{turn:?} at {percent} %");
        }
        assert!(sleep(99, Duration::from_secs(1)) <= Duration::from_millis(13));
    }

    #[test]
    fn a_brake_that_is_not_wanted_does_nothing() {
        let mut brake = Brake::new(Throttle::default());
        assert_eq!(brake.before_entry(), None);
        assert!(brake.alarm.is_none() && brake.turn.is_none());
    }

    #[test]
    fn a_thread_that_works_sleeps_in_proportion_and_one_that_waits_does_not() {
        crate::kvm::vcpu::install_kick_handler().unwrap();
        let throttle = Throttle::default();
        throttle.set(75);
        let mut brake = Brake::new(throttle.clone());
        assert_eq!(brake.before_entry(), None, "a turn begins");
        let began = thread_cpu_time();
        while thread_cpu_time() - began < turn(75) * 2 {
            std::hint::spin_loop();
        }
        let nap = brake.before_entry().expect("the turn is over");
        assert!(nap > turn(75) * 3, "{nap:?}");
        assert_eq!(brake.before_entry(), None, "the next begins after the sleep");
        for _ in 0..4 {
            std::thread::sleep(turn(75) * 2);
            assert_eq!(brake.before_entry(), None, "it has used nothing");
        }
        assert!(brake.turn.unwrap().length > turn(75), "and is looked at less often");
        throttle.set(0);
        assert_eq!(brake.before_entry(), None);
        assert!(brake.turn.is_none());
    }
}
