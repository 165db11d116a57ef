//! How fast the pieces are that a page goes through, on one core: XBZRLE, the zero test, compression.
//!
//! ```text
//! cargo run --release -p migration --example codec -- [MiB] [xbzrle] [zero] [compress]
//! ```
//! The working set is larger than the processor's caches, so that memory is part of what is measured;
//! the plain vector sum and the plain comparison say what memory allows. Time is this thread's
//! processor time, so that neighbours take as little part in it as possible; the best of some passes.

use devices::ram::{GuestRam, RamLayout};
use migration::ram::compress::{Compressor, Decompressor, Method};
use migration::ram::page::Page;
use migration::ram::simd::Kernel;
use migration::ram::xbzrle::{self, Encoded, Encoder};
use migration::ram::zero::is_zero;
use std::time::Duration;
use vm_memory::{GuestMemoryBackend, VolatileMemory};

const PAGE: usize = 4096;
const PASSES: usize = 5;

fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec to be filled in.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The best rate of some passes over `bytes` bytes, in GB/s.
fn rate(bytes: usize, mut pass: impl FnMut()) -> f64 {
    let best = (0..PASSES)
        .map(|_| {
            let start = thread_time();
            pass();
            thread_time().saturating_sub(start)
        })
        .min();
    bytes as f64 / best.unwrap_or_default().as_secs_f64() / 1e9
}

/// Numbers that look random; the same ones every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> usize {
        usize::try_from((self.next() >> 11) % end).unwrap_or(0)
    }

    fn fill(&mut self, memory: &mut [u8]) {
        for byte in memory.chunks_mut(8) {
            #[expect(clippy::host_endian_bytes, reason = "never leaves this program")]
            byte.copy_from_slice(&self.next().to_ne_bytes()[..byte.len()]);
        }
    }
}

/// Memory like a guest's: page aligned, huge pages if the system gives any.
struct Memory {
    at: *mut u8,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> Self {
        // SAFETY: an anonymous mapping of its own, at an address of the system's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert!(at != libc::MAP_FAILED, "no memory");
        // SAFETY: exactly the mapping made above; the advice changes no content.
        unsafe { libc::madvise(at, len, libc::MADV_HUGEPAGE) };
        Self { at: at.cast(), len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `len` bytes of zeroed memory, borrowed as `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

/// What a guest does to a page in which about one byte of twenty changes.
#[derive(Clone, Copy)]
enum Pattern {
    Scattered,
    Words,
    Clusters,
    OneCluster,
    Unchanged,
    Rewritten,
}

impl Pattern {
    const ALL: [(Self, &str); 6] = [
        (Self::Scattered, "5 % scattered bytes"),
        (Self::Words, "5 % scattered u64"),
        (Self::Clusters, "5 % in clusters of 16-128"),
        (Self::OneCluster, "5 % in one cluster"),
        (Self::Unchanged, "unchanged"),
        (Self::Rewritten, "wholly changed"),
    ];

    fn apply(self, page: &mut [u8], random: &mut Random) {
        match self {
            Self::Scattered => {
                for _ in 0..205 {
                    let at = random.below(4096);
                    page[at] = page[at].wrapping_add(1 << random.below(8));
                }
            }
            Self::Words => {
                for _ in 0..26 {
                    let at = 8 * random.below(512);
                    random.fill(&mut page[at..at + 8]);
                }
            }
            Self::Clusters => {
                let mut left = 205;
                while left > 0 {
                    let len = (16 + random.below(113)).min(left);
                    let at = random.below((4096 - len) as u64);
                    random.fill(&mut page[at..at + len]);
                    left -= len;
                }
            }
            Self::OneCluster => {
                let at = random.below(4096 - 205);
                random.fill(&mut page[at..at + 205]);
            }
            Self::Unchanged => {}
            Self::Rewritten => random.fill(page),
        }
    }
}

fn pages(memory: &[u8]) -> &[Page] {
    memory.as_chunks::<PAGE>().0
}

fn compare(len: usize) {
    let (mut old, mut new) = (Memory::new(len), Memory::new(len));
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    random.fill(old.bytes());
    let mut deltas = vec![0u8; len + PAGE];
    deltas.fill(1);
    for (pattern, name) in Pattern::ALL {
        new.bytes().copy_from_slice(old.bytes());
        for page in new.bytes().chunks_mut(PAGE) {
            pattern.apply(page, &mut random);
        }
        let (old, new) = (old.bytes(), new.bytes());
        println!("{name}");
        let plain = rate(len, || assert_eq!(old == new, matches!(pattern, Pattern::Unchanged)));
        if matches!(pattern, Pattern::Unchanged) {
            println!("  plain comparison      {plain:6.2} GB/s");
        }
        for kernel in Kernel::all() {
            let mut encoder = Encoder::new(kernel);
            let mut lens = vec![0; len / PAGE];
            let encode = rate(len, || {
                let mut into = [0; PAGE];
                for (index, (old, new)) in pages(old).iter().zip(pages(new)).enumerate() {
                    lens[index] = match encoder.encode(old, new, &mut into) {
                        Encoded::Bytes(len) => len,
                        Encoded::Unchanged | Encoded::Overflow => 0,
                    };
                }
            });
            let warm = rate(len, || {
                let mut into = [0; PAGE];
                let sixteen = pages(old).iter().zip(pages(new)).take(16);
                for (old, new) in sixteen.cycle().take(len / PAGE) {
                    std::hint::black_box(encoder.encode(old, new, &mut into));
                }
            });
            println!(
                "  encode {:9}      {encode:6.2} GB/s, {warm:6.2} in cache, {:5.0} bytes a page",
                kernel.name(),
                lens.iter().sum::<usize>() as f64 / lens.len() as f64,
            );
        }
        let (mut encoder, mut at, mut ends) = (Encoder::default(), 0, Vec::new());
        for (old, new) in pages(old).iter().zip(pages(new)) {
            if let Encoded::Bytes(len) = encoder.encode(old, new, &mut deltas[at..at + PAGE]) {
                at += len;
            }
            ends.push(at);
        }
        if at > 0 {
            let decode = rate(len, || {
                let mut start = 0;
                for (page, end) in new.as_chunks_mut::<PAGE>().0.iter_mut().zip(&ends) {
                    if *end > start {
                        xbzrle::decode(&deltas[start..*end], page).expect("our own delta");
                    }
                    start = *end;
                }
            });
            println!("  decode                {decode:6.2} GB/s");
        }
    }
}

/// What memory allows: every word is read, and enters a sum.
fn sum(memory: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn wide(memory: &[u8]) -> u64 {
        narrow(memory)
    }
    #[inline(always)]
    fn narrow(memory: &[u8]) -> u64 {
        // Sums of their own, or each addition waits for the one before.
        let mut sums = [0u64; 64];
        for block in memory.as_chunks::<512>().0 {
            for (sum, word) in sums.iter_mut().zip(block.as_chunks::<8>().0) {
                #[expect(clippy::host_endian_bytes, reason = "never leaves this program")]
                let word = u64::from_ne_bytes(*word);
                *sum = sum.wrapping_add(word);
            }
        }
        sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
    }
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has the instructions.
        return unsafe { wide(memory) };
    }
    narrow(memory)
}

fn zeroes(len: usize) {
    let layout = RamLayout::for_size(len as u64).expect("a size for RAM");
    let ram = GuestRam::from_ranges(&layout.ranges()).expect("guest RAM is mapped");
    let region = ram.iter().next().expect("there is memory").get_mmap();
    let len = region.size();
    // SAFETY: exactly one live mapping; the advice changes no content.
    unsafe { libc::madvise(region.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
    // SAFETY: the mapping is anonymous memory, and nobody writes it while it is borrowed here.
    let bytes = unsafe { std::slice::from_raw_parts_mut(region.as_ptr(), len) };
    // Untouched memory would be one zero page again and again.
    bytes.fill(1);
    bytes.fill(0);
    let plain = rate(len, || assert_eq!(sum(bytes), 0));
    let scan = rate(len, || {
        for at in (0..len).step_by(PAGE) {
            let page = region.get_slice(at, PAGE).expect("a page of it");
            assert!(is_zero(&page));
        }
    });
    println!("zero pages\n  vector sum            {plain:6.2} GB/s");
    println!("  zero test             {scan:6.2} GB/s, {:.2} of it", scan / plain);
}

/// Something like log files: lines that resemble each other, with numbers that differ.
fn text(memory: &mut [u8], random: &mut Random) {
    const WORDS: [&str; 16] = [
        "request",
        "served",
        "from",
        "cache",
        "in",
        "connection",
        "closed",
        "by",
        "peer",
        "retry",
        "after",
        "page",
        "fault",
        "at",
        "warning:",
        "timeout",
    ];
    let (mut at, mut line) = (0, 0);
    while at < memory.len() {
        line += 1;
        let mut text = format!("[{:5}.{:06}] ", line / 50, random.below(1_000_000));
        for _ in 0..4 + random.below(8) {
            text.push_str(WORDS[random.below(16)]);
            text.push(' ');
        }
        text.push_str(&format!("{:x}\n", random.below(1 << 24)));
        let len = text.len().min(memory.len() - at);
        memory[at..at + len].copy_from_slice(&text.as_bytes()[..len]);
        at += len;
    }
}

/// Pages in a run that is compressed as a whole.
const RUN_PAGES: usize = 64;

fn compress(len: usize) {
    let mut memory = Memory::new(len);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for kind in ["text", "half text, half random", "random"] {
        match kind {
            "text" => text(memory.bytes(), &mut random),
            "random" => random.fill(memory.bytes()),
            _ => memory.bytes().chunks_mut(8 * PAGE).step_by(2).for_each(|run| random.fill(run)),
        }
        let memory = memory.bytes();
        println!("runs of {RUN_PAGES} pages, {kind}");
        for (name, method) in [
            ("zlib:1", Method::Zlib { level: 1 }),
            ("zlib:6", Method::Zlib { level: 6 }),
            ("zstd:1", Method::Zstd { level: 1 }),
            ("zstd:3", Method::Zstd { level: 3 }),
        ] {
            let mut compressor = Compressor::new(method).expect("a level that there is");
            let mut decompressor = Decompressor::new(method).expect("a level that there is");
            let (mut sent, mut ends) = (Vec::with_capacity(len), Vec::new());
            let pack = rate(len, || {
                sent.clear();
                ends.clear();
                for run in memory.chunks(RUN_PAGES * PAGE) {
                    compressor.compress(run, &mut sent);
                    ends.push(sent.len());
                }
            });
            let raw = std::iter::once(&0).chain(&ends).zip(&ends).filter(|(a, b)| a == b).count();
            let size = sent.len() + raw * RUN_PAGES * PAGE;
            let mut back = vec![0; RUN_PAGES * PAGE];
            let unpack = rate(len, || {
                let mut start = 0;
                for end in ends.iter().filter(|end| **end > 0) {
                    if *end > start {
                        let run = &sent[start..*end];
                        decompressor.decompress(run, &mut back).expect("our own run");
                    }
                    start = *end;
                }
            });
            print!("  {name}  {pack:6.2} GB/s, to {:5.1} %", size as f64 * 100. / len as f64);
            if sent.is_empty() { println!() } else { println!(", back {unpack:5.2} GB/s") }
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mib = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(256usize);
    let len = mib << 20;
    let parts: [(&str, &dyn Fn()); 3] = [
        ("xbzrle", &|| compare(len)),
        ("zero", &|| zeroes(len)),
        ("compress", &|| compress(len.min(64 << 20))),
    ];
    let named = |name: &str| args.iter().any(|arg| arg == name);
    let all = !parts.iter().any(|(name, _)| named(name));
    for (name, part) in parts {
        if all || named(name) {
            part();
        }
    }
}
