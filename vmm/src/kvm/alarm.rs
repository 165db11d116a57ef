//! A timer that kicks the vCPU of the thread that created it, like [`super::vcpu::kick`]. Used by
//! `machine::throttle`: the kernel interrupts the guest without waking another thread.

use super::KvmError;
use std::mem::MaybeUninit;
use std::ptr;
use std::time::Duration;
use vmm_sys_util::signal::SIGRTMIN;

/// Kicks its own thread after a delay. Must stay on the thread that created it.
#[derive(Debug)]
pub struct Alarm {
    timer: libc::timer_t,
}

impl Alarm {
    /// A disarmed alarm for the calling thread.
    pub fn for_this_thread() -> Result<Self, KvmError> {
        // SAFETY: a plain C structure of integers and pointers, for which all zeroes is valid.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGRTMIN();
        event.sigev_notify_thread_id = super::vcpu::thread_id();
        let mut timer = ptr::null_mut();
        // SAFETY: both pointers are to live local variables, and neither is kept.
        let result =
            unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
        check("timer_create", result)?;
        Ok(Self { timer })
    }

    /// Kicks once, after `delay`; zero disarms.
    pub fn set(&self, delay: Duration) -> Result<(), KvmError> {
        let it_value = libc::timespec {
            tv_sec: libc::time_t::try_from(delay.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: delay.subsec_nanos().into(),
        };
        let it_interval = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let when = libc::itimerspec { it_interval, it_value };
        // SAFETY: the timer exists until `self` is dropped; `when` is live, and the old value not asked
        // for.
        let result =
            unsafe { libc::timer_settime(self.timer, 0, &raw const when, ptr::null_mut()) };
        check("timer_settime", result)
    }
}

fn check(what: &'static str, result: libc::c_int) -> Result<(), KvmError> {
    if result == 0 {
        return Ok(());
    }
    Err(KvmError::Ioctl { what, source: std::io::Error::last_os_error() })
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: made in `for_this_thread` and deleted nowhere else.
        unsafe { libc::timer_delete(self.timer) };
    }
}

/// CPU time of the calling thread, guest and host.
pub fn thread_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("a thread's CPU time is not negative")
}
