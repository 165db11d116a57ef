//! Received frames that nobody has taken yet, by kind, and the reason why the connection ended. Filled by
//! the reader thread, waited on by any thread through [`super::Control`].

use crate::cancel::CancelToken;
use crate::error::ParticipantError;
use crate::transport::Liveness;
use crate::wire::{Decoder, Frame, Kind, WireError};
use std::collections::VecDeque;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most frames held. A full inbox makes the reader, and so the peer, wait.
const MAX_FRAMES: usize = 256;
/// Most bytes held: two sections of maximum length.
const MAX_BYTES: usize = 2 * crate::wire::MAX_SECTION_BYTES as usize;

/// Limits a wait.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// What is waited for, for error messages.
    pub what: &'static str,
    /// Deadline, and its distance from the start of the wait. Without it the wait lasts as long as the peer
    /// is alive and nothing cancels.
    until: Option<(Instant, Duration)>,
}

impl Limit {
    /// No deadline: ends when the peer dies or the migration is cancelled.
    pub fn alive(what: &'static str) -> Self {
        Self { what, until: None }
    }

    /// For `longest` at most.
    pub fn within(what: &'static str, longest: Duration) -> Self {
        Self { what, until: Some((Instant::now() + longest, longest)) }
    }

    /// Until `deadline`.
    pub fn until(what: &'static str, deadline: Instant) -> Self {
        let longest = deadline.saturating_duration_since(Instant::now());
        Self { what, until: Some((deadline, longest)) }
    }
}

/// The frame with which the peer ended the migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Farewell {
    /// `Refused`, `Abort` or `Declined`.
    pub kind: Kind,
    /// The peer's error message.
    pub reason: String,
}

impl From<Farewell> for WireError {
    fn from(last: Farewell) -> Self {
        match last.kind {
            Kind::Abort => Self::Aborted(last.reason),
            _ => Self::Refused(last.reason),
        }
    }
}

#[derive(Default)]
pub(super) struct State {
    /// In the order of sending.
    stream: VecDeque<Frame>,
    bytes: usize,
    /// Answers to marks, not yet decoded: number and channel.
    marks: VecDeque<Vec<u8>>,
    malformed_mark: Option<WireError>,
    farewell: Option<Farewell>,
    /// Drop `Ready` of attempts up to this one.
    stale_ready: u32,
    /// The connection has ended, and the reason until it is taken.
    ended: bool,
    end: Option<WireError>,
    /// A thread of this side has failed, and the reason until the driver takes it.
    failed: bool,
    failure: Option<ParticipantError>,
    /// This side has closed the inbox.
    closed: bool,
}

impl State {
    pub(super) fn next_frame(&mut self) -> Option<Frame> {
        loop {
            let frame = self.stream.pop_front()?;
            self.bytes -= frame.payload.len();
            if frame.kind != Kind::Ready || !self.is_stale(&frame) {
                return Some(frame);
            }
        }
    }

    fn is_stale(&self, ready: &Frame) -> bool {
        let attempt = Decoder::new("Ready", &ready.payload).u32();
        attempt.is_ok_and(|attempt| attempt <= self.stale_ready)
    }

    pub(super) fn next_mark(&mut self) -> Option<(u64, u16)> {
        let payload = self.marks.pop_front()?;
        let mut decoder = Decoder::new("the answer to a mark", &payload);
        let mark = (|| Ok::<_, WireError>((decoder.u64()?, decoder.u16()?)))();
        match mark.and_then(|mark| decoder.finish().map(|()| mark)) {
            Ok(mark) => Some(mark),
            Err(error) => {
                self.malformed_mark = Some(error);
                None
            }
        }
    }

    fn is_full(&self) -> bool {
        self.stream.len() + self.marks.len() >= MAX_FRAMES || self.bytes >= MAX_BYTES
    }

    /// Why no more frames will come, if so.
    fn reason(&mut self) -> Option<WireError> {
        if let Some(error) = self.malformed_mark.take() {
            return Some(error);
        }
        if let Some(last) = self.farewell.clone() {
            return Some(last.into());
        }
        if self.failed {
            return Some(WireError::Interrupted);
        }
        if self.ended || self.closed {
            let gone = || WireError::Lost(io::ErrorKind::BrokenPipe.into());
            return Some(self.end.take().unwrap_or_else(gone));
        }
        None
    }
}

/// How likely a failure is the root cause: an interrupted wait never is, a broken connection seldom.
fn rank(failure: &ParticipantError) -> u8 {
    match failure {
        failure if failure.is_interrupted() => 0,
        failure if failure.is_broken() => 1,
        _ => 2,
    }
}

#[derive(Default)]
pub(super) struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        devices::lock(&self.state)
    }

    fn sleep<'s>(&self, state: MutexGuard<'s, State>, longest: Duration) -> MutexGuard<'s, State> {
        let waited = self.changed.wait_timeout(state, longest);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Wakes all waiters to re-check their conditions.
    pub(super) fn wake(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Adds a frame, waiting for room; calls `waiting` repeatedly meanwhile, as this side is the slow one.
    /// Returns false once the inbox is closed.
    pub(super) fn deliver(&self, frame: Frame, waiting: impl Fn()) -> bool {
        let mut state = self.lock();
        while state.is_full() && !state.closed {
            waiting();
            state = self.sleep(state, crate::transport::TICK);
        }
        if state.closed {
            return false;
        }
        match frame.kind {
            Kind::Mark => state.marks.push_back(frame.payload),
            Kind::Refused | Kind::Abort | Kind::Declined => {
                let last = Farewell { kind: frame.kind, reason: frame.reason() };
                state.farewell.get_or_insert(last);
            }
            _ => {
                state.bytes += frame.payload.len();
                state.stream.push_back(frame);
            }
        }
        self.changed.notify_all();
        true
    }

    /// Records that the connection has ended.
    pub(super) fn end(&self, error: WireError) {
        let mut state = self.lock();
        (state.ended, state.end) = (true, Some(error));
        self.changed.notify_all();
    }

    /// Closes the inbox: frames are no longer wanted.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Whether nothing more will come.
    pub(super) fn has_ended(&self) -> bool {
        let state = self.lock();
        state.ended || state.closed || state.farewell.is_some()
    }

    pub(super) fn has_failed(&self) -> bool {
        self.lock().failed
    }

    pub(super) fn fail(&self, error: ParticipantError) {
        let mut state = self.lock();
        state.failed = true;
        if state.failure.as_ref().is_none_or(|kept| rank(&error) > rank(kept)) {
            state.failure = Some(error);
        }
        self.changed.notify_all();
    }

    pub(super) fn ignore_ready_up_to(&self, attempt: u32) {
        self.lock().stale_ready = attempt;
    }

    pub(super) fn is_next(&self, kind: Kind) -> bool {
        self.lock().stream.front().is_some_and(|frame| frame.kind == kind)
    }

    /// Waits until nothing more will come, for `longest` at most.
    pub(super) fn await_end(&self, longest: Duration) {
        let end = Instant::now() + longest;
        let mut state = self.lock();
        while !state.ended && !state.closed {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.sleep(state, left);
        }
    }

    pub(super) fn take_failure(&self) -> Option<ParticipantError> {
        self.lock().failure.take()
    }

    pub(super) fn farewell_within(&self, longest: Duration) -> Option<Farewell> {
        let end = Instant::now() + longest;
        let mut state = self.lock();
        loop {
            if state.farewell.is_some() || state.ended || state.closed {
                return state.farewell.clone();
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.sleep(state, left);
        }
    }

    /// Waits until `pick` returns something. A cancel wins over a frame; a frame wins over a deadline that
    /// has just passed.
    pub(super) fn wait<T>(
        &self,
        limit: &Limit,
        cancel: &CancelToken,
        liveness: &Liveness,
        patience: Duration,
        mut pick: impl FnMut(&mut State) -> Option<Result<T, WireError>>,
    ) -> Result<T, WireError> {
        let mut state = self.lock();
        loop {
            if cancel.is_cancelled() {
                return Err(WireError::Interrupted);
            }
            if let Some(result) = pick(&mut state) {
                // There is room again.
                self.changed.notify_all();
                return result;
            }
            if let Some(reason) = state.reason() {
                return Err(reason);
            }
            let silence = liveness.silence();
            if silence >= patience {
                return Err(WireError::Stalled { seconds: patience.as_secs() });
            }
            let mut longest = patience - silence;
            if let Some((until, within)) = limit.until {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(WireError::Late { what: limit.what, within });
                }
                longest = longest.min(left);
            }
            state = self.sleep(state, longest);
        }
    }
}
