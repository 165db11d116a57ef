//! What a page costs besides the codecs that it goes through, on one core: looking it up in the XBZRLE cache,
//! a cache that outgrows its memory, applying deltas to guest RAM, asking the bandwidth cap.
//!
//! ```text
//! cargo run --release -p migration --example pages -- [encode] [look-up] [grow] [apply] [cap]
//! ```
//! Time is this thread's processor time; the best of some passes.

use devices::ram::{GuestAddress, GuestRam, PageIndex, RamLayout};
use migration::cancel::CancelToken;
use migration::guest::IncomingRam;
use migration::pace::Cap;
use migration::params::SharedParams;
use migration::ram::cache::PageCache;
use migration::ram::encode::{Encoding, Wanted};
use migration::ram::frame::{Batch, Packing, RunKind};
use migration::ram::page::Page;
use migration::ram::page_receiver::PageReceiver;
use migration::ram::xbzrle::{Encoded, Encoder};
use migration::stats::Counters;
use migration::transport::{Channel, PATIENCE, PageSlice, Throttle, Transport};
use migration::wire::section::RamSetup;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm_memory::Bytes;

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;
const PASSES: usize = 7;

fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec to be filled in.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn took(work: impl FnOnce()) -> Duration {
    let start = thread_time();
    work();
    thread_time().saturating_sub(start)
}

/// Nanoseconds that one of `count` takes, in the best of some passes.
fn nanos(count: usize, mut pass: impl FnMut(usize)) -> f64 {
    let best = (0..PASSES).map(|number| took(|| pass(number))).min();
    best.unwrap_or_default().as_nanos() as f64 / count as f64
}

fn small(number: usize) -> u8 {
    u8::try_from(number % 256).unwrap_or(0)
}

/// One round over `pages`, each of which has changed in one place.
fn round(encoding: &mut Encoding, pages: usize, stride: usize, number: usize) {
    let mut page: Page = std::array::from_fn(small);
    page[1000] = small(number);
    for index in 0..pages {
        *encoding.next_page() = page;
        let index = PageIndex((index * stride) as u64);
        encoding.take(index, true, false).expect("a page was copied");
        if encoding.is_full() {
            encoding.clear();
        }
    }
    encoding.clear();
    encoding.end_round();
}

fn encoding(cache_bytes: usize) -> Encoding {
    let mut encoding = Encoding::default();
    let wanted = Wanted { cache_bytes: Some(cache_bytes), method: None };
    encoding.want(wanted).expect("there is randomness");
    encoding
}

fn encode() {
    for (name, mib, stride) in
        [("copies", 32, 1), ("copies, every 8th page", 32, 8), ("copies and digests", 256, 1)]
    {
        let pages = mib * MIB / PAGE;
        let mut encoding = encoding(64 * MIB);
        (0..3).for_each(|number| round(&mut encoding, pages, stride, number + 100));
        let each = nanos(pages, |number| round(&mut encoding, pages, stride, number));
        println!("encode, known by {name:22}  {each:7.1} ns a page");
    }
}

/// Look-ups alone, hit and miss.
fn look_up() {
    for mib in [64, 256] {
        let pages = mib * MIB / PAGE;
        let mut cache = PageCache::new(mib * MIB);
        (0..pages).for_each(|page| {
            cache.insert(PageIndex(page as u64), &[0; PAGE]);
        });
        let hit = nanos(pages, |_| {
            assert!((0..pages).all(|page| cache.lookup(PageIndex(page as u64)).is_some()));
        });
        let miss = nanos(pages, |_| {
            let others = pages..2 * pages;
            assert!(others.into_iter().all(|page| cache.lookup(PageIndex(page as u64)).is_none()));
        });
        println!("look up in {mib:4} MiB  {hit:7.1} ns a hit, {miss:.1} ns a miss");
    }
}

/// The first rounds over a working set larger than the cache.
fn grow() {
    for cache in [64, 512] {
        let pages = 5 * cache * MIB / PAGE;
        let best = (0..3).map(|_| {
            let mut encoding = encoding(cache * MIB);
            took(|| (0..2).for_each(|number| round(&mut encoding, pages, 1, number)))
        });
        let best = best.min().unwrap_or_default();
        println!("grow, {cache:4} MiB of cache for five times as much  {best:.1?}");
    }
}

/// Bytes that arrive again and again.
struct Replay(Vec<u8>, Mutex<usize>);

impl Transport for Replay {
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut at = self.1.lock().expect("one thread");
        let count = into.len().min(self.0.len() - *at);
        into[..count].copy_from_slice(&self.0[*at..*at + count]);
        *at = (*at + count) % self.0.len();
        Ok(count)
    }
    fn send(&self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn receive_pages(&self, _: &[PageSlice<'_>]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn send_pages(&self, _: &[u8], _: &[PageSlice<'_>]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn patience(&self) -> Duration {
        PATIENCE
    }
    fn shutdown(&self) {}
}

/// Pages in a frame.
const FRAME: usize = 128;

fn apply() {
    let bytes = 64 * MIB;
    let layout = RamLayout::for_size(bytes as u64).expect("a size for RAM");
    for (name, runs, len) in [("one u64", 1, 8), ("26 of them", 26, 8), ("205 bytes", 205, 1)] {
        let ram = GuestRam::from_ranges(&layout.ranges()).expect("guest RAM is mapped");
        let (old, mut new): (Page, Page) = ([1; PAGE], [1; PAGE]);
        (0..runs).for_each(|run| new[run * (PAGE / runs)..][..len].fill(2));
        let mut delta = [0; PAGE];
        let Encoded::Bytes(len) = Encoder::default().encode(&old, &new, &mut delta) else {
            panic!("a delta is shorter than a page");
        };
        let mut stream = Vec::new();
        let mut zeroes = Batch::default();
        let mut head = migration::wire::Encoder::default();
        let pages = u32::try_from(bytes / PAGE).expect("a small guest");
        zeroes.push(PageIndex(0), pages, RunKind::Zero, &layout);
        zeroes.encode_head(Packing::None, &mut head).expect("one run");
        let known = head.bytes().to_vec();
        for first in (0..bytes / PAGE).step_by(FRAME) {
            let mut batch = Batch::default();
            // Not adjacent in the table, as pages of a busy guest are not.
            for page in first..first + FRAME {
                batch.push(PageIndex(page as u64), 1, RunKind::Delta, &layout);
            }
            batch.encode_head(Packing::None, &mut head).expect("a frame");
            let part = u32::try_from(FRAME * (2 + len)).expect("a frame is small");
            head.u32(part);
            for _ in 0..FRAME {
                head.u16(u16::try_from(len).expect("less than a page")).raw(&delta[..len]);
            }
            stream.extend_from_slice(head.bytes());
        }
        (0..bytes).step_by(PAGE).for_each(|at| {
            ram.write_slice(&old, GuestAddress(at as u64)).expect("it fits");
        });
        let ram = IncomingRam { ram, layout: layout.clone() };
        let setup =
            RamSetup { page_count: layout.page_count(), page_bytes: 4096, data_channels: 1 };
        let counters = Arc::new(Counters::new());
        let mut receiver = PageReceiver::start(ram, setup, counters).expect("sizes agree");
        let channel =
            |bytes| Channel::new(Arc::new(Replay(bytes, Mutex::default())), CancelToken::new());
        receiver.receive(&channel(known)).expect("a frame of zero pages");
        let channel = channel(stream);
        let each = nanos(bytes / PAGE, |_| {
            for _ in 0..bytes / PAGE / FRAME {
                receiver.receive(&channel).expect("our own frame");
            }
        });
        println!("apply, {name:10} changed in a page  {each:7.1} ns a page");
    }
}

fn cap() {
    const SENDS: usize = 1 << 20;
    let mut cap = Cap::new(SharedParams::default(), CancelToken::new());
    let each = nanos(SENDS, |_| {
        for _ in 0..SENDS {
            let bytes = cap.allow(MIB).expect("nobody cancels");
            cap.sent(bytes);
        }
    });
    println!("cap, none set  {each:7.1} ns a send");
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let parts: [(&str, fn()); 5] =
        [("encode", encode), ("look-up", look_up), ("grow", grow), ("apply", apply), ("cap", cap)];
    for (name, part) in parts {
        if args.is_empty() || args.iter().any(|arg| arg == name) {
            part();
        }
    }
}
