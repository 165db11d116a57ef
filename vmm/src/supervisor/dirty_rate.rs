//! `calc-dirty-rate`: measures how much RAM a guest writes, with the dirty log, on its own thread. A
//! migration needs the log exclusively and aborts the measurement.

use crate::kvm::vm::Vm;
use crate::machine::dirty::VmDirtyLog;
use devices::ram::{PAGE_SIZE, PageIndex};
use migration::guest::{DirtySource, GuestError};
use serde_json::{Value, json};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Words of the bitmap cleared per call.
const CLEAR_WORDS: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Status {
    #[default]
    Unstarted,
    Measuring,
    Measured,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::Unstarted => "unstarted",
            Self::Measuring => "measuring",
            Self::Measured => "measured",
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Figures {
    status: Status,
    /// Seconds since 1970.
    start_time: u64,
    calc_time: Duration,
    bytes_per_sec: Option<u64>,
    stop: bool,
}

#[derive(Debug, Default)]
struct Shared {
    figures: Mutex<Figures>,
    stopped: Condvar,
}

impl Shared {
    fn figures(&self) -> MutexGuard<'_, Figures> {
        devices::lock(&self.figures)
    }
}

/// The current or last measurement. Dropping it aborts that.
#[derive(Debug, Default)]
pub struct DirtyRate {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl DirtyRate {
    /// Whether a measurement is running.
    pub fn is_measuring(&self) -> bool {
        self.shared.figures().status == Status::Measuring
    }

    /// Starts to measure writes to the RAM of `vm` for `calc_time`.
    pub fn start(&mut self, vm: Arc<Vm>, calc_time: Duration) -> io::Result<()> {
        // No measurement is running, so its thread is about to end.
        if let Some(earlier) = self.abort() {
            earlier.join();
        }
        // A wall clock before 1970 is reported as 1970.
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (status, start_time) = (Status::Measuring, since_1970.as_secs());
        self.shared = Arc::default();
        *self.shared.figures() = Figures { status, start_time, calc_time, ..Figures::default() };
        let shared = self.shared.clone();
        let work = move || {
            let result = measure(vm, calc_time, &shared);
            let mut figures = shared.figures();
            figures.status = Status::Unstarted;
            match result {
                Ok(Some(bytes_per_sec)) => {
                    figures.status = Status::Measured;
                    figures.bytes_per_sec = Some(bytes_per_sec);
                }
                Ok(None) => log::info!("the measurement of the dirty rate was ended early"),
                Err(error) => log::warn!("the dirty rate cannot be measured: {error}"),
            }
        };
        let builder = std::thread::Builder::new().name("dirty-rate".into());
        match builder.stack_size(128 << 10).spawn(work) {
            Ok(thread) => self.thread = Some(thread),
            Err(error) => {
                *self.shared.figures() = Figures::default();
                return Err(error);
            }
        }
        Ok(())
    }

    /// Aborts a running measurement, which is then as if it had not been started. Joining the result, which
    /// may take tens of milliseconds, frees the dirty log.
    pub fn abort(&mut self) -> Option<Aborted> {
        let thread = self.thread.take()?;
        let mut figures = self.shared.figures();
        figures.stop = true;
        if figures.status == Status::Measuring {
            figures.status = Status::Unstarted;
        }
        drop(figures);
        self.shared.stopped.notify_all();
        Some(Aborted(thread))
    }

    /// The reply to `query-dirty-rate`, with times in milliseconds or seconds.
    pub fn query(&self, in_millis: bool) -> Value {
        let figures = *self.shared.figures();
        let (unit, calc_time) = match in_millis {
            true => ("millisecond", figures.calc_time.as_millis()),
            false => ("second", figures.calc_time.as_secs().into()),
        };
        // Saturates: `calc-time` is at most a minute.
        let mut answer = json!({
            "status": figures.status.name(),
            "start-time": figures.start_time,
            "calc-time": u64::try_from(calc_time).unwrap_or(u64::MAX),
            "calc-time-unit": unit,
            "sample-pages": 0,
            "mode": "dirty-bitmap",
        });
        if let Some(bytes_per_sec) = figures.bytes_per_sec {
            answer["dirty-rate"] = (bytes_per_sec >> 20).into();
            answer["x-dirty-bytes-per-second"] = bytes_per_sec.into();
        }
        answer
    }
}

impl Drop for DirtyRate {
    fn drop(&mut self) {
        self.abort();
    }
}

/// An aborted measurement, which ends soon.
#[derive(Debug)]
pub struct Aborted(JoinHandle<()>);

impl Aborted {
    /// Waits for its end; only then may the dirty log be used again.
    pub fn join(self) {
        if self.0.join().is_err() {
            log::error!("the thread that measures the dirty rate panicked");
        }
    }
}

/// Bytes of written pages per second; `None` if aborted.
fn measure(vm: Arc<Vm>, calc_time: Duration, shared: &Shared) -> Result<Option<u64>, GuestError> {
    let page_count = vm.layout().page_count();
    let words = usize::try_from(page_count.div_ceil(64)).expect("64-bit host");
    let mut bitmap = vec![0u64; words];
    let mut log = VmDirtyLog::new(vm);
    log.start()?;
    // Clear the log: in some modes every page starts dirty.
    log.drain_into(&mut bitmap)?;
    for (index, mask) in bitmap.chunks(CLEAR_WORDS).enumerate() {
        log.clear(PageIndex((index * CLEAR_WORDS * 64) as u64), mask)?;
    }
    bitmap.fill(0);
    let began = Instant::now();
    let figures = shared.figures();
    let waited = shared.stopped.wait_timeout_while(figures, calc_time, |figures| !figures.stop);
    let stopped = waited.unwrap_or_else(PoisonError::into_inner).0.stop;
    if stopped {
        return Ok(None);
    }
    log.drain_into(&mut bitmap)?;
    let elapsed = began.elapsed();
    let pages: u64 = bitmap.iter().map(|word| u64::from(word.count_ones())).sum();
    Ok(Some(migration::policy::per_second(pages * PAGE_SIZE, elapsed)))
}
