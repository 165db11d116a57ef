//! `qemu-nbd` and `nbdkit` as servers, compared with a plain model.

use super::*;
use ferry_tests::needs;
use proptest::prelude::*;
use rustix::process::{Pid, Signal, kill_process};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::time::Instant;
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;

/// A server on a socket that the test has bound: it need not be waited for, and its successor gets the same one.
pub struct Server {
    pub address: NbdAddress,
    command: Vec<String>,
    listener: OwnedFd,
    child: Child,
    _folder: TempDir,
}

impl Server {
    /// Starts the words of `command` on a Unix socket.
    pub fn start(command: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap().into();
        Self::start_on(listener, unix(&path, ""), folder, command)
    }

    /// Starts it on a TCP port.
    pub fn start_on_tcp(command: &[&str], host: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let address = NbdAddress::new(NbdServer::Tcp { host: host.into(), port }, "").unwrap();
        Self::start_on(listener.into(), address, tempfile::tempdir().unwrap(), command)
    }

    fn start_on(listener: OwnedFd, address: NbdAddress, folder: TempDir, command: &[&str]) -> Self {
        let command: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
        let child = spawn(&command, &listener);
        Self { address, command, listener, child, _folder: folder }
    }

    /// Ends it, if need be, and starts it anew.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(&self.command, &self.listener);
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn open(&self, options: NbdOptions) -> NbdClient {
        NbdClient::open(&self.address, options).unwrap_or_else(|error| panic!("{}", text(&error)))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Both servers take a listening socket as descriptor 3, as systemd gives it to them.
fn spawn(command: &[String], listener: &OwnedFd) -> Child {
    let mut shell = Command::new("sh");
    shell.args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\" 3<&0 </dev/null", "sh"]);
    shell.args(command).stdin(listener.try_clone().unwrap());
    shell.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// `qemu-nbd` with a sparse image of `len_bytes`.
pub fn qemu_nbd(len_bytes: u64, options: &[&str]) -> (tempfile::NamedTempFile, Server) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(len_bytes).unwrap();
    let path = image.path().to_str().unwrap().to_owned();
    let server = Server::start(&qemu_nbd_command(&path, options));
    (image, server)
}

/// It serves until it is killed.
pub fn qemu_nbd_command<'a>(path: &'a str, options: &[&'a str]) -> Vec<&'a str> {
    [&["qemu-nbd", "-t", "-f", "raw"], options, &[path]].concat()
}

/// `nbdkit` in the foreground.
pub fn nbdkit(words: &[&str]) -> Server {
    Server::start(&[&["nbdkit", "-f"], words].concat())
}

/// Something that a disk is asked to do, in sectors.
#[derive(Debug, Clone)]
enum Step {
    Read(u64, usize),
    Write(u64, usize, u8),
    Zeroes(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    Extents,
}

/// Sectors of the disk in these tests.
const SECTORS: u64 = 4096;

fn any_step() -> impl Strategy<Value = Step> {
    let range = || (0..SECTORS, 1u64..600).prop_map(|(at, len)| (at, len.min(SECTORS - at)));
    prop_oneof![
        3 => range().prop_map(|(at, len)| Step::Read(at, len as usize)),
        3 => (range(), any::<u8>()).prop_map(|((at, len), byte)| Step::Write(at, len as usize, byte)),
        2 => (range(), any::<bool>()).prop_map(|((at, len), unmap)| Step::Zeroes(at, len, unmap)),
        1 => range().prop_map(|(at, len)| Step::Discard(at, len)),
        1 => Just(Step::Flush),
        1 => Just(Step::Extents),
    ]
}

/// The whole disk by its extents: the zero ones need not be read.
fn read_by_extents(client: &NbdClient) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(client.len_bytes()).unwrap()];
    let mut at = 0;
    while at < client.len_bytes() {
        let extent = client.extent_at(at).unwrap();
        assert!(extent.len_bytes > 0 && extent.len_bytes.is_multiple_of(512));
        let end = at + extent.len_bytes;
        if extent.content == Content::Data {
            client.read_at(&mut bytes[at as usize..end as usize], at).unwrap();
        }
        at = end;
    }
    bytes
}

fn follow(client: &NbdClient, model: &mut [u8], step: &Step) {
    let range = |at: u64, len: u64| (at * 512) as usize..((at + len) * 512) as usize;
    match *step {
        Step::Read(at, len) => {
            let mut buffer = vec![0xaa; len * 512];
            client.read_at(&mut buffer, at * 512).unwrap();
            assert!(buffer == model[range(at, len as u64)], "{step:?}");
        }
        Step::Write(at, len, byte) => {
            let bytes: Vec<u8> =
                (0..len * 512).map(|at| byte.wrapping_add((at / 512) as u8)).collect();
            client.write_at(&bytes, at * 512).unwrap();
            model[range(at, len as u64)].copy_from_slice(&bytes);
        }
        Step::Zeroes(at, len, may_unmap) => {
            client.write_zeroes(at * 512, len * 512, may_unmap).unwrap();
            model[range(at, len)].fill(0);
        }
        Step::Discard(at, len) => {
            client.discard(at * 512, len * 512).unwrap();
            // It reads as it did or as zeroes, sector by sector.
            for sector in at..at + len {
                let mut buffer = [0; 512];
                client.read_at(&mut buffer, sector * 512).unwrap();
                let model = &mut model[range(sector, 1)];
                assert!(buffer == *model || buffer == [0; 512]);
                model.copy_from_slice(&buffer);
            }
        }
        Step::Flush => client.flush().unwrap(),
        Step::Extents => assert!(read_by_extents(client) == model),
    }
}

fn compare_with_a_model(clients: &[NbdClient], steps_per_case: usize) {
    let strategy = prop::collection::vec(any_step(), 1..steps_per_case);
    let config = ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    for client in clients {
        let mut model = read_by_extents(client);
        let model = std::cell::RefCell::new(&mut model);
        let checked = runner.run(&strategy, |steps| {
            let mut model = model.borrow_mut();
            steps.iter().for_each(|step| follow(client, &mut model, step));
            assert!(read_by_extents(client) == **model);
            Ok(())
        });
        checked.unwrap();
    }
}

#[test]
#[needs(qemu_nbd)]
fn a_disk_on_qemu_nbd_behaves_like_a_plain_model() {
    let (image, server) = qemu_nbd(SECTORS * 512, &["-e", "8", "--discard=unmap"]);
    let (single, several) = (server.open(single()), server.open(with_connections(4)));
    assert_eq!((single.connection_count(), several.connection_count()), (1, 4));
    compare_with_a_model(&[single, several], 40);
    let last = server.open(NbdOptions { read_only: true, ..NbdOptions::default() });
    assert!(last.read_only());
    last.flush().unwrap();
    assert!(std::fs::read(image.path()).unwrap() == read_by_extents(&last), "the image itself");
}

#[test]
#[needs(nbdkit)]
fn a_disk_on_nbdkit_behaves_like_a_plain_model_whatever_it_cannot_do() {
    let size = "2M";
    let limited: &[&str] = &[
        "--filter=blocksize-policy",
        "memory",
        size,
        "blocksize-minimum=512",
        "blocksize-preferred=4096",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
    ];
    let servers: &[&[&str]] = &[
        &["memory", size],
        limited,
        &["--filter=nozero", "--filter=noextents", "memory", size],
        &["--no-sr", "memory", size],
        &["--filter=fua", "--filter=noparallel", "memory", size, "serialize=requests"],
    ];
    for words in servers {
        let server = nbdkit(words);
        compare_with_a_model(&[server.open(with_connections(4))], 20);
    }
    let large = nbdkit(&["--filter=blocksize-policy", "memory", size, "blocksize-minimum=4096"]);
    let error = NbdClient::open(&large.address, single()).unwrap_err();
    assert!(text(&error).contains("blocks of 4096 bytes"), "{}", text(&error));
}

#[test]
#[needs(qemu_nbd)]
fn threads_that_write_at_once_find_what_they_have_written() {
    let server = qemu_nbd(64 * MIB, &["-e", "8"]);
    for options in [single(), with_connections(4)] {
        let client = &server.1.open(options);
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                scope.spawn(move || {
                    let (base, mut random) = (thread * 8 * MIB, thread + 1);
                    let mut model = vec![0; 8 * MIB as usize];
                    client.write_at(&model, base).unwrap();
                    for _ in 0..100 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let at = (random >> 33) % (8 * MIB / 512 - 512) * 512;
                        let len = (1 + (random >> 20) % 512) as usize * 512;
                        let place = at as usize..at as usize + len;
                        if random.is_multiple_of(3) {
                            let mut buffer = vec![0; len];
                            client.read_at(&mut buffer, base + at).unwrap();
                            assert!(buffer == model[place]);
                        } else {
                            model[place.clone()].fill((random >> 8) as u8);
                            client.write_at(&model[place], base + at).unwrap();
                        }
                    }
                    let mut buffer = vec![1; model.len()];
                    client.read_at(&mut buffer, base).unwrap();
                    assert!(buffer == model);
                });
            }
        });
        client.flush().unwrap();
    }
}

#[test]
#[needs(qemu_nbd)]
fn what_is_larger_than_a_request_may_be_is_split() {
    let (_image, server) = qemu_nbd(80 * MIB, &["--discard=unmap"]);
    let client = server.open(single());
    let bytes: Vec<u8> = (0..72 * MIB).map(|at| (at >> 9) as u8 ^ at as u8).collect();
    client.write_at(&bytes, 4 * MIB).unwrap();
    let mut back = vec![0; bytes.len()];
    client.read_at(&mut back, 4 * MIB).unwrap();
    assert!(back == bytes);
    client.write_zeroes(0, 80 * MIB, true).unwrap();
    assert_eq!(client.extent_at(0).unwrap().content, Content::Zero);
    client.discard(0, 80 * MIB).unwrap();
    assert!(read_by_extents(&client) == vec![0; 80 * MIB as usize]);
}

#[test]
#[needs(qemu_nbd)]
fn a_read_only_export_is_a_read_only_disk() {
    let (image, server) = qemu_nbd(MIB, &["-r"]);
    let client = server.open(single());
    assert!(client.read_only());
    let error = client.write_at(&[1; 512], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
    client.read_at(&mut [0; 512], 0).unwrap();
    drop(image);
}

#[test]
#[needs(qemu_nbd)]
fn a_server_is_found_by_name_and_by_address_and_its_exports_by_theirs() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(MIB).unwrap();
    let path = image.path().to_str().unwrap();
    let server =
        Server::start_on_tcp(&qemu_nbd_command(path, &["-x", "a disk/ä", "-e", "0"]), "localhost");
    let NbdServer::Tcp { port, .. } = *server.address.server() else { panic!() };
    for host in ["localhost", "127.0.0.1"] {
        let address: NbdAddress = format!("nbd://{host}:{port}/a%20disk/%C3%A4").parse().unwrap();
        let client = NbdClient::open(&address, NbdOptions::default()).unwrap();
        assert_eq!(client.location(), format!("nbd://{host}:{port}/a%20disk/%C3%A4"));
        assert_eq!(client.connection_count(), 2, "over TCP");
        client.write_at(&[1; 512], 0).unwrap();
        client.flush().unwrap();
    }
    let address: NbdAddress = format!("nbd:127.0.0.1:{port}:exportname=other").parse().unwrap();
    let error = NbdClient::open(&address, single()).unwrap_err();
    assert!(text(&error).contains("no export \"other\""), "{}", text(&error));
}

#[test]
#[needs(qemu_nbd)]
fn a_server_that_takes_fewer_connections_is_used_with_those() {
    let (_image, server) = qemu_nbd(MIB, &["-e", "2"]);
    let began = Instant::now();
    let client = server.open(with_connections(4));
    assert_eq!(client.connection_count(), 2);
    assert!(began.elapsed() < Duration::from_secs(5));
    client.write_at(&[1; 512], 0).unwrap();
}
