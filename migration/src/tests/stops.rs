//! Stops that take too long: the guest runs on within its limit, whoever is blocked, its user hears what is
//! at fault, and the guest moves as soon as it can.

use super::fake::*;
use crate::error::chain;
use crate::params::Params;
use crate::source::{MigrationEvent, SourceError, SourceOutcome};
use crate::stats::MigrationStatus;
use crate::transport::memory::{MemoryLink, MemoryTransport};
use crate::transport::{PageSlice, TICK, Transport};
use crate::wire::{self, HEADER_BYTES, Kind};
use std::io;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn limited(limit: Duration) -> Params {
    Params { downtime_limit: limit, multifd_channels: 1, ..Params::default() }
}

/// Bytes of the payload of Eof.
const EOF_BYTES: usize = 5;

fn parts_said(end: &End) -> Vec<String> {
    let said = end.events.iter().filter_map(|event| match event {
        MigrationEvent::NotConverging(facts) => facts.part.as_ref(),
        _ => None,
    });
    said.map(|part| part.to_string()).collect()
}

#[test]
fn a_disk_that_is_slow_to_drain_is_named_its_guest_is_left_alone_and_moves_when_it_may() {
    let scenario = Scenario { params: limited(ms(20)), ..Default::default() };
    *scenario.machine.drain.lock().unwrap() = ms(30);
    let machine = scenario.machine.clone();
    let (began, passes) = (Instant::now(), Arc::new(AtomicU32::new(0)));
    let counted = passes.clone();
    // After a while its user allows for it.
    let raised = (40, limited(ms(2000)));
    let watch: Watch = Arc::new(move |event| {
        if matches!(event, MigrationEvent::Pass(_)) {
            counted.fetch_add(1, SeqCst);
        }
    });
    let scenario = Scenario { watch: Some(watch), changes: vec![raised], ..scenario };
    let end = migrate(&scenario);
    end.assert_moved();
    let stats = end.counters.snapshot();
    let overdue = machine.overdue.load(SeqCst);
    assert_eq!(stats.called_off, u64::from(overdue));
    // 100 ms after the first, 200 after the second…: far fewer than there were passes.
    assert!((1..=8).contains(&overdue), "{overdue} stops in {:?}", began.elapsed());
    assert!(began.elapsed() > ms(1000), "passes without a stop take their time");
    assert!(passes.load(SeqCst) >= 40);
    assert_eq!(parts_said(&end), [format!("{SLOW_DISK} takes 30 ms")]);
}

#[test]
fn a_shared_disk_that_is_slow_to_flush_is_flushed_before_the_stop_and_named() {
    let scenario = Scenario { params: limited(ms(20)), ..Default::default() };
    *scenario.machine.flush.lock().unwrap() = ms(3000);
    let machine = scenario.machine.clone();
    let watch: Watch = Arc::new(move |event| {
        if matches!(event, MigrationEvent::NotConverging(_)) {
            *machine.flush.lock().unwrap() = Duration::ZERO;
        }
    });
    let end = migrate(&Scenario { watch: Some(watch), ..scenario });
    end.assert_moved();
    assert_eq!(parts_said(&end), ["flushing disk `shared` takes 3000 ms"]);
    assert_eq!(end.counters.snapshot().called_off, 0, "the guest was never stopped for it");
    assert!(end.counters.snapshot().downtime.unwrap() < ms(1000));
}

type Takes = Box<dyn Fn(&[u8]) -> bool + Send + Sync>;

/// A connection that takes only what a test lets through.
struct Gate {
    inner: MemoryTransport,
    takes: Takes,
}

impl Gate {
    fn wait(&self, bytes: &[u8]) -> io::Result<()> {
        if (self.takes)(bytes) {
            return Ok(());
        }
        std::thread::park_timeout(TICK);
        Err(io::ErrorKind::WouldBlock.into())
    }
}

impl Transport for Gate {
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        self.inner.receive(into)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.wait(bytes)?;
        self.inner.send(bytes)
    }

    fn receive_pages(&self, pages: &[PageSlice<'_>]) -> io::Result<usize> {
        self.inner.receive_pages(pages)
    }

    fn send_pages(&self, head: &[u8], pages: &[PageSlice<'_>]) -> io::Result<usize> {
        self.wait(head)?;
        self.inner.send_pages(head, pages)
    }

    fn patience(&self) -> Duration {
        self.inner.patience()
    }

    fn shutdown(&self) {
        self.inner.shutdown();
    }
}

/// Moves a guest whose first data channel takes nothing in its first `stops` stops, until `open` says so:
/// it is asked once the guest runs again. Returns how long the guest was stopped then, at most.
fn migrate_over_gate(
    scenario: Scenario,
    channels: u16,
    stops: u32,
    open: fn() -> bool,
) -> (End, Duration) {
    let link = MemoryLink::new(None).with_patience(scenario.patience);
    let (main, main_in) = link.connect();
    let mut source = Ends { main: Arc::new(main), data: Vec::new(), disks: Vec::new() };
    let mut destination = Ends { main: Arc::new(main_in), data: Vec::new(), disks: Vec::new() };
    let closed = Arc::new(AtomicBool::new(false));
    for index in 0..channels {
        let (out, into) = link.connect();
        let closed = if index == 0 { closed.clone() } else { Arc::default() };
        let takes = Box::new(move |_: &[u8]| !closed.load(SeqCst));
        source.data.push(Arc::new(Gate { inner: out, takes }));
        destination.data.push(Arc::new(into));
    }
    let params = Params { multifd_channels: channels, ..scenario.params.clone() };
    let machine = scenario.machine.clone();
    let stopped_for = Arc::new(Mutex::new(None));
    let (told, left) = (stopped_for.clone(), AtomicU32::new(stops));
    let watch: Watch = Arc::new(move |event| {
        let device = *event == MigrationEvent::Status(MigrationStatus::Device);
        let one_less = |left: u32| left.checked_sub(1);
        if !device || left.fetch_update(SeqCst, SeqCst, one_less).is_err() {
            return;
        }
        closed.store(true, SeqCst);
        let (machine, closed) = (machine.clone(), closed.clone());
        let (told, stopped) = (told.clone(), Instant::now());
        std::thread::spawn(move || {
            while !machine.running.load(SeqCst) {
                assert!(stopped.elapsed() < Duration::from_secs(60), "the guest stays stopped");
                std::thread::park_timeout(ms(1));
            }
            let longest = &mut *told.lock().unwrap();
            *longest = (*longest).max(Some(stopped.elapsed()));
            if open() {
                closed.store(false, SeqCst);
            }
        });
    });
    let scenario = Scenario { watch: Some(watch), params, ..scenario };
    let end = migrate_over(&scenario, source, destination, || 0);
    let stopped_for = stopped_for.lock().unwrap().expect("the guest ran again");
    (end, stopped_for)
}

#[test]
fn a_link_that_becomes_slow_after_the_decision_lets_the_guest_run_on_in_time_and_move_later() {
    for (channels, xbzrle) in [(1, false), (1, true), (3, true)] {
        let params = Params { xbzrle, ..limited(ms(100)) };
        let scenario = Scenario {
            ram_bytes: 8 << 20,
            dirtying: Some((300, Duration::from_micros(200))),
            lively: true,
            params,
            ..Default::default()
        };
        let (end, stopped) = migrate_over_gate(scenario, channels, 1, || true);
        end.assert_moved();
        // The limit, and what a busy host makes of it.
        assert!(stopped < ms(1500), "{channels} channels: stopped for {stopped:?}");
        assert!(end.counters.snapshot().called_off >= 1);
        assert!(end.destination_machine.loads.load(SeqCst) >= 2, "records came again");
        let statuses = end.events.iter().filter_map(|event| match event {
            MigrationEvent::Status(status) => Some(*status),
            _ => None,
        });
        let back: Vec<_> = statuses.collect();
        use MigrationStatus::{Active, Device};
        assert!(back.windows(3).any(|three| three == [Device, Active, Device]), "{back:?}");
    }
}

#[test]
fn the_part_that_was_in_progress_at_the_deadline_is_named_not_the_next_one() {
    let scenario = Scenario {
        ram_bytes: 8 << 20,
        dirtying: Some((300, Duration::from_micros(200))),
        lively: true,
        params: limited(ms(300)),
        ..Default::default()
    };
    // The user is told after two called-off stops.
    let (end, _) = migrate_over_gate(scenario, 1, 2, || true);
    end.assert_moved();
    let said = parts_said(&end);
    let [part] = &said[..] else { panic!("{said:?}") };
    let sending = "sending the rest of section \"ram\" takes more than ";
    let took = part.strip_prefix(sending).and_then(|rest| rest.strip_suffix(" ms"));
    let took: u64 = took.unwrap_or_else(|| panic!("{part:?}")).parse().unwrap();
    assert!(took >= 100, "{part}");
    let facts = end.events.iter().find_map(|event| match event {
        MigrationEvent::NotConverging(facts) => Some(facts),
        _ => None,
    });
    let facts = facts.unwrap();
    // As measured by the passes before the stop; by then nobody writes.
    assert!(facts.bytes_per_sec > 0, "{facts:?}");
}

#[test]
fn a_link_that_dies_in_the_pause_does_not_keep_the_guest_stopped() {
    let patience = Duration::from_secs(3);
    let scenario = Scenario { params: limited(ms(100)), patience, ..Default::default() };
    let began = Instant::now();
    let (end, stopped) = migrate_over_gate(scenario, 1, 1, || false);
    let SourceOutcome::Failed(error) = &end.source else { panic!("{:?}", end.source) };
    assert!(chain(error).contains("stalled"), "{}", chain(error));
    assert!(stopped < ms(1500), "stopped for {stopped:?}");
    // It was given up long after the guest went on.
    assert!(began.elapsed() >= patience);
    end.assert_back_at_source("dead link");
}

/// Moves a guest over a control connection that takes what the test lets through.
fn migrate_over_main(
    scenario: &Scenario,
    takes: impl Fn(&[u8]) -> bool + Send + Sync + 'static,
) -> End {
    let link = MemoryLink::new(None).with_patience(scenario.patience);
    let (main, main_in) = link.connect();
    let (data, data_in) = link.connect();
    let main = Gate { inner: main, takes: Box::new(takes) };
    let source = Ends { main: Arc::new(main), data: vec![Arc::new(data)], disks: Vec::new() };
    let destination =
        Ends { main: Arc::new(main_in), data: vec![Arc::new(data_in)], disks: Vec::new() };
    migrate_over(scenario, source, destination, || 0)
}

/// The kinds of these frames.
fn kinds(mut frames: &[u8]) -> Vec<Kind> {
    let mut kinds = Vec::new();
    while let Some((header, rest)) = frames.split_first_chunk::<HEADER_BYTES>() {
        let (kind, len) = wire::decode_header(header).unwrap();
        kinds.push(kind);
        frames = &rest[usize::try_from(len).unwrap()..];
    }
    kinds
}

#[test]
fn a_destination_that_stops_reading_at_the_end_does_not_keep_the_guest_stopped() {
    let scenario = Scenario { params: limited(ms(100)), ..Default::default() };
    // Nothing is taken from the end of the stream on, until the guest runs again.
    let machine = scenario.machine.clone();
    let stopped = Arc::<Mutex<Option<Instant>>>::default();
    let waited = Arc::<Mutex<Option<Duration>>>::default();
    let told = waited.clone();
    let eof = wire::header(Kind::Eof, u32::try_from(EOF_BYTES).unwrap());
    let end = migrate_over_main(&scenario, move |bytes| {
        let ends = bytes.windows(eof.len()).any(|frame| frame == eof);
        if waited.lock().unwrap().is_some() || !ends {
            return true;
        }
        let since = *stopped.lock().unwrap().get_or_insert_with(Instant::now);
        assert!(since.elapsed() < Duration::from_secs(60), "the guest stays stopped");
        if machine.running.load(SeqCst) {
            *waited.lock().unwrap() = Some(since.elapsed());
        }
        false
    });
    end.assert_moved();
    let stopped = told.lock().unwrap().expect("the guest ran again");
    assert!(stopped < ms(1500), "stopped for {stopped:?}");
    assert!(end.counters.snapshot().called_off >= 1);
}

#[test]
fn the_destination_is_told_once_of_a_guest_that_cannot_be_resumed() {
    let cancelled = Scenario {
        cancel_source_at: Some(MigrationEvent::Status(MigrationStatus::Device)),
        params: limited(ms(5000)),
        ..Default::default()
    };
    let called_off = Scenario { params: limited(ms(60)), ..Default::default() };
    *called_off.destination.slow_locks.lock().unwrap() = (1, ms(200));
    for scenario in [cancelled, called_off] {
        let sent = Arc::<Mutex<Vec<u8>>>::default();
        let record = sent.clone();
        let end = migrate_over_main(&Scenario { fail: Fail::Resume, ..scenario }, move |bytes| {
            record.lock().unwrap().extend(bytes);
            true
        });
        let SourceOutcome::Failed(SourceError::NotResumed { .. }) = &end.source else {
            panic!("{:?}", end.source)
        };
        assert_eq!(end.running_guests(), 0);
        let kinds = kinds(&sent.lock().unwrap());
        let aborts = kinds.iter().filter(|kind| **kind == Kind::Abort).count();
        assert_eq!(aborts, 1, "{kinds:?}");
    }
}

#[test]
fn a_destination_that_is_slow_to_be_ready_has_let_go_of_shared_disks_before_the_guest_runs_on() {
    let scenario = Scenario { params: limited(ms(60)), ..Default::default() };
    // It holds the lock for longer than the guest may be stopped.
    *scenario.destination.slow_locks.lock().unwrap() = (2, ms(200));
    let end = migrate(&scenario);
    end.assert_moved();
    let stats = end.counters.snapshot();
    assert!(stats.called_off >= 1, "{} stops called off", stats.called_off);
    assert!(stats.downtime.unwrap() < ms(1500), "{:?}", stats.downtime);
}

#[test]
fn a_destination_that_is_always_slower_than_the_limit_gets_its_guest_once_that_is_known() {
    let scenario = Scenario { params: limited(ms(20)), ..Default::default() };
    *scenario.destination.slow_locks.lock().unwrap() = (u32::MAX, ms(40));
    let end = migrate(&scenario);
    end.assert_moved();
    let stats = end.counters.snapshot();
    assert!((1..=12).contains(&stats.called_off), "{} stops called off", stats.called_off);
    assert!(stats.downtime.unwrap() >= ms(40));
}

#[test]
fn a_cancel_while_the_destination_is_getting_ready_leaves_the_guest_running_on_a_locked_disk() {
    let scenario = Scenario { params: limited(ms(5000)), ..Default::default() };
    *scenario.destination.slow_locks.lock().unwrap() = (1, ms(100));
    let at = MigrationEvent::Status(MigrationStatus::Device);
    let end = migrate(&Scenario { cancel_source_at: Some(at), ..scenario });
    assert!(matches!(end.source, SourceOutcome::Cancelled), "{:?}", end.source);
    end.assert_back_at_source("cancelled before Ready");
}
