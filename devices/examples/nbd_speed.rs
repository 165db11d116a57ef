//! Copies a file to an NBD export, as a mirror does, and says how fast: N threads, each with one write of 1 MiB
//! (or of KIB) in flight, then a flush.
//!
//! ```text
//! cargo run --release -p devices --example nbd_speed -- FILE ADDRESS [THREADS [CONNECTIONS [KIB]]]
//! ```
//! To be compared with `qemu-img convert -n -W -m 16 -f raw -O raw FILE ADDRESS` and the same server, in turns.

use devices::block::backend::BlockBackend;
use devices::block::nbd::address::NbdAddress;
use devices::block::nbd::client::{NbdClient, NbdOptions};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Time of a copy without and with the flush after it.
fn copy(
    file: &File,
    client: &NbdClient,
    threads: usize,
    piece_bytes: usize,
) -> (Duration, Duration) {
    let (began, next) = (Instant::now(), &AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(move || {
                let mut buffer = vec![0; piece_bytes];
                loop {
                    let at = next.fetch_add(piece_bytes as u64, Ordering::Relaxed);
                    let len = client.len_bytes().saturating_sub(at).min(piece_bytes as u64);
                    if len == 0 {
                        return;
                    }
                    let piece = &mut buffer[..usize::try_from(len).expect("a piece at most")];
                    file.read_exact_at(piece, at).expect("the file is as large as the export");
                    client.write_at(piece, at).expect("the server takes it");
                }
            });
        }
    });
    let written = began.elapsed();
    client.flush().expect("the server can flush");
    (written, began.elapsed())
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [path, address, numbers @ ..] = &words[..] else {
        eprintln!("usage: nbd_speed FILE ADDRESS [THREADS [CONNECTIONS [KIB]]]");
        std::process::exit(2);
    };
    let number = |at: usize, default| {
        numbers.get(at).map_or(default, |word: &String| word.parse().expect("a number"))
    };
    let (threads, connections, kib) = (number(0, 16), number(1, 0), number(2, 1024));
    // As many as pay, if it is 0.
    let max_connections = Some(connections).filter(|count| *count > 0);
    let file = File::open(path).expect("the file can be read");
    let address: NbdAddress = address.parse().unwrap_or_else(|error| panic!("{error}"));
    let options = NbdOptions { max_connections, ..NbdOptions::default() };
    let client = NbdClient::open(&address, options).expect("the server answers");
    let (written, flushed) = copy(&file, &client, threads, kib << 10);
    let rate = |time: Duration| client.len_bytes() as f64 / time.as_secs_f64() / 1e6;
    println!(
        "{threads} threads, {} connections: {:.0} MB/s, with flush {:.0} MB/s",
        client.connection_count(),
        rate(written),
        rate(flushed)
    );
}
