//! Figures of the RAM engine: several channels against two plain sockets, compression, processor time,
//! and the pieces that a page goes through.

use crate::figures::Figure;
use crate::moves::{How, XBZRLE, moved_well};
use crate::rows::Program;
use anyhow::{Context, Result, ensure};
use ferry_tests::ferry::{self, Guest};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

fn asleep(memory_mb: u64) -> Guest {
    Guest::new("work=dirty fill=random fill_pct=75 sleep=1", memory_mb)
}

/// GB of 4 GiB of RAM per second over one channel.
pub fn one_channel(program: Program) -> Result<f64> {
    gb_per_sec(program, 1)
}

fn gb_per_sec(program: Program, channels: u16) -> Result<f64> {
    let how = How { channels: Some(channels), ..How::fast(300) };
    let moved = moved_well(program, &asleep(4096), &how)?;
    Ok((4u64 << 30) as f64 / 1e6 / moved.ms())
}

/// The same over as many channels as are best.
pub fn best_channels(program: Program) -> Result<f64> {
    let rates: Vec<_> =
        [1, 2, 4].into_iter().map(|count| gb_per_sec(program, count)).collect::<Result<_>>()?;
    rates.into_iter().reduce(f64::max).context("some count")
}

/// The same, compared with what two plain sockets move between two buffers of that size, 75 % of which
/// have something in them.
pub fn against_sockets(program: Program) -> Result<f64> {
    match program {
        Program::Ferry => best_channels(program),
        // In GB of RAM as well: the rest is zero, and costs nothing.
        Program::Qemu | Program::Newer => Ok(two_sockets(3 << 30)? / 0.75),
    }
}

/// GB per second that two sockets of the loopback move from one buffer to another, `bytes` in all.
fn two_sockets(bytes: usize) -> Result<f64> {
    let half = bytes / 2;
    let mut threads = Vec::new();
    let mut senders = Vec::new();
    let mut random = [0; 4096];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    for _ in 0..2 {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        senders.push((TcpStream::connect(listener.local_addr()?)?, random.repeat(half / 4096)));
        let mut socket = listener.accept()?.0;
        // Touched, as a destination's memory is before the first page comes.
        let mut into = vec![1u8; half];
        threads.push(std::thread::spawn(move || socket.read_exact(&mut into)));
    }
    let began = Instant::now();
    for (mut socket, buffer) in senders {
        threads.push(std::thread::spawn(move || socket.write_all(&buffer)));
    }
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    Ok(bytes as f64 / began.elapsed().as_secs_f64() / 1e9)
}

/// Seconds of processor time per GiB of RAM, both sides together.
pub fn processor_time(program: Program) -> Result<f64> {
    Ok(moved_well(program, &asleep(4096), &How::fast(300))?.processor_seconds / 4.0)
}

pub const GIGABIT: u64 = 125_000_000;

/// Seconds that 1 GiB full of text takes over a link of 1 Gb/s with zlib at level 1.
pub fn zlib(program: Program) -> Result<f64> {
    let guest = Guest::new("work=dirty fill=text fill_pct=100 sleep=1", 1024);
    let how = How {
        channels: Some(2),
        compression: Some("zlib"),
        max_bandwidth: GIGABIT,
        ..How::fast(300)
    };
    Ok(moved_well(program, &guest, &how)?.ms() / 1e3)
}

/// Seconds until a guest that dirties 500 MB/s of 256 MiB, a twentieth of each page, has moved over
/// a link of 1 Gb/s with XBZRLE.
pub fn xbzrle(program: Program) -> Result<Figure> {
    let work = "work=dirty fill=random fill_pct=75 ws_mb=256 rate_mbps=500 change_pct=5";
    let how = How { max_bandwidth: GIGABIT, capabilities: &[XBZRLE], ..How::fast(300) };
    Ok(crate::moves::moved(program, &Guest::new(work, 1024), &how)?.seconds())
}

/// GB per second that XBZRLE encodes with the best vectors at hand, a twentieth of the bytes changed, here
/// and there.
pub fn xbzrle_encode(program: Program) -> Result<f64> {
    ensure!(program == Program::Ferry, "there is nothing to compare with");
    number(&codec("xbzrle")?, "5 % scattered bytes", "encode ")
}

/// GB per second that are found to be zero; on the other side, a plain vector sum.
pub fn zero_scan(program: Program) -> Result<f64> {
    let line = if program == Program::Ferry { "zero test" } else { "vector sum" };
    number(&codec("zero")?, "zero pages", line)
}

/// What the example `codec` says of one of its parts.
fn codec(part: &str) -> Result<String> {
    example("codec", &["256", part])
}

/// What an example says.
pub fn example(name: &str, arguments: &[&str]) -> Result<String> {
    let binary = ferry::binary();
    let folder = binary.parent().unwrap_or(Path::new("."));
    let output = Command::new(folder.join("examples").join(name)).args(arguments).output();
    let output = output.with_context(|| {
        format!("cannot start the example {name}: is it built? `make bench` does")
    })?;
    ensure!(output.status.success(), "the example {name} has failed");
    Ok(String::from_utf8(output.stdout)?)
}

/// The number that follows `name` on the first line with it after the line `heading`.
fn number(text: &str, heading: &str, name: &str) -> Result<f64> {
    let mut lines = text.lines().skip_while(|line| *line != heading);
    let line = lines.find_map(|line| line.trim().strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().find_map(|word| word.parse().ok()));
    number.with_context(|| format!("no {name:?} after {heading:?} in {text:?}"))
}
