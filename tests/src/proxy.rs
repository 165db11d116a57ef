//! A link that counts, can be cut and can be made slow: forwards every connection to a destination and
//! notes when how many bytes came.

use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

type Arrivals = Arc<Mutex<Vec<(Instant, usize)>>>;
/// Both ends of each, in the order in which they came.
type Connections = Arc<Mutex<Vec<[TcpStream; 2]>>>;

/// How fast a connection forwards, in either direction.
#[derive(Default)]
struct Speed {
    /// Bytes per second: none for as fast as can be, 0 for nothing at all.
    limit: Mutex<Option<u64>>,
    changed: Condvar,
}

impl Speed {
    /// Returns when `count` bytes may pass that came just now.
    fn wait(&self, count: usize) {
        let came = Instant::now();
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let waited = match *limit {
                None => return,
                Some(0) => self.changed.wait(limit).unwrap_or_else(PoisonError::into_inner),
                Some(bytes_per_sec) => {
                    let due = came + Duration::from_secs_f64(count as f64 / bytes_per_sec as f64);
                    let left = due.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return;
                    }
                    let waited = self.changed.wait_timeout(limit, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            limit = waited;
        }
    }
}

/// A running proxy. Its threads end with the connections; the one that accepts, with the process.
pub struct Proxy {
    address: String,
    arrivals: Arrivals,
    connections: Connections,
    /// Ends are torn off, not closed.
    torn: Arc<AtomicBool>,
    speed: Arc<Speed>,
}

/// Starts one in front of `destination`, a `tcp:` address.
pub fn start(destination: &str) -> Result<Proxy> {
    let to = destination.strip_prefix("tcp:").context("not a tcp: address")?.to_owned();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("tcp:{}", listener.local_addr()?);
    let arrivals = Arrivals::default();
    let connections = Connections::default();
    let torn = Arc::<AtomicBool>::default();
    let (noted, kept, tears) = (arrivals.clone(), connections.clone(), torn.clone());
    let speed = Arc::<Speed>::default();
    let held = speed.clone();
    std::thread::spawn(move || {
        for from in listener.incoming() {
            let (Ok(from), Ok(to)) = (from, TcpStream::connect(&to)) else { return };
            let (Ok(back_from), Ok(back_to)) = (to.try_clone(), from.try_clone()) else { return };
            let (Ok(end), Ok(other)) = (from.try_clone(), to.try_clone()) else { return };
            kept.lock().unwrap_or_else(PoisonError::into_inner).push([end, other]);
            let (noted, tears, again) = (noted.clone(), tears.clone(), tears.clone());
            let (speed, back) = (held.clone(), held.clone());
            std::thread::spawn(move || forward(from, to, Some(&noted), &tears, &speed));
            std::thread::spawn(move || forward(back_from, back_to, None, &again, &back));
        }
    });
    Ok(Proxy { address, arrivals, connections, torn, speed })
}

fn forward(
    mut from: TcpStream,
    mut to: TcpStream,
    noted: Option<&Arrivals>,
    torn: &AtomicBool,
    speed: &Speed,
) {
    // Without it a small frame waits for the acknowledgement of the one before.
    let _ = to.set_nodelay(true);
    let mut buffer = vec![0; 128 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if let Some(noted) = noted {
            let arrival = (Instant::now(), count);
            noted.lock().unwrap_or_else(PoisonError::into_inner).push(arrival);
        }
        speed.wait(count);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    if torn.load(Ordering::SeqCst) {
        return;
    }
    // The other side has to notice; it may have gone already.
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

impl Proxy {
    /// How many connections there were.
    pub fn connections(&self) -> usize {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// From now on each connection forwards so many bytes per second in each direction: 0 is a link that
    /// takes no packet any more and tells nobody, none is as fast as can be.
    pub fn limit(&self, bytes_per_sec: Option<u64>) {
        *self.speed.limit.lock().unwrap_or_else(PoisonError::into_inner) = bytes_per_sec;
        self.speed.changed.notify_all();
    }

    /// Cuts connections, counted in the order in which they came.
    pub fn cut(&self, which: impl Fn(usize) -> bool) {
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let cut = connections.iter().enumerate().filter(|(index, _)| which(*index));
        for end in cut.flat_map(|(_, ends)| ends) {
            // It may have ended already.
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Resets all connections, as a router does that has forgotten them. No more can be made.
    pub fn reset(&self) {
        self.torn.store(true, Ordering::SeqCst);
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        for end in std::mem::take(&mut *connections).iter().flatten() {
            // Closing the last descriptor sends the reset: linger is 0.
            let _ = socket2::SockRef::from(end).set_linger(Some(Duration::ZERO));
            // Wakes the reading thread without notifying the peer.
            let _ = end.shutdown(Shutdown::Read);
        }
    }

    /// Where to migrate to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Bytes that came from the source in each `interval`, from the first that came on.
    pub fn bytes_per(&self, interval: Duration) -> Vec<u64> {
        let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bins = Vec::new();
        let Some((first, _)) = arrivals.first() else { return bins };
        for (at, bytes) in arrivals.iter() {
            let bin = at.duration_since(*first).as_nanos() / interval.as_nanos();
            let bin = usize::try_from(bin).unwrap_or(usize::MAX);
            bins.resize(bins.len().max(bin + 1), 0);
            bins[bin] += *bytes as u64;
        }
        bins
    }
}
