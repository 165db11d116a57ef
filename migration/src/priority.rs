//! The priority of a migration's threads: below the vCPUs' while these run, except for one that a stopped guest
//! waits for. Where the caller of this crate starts them is where they get their usual one.

use rustix::process::setpriority_process;

/// The nice value of a thread that may wait: a seventieth of a vCPU's share of a processor that both want. To a
/// larger share a guest on two processors often lost a tick of the scheduler's (4 ms) right after its move.
const LAST: i32 = 19;

/// Nobody waits for what the calling thread does from now on: the guest has moved.
pub(crate) fn give_way() {
    set(LAST);
}

/// Undoes for the calling thread that migration threads yield to vCPUs: it inherits that from `mig-out`, but
/// a guest that is stopped waits for it. Needs CAP_SYS_NICE or an `ulimit -e` that allows it; without,
/// the thread still sleeps until the deadline and so is preferred to whoever has used its time.
pub(crate) fn be_on_time() {
    set(0);
}

fn set(nice: i32) {
    if let Err(error) = setpriority_process(Some(rustix::thread::gettid()), nice) {
        log::debug!("a thread keeps its priority: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::getpriority_process;

    #[test]
    fn a_thread_that_is_waited_for_is_not_nice_if_it_may_choose_and_one_that_is_not_is() {
        let nice = std::thread::spawn(|| {
            let thread = Some(rustix::thread::gettid());
            setpriority_process(thread, 5).unwrap();
            let may_choose = setpriority_process(thread, 4).is_ok();
            be_on_time();
            let on_time = getpriority_process(thread).unwrap();
            give_way();
            (may_choose, on_time, getpriority_process(thread).unwrap())
        });
        let (may_choose, on_time, last) = nice.join().unwrap();
        assert_eq!((on_time, last), (if may_choose { 0 } else { 5 }, LAST));
    }
}
