//! Figures of disks that are mirrored: to a file, and to `qemu-nbd`; what the guest's writes take meanwhile, and what an
//! idle mirror costs.

use crate::alone::run;
use crate::disks::random_gib;
use crate::memory;
use crate::rows::Program;
use anyhow::{Context, Result, bail, ensure};
use ferry_tests::disk;
use ferry_tests::ferry::Guest;
use ferry_tests::image::compare;
use ferry_tests::process::{Process, SOON, Vmm};
use ferry_tests::qmp::Qmp;
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const GIB: u64 = 1 << 30;
const MEMORY_MB: u64 = 128;

/// Where the copy goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum To {
    /// A raw file, with this `cache`.
    File(&'static str),
    /// `qemu-nbd` on a raw file, over a Unix socket.
    Unix,
    /// The same over TCP.
    Tcp,
}

/// A `qemu-nbd` on `image`, and its address.
fn serve(to: To, folder: &Path, image: &Path) -> Result<(Process, String)> {
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--shared=16", "--format=raw", "--export-name=x"]);
    command.args(["--cache=writeback", "--discard=unmap"]);
    let socket = folder.join("nbd.sock");
    let port = 20_000 + std::process::id() % 20_000;
    let address = match to {
        To::Tcp => {
            command.args(["--bind=127.0.0.1", "--port", &port.to_string()]);
            format!("nbd:127.0.0.1:{port}:exportname=x")
        }
        _ => {
            command.arg("--socket").arg(&socket);
            format!("nbd:unix:{}:exportname=x", socket.display())
        }
    };
    let process = Process::start(command.arg(image))?;
    let deadline = Instant::now() + SOON;
    let listens = || match to {
        To::Tcp => {
            let port = u16::try_from(port).unwrap_or(0);
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        }
        _ => std::os::unix::net::UnixStream::connect(&socket).is_ok(),
    };
    while !listens() {
        if Instant::now() > deadline {
            bail!("qemu-nbd does not listen: {}", process.err.tail());
        }
        std::thread::yield_now();
    }
    Ok((process, address))
}

/// Starts a mirror of the disk to a target that exists.
pub fn mirror(qmp: &mut Qmp, target: &str, more: Value) -> Result<()> {
    let mut arguments = json!({
        "device": "disk", "job-id": "m", "target": target, "format": "raw", "sync": "full",
        "mode": "existing",
    });
    if let (Some(all), Some(more)) = (arguments.as_object_mut(), more.as_object()) {
        all.extend(more.clone());
    }
    qmp.execute("drive-mirror", arguments).map(drop)
}

/// Waits until the mirror is ready.
pub fn ready(qmp: &mut Qmp) -> Result<()> {
    let ends = ["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"];
    let event = qmp.wait_event_where(Duration::from_secs(120), |event| {
        event["event"].as_str().is_some_and(|name| ends.contains(&name))
    })?;
    match event["event"] == "BLOCK_JOB_READY" {
        true => Ok(()),
        false => bail!("the mirror has ended: {event}"),
    }
}

/// A guest with the image as its disk.
pub fn guest(program: Program, work: &str, image: &Path, cache: &str) -> Result<Vmm> {
    let mut guest = Guest::new(work, MEMORY_MB).disk("disk", image);
    guest.disks[0].push_str(&format!(",cache={cache}"));
    run(program, &guest)
}

/// A disk of 1 GiB that has other bytes, on the host's disk and in its memory: what is measured is a copy, not how the
/// host finds blocks and memory for it.
pub fn written_before(path: &Path) -> Result<()> {
    let mut file = std::fs::File::create(path)?;
    let bytes = vec![0xa5; 1 << 20];
    for _ in 0..GIB >> 20 {
        file.write_all(&bytes)?;
    }
    Ok(file.sync_all()?)
}

/// MB per second of a mirror of 1 GiB of random bytes, until it is ready.
pub fn speed(program: Program, to: To) -> Result<f64> {
    let image = random_gib()?;
    let folder = tempfile::tempdir()?;
    let copy = folder.path().join("copy.img");
    written_before(&copy)?;
    memory::warm(MEMORY_MB);
    let cache = if let To::File(cache) = to { cache } else { "writeback" };
    let vmm = guest(program, "work=idle", &image, cache)?;
    vmm.wait_line("^HB n=3 ")?;
    let mut qmp = vmm.qmp()?;
    let (server, target) = match to {
        To::File(_) => (None, copy.display().to_string()),
        To::Unix | To::Tcp => {
            let (server, address) = serve(to, folder.path(), &copy)?;
            (Some(server), address)
        }
    };
    let began = Instant::now();
    mirror(&mut qmp, &target, json!({}))?;
    ready(&mut qmp)?;
    let took = began.elapsed();
    qmp.execute("block-job-cancel", json!({"device": "m"}))?;
    qmp.wait_event("BLOCK_JOB_COMPLETED", SOON)?;
    drop(server);
    compare(&image, &copy).context("the copy")?;
    Ok(GIB as f64 / 1e6 / took.as_secs_f64())
}

/// MB per second that `nbdcopy` reads from an export of a raw image of 1 GiB: of a running guest's disk, and, in QEMU's
/// place, of `qemu-nbd`.
pub fn export_read(program: Program) -> Result<f64> {
    let image = random_gib()?;
    let folder = tempfile::tempdir()?;
    memory::warm(MEMORY_MB);
    let socket = folder.path().join("nbd.sock");
    let (_vmm, _server) = match program {
        Program::Ferry => {
            let vmm = guest(program, "work=idle", &image, "writeback")?;
            vmm.wait_line("^HB n=3 ")?;
            let mut qmp = vmm.qmp()?;
            let addr = json!({"type": "unix", "data": {"path": socket}});
            qmp.execute("nbd-server-start", json!({"addr": addr}))?;
            qmp.execute("nbd-server-add", json!({"device": "disk", "name": "x"}))?;
            (Some(vmm), None)
        }
        Program::Qemu | Program::Newer => (None, Some(serve(To::Unix, folder.path(), &image)?.0)),
    };
    let uri = format!("nbd+unix:///x?socket={}", socket.display());
    let began = Instant::now();
    let status = Command::new("nbdcopy").args([&uri, "null:"]).status()?;
    let took = began.elapsed();
    ensure!(status.success(), "nbdcopy: {status}");
    Ok(GIB as f64 / 1e6 / took.as_secs_f64())
}

/// Processor time of an idle mirror that is ready, in percent of one processor, beyond that of the guest without it.
pub fn idle(program: Program) -> Result<f64> {
    const FOR: Duration = Duration::from_secs(5);
    let folder = tempfile::tempdir()?;
    let (image, copy) = (folder.path().join("disk.img"), folder.path().join("copy.img"));
    disk::create(&image, 64 << 20)?;
    disk::create(&copy, 64 << 20)?;
    let vmm = guest(program, "work=idle", &image, "writeback")?;
    vmm.wait_line("^HB n=3 ")?;
    let mut qmp = vmm.qmp()?;
    let busy = |vmm: &Vmm| -> Result<f64> {
        let before = cpu_ticks(vmm.process.id())?;
        let began = Instant::now();
        // Only time passes: that is what is measured.
        while began.elapsed() < FOR {
            std::thread::park_timeout(FOR.saturating_sub(began.elapsed()));
        }
        let ticks = cpu_ticks(vmm.process.id())? - before;
        Ok(ticks as f64 / 100.0 / began.elapsed().as_secs_f64() * 100.0)
    };
    let without = busy(&vmm)?;
    mirror(&mut qmp, &copy.display().to_string(), json!({}))?;
    ready(&mut qmp)?;
    Ok((busy(&vmm)? - without).max(0.0))
}

/// User and system time of a process, in ticks of 10 ms (proc(5)).
fn cpu_ticks(pid: u32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after = stat.rsplit_once(')').context("a name in parentheses")?.1;
    let field = |index: usize| -> Result<u64> {
        Ok(after.split_whitespace().nth(index).context("a field")?.parse()?)
    };
    Ok(field(11)? + field(12)?)
}
