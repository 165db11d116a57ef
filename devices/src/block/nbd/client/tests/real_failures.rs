//! Real servers that fail, are slow, stop, or die.

use super::real::*;
use super::*;
use ferry_tests::needs;
use rustix::process::Signal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

#[test]
#[needs(nbdkit)]
fn a_full_server_is_a_full_disk_and_goes_on_when_it_has_space() {
    let folder = tempfile::tempdir().unwrap();
    let trigger = folder.path().join("full");
    let file = format!("error-pwrite-file={}", trigger.display());
    let full = ["error-pwrite=ENOSPC", "error-pwrite-rate=100%", &file];
    let server = nbdkit(&[&["--filter=error", "memory", "1M"], &full[..]].concat());
    let client = server.open(NbdOptions::default());
    client.write_at(&[1; 4096], 0).unwrap();
    std::fs::write(&trigger, "").unwrap();
    let error = client.write_at(&[1; 4096], 4096).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
    assert!(error.to_string().contains("refuses a write of 4096 bytes at 4096"), "{error}");
    std::fs::remove_file(&trigger).unwrap();
    client.write_at(&[1; 4096], 4096).unwrap();
    assert!(client.control().is_connected());
}

#[test]
#[needs(nbdkit)]
fn random_errors_reach_their_requests_and_nobody_else_s() {
    let server = nbdkit(&["--filter=error", "memory", "8M", "error=EIO", "error-rate=30%"]);
    let client = &server.open(with_connections(4));
    let (failed, succeeded) = (&AtomicU64::new(0), &AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            scope.spawn(move || {
                for round in 0..100u8 {
                    let place = thread * MIB + u64::from(round) * 4096;
                    let mut back = [0xff; 4096];
                    let done = client
                        .write_at(&[round; 4096], place)
                        .and_then(|()| client.read_at(&mut back, place));
                    let counter = if done.is_ok() { succeeded } else { failed };
                    match done {
                        Ok(()) => assert!(back == [round; 4096]),
                        Err(error) => {
                            assert!(error.to_string().contains("Input/output error"), "{error}")
                        }
                    }
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let counts = (failed.load(Ordering::Relaxed), succeeded.load(Ordering::Relaxed));
    assert!(counts.0 > 100 && counts.1 > 100, "{counts:?}");
}

#[test]
#[needs(nbdkit)]
fn a_slow_server_is_waited_for_up_to_the_timeout() {
    let server = nbdkit(&["--filter=delay", "memory", "1M", "wdelay=500ms"]);
    let options = NbdOptions { stall_timeout: Duration::from_secs(20), ..single() };
    server.open(options).write_at(&[1; 512], 0).unwrap();
    let options = NbdOptions { stall_timeout: Duration::from_millis(100), ..single() };
    let error = server.open(options).write_at(&[1; 512], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
}

/// Threads that write until they fail. Returns the errors and how many MiB had been written when `when` was called,
/// which is once some are.
fn write_until_failed(client: &NbdClient, when: impl FnOnce()) -> Vec<io::Error> {
    let written = &AtomicU64::new(0);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..8u64)
            .map(|thread| {
                scope.spawn(move || {
                    let buffer = vec![thread as u8; MIB as usize];
                    for at in (0..8).cycle() {
                        if let Err(error) = client.write_at(&buffer, (thread * 8 + at) * MIB) {
                            return error;
                        }
                        written.fetch_add(1, Ordering::Relaxed);
                    }
                    unreachable!("it goes round");
                })
            })
            .collect();
        let began = Instant::now();
        while written.load(Ordering::Relaxed) < 32 {
            assert!(began.elapsed() < SOON, "nothing is written");
            std::thread::yield_now();
        }
        when();
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    })
}

#[test]
#[needs(qemu_nbd)]
fn a_killed_qemu_nbd_fails_all_at_once_and_its_successor_is_used() {
    let (_image, mut server) = qemu_nbd(64 * MIB, &["-e", "8"]);
    for max_connections in [1, 4] {
        let options = NbdOptions {
            max_connections: Some(max_connections),
            reconnect_interval: SHORT,
            ..NbdOptions::default()
        };
        let client = server.open(options);
        let mut killed = Instant::now();
        let errors = write_until_failed(&client, || {
            killed = Instant::now();
            server.kill();
        });
        assert!(killed.elapsed() < SOON);
        for error in errors {
            use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
            assert!(
                matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof),
                "{error}"
            );
        }
        client.write_at(&[1; 512], 0).unwrap_err();
        server.restart();
        let began = Instant::now();
        while let Err(error) = client.write_at(&[2; 512], 0) {
            assert!(began.elapsed() < SOON, "{error}");
            std::thread::yield_now();
        }
        assert_eq!(client.connection_count(), max_connections);
        assert!(client.flush().unwrap_err().to_string().contains("must be written again"));
        assert!(client.control().take_lost_writes().unwrap().marked_bytes() >= 8 * MIB);
        client.flush().unwrap();
    }
}

#[test]
#[needs(qemu_nbd)]
fn a_stopped_qemu_nbd_fails_all_after_the_timeout_or_the_interrupt() {
    let (_image, server) = qemu_nbd(64 * MIB, &["-e", "8"]);
    for max_connections in [1, 4] {
        let options = NbdOptions {
            max_connections: Some(max_connections),
            stall_timeout: SHORT,
            connect_timeout: SHORT,
            ..NbdOptions::default()
        };
        let client = server.open(options.clone());
        let mut stopped = Instant::now();
        let errors = write_until_failed(&client, || {
            stopped = Instant::now();
            server.signal(Signal::STOP);
        });
        assert!(stopped.elapsed() < SOON);
        assert!(errors.iter().all(|error| error.kind() == io::ErrorKind::TimedOut), "{errors:?}");
        let began = Instant::now();
        client.flush().unwrap_err();
        drop(client);
        assert!(began.elapsed() < SOON, "neither hangs");
        let error = NbdClient::open(&server.address, options.clone()).unwrap_err();
        assert!(text(&error).contains("did not answer in time"), "{}", text(&error));
        server.signal(Signal::CONT);

        let client = server
            .open(NbdOptions { max_connections: Some(max_connections), ..NbdOptions::default() });
        let mut stopped = Instant::now();
        let errors = write_until_failed(&client, || {
            server.signal(Signal::STOP);
            stopped = Instant::now();
            client.control().interrupt();
        });
        assert!(stopped.elapsed() < SOON);
        assert!(
            errors.iter().all(|error| error.kind() == io::ErrorKind::ConnectionAborted),
            "{errors:?}"
        );
        server.signal(Signal::CONT);
    }
}

#[test]
#[needs(qemu_nbd)]
fn a_qemu_nbd_that_is_stopped_for_a_moment_is_not_lost() {
    let (_image, server) = qemu_nbd(MIB, &[]);
    let client = server.open(single());
    server.signal(Signal::STOP);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| client.write_at(&[7; 4096], 0));
        server.signal(Signal::CONT);
        writing.join().unwrap().unwrap();
    });
    let mut back = [0; 4096];
    client.read_at(&mut back, 0).unwrap();
    assert!(back == [7; 4096]);
}
