//! Moves a gigabyte between two processes over loopback TCP, without KVM, and prints how fast.
//!
//! ```text
//! cargo run --release -p migration --example loopback -- [MiB] [percent random] [unix] [prefault]
//! ```
//! The parent is the source, a child of the same program the destination, each with a mapping like a
//! virtual machine's: anonymous, private, advised to use huge pages.
//! With `prefault` the destination has a thread that makes its pages exist while they arrive.

use devices::ram::{GuestAddress, GuestRam, PageIndex, RamLayout};
use devices::state::DeviceRecord;
use migration::cancel::CancelToken;
use migration::destination::{Destination, DestinationHost, GoOn};
use migration::guest::{
    DirtySource, GuestControl, GuestError, IncomingRam, MachineDescription, PartTime, RunPermit,
    Stopped,
};
use migration::params::SharedParams;
use migration::participant::Incoming;
use migration::ram::incoming::RamIncoming;
use migration::ram::outgoing::RamOutgoing;
use migration::source::{AppliedThrottle, Source, SourceOutcome, SourceRam};
use migration::stats::Counters;
use migration::transport::{Address, Listener};
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

const HUGE_PAGE: usize = 2 << 20;

fn allocate(layout: &RamLayout) -> GuestRam {
    let ram = GuestRam::from_ranges(&layout.ranges()).expect("guest RAM is mapped");
    for (block, region) in layout.blocks().iter().zip(ram.iter()) {
        let len = usize::try_from(block.len_bytes()).expect("64-bit host");
        // SAFETY: the range is exactly one live mapping; the advice changes no content.
        unsafe { libc::madvise(region.get_mmap().as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
    }
    ram
}

struct Guest(Option<RunPermit>);

impl GuestControl for Guest {
    fn flush_ahead(&mut self, _: Instant) -> Result<PartTime, GuestError> {
        Ok(PartTime::new("flush", Duration::ZERO))
    }
    fn pause(&mut self, _: Instant) -> Result<Stopped, GuestError> {
        let permit = self.0.take().ok_or_else(|| GuestError::new("no permit"))?;
        Ok(Stopped { permit, was_running: true, drains: Vec::new() })
    }
    fn save_records(&mut self) -> Result<Vec<DeviceRecord>, GuestError> {
        Ok(Vec::new())
    }
    fn release_disks(&mut self, _: Instant) -> Result<PartTime, GuestError> {
        Ok(PartTime::new("flush", Duration::ZERO))
    }
    fn resume(&mut self, stopped: Stopped) -> Result<(), GuestError> {
        self.0 = Some(stopped.permit);
        Ok(())
    }
    fn surrendered(&mut self) {}
    fn throttle(&mut self, _: u8) -> Result<(), GuestError> {
        Ok(())
    }
}

/// Nothing writes.
struct Quiet;

impl DirtySource for Quiet {
    fn start(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn drain_into(&mut self, _: &mut [u64]) -> Result<(), GuestError> {
        Ok(())
    }
    fn clear(&mut self, _: PageIndex, _: &[u64]) -> Result<(), GuestError> {
        Ok(())
    }
    fn stop(&mut self) {}
}

struct Host {
    arrived: Option<IncomingRam>,
    prefault: bool,
}

/// Makes all pages of `ram` exist, from its start on.
fn prefault(ram: &GuestRam) {
    for region in ram.iter() {
        let len = usize::try_from(region.len()).expect("64-bit host");
        for start in (0..len).step_by(HUGE_PAGE) {
            let at = region.get_mmap().as_ptr().wrapping_add(start).cast();
            // SAFETY: a part of a live mapping, which `ram` holds; populating changes no content.
            unsafe { libc::madvise(at, HUGE_PAGE.min(len - start), libc::MADV_POPULATE_WRITE) };
        }
    }
}

impl DestinationHost for Host {
    fn build(
        &mut self,
        description: &MachineDescription,
        _go_on: GoOn<'_>,
    ) -> Result<Vec<Box<dyn Incoming>>, GuestError> {
        let layout = RamLayout::for_size(description.ram_bytes)
            .map_err(|error| GuestError::new(error.to_string()))?;
        let ram = IncomingRam { ram: allocate(&layout), layout };
        self.arrived = Some(ram.clone());
        if self.prefault {
            let ram = ram.ram.clone();
            std::thread::spawn(move || prefault(&ram));
        }
        Ok(vec![Box::new(RamIncoming::new(ram))])
    }
    fn load_records(&mut self, _: Vec<DeviceRecord>) -> Result<(), GuestError> {
        Ok(())
    }
    fn lock_disks(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn called_off(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn run(&mut self, _: RunPermit, _: bool) -> Result<(), GuestError> {
        Ok(())
    }
    fn abandon(&mut self) {}
}

/// A sum that tells two memories apart.
fn checksum(ram: &GuestRam, layout: &RamLayout) -> u64 {
    let mut page = [0u8; 4096];
    let mut sum = 0u64;
    for index in 0..layout.page_count() {
        let Some(address) = layout.address_of(PageIndex(index)) else { continue };
        ram.read_slice(&mut page, address).expect("RAM is readable");
        for word in page.as_chunks::<8>().0 {
            #[expect(clippy::host_endian_bytes, reason = "both ends are this program")]
            let word = u64::from_ne_bytes(*word);
            sum = sum.rotate_left(5).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(word);
        }
    }
    sum
}

fn receive(address: &str, prefault: bool) {
    let listener = Listener::bind(&address.parse().expect("an address")).expect("it can be bound");
    println!("{}", listener.local_address());
    let mut host = Host { arrived: None, prefault };
    Destination {
        host: &mut host,
        counters: Arc::new(Counters::new()),
        cancel: CancelToken::new(),
        give_up: CancelToken::new(),
        events: &mut |_| {},
    }
    .receive(&listener)
    .expect("the guest arrives");
    let ram = host.arrived.expect("there is a machine");
    println!("{}", checksum(&ram.ram, &ram.layout));
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [receiver, address, how @ ..] = args.as_slice()
        && receiver == "receive"
    {
        return receive(address, how == ["prefault"]);
    }
    let how = args.iter().any(|arg| arg == "prefault").then_some("prefault");
    let number = |index: usize, default| {
        args.get(index).map_or(default, |arg| arg.parse().unwrap_or(default))
    };
    let (size_mib, percent): (u64, u64) = (number(0, 1024), number(1, 75));
    let layout = RamLayout::for_size(size_mib << 20).expect("a size for RAM");
    let ram = allocate(&layout);
    let mut random = std::fs::File::open("/dev/urandom").expect("there is randomness");
    let mut block = vec![0u8; 2 << 20];
    random.read_exact(&mut block).expect("there is randomness");
    for start in (0..(size_mib << 20) * percent / 100).step_by(2 << 20) {
        block.rotate_left(8);
        ram.write_slice(&block, GuestAddress(start)).expect("it fits");
    }
    let at = if args.iter().any(|arg| arg == "unix") {
        format!("unix:{}", std::env::temp_dir().join("ferry-loopback").display())
    } else {
        "tcp:127.0.0.1:0".to_owned()
    };
    let sum = checksum(&ram, &layout);
    for _ in 0..5 {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["receive", &at])
            .args(how)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a child");
        let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        let address: Address = lines
            .next()
            .and_then(Result::ok)
            .and_then(|line| line.parse().ok())
            .expect("an address");
        let counters = Arc::new(Counters::new());
        let params = SharedParams::default();
        let source_ram =
            SourceRam { ram: ram.clone(), layout: layout.clone(), dirty: Box::new(Quiet) };
        let started = Instant::now();
        let outcome = Source {
            guest: &mut Guest(Some(RunPermit::cold_boot())),
            machine: &mut || {
                Ok(MachineDescription {
                    version: 1,
                    ram_bytes: size_mib << 20,
                    machine: serde_json::Value::Null.into(),
                })
            },
            participants: vec![Box::new(RamOutgoing::new(source_ram, params.get().channels()))],
            params,
            counters: counters.clone(),
            throttle: AppliedThrottle::default(),
            cancel: CancelToken::new(),
            give_up: CancelToken::new(),
            events: &mut |_| {},
        }
        .migrate(&address);
        let elapsed = started.elapsed();
        assert!(matches!(outcome, SourceOutcome::Completed), "{outcome:?}");
        let arrived = lines.next().and_then(Result::ok).and_then(|line| line.parse::<u64>().ok());
        assert_eq!(arrived, Some(sum), "the memory that arrived is another");
        child.wait().expect("the child ends");
        let stats = counters.snapshot();
        println!(
            "{size_mib} MiB, {percent} % random: {elapsed:.1?}, {:.2} GB/s of RAM, {:.2} GB/s sent, \
             setup {:.1?}, stopped {:.2?}",
            (size_mib << 20) as f64 / elapsed.as_secs_f64() / 1e9,
            stats.transferred_bytes as f64 / elapsed.as_secs_f64() / 1e9,
            stats.setup_time.unwrap_or_default(),
            stats.downtime.unwrap_or_default(),
        );
    }
}
