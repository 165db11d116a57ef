//! The guest's console and those who read it: slowly, late, or not at all.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::lines::Lines;
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::verdict::{Transcript, field};
use ferry_tests::{image, needs};
use serde_json::json;
use std::io::{PipeReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes in the UART's transmitter when it is full, less a FIFO that a driver would not start to fill.
const TRANSMITTER_BYTES: usize = (64 << 10) - 16;
/// A socket takes some 270 writes of one byte each, however small they are.
const SMALL_WRITES: usize = 270;
/// Says a line of some 94 bytes per millisecond.
const CHATTY: &str = "work=idle hb_ms=1";

/// Bytes that wait to be read.
fn unread(fd: &impl AsFd) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the kernel writes one int to `count`.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut count) };
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
    usize::try_from(count).unwrap()
}

/// A guest whose console is a socket, and a client that has connected to it. Nothing is read.
fn with_client(cmdline: &str, socket: &Path) -> (Vmm, UnixStream) {
    let to_socket = format!("socket={}", socket.display());
    let guest = Guest::new(cmdline, 64);
    let vmm = ferry::run_with(&guest, &["--serial", &to_socket]).unwrap();
    vmm.qmp().unwrap();
    (vmm, UnixStream::connect(socket).unwrap())
}

/// Waits until the guest waits for its transmitter. It takes no input then: what is typed stays in the
/// UART's FIFO until that is full.
fn wait_until_guest_waits(vmm: &Vmm) {
    let mut qmp = vmm.qmp().unwrap();
    let end = Instant::now() + SOON;
    let mut since = Instant::now();
    // It looks for input every few milliseconds while it runs.
    while since.elapsed() < Duration::from_secs(1) {
        assert!(Instant::now() < end, "the guest goes on");
        // Means nothing to it.
        let typed = json!({"data": "z".repeat(64)});
        if qmp.execute("x-console-input", typed).unwrap()["taken"] != 0 {
            since = Instant::now();
        }
        // Taking input is work for the guest, too: all the time, it would never come to say much.
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Waits until a pipe takes no more.
fn wait_until_full(reader: &PipeReader) {
    let end = Instant::now() + SOON;
    let (mut last, mut since) = (0, Instant::now());
    while last == 0 || since.elapsed() < Duration::from_millis(300) {
        assert!(Instant::now() < end, "{last} bytes, and it goes on");
        let now = unread(reader);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        // A pipe gives no event for being full.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Stops and resumes the guest for a while; each must be answered at once.
fn assert_answers_at_once(vmm: &Vmm) {
    let mut qmp = vmm.qmp().unwrap();
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        let began = Instant::now();
        qmp.execute("stop", json!({})).unwrap();
        qmp.execute("cont", json!({})).unwrap();
        slowest = slowest.max(began.elapsed());
    }
    // It was half a second, and on a loaded host a thread may wait for a CPU that long.
    assert!(slowest < Duration::from_millis(300), "{slowest:?}");
}

#[test]
#[needs(kvm)]
fn a_client_that_does_not_read_holds_nobody_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (vmm, client) = with_client(CHATTY, &folder.path().join("serial"));
    wait_until_guest_waits(&vmm);
    assert_answers_at_once(&vmm);
    let lines = Lines::collect(client);
    // What waited is all there, and the guest goes on where it waited.
    let count = lines.wait_for("^HB ", SOON).unwrap().index + 4 * TRANSMITTER_BYTES / 150;
    lines.wait_from(count, "^HB ", SOON).unwrap();
    let whole: Vec<_> = lines.from(1).into_iter().filter(|line| line.starts_with("HB ")).collect();
    let numbers = whole.iter().map(|line| field(line, "n").unwrap());
    let first = field(&whole[0], "n").unwrap();
    assert!(numbers.eq(first..first + whole.len() as u64), "lines are missing: {whole:?}");
    let waited = whole.iter().filter_map(|line| field(line, "max_gap_us")).max().unwrap();
    assert!(waited >= 500_000, "it never waited: {waited} us at most");
    drop(vmm);
}

#[test]
#[needs(kvm)]
fn a_client_that_does_not_read_for_a_moment_costs_the_guest_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (vmm, client) = with_client(CHATTY, &folder.path().join("serial"));
    let end = Instant::now() + SOON;
    // More than a socket holds of single bytes.
    while unread(&client) < 10 * SMALL_WRITES {
        assert!(Instant::now() < end, "only {} bytes", unread(&client));
        std::thread::sleep(Duration::from_millis(1));
    }
    let lines = Lines::collect(client);
    lines.wait_from(40 * SMALL_WRITES / 150, "^HB ", SOON).unwrap();
    let beats = lines.from(1);
    let mut gaps: Vec<_> = beats.iter().filter_map(|line| field(line, "max_gap_us")).collect();
    gaps.sort_unstable();
    // Each would be half a second. A single one may be, on a loaded host.
    assert!(gaps[gaps.len() / 2] < 100_000, "{beats:?}");
    drop(vmm);
}

#[test]
#[needs(kvm)]
fn a_guest_whose_output_nobody_reads_moves_with_what_is_unsent() {
    let folder = tempfile::tempdir().unwrap();
    let (source, client) = with_client(CHATTY, &folder.path().join("serial"));
    wait_until_guest_waits(&source);
    let destination = ferry::receive().unwrap();
    let ended = ferry::migrate_well(&source, &destination.address, &[]).unwrap();
    assert!(ended.code == 0, "{ended:?}");
    let vmm = destination.vmm;
    vmm.wait_line("^HB ").unwrap();
    drop(source);
    // Read only now: what the source had sent by then, and nothing of what it had not.
    let at_source = Lines::collect(client);
    at_source.wait_end(SOON).unwrap();
    let unsent = TRANSMITTER_BYTES / 150;
    vmm.serial().wait_from(2 * unsent, "^HB ", SOON).unwrap();
    let text = at_source.text() + &vmm.serial().text();
    let beats: Vec<_> = text.lines().filter(|line| line.starts_with("HB ")).collect();
    // The last may still be on its way.
    let whole = &beats[..beats.len() - 1];
    let numbers = whole.iter().map(|line| field(line, "n").unwrap());
    let first = field(whole[0], "n").unwrap();
    assert!(numbers.eq(first..first + whole.len() as u64), "cut, lost or doubled: {whole:?}");
    Transcript::of([&at_source, vmm.serial()]).judge().unwrap();
}

#[test]
#[needs(kvm)]
fn a_path_that_is_no_socket_is_refused_and_stays() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("precious");
    std::fs::write(&file, "precious").unwrap();
    let kernel = guest_images::KERNEL;
    let serial = format!("socket={}", file.display());
    let control = format!("unix:{}", file.display());
    for arguments in [
        &["run", "--kernel", kernel, "--serial", &serial][..],
        &["run", "--kernel", kernel, "--qmp", &control],
        &["receive", &control],
    ] {
        let (code, text) = ferry::end_of(arguments).unwrap();
        assert_eq!(code, 126, "{text}");
        for word in [file.to_str().unwrap(), "regular file", "another path"] {
            assert!(text.contains(word), "{arguments:?} does not say {word:?}: {text}");
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"precious", "{arguments:?}");
    }
}

#[test]
#[needs(kvm)]
fn sockets_are_for_their_owner_only_and_go_with_their_process() {
    let folder = tempfile::tempdir().unwrap();
    let [serial, incoming] = ["serial", "incoming"].map(|name| folder.path().join(name));
    let (vmm, client) = with_client("work=idle", &serial);
    let destination = ferry::receive_at(&format!("unix:{}", incoming.display()), &[]).unwrap();
    let sockets = [&*serial, &incoming, vmm.socket()].map(Path::to_owned);
    for socket in &sockets {
        let metadata = std::fs::metadata(socket).unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600, "{}", socket.display());
    }
    drop(client);
    for mut vmm in [vmm, destination.vmm] {
        vmm.process.signal(libc::SIGTERM).unwrap();
        vmm.process.wait(SOON).unwrap();
    }
    for socket in &sockets {
        assert!(!socket.exists(), "{} is left behind", socket.display());
    }
}

struct KilledOnDrop(Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        // It has ended already if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl KilledOnDrop {
    fn end(&mut self, signal: i32, limit: Duration) -> (Option<i32>, Duration) {
        let began = Instant::now();
        // SAFETY: no memory is involved; the child has not been waited for, so its id is its own.
        unsafe { libc::kill(i32::try_from(self.0.id()).unwrap(), signal) };
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return (status.code(), began.elapsed());
            }
            assert!(began.elapsed() < limit, "it still runs");
            // A child's end gives no event that can be waited for with a limit.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn chatty_to_pipe(more: &[&str]) -> (KilledOnDrop, PipeReader) {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command: Command = ferry::command(["run", "--kernel", guest_images::KERNEL]);
    command.args(["--memory", "64M", "--cmdline", CHATTY]).args(more);
    let child = command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::null()).spawn();
    (KilledOnDrop(child.unwrap()), reader)
}

#[test]
#[needs(kvm)]
fn a_signal_and_a_timeout_end_a_process_whose_output_nobody_reads() {
    let (mut child, reader) = chatty_to_pipe(&[]);
    wait_until_full(&reader);
    let (code, took) = child.end(libc::SIGTERM, SOON);
    assert_eq!(code, Some(130));
    assert!(took < Duration::from_secs(2), "{took:?}");

    let began = Instant::now();
    let (mut child, _reader) = chatty_to_pipe(&["--timeout", "1s"]);
    let (code, _) = child.end(0, SOON);
    assert_eq!(code, Some(124));
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

#[test]
#[needs(kvm)]
fn a_reader_that_comes_late_gets_the_last_word_of_a_guest_that_has_ended() {
    let (mut child, mut reader) = chatty_to_pipe(&["--expect", "HB n=40 "]);
    let (code, _) = child.end(0, SOON);
    assert_eq!(code, Some(0));
    let mut text = String::new();
    drop(child);
    reader.read_to_string(&mut text).unwrap();
    assert!(text.contains("HB n=40 "), "{text}");
}

#[test]
#[needs(kvm)]
fn a_match_does_not_depend_on_the_reader() {
    // More than the pipe takes, less than pipe and transmitter together.
    let (mut child, reader) = chatty_to_pipe(&["--expect", "HB n=1000 "]);
    let (code, _) = child.end(0, SOON);
    assert_eq!(code, Some(0));
    assert!(unread(&reader) > 60_000, "the pipe is not full: {} bytes", unread(&reader));
}

#[test]
#[needs(kvm)]
fn a_log_file_is_complete_when_the_guest_is_stopped_and_when_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("serial.log");
    let to_file = format!("file={}", log.display());
    let guest = Guest::new(CHATTY, 64);
    let mut vmm = ferry::run_with(&guest, &["--serial", &to_file]).unwrap();
    let mut qmp = vmm.qmp().unwrap();
    let end = Instant::now() + SOON;
    while std::fs::metadata(&log).map_or(0, |metadata| metadata.len()) < 10_000 {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(1));
    }
    qmp.execute("stop", json!({})).unwrap();
    let stopped = std::fs::read_to_string(&log).unwrap();
    qmp.execute("query-status", json!({})).unwrap();
    assert_eq!(std::fs::read_to_string(&log).unwrap(), stopped);
    qmp.execute("cont", json!({})).unwrap();
    qmp.execute("x-console-input", json!({"data": "c"})).unwrap();
    qmp.execute("x-console-input", json!({"data": "p"})).unwrap();
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 0);
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.starts_with(&stopped), "{text}");
    // The guest sends all it has to say before it powers off.
    assert!(text[stopped.len()..].contains("\nCHECK ") && text.ends_with('\n'), "{text}");
}

fn fifo(folder: &Path) -> PathBuf {
    let path = folder.join("fifo");
    let made = Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    path
}

#[test]
#[needs(kvm)]
fn a_fifo_that_nobody_reads_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = fifo(folder.path());
    let serial = format!("file={}", fifo.display());
    let arguments = ["run", "--kernel", guest_images::KERNEL, "--serial", &serial];
    for more in [&[][..], &["--migrate-every", "1s"]] {
        let (code, text) = ferry::end_of([&arguments, more].concat()).unwrap();
        assert_eq!(code, 126, "{text}");
        let expected = format!("serial log {} is a FIFO that nobody reads", fifo.display());
        assert!(text.lines().last().unwrap().contains(&expected), "{text}");
    }
}

#[test]
#[needs(kvm)]
fn a_fifo_is_a_log_for_its_reader_and_holds_nobody_who_does_not_read_it() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = fifo(folder.path());
    // To read; opened so, it waits for no writer.
    let reader = std::fs::File::options().read(true).write(true).open(&fifo).unwrap();
    let serial = format!("file={}", fifo.display());
    let mut vmm = ferry::run_with(&Guest::new(CHATTY, 64), &["--serial", &serial]).unwrap();
    let end = Instant::now() + SOON;
    while unread(&reader) < 60_000 {
        assert!(Instant::now() < end, "only {} bytes", unread(&reader));
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_answers_at_once(&vmm);
    let lines = Lines::collect(reader);
    lines.wait_for("^HB n=1000 ", SOON).unwrap();
    vmm.process.signal(libc::SIGINT).unwrap();
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 130);
}

#[test]
#[needs(kvm, mounts)]
fn a_full_disk_costs_the_log_but_not_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let _small = image::SmallFileSystem::mount(folder.path(), 16 << 10).unwrap();
    let log = folder.path().join("serial.log");
    let to_file = format!("file={}", log.display());
    let vmm = ferry::run_with(&Guest::new(CHATTY, 64), &["--serial", &to_file]).unwrap();
    vmm.process.err.wait_for("serial output is being lost", SOON).unwrap();
    assert_answers_at_once(&vmm);
    let said = vmm.process.err.text();
    assert!(said.matches("being lost").count() <= 10, "limited: {said}");
    assert_eq!(vmm.qmp().unwrap().run_state().unwrap(), "running");
}

#[test]
#[needs(kvm)]
fn a_client_that_leaves_takes_its_output_with_it_and_the_next_one_starts_anew() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("serial");
    let (vmm, client) = with_client(CHATTY, &socket);
    wait_until_guest_waits(&vmm);
    let mut buffer = [0; 4096];
    let mut client = client;
    let len = client.read(&mut buffer).unwrap();
    let bytes_in_socket = unread(&client);
    drop(client);
    let early = String::from_utf8_lossy(&buffer[..len]).into_owned();
    let early = early.lines().rfind(|line| line.starts_with("HB ")).unwrap();
    let early = field(early, "n").unwrap();
    let lines = Lines::collect(UnixStream::connect(&socket).unwrap());
    // The guest goes on without anybody: what comes next was said later than all that waited.
    let found = lines.wait_from(1, "^HB n=", SOON).unwrap();
    // Lines only grow: what waited was at least so many of them.
    let waited = early + ((bytes_in_socket + TRANSMITTER_BYTES) / (found.text.len() + 2)) as u64;
    assert!(field(&found.text, "n").unwrap() > waited, "{early} {bytes_in_socket} {found:?}");
    drop(vmm);
}

/// A Multiboot kernel that writes dots and never reads: `mov dx, 0x3f8; mov al, '.'; out dx, al`, a delay,
/// and again.
fn deaf_kernel(folder: &Path) -> PathBuf {
    const BASE: u32 = 0x10_0000;
    const FLAGS: u32 = 0x1_0000; // The addresses below are given.
    const MAGIC: u32 = 0x1bad_b002;
    let checksum = 0u32.wrapping_sub(MAGIC + FLAGS);
    let header = [MAGIC, FLAGS, checksum, BASE, BASE, 0, 0, BASE + 32];
    let code =
        [0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xb9, 0, 0, 0x80, 0, 0xe2, 0xfe, 0xeb, 0xf0];
    let bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).chain(code).collect();
    let path = folder.join("deaf");
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
#[needs(kvm)]
fn a_client_that_leaves_input_unread_makes_room_for_the_next_one() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("serial");
    let mut guest = Guest::new("", 64);
    guest.kernel = deaf_kernel(folder.path());
    let serial = format!("socket={}", socket.display());
    let _vmm = ferry::run_with(&guest, &["--serial", &serial]).unwrap();
    for typed in [4096, 0] {
        let connect = || loop {
            // The socket appears once the process has started.
            match UnixStream::connect(&socket) {
                Ok(client) => return client,
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let mut client = connect();
        client.set_read_timeout(Some(SOON)).unwrap();
        // More than the guest's port takes.
        client.write_all(&vec![b'x'; typed]).unwrap();
        let mut dot = [0];
        client.read_exact(&mut dot).unwrap();
        assert_eq!(dot, *b".");
    }
}
