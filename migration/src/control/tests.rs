use super::*;
use crate::transport::memory::{MemoryLink, MemoryTransport};
use crate::wire::Encoder;
use std::sync::mpsc::channel;

const PATIENCE: Duration = Duration::from_millis(600);

fn control(patience: Duration) -> (Control, ControlThreads, MemoryTransport, CancelToken) {
    let (ours, theirs) = MemoryLink::new(None).with_patience(patience).connect();
    let cancel = CancelToken::new();
    let (control, threads) = Control::start(Arc::new(ours), cancel.clone()).unwrap();
    (control, threads, theirs, cancel)
}

fn say(to: &MemoryTransport, kind: Kind, payload: &[u8]) {
    let mut bytes = Vec::new();
    wire::append_frame(&mut bytes, kind, payload).unwrap();
    crate::tests::write_all(to, &bytes);
}

/// Sends keep-alives without a pause, until the other side has hung up.
fn chatter(peer: MemoryTransport) -> JoinHandle<()> {
    let mut alive = Vec::new();
    wire::append_frame(&mut alive, Kind::KeepAlive, &[]).unwrap();
    std::thread::spawn(move || {
        while peer.send(&alive).is_ok() {
            std::thread::yield_now();
        }
    })
}

#[test]
fn keep_alives_put_no_deadline_off() {
    let (control, threads, peer, _) = control(PATIENCE);
    let talking = chatter(peer);
    let began = Instant::now();
    let longest = Duration::from_millis(100);
    let error = control.expect(Kind::Ready, &Limit::within("readiness", longest)).unwrap_err();
    assert_eq!(error.to_string(), "readiness did not come within 100 ms");
    assert!(began.elapsed() >= longest && began.elapsed() < longest * 30, "{:?}", began.elapsed());
    drop(threads);
    talking.join().unwrap();
}

#[test]
fn keep_alives_put_no_cancel_off() {
    let (control, threads, peer, cancel) = control(PATIENCE);
    let talking = chatter(peer);
    let (tell, ended) = channel();
    let waiting = control.clone();
    let thread = std::thread::spawn(move || {
        tell.send(waiting.next(&Limit::alive("acceptance")).unwrap_err()).unwrap();
    });
    cancel.cancel();
    let error = ended.recv_timeout(Duration::from_secs(20)).expect("the wait ends");
    assert!(matches!(error, WireError::Interrupted), "{error}");
    thread.join().unwrap();
    drop(threads);
    talking.join().unwrap();
}

#[test]
fn a_peer_that_is_silent_is_stalled_and_one_that_dribbles_is_late() {
    let (control, _threads, peer, _) = control(Duration::from_millis(150));
    let error = control.next(&Limit::alive("acceptance")).unwrap_err();
    assert!(matches!(error, WireError::Stalled { .. }), "{error}");
    // Half a frame, byte by byte, each before the patience is over. The first is heard before the wait.
    let header = wire::header(Kind::Refused, 4000);
    peer.send(&header[..1]).unwrap();
    let sent = Instant::now();
    while control.is_lost() {
        assert!(sent.elapsed() < Duration::from_secs(20), "the byte is not heard");
        std::thread::yield_now();
    }
    let (tell, ended) = channel();
    let thread = std::thread::spawn(move || {
        let limit = Limit::within("acceptance", Duration::from_millis(400));
        tell.send(control.next(&limit).unwrap_err().to_string()).unwrap();
    });
    let bytes = header[1..].iter().chain(std::iter::repeat(&b'x')).take(3000);
    let error = bytes.map(|byte| {
        let _ = peer.send(&[*byte]);
        ended.recv_timeout(Duration::from_millis(5)).ok()
    });
    let error = error.flatten().next().expect("the wait ends");
    assert_eq!(error, "acceptance did not come within 400 ms");
    thread.join().unwrap();
}

/// A transport whose other end never reads: some bytes fit, then none do.
struct Full {
    inner: MemoryTransport,
    room: Mutex<usize>,
}

impl Transport for Full {
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        self.inner.receive(into)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut room = devices::lock(&self.room);
        let count = bytes.len().min(*room);
        *room -= count;
        match count {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            count => Ok(count),
        }
    }

    fn receive_pages(&self, pages: &[crate::transport::PageSlice<'_>]) -> io::Result<usize> {
        self.inner.receive_pages(pages)
    }

    fn send_pages(
        &self,
        head: &[u8],
        pages: &[crate::transport::PageSlice<'_>],
    ) -> io::Result<usize> {
        self.inner.send_pages(head, pages)
    }

    fn patience(&self) -> Duration {
        self.inner.patience()
    }

    fn shutdown(&self) {
        self.inner.shutdown();
    }
}

#[test]
fn a_peer_that_does_not_read_for_a_while_does_not_end_the_pulse() {
    let (ours, theirs) = MemoryLink::new(None).with_patience(PATIENCE).connect();
    // Half a keep-alive.
    let full = Arc::new(Full { inner: ours, room: Mutex::new(4) });
    let (control, _threads) = Control::start(full.clone(), CancelToken::new()).unwrap();
    let beating = Instant::now();
    while *devices::lock(&full.room) > 0 {
        assert!(beating.elapsed() < Duration::from_secs(20), "no pulse at all");
        say(&theirs, Kind::KeepAlive, &[]);
        std::thread::park_timeout(Duration::from_millis(20));
    }
    // For longer than anybody's patience; meanwhile the peer says that it lives.
    let full_since = Instant::now();
    while full_since.elapsed() < PATIENCE * 3 {
        say(&theirs, Kind::KeepAlive, &[]);
        std::thread::park_timeout(Duration::from_millis(50));
    }
    assert!(!control.is_lost());
    *devices::lock(&full.room) = 1 << 20;
    let again = Instant::now();
    while *devices::lock(&full.room) == 1 << 20 {
        assert!(again.elapsed() < KEEP_ALIVE * 20, "the pulse has ended");
        say(&theirs, Kind::KeepAlive, &[]);
        std::thread::park_timeout(Duration::from_millis(20));
    }
    // The keep-alive that was begun is finished, and another follows.
    let next = Instant::now();
    while *devices::lock(&full.room) > (1 << 20) - 8 {
        assert!(next.elapsed() < KEEP_ALIVE * 20, "the pulse has ended");
        say(&theirs, Kind::KeepAlive, &[]);
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// A transport that is in the middle of a write until the test lets it go on.
struct Slow {
    inner: MemoryTransport,
    writing: std::sync::mpsc::Sender<()>,
    go_on: Mutex<std::sync::mpsc::Receiver<()>>,
}

impl Transport for Slow {
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        self.inner.receive(into)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.writing.send(());
        // Fails once the test has seen enough.
        let _ = devices::lock(&self.go_on).recv();
        self.inner.send(bytes)
    }

    fn receive_pages(&self, pages: &[crate::transport::PageSlice<'_>]) -> io::Result<usize> {
        self.inner.receive_pages(pages)
    }

    fn send_pages(
        &self,
        head: &[u8],
        pages: &[crate::transport::PageSlice<'_>],
    ) -> io::Result<usize> {
        self.inner.send_pages(head, pages)
    }

    fn patience(&self) -> Duration {
        self.inner.patience()
    }

    fn shutdown(&self) {
        self.inner.shutdown();
    }
}

/// What the peer gets if `first` is in the middle of a write when another thread has a frame that must not be
/// held up.
fn a_frame_during_a_slow_write(
    first: impl FnOnce(Control) -> Result<(), WireError> + Send + 'static,
) {
    let (ours, theirs) = MemoryLink::new(None).connect();
    let (tell_writing, writing) = channel();
    let (let_go, go_on) = channel();
    let slow = Slow { inner: ours, writing: tell_writing, go_on: Mutex::new(go_on) };
    let (control, _threads) = Control::start(Arc::new(slow), CancelToken::new()).unwrap();
    let sending = control.clone();
    let sender = std::thread::spawn(move || first(sending));
    writing.recv().unwrap();
    let trying = control.clone();
    let (tell, tried) = channel();
    let trier = std::thread::spawn(move || tell.send(trying.try_send(Kind::CalledOff, &[])));
    let tried = tried.recv_timeout(Duration::from_secs(20));
    drop(let_go);
    tried.expect("it waits for the other").unwrap();
    trier.join().unwrap().unwrap();
    sender.join().unwrap().unwrap();
    // Whoever was writing has written both, before anything else is sent.
    assert!(control.0.outbox.is_empty(), "the second frame waits for the next one");
    // Both are whole, in the order of pushing.
    let (peer, _peer_threads) = Control::start(Arc::new(theirs), CancelToken::new()).unwrap();
    let limit = Limit::alive("a frame");
    assert_eq!(peer.expect(Kind::Eof, &limit).unwrap(), [1]);
    assert!(peer.expect(Kind::CalledOff, &limit).unwrap().is_empty());
}

#[test]
fn who_must_not_be_held_up_does_not_wait_for_a_slow_write() {
    a_frame_during_a_slow_write(|control| control.send(Kind::Eof, &[1]));
    a_frame_during_a_slow_write(|control| control.try_send(Kind::Eof, &[1]));
}

#[test]
fn life_here_keeps_a_data_connection_from_being_called_dead_for_a_while() {
    let (control, _threads, peer, cancel) = control(PATIENCE);
    let (data, data_there) = MemoryLink::new(None).with_patience(PATIENCE).connect();
    let channel = crate::transport::Channel::new(Arc::new(data), cancel)
        .with_liveness(control.liveness().clone());
    let began = Instant::now();
    let reader = std::thread::spawn(move || channel.read_exact(&mut [0]));
    while began.elapsed() < PATIENCE * 3 {
        say(&peer, Kind::KeepAlive, &[]);
        std::thread::park_timeout(Duration::from_millis(20));
    }
    crate::tests::write_all(&data_there, &[1]);
    reader.join().unwrap().expect("its storage had a hiccup, no more");
}

#[test]
fn marks_and_frames_come_in_their_own_order_and_a_stale_ready_is_passed_over() {
    let (control, _threads, peer, _) = control(PATIENCE);
    control.ignore_ready_up_to(2);
    for attempt in [1u32, 2] {
        say(&peer, Kind::Ready, Encoder::default().u32(attempt).bytes());
    }
    say(&peer, Kind::Mark, Encoder::default().u64(7).u16(1).bytes());
    assert_eq!(control.next_mark(&Limit::alive("a mark")).unwrap(), (7, 1));
    say(&peer, Kind::Ready, Encoder::default().u32(3).bytes());
    let error = control.next_mark(&Limit::alive("a mark")).unwrap_err();
    assert_eq!(error.to_string(), "unexpected Ready where the answer to a mark belongs");
}

#[test]
fn the_first_failure_is_the_cause_unless_it_is_a_broken_connection() {
    let lost = || WireError::Lost(io::ErrorKind::BrokenPipe.into());
    let own = || WireError::Malformed { what: "page frame", reason: "odd".into() };
    for (first, second) in [(lost(), own()), (own(), lost())] {
        let (control, _threads, _peer, _) = control(PATIENCE);
        control.fail(first.into());
        control.fail(second.into());
        let woken = control.next(&Limit::alive("anything")).unwrap_err();
        let cause = control.cause_of(woken.into()).to_string();
        assert_eq!(cause, "malformed page frame: odd");
    }
}

#[test]
fn a_wait_that_was_interrupted_explains_nothing() {
    let lost = || WireError::Lost(io::ErrorKind::BrokenPipe.into());
    for failures in [[lost(), WireError::Interrupted], [WireError::Interrupted, lost()]] {
        let (control, _threads, _peer, _) = control(PATIENCE);
        failures.into_iter().for_each(|failure| control.fail(failure.into()));
        let woken = control.next(&Limit::alive("anything")).unwrap_err();
        assert_eq!(control.own_cause(woken.into()).to_string(), "connection lost");
    }
}

#[test]
fn what_the_peer_says_explains_a_broken_connection() {
    let (control, _threads, peer, _) = control(PATIENCE);
    say(&peer, Kind::Refused, b"the disk is full");
    let lost = WireError::Lost(io::ErrorKind::BrokenPipe.into());
    let cause = control.cause_of(lost.on_data_channel(3).into()).to_string();
    assert_eq!(cause, "the destination refuses: the disk is full");
}

#[test]
fn a_peer_that_sends_more_than_is_looked_at_has_to_wait() {
    let (control, threads, peer, _) = control(PATIENCE);
    let sent = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counting = sent.clone();
    let section = vec![0; 1 << 20];
    let mut frame = Vec::new();
    wire::append_frame(&mut frame, Kind::Section, &section).unwrap();
    // Far more than may be kept; the memory link itself takes everything.
    crate::tests::write_all(&peer, &frame.repeat(64));
    let began = Instant::now();
    let mut received = 0;
    // Slowly, and for longer than a silence may last: the one that is slow is this side.
    while received < 64 {
        control.next(&Limit::alive("a section")).unwrap();
        received += 1;
        counting.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if began.elapsed() < PATIENCE * 2 {
            std::thread::park_timeout(Duration::from_millis(50));
        }
    }
    assert_eq!(sent.load(std::sync::atomic::Ordering::Relaxed), 64);
    drop(threads);
}

#[test]
fn a_peer_that_is_silent_while_the_inbox_is_full_is_not_alive_for_ever() {
    let patience = Duration::from_millis(100);
    let (control, _threads, peer, _) = control(patience);
    let mut frame = Vec::new();
    wire::append_frame(&mut frame, Kind::Section, &[0; 16]).unwrap();
    // More than may be kept, and then nothing.
    crate::tests::write_all(&peer, &frame.repeat(1000));
    let began = Instant::now();
    while !control.is_lost() {
        assert!(began.elapsed() < patience * 200, "a silent peer is taken for alive");
        std::thread::park_timeout(patience / 10);
    }
    assert!(began.elapsed() > patience * 3, "this side was the slow one: {:?}", began.elapsed());
}
