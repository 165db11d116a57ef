//! CPU throttling for auto-converge: each vCPU alternates between running and sleeping, in slices of a few
//! milliseconds, so that the guest slows down but never stalls.
//!
//! ```text
//! throttled by 80 %:  ▇▁▁▁▁▇▁▁▁▁▇▁▁▁▁   1 ms in the guest, 4 ms asleep
//!              99 %:  ▏▁▁▁▁▁▁▁▁▁▁▏▁▁▁   0.1 ms in the guest, 10 ms asleep
//! ```
//! [`Throttle`] is the setting, shared by all vCPU threads; a [`Brake`] applies it on one thread. An
//! [`Alarm`] ends a vCPU's turn with a kick; then the vCPU sleeps in proportion to the CPU time that it has
//! used, so that an idle vCPU is not throttled. It sleeps on its mailbox, so a pause does not wait for it.
//! Called by `vcpus`; the migration engine chooses the percentage.

use crate::kvm::alarm::{Alarm, thread_cpu_time};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// Length of a turn plus the sleep after it, if both fit.
const PERIOD: Duration = Duration::from_millis(5);
/// Minimum turn, so that the kick does not cost more than the turn…
const SHORTEST_TURN: Duration = Duration::from_micros(200);
/// …unless the sleep after it would become longer than this.
const LONGEST_SLEEP: Duration = Duration::from_millis(10);
/// How much an overlong turn may extend the sleep.
const LATE: Duration = Duration::from_millis(3);
/// Maximum turn of a vCPU that is mostly idle.
const IDLE_LOOK: Duration = Duration::from_millis(2);

/// The throttle percentage of a machine's vCPUs. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Throttle(Arc<AtomicU8>);

impl Throttle {
    /// Maximum percentage.
    pub const MOST: u8 = 99;

    /// Sets the percentage. The caller kicks the vCPUs so that they notice.
    pub fn set(&self, percent: u8) {
        self.0.store(percent.min(Self::MOST), Ordering::Release);
    }

    /// The percentage.
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

/// How long it sleeps after `used` CPU time.
fn sleep(percent: u8, used: Duration) -> Duration {
    let sleeps = u32::from(percent.min(Throttle::MOST));
    (used * sleeps / (100 - sleeps)).min(LONGEST_SLEEP + LATE)
}

/// The current turn.
#[derive(Debug, Clone, Copy)]
struct Turn {
    /// The percentage at its start: a change ends the turn.
    percent: u8,
    began: Instant,
    /// The thread's CPU time at its start.
    used: Duration,
    length: Duration,
}

/// Applies the throttle on one vCPU thread.
#[derive(Debug)]
pub struct Brake {
    throttle: Throttle,
    alarm: Option<Alarm>,
    turn: Option<Turn>,
}

impl Brake {
    /// Applies `throttle` on the calling thread.
    pub fn new(throttle: Throttle) -> Self {
        Self { throttle, alarm: None, turn: None }
    }

    /// Call before each entry into the guest: returns how long to sleep before asking again, or `None` to
    /// enter.
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
        // Kicked for another reason: the turn continues.
        if turn.began.elapsed() < turn.length && turn.percent == percent {
            return None;
        }
        let used = thread_cpu_time().saturating_sub(turn.used);
        let whole = self::turn(percent);
        if used < whole / 2 {
            // Mostly idle: extend the turn and keep counting its CPU time.
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
            // Without an alarm the vCPU is not throttled, which is harmless.
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

    /// Ends throttling, or the vCPU stops: disarms the alarm.
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
