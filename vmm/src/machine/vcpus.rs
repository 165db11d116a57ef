//! The vCPU threads: run loop, park, save and restore. Each thread owns its `VcpuFd`.
//!
//! ```text
//!            Run                       Park, guest ended
//!  parked ───────────▶ in KVM_RUN ───────────────────────▶ parked
//!    │ Save, Restore, Locate: answered while parked only
//! ```
//! A throttled vCPU sometimes sleeps on its mailbox before it enters the guest: see [`throttle`]. Commands
//! come through a channel; one that must interrupt `KVM_RUN` is followed by a kick. All threads are told
//! first and waited for afterwards, so that pausing many vCPUs takes as long as pausing one.
//!
//! [`throttle`]: super::throttle

use super::throttle::{Brake, Throttle};
use super::unclaimed::{Place, Unclaimed};
use crate::kvm::KvmError;
use crate::kvm::cpu_state::{CpuStateLayout, VcpuState};
use crate::kvm::vcpu::{Exit, Vcpu, kick};
use devices::bus::Bus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A vCPU stops within a millisecond or so, whatever disks and clients do. After this long it never will.
const PARK_LIMIT: Duration = Duration::from_secs(5);

/// Why a vCPU stopped by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEnd {
    /// The guest crashed: why, and where.
    Crashed(String),
    /// KVM cannot continue; the text names the vCPU and the reason.
    Failed(String),
}

/// State shared by all vCPU threads.
#[derive(Clone)]
pub struct VcpuContext {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Accesses where no device is.
    pub unclaimed: Arc<Unclaimed>,
    /// Set by the device through which the guest ended: no vCPU runs past its current exit.
    pub ended: Arc<AtomicBool>,
    /// Called once when a vCPU cannot continue.
    pub on_end: Arc<dyn Fn(VcpuEnd) + Send + Sync>,
    /// How vCPU state is saved and restored on this host.
    pub layout: CpuStateLayout,
}

type Reply<T> = Sender<Result<T, KvmError>>;

enum Command {
    Run,
    Park(Sender<()>),
    NotifyClockPaused,
    /// Asks where the guest is, in words.
    Locate(Sender<String>),
    Save(Reply<VcpuState>),
    Restore(Box<VcpuState>, Option<u64>, Reply<()>),
}

struct VcpuThread {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
    thread_id: i32,
}

/// The vCPU threads of one machine. Dropping it stops and joins them.
pub struct Vcpus {
    threads: Vec<VcpuThread>,
    throttle: Throttle,
}

/// A failure of a vCPU thread.
#[derive(Debug, thiserror::Error)]
pub enum VcpusError {
    #[error("cannot start the thread of vCPU {index}")]
    Spawn {
        index: u8,
        #[source]
        source: std::io::Error,
    },
    /// The thread has ended, which is a bug.
    #[error("the thread of vCPU {index} has died")]
    Gone { index: usize },
    /// The thread does not answer, which is a bug.
    #[error("vCPU {index} does not stop")]
    Stuck { index: usize },
    #[error("vCPU {index}")]
    Kvm {
        index: usize,
        #[source]
        source: KvmError,
    },
    /// A stream holds records for another number of vCPUs.
    #[error("{found} vCPU states for {expected} vCPUs")]
    Count { found: usize, expected: usize },
}

impl Vcpus {
    /// Starts one parked thread per vCPU.
    pub fn start(vcpus: Vec<Vcpu>, context: &VcpuContext) -> Result<Self, VcpusError> {
        let threads = Vec::with_capacity(vcpus.len());
        let mut all = Self { threads, throttle: Throttle::default() };
        for vcpu in vcpus {
            let index = vcpu.index();
            let (commands, inbox) = channel();
            let (id_sender, id) = channel();
            let (context, throttle) = (context.clone(), all.throttle.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vcpu-{index}"))
                .stack_size(256 << 10)
                .spawn(move || {
                    // The receiver waits below; if it is gone, the id is not needed.
                    let _ = id_sender.send(crate::kvm::vcpu::thread_id());
                    let brake = Brake::new(throttle);
                    VcpuLoop { vcpu, inbox, context, brake }.parked();
                })
                .map_err(|source| VcpusError::Spawn { index, source })?;
            let thread_id = id.recv().map_err(|_| VcpusError::Gone { index: index.into() })?;
            all.threads.push(VcpuThread { commands, thread: Some(thread), thread_id });
        }
        Ok(all)
    }

    /// Kernel thread ids by vCPU number.
    pub fn thread_ids(&self) -> Vec<i32> {
        self.threads.iter().map(|thread| thread.thread_id).collect()
    }

    /// Throttles every vCPU by `percent`, including parked ones; 0 ends throttling.
    pub fn throttle(&self, percent: u8) {
        self.throttle.set(percent);
        self.threads.iter().filter_map(|vcpu| vcpu.thread.as_ref()).for_each(kick);
    }

    /// Where each vCPU is, in words, of those that answer by `deadline`. They must be parked.
    pub fn locate(&self, deadline: Instant) -> Vec<String> {
        let ask = |thread: &VcpuThread| {
            let (reply, answer) = channel();
            thread.commands.send(Command::Locate(reply)).is_ok().then_some(answer)
        };
        let answers: Vec<_> = self.threads.iter().filter_map(ask).collect();
        let left = || deadline.saturating_duration_since(Instant::now());
        answers.into_iter().filter_map(|answer| answer.recv_timeout(left()).ok()).collect()
    }

    /// Checks that every vCPU's thread is alive: otherwise only a part of the guest would run.
    pub fn check(&self) -> Result<(), VcpusError> {
        let is_gone = |vcpu: &VcpuThread| vcpu.thread.as_ref().is_none_or(JoinHandle::is_finished);
        match self.threads.iter().position(is_gone) {
            Some(index) => Err(VcpusError::Gone { index }),
            None => Ok(()),
        }
    }

    /// Runs every vCPU, or none on error.
    pub fn run(&self) -> Result<(), VcpusError> {
        self.check()?;
        self.tell_all(|| Command::Run).inspect_err(|_| {
            // The vCPUs before the dead one run already.
            if let Err(error) = self.park_living(PARK_LIMIT) {
                log::error!("a guest that could not be started cannot be stopped: {error}");
            }
        })
    }

    /// Stops every vCPU; on return none executes guest code and the last access of each is complete. If one
    /// does not stop, which is a bug, all resume. If one has died, the others are stopped.
    pub fn park(&self) -> Result<(), VcpusError> {
        let parked = self.park_living(PARK_LIMIT);
        if let Err(VcpusError::Stuck { .. }) = parked {
            // A thread that has died meanwhile is reported by the next attempt.
            let _ = self.tell_all(|| Command::Run);
        }
        parked.and_then(|()| self.check())
    }

    /// Stops every vCPU with a live thread.
    fn park_living(&self, limit: Duration) -> Result<(), VcpusError> {
        let mut parked = Vec::with_capacity(self.threads.len());
        for (index, vcpu) in self.threads.iter().enumerate() {
            let (sender, answer) = channel();
            if vcpu.commands.send(Command::Park(sender)).is_err() {
                continue;
            }
            vcpu.thread.as_ref().inspect(|thread| kick(thread));
            parked.push((index, answer));
        }
        let deadline = Instant::now() + limit;
        for (index, answer) in parked {
            let left = deadline.saturating_duration_since(Instant::now());
            answer.recv_timeout(left).map_err(|error| match error {
                RecvTimeoutError::Timeout => VcpusError::Stuck { index },
                RecvTimeoutError::Disconnected => VcpusError::Gone { index },
            })?;
        }
        Ok(())
    }

    /// Tells a parked guest's kvmclock that it was paused.
    pub fn notify_clock_paused(&self) -> Result<(), VcpusError> {
        self.tell_all(|| Command::NotifyClockPaused)
    }

    /// The state of every vCPU, by number. The vCPUs must be parked.
    pub fn save(&self) -> Result<Vec<VcpuState>, VcpusError> {
        let replies = self.ask_all(|_, reply| Command::Save(reply))?;
        wait_all(replies)
    }

    /// Loads every vCPU's state; `tsc_offset` returns each one's new offset. The vCPUs must be parked.
    pub fn restore(
        &self,
        states: Vec<VcpuState>,
        tsc_offset: impl Fn(&VcpuState) -> Option<u64>,
    ) -> Result<(), VcpusError> {
        if states.len() != self.threads.len() {
            let (found, expected) = (states.len(), self.threads.len());
            return Err(VcpusError::Count { found, expected });
        }
        let mut states = states.into_iter();
        let replies = self.ask_all(|index, reply| match states.next() {
            Some(state) => {
                let offset = tsc_offset(&state);
                Command::Restore(Box::new(state), offset, reply)
            }
            None => unreachable!("counted above, at vCPU {index}"),
        })?;
        wait_all(replies).map(drop)
    }

    fn tell_all(&self, mut command: impl FnMut() -> Command) -> Result<(), VcpusError> {
        for (index, thread) in self.threads.iter().enumerate() {
            thread.commands.send(command()).map_err(|_| VcpusError::Gone { index })?;
        }
        Ok(())
    }

    fn ask_all<T>(
        &self,
        mut command: impl FnMut(usize, Reply<T>) -> Command,
    ) -> Result<Vec<Receiver<Result<T, KvmError>>>, VcpusError> {
        let mut replies = Vec::with_capacity(self.threads.len());
        for (index, thread) in self.threads.iter().enumerate() {
            let (reply, answer) = channel();
            let sent = thread.commands.send(command(index, reply));
            sent.map_err(|_| VcpusError::Gone { index })?;
            replies.push(answer);
        }
        Ok(replies)
    }
}

fn wait_all<T>(replies: Vec<Receiver<Result<T, KvmError>>>) -> Result<Vec<T>, VcpusError> {
    let wait = |(index, reply): (usize, Receiver<Result<T, KvmError>>)| {
        let result = reply.recv().map_err(|_| VcpusError::Gone { index })?;
        result.map_err(|source| VcpusError::Kvm { index, source })
    };
    replies.into_iter().enumerate().map(wait).collect()
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        for thread in &mut self.threads {
            // The closed channel ends the thread; the kick makes it check.
            thread.commands = channel().0;
            if let Some(handle) = &thread.thread {
                kick(handle);
            }
        }
        for thread in self.threads.iter_mut().filter_map(|thread| thread.thread.take()) {
            if thread.join().is_err() {
                log::error!("a vCPU thread panicked");
            }
        }
    }
}

struct VcpuLoop {
    vcpu: Vcpu,
    inbox: Receiver<Command>,
    context: VcpuContext,
    brake: Brake,
}

/// What the loop does after an exit.
enum After {
    Continue,
    /// Check the mailbox.
    Look,
    /// This vCPU is done.
    Ended(Option<VcpuEnd>),
}

impl VcpuLoop {
    /// Serves commands until the machine is dropped.
    fn parked(mut self) {
        self.vcpu.bind_to_thread();
        while let Ok(command) = self.inbox.recv() {
            match command {
                Command::Run => {
                    let end = self.in_guest();
                    self.brake.release();
                    if end.is_none() {
                        return;
                    }
                }
                // Ignore a reply whose receiver is gone.
                Command::Park(done) => drop(done.send(())),
                Command::NotifyClockPaused => self.vcpu.notify_clock_paused(),
                Command::Locate(reply) => drop(reply.send(self.place())),
                Command::Save(reply) => {
                    drop(reply.send(VcpuState::save(&self.vcpu, &self.context.layout)));
                }
                Command::Restore(state, tsc_offset, reply) => {
                    let layout = &self.context.layout;
                    drop(reply.send(state.restore(&self.vcpu, layout, tsc_offset)));
                }
            }
        }
    }

    /// Runs guest code until told to park or the guest ends. `None` if the machine is gone.
    fn in_guest(&mut self) -> Option<()> {
        loop {
            // Acknowledge first: a command sent after the check kicks again.
            self.vcpu.acknowledge_kick();
            let mut nap = Duration::ZERO;
            loop {
                match self.inbox.recv_timeout(nap) {
                    Ok(Command::Park(done)) => return done.send(()).ok().or(Some(())),
                    // `Run` while running, or a command that needs a parked vCPU: the dropped reply channel
                    // is the error.
                    Ok(_) => {
                        nap = Duration::ZERO;
                        continue;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return None,
                }
                if self.context.ended.load(Ordering::Acquire) {
                    return Some(());
                }
                match self.brake.before_entry() {
                    Some(longer) => nap = longer,
                    None => break,
                }
            }
            loop {
                match self.one_exit() {
                    After::Continue if !self.context.ended.load(Ordering::Acquire) => {}
                    After::Look => break,
                    After::Continue => {
                        self.vcpu.complete_access();
                        return Some(());
                    }
                    After::Ended(end) => {
                        if let Some(end) = end {
                            self.fail(end);
                        }
                        return Some(());
                    }
                }
            }
        }
    }

    fn one_exit(&mut self) -> After {
        match self.vcpu.run() {
            Exit::Port { port, write } => {
                let (pio, unclaimed) = (&self.context.pio, &self.context.unclaimed);
                for element in self.vcpu.port_data() {
                    let found = match write {
                        true => pio.write(port.into(), element),
                        false => pio.read(port.into(), element),
                    };
                    if !found {
                        unclaimed.accessed(Place::Port(port), write);
                    }
                }
                After::Continue
            }
            Exit::Mmio { address, write } => {
                let (mmio, data) = (&self.context.mmio, self.vcpu.mmio_data());
                let found =
                    if write { mmio.write(address, data) } else { mmio.read(address, data) };
                if !found {
                    self.context.unclaimed.accessed(Place::Memory(address), write);
                }
                After::Continue
            }
            Exit::Interrupted => After::Look,
            Exit::Crashed(reason) => After::Ended(Some(VcpuEnd::Crashed(reason))),
            Exit::Failed(reason) => After::Ended(Some(VcpuEnd::Failed(reason))),
        }
    }

    fn fail(&self, end: VcpuEnd) {
        let first = !self.context.ended.swap(true, Ordering::AcqRel);
        if first {
            (self.context.on_end)(match end {
                VcpuEnd::Failed(why) => {
                    VcpuEnd::Failed(format!("vCPU {}: {why}", self.vcpu.index()))
                }
                VcpuEnd::Crashed(why) => VcpuEnd::Crashed(format!("{why}, {}", self.place())),
            });
        }
    }

    /// Where the guest is, in words; logs all registers.
    fn place(&self) -> String {
        match self.vcpu.registers() {
            Ok(registers) => {
                log::info!("{registers}");
                registers.place()
            }
            Err(error) => format!("vCPU {} at an unknown place: {error}", self.vcpu.index()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread that serves commands like a vCPU's and reports them.
    fn living(seen: &Sender<&'static str>) -> VcpuThread {
        crate::kvm::vcpu::install_kick_handler().unwrap();
        let (commands, inbox) = channel();
        let seen = seen.clone();
        let thread = std::thread::spawn(move || {
            while let Ok(command) = inbox.recv() {
                let name = match command {
                    Command::Park(done) => {
                        done.send(()).unwrap();
                        "park"
                    }
                    Command::Run => "run",
                    _ => "other",
                };
                seen.send(name).unwrap();
            }
        });
        VcpuThread { commands, thread: Some(thread), thread_id: 0 }
    }

    fn dead() -> VcpuThread {
        let thread = std::thread::spawn(|| {});
        while !thread.is_finished() {
            std::thread::yield_now();
        }
        VcpuThread { commands: channel().0, thread: Some(thread), thread_id: 0 }
    }

    #[test]
    fn a_guest_with_a_dead_vcpu_is_not_started_in_part() {
        let (seen, commands) = channel();
        let vcpus = Vcpus { threads: vec![living(&seen), dead()], throttle: Throttle::default() };
        assert!(matches!(vcpus.run(), Err(VcpusError::Gone { index: 1 })));
        drop((vcpus, seen));
        assert_eq!(commands.iter().collect::<Vec<_>>(), [""; 0]);
    }

    #[test]
    fn one_that_dies_as_it_is_started_stops_the_others() {
        let (seen, commands) = channel();
        // It has not ended yet, but receives nothing.
        let (end, waits) = channel::<()>();
        let thread = std::thread::spawn(move || waits.recv().unwrap_or(()));
        let deaf = VcpuThread { commands: channel().0, thread: Some(thread), thread_id: 0 };
        let vcpus = Vcpus { threads: vec![living(&seen), deaf], throttle: Throttle::default() };
        assert!(matches!(vcpus.run(), Err(VcpusError::Gone { index: 1 })));
        drop((end, vcpus, seen));
        assert_eq!(commands.iter().collect::<Vec<_>>(), ["run", "park"]);
    }
}
