//! Connections that stall, break, are interrupted, and come back.

use super::scripted::*;
use super::*;
use std::sync::mpsc::channel;
use std::time::Instant;

const WRITE: u16 = command::WRITE;

/// Options under which a test does not wait long.
fn quick() -> NbdOptions {
    NbdOptions { stall_timeout: SHORT, reconnect_interval: SHORT, ..single() }
}

/// Requests of many threads, more than a socket takes at once. Returns their errors.
fn errors_of_many(client: &NbdClient) -> Vec<io::Error> {
    let buffer = vec![1; 64 << 10];
    std::thread::scope(|scope| {
        let request = |at: u64| {
            let buffer = &buffer;
            scope.spawn(move || match at % 3 {
                0 => client.read_at(&mut [0; 512], 0).unwrap_err(),
                _ => client.write_at(buffer, at % 16 * 65536).unwrap_err(),
            })
        };
        let threads: Vec<_> = (0..24).map(request).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn a_server_that_stalls_fails_every_request_in_time() {
    let server = Scripted::serve(Said::default(), |peer| peer.drain_slowly());
    let client = NbdClient::open(&server.address, quick()).unwrap();
    let began = Instant::now();
    let errors = errors_of_many(&client);
    assert!(began.elapsed() >= SHORT && began.elapsed() < SOON);
    for error in errors {
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        assert!(error.to_string().contains("no progress for 300ms"), "{error}");
    }
}

impl Peer {
    /// Reads nothing until the client is gone.
    fn drain_slowly(&mut self) -> io::Result<()> {
        let mut fds = [rustix::event::PollFd::new(&self.stream, rustix::event::PollFlags::RDHUP)];
        rustix::event::poll(&mut fds, None)?;
        Ok(())
    }
}

#[test]
fn a_reply_of_a_byte_now_and_then_is_no_progress() {
    let server = Scripted::serve(Said::default(), |peer| {
        peer.request()?;
        peer.stream.set_read_timeout(Some(SHORT / 10))?;
        loop {
            // The magic number of a chunk, and then for ever more of what may follow.
            peer.send([0x66])?;
            let mut none = [0];
            if matches!(io::Read::read(&mut peer.stream, &mut none), Ok(0)) {
                return Ok(());
            }
        }
    });
    let client = NbdClient::open(&server.address, quick()).unwrap();
    let began = Instant::now();
    client.flush().unwrap_err();
    assert!(began.elapsed() < SOON);
}

#[test]
fn slow_is_not_stalled_while_the_connection_makes_progress() {
    let server = Scripted::serve(Said::default(), |peer| {
        // Six replies, which take longer than the timeout together.
        let requests: Vec<_> = (0..6).map(|_| peer.request().unwrap().0).collect();
        peer.stream.set_read_timeout(Some(10 * SHORT / 4))?;
        for request in requests {
            let mut none = [0];
            let _ = io::Read::read(&mut peer.stream, &mut none);
            peer.simple(request.cookie, 0)?;
        }
        peer.stream.set_read_timeout(None)?;
        peer.acknowledge_all()
    });
    let options = NbdOptions { stall_timeout: 10 * SHORT, ..single() };
    let client = NbdClient::open(&server.address, options).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| client.write_at(&[1; 512], 0).unwrap());
        }
    });
}

#[test]
fn an_interrupt_ends_every_request_at_once_and_for_good() {
    let (sender, arrived) = channel();
    let server = Scripted::serve(Said::default(), move |peer| {
        let request = peer.request()?;
        sender.send(request.0.command).unwrap();
        peer.drain_slowly()
    });
    let client = NbdClient::open(&server.address, single()).unwrap();
    let control = client.control();
    let errors = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| errors_of_many(&client));
        arrived.recv_timeout(SOON).unwrap();
        control.interrupt();
        waiting.join().unwrap()
    });
    for error in errors {
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{error}");
        assert!(error.to_string().contains("interrupted"), "{error}");
    }
    assert!(client.flush().unwrap_err().to_string().contains("interrupted"));
    control.interrupt();
    drop(client);
    control.interrupt();
    assert!(!control.is_connected());
}

#[test]
fn an_interrupt_ends_an_attempt_to_connect_again() {
    let (sender, connected) = channel();
    let server = Scripted::start(move |peer, number| {
        if number == 0 {
            return peer.handshake(Said::default());
        }
        sender.send(()).unwrap();
        peer.drain().map(drop)
    });
    let options = NbdOptions { reconnect_interval: Duration::ZERO, ..single() };
    let client = NbdClient::open(&server.address, options).unwrap();
    client.flush().unwrap_err();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| errors_of_many(&client));
        connected.recv_timeout(SOON).unwrap();
        let began = Instant::now();
        client.control().interrupt();
        waiting.join().unwrap();
        assert!(began.elapsed() < Duration::from_secs(5), "the handshake has 10 s");
    });
}

#[test]
fn a_lost_connection_is_made_again_once_per_interval() {
    let server = Scripted::start(|peer, number| match number {
        // Lost with the first request; then a server that is not ready yet; then one with another disk.
        0 => {
            peer.handshake(Said::default())?;
            peer.request().map(drop)
        }
        1 => Ok(()),
        2 => peer.handshake(Said { len_bytes: DISK / 2, ..Said::default() }),
        3 => {
            peer.handshake(Said { flags: FLAGS | transmission_flag::READ_ONLY, ..Said::default() })
        }
        _ => {
            peer.handshake(Said::default())?;
            peer.acknowledge_all()
        }
    });
    let client = NbdClient::open(&server.address, quick()).unwrap();
    let first = client.flush().unwrap_err();
    assert!(first.to_string().contains("has closed the connection"), "{first}");
    let reasons =
        ["cannot be made again: the handshake broke off", "524288 bytes now", "read-only now"];
    for reason in reasons {
        let before = client.flush().unwrap_err().to_string();
        assert!(!before.contains(reason), "too early: {before}");
        let lost = Instant::now();
        let error = loop {
            let error = client.flush().unwrap_err();
            if error.to_string() != before {
                break error;
            }
            std::thread::yield_now();
        };
        assert!(lost.elapsed() <= SOON);
        let error = error.to_string();
        assert!(error.contains(reason) && error.contains("has closed the connection"), "{error}");
    }
    let began = Instant::now();
    while client.flush().is_err() {
        assert!(began.elapsed() < SOON, "it is not connected again");
        std::thread::yield_now();
    }
    client.write_at(&[1; 512], 0).unwrap();
    assert_eq!(client.connection_count(), 1);
    drop(client);
    let ends: Vec<bool> = (0..5).map(|_| server.end().is_ok()).collect();
    assert_eq!(ends, [true; 5], "five connections, no more");
    assert!(server.ends.try_recv().is_err());
}

#[test]
fn requests_that_come_while_one_connects_wait_for_the_outcome() {
    let server = Scripted::start(|peer, number| {
        peer.handshake(Said::default())?;
        if number == 0 {
            return Ok(());
        }
        peer.acknowledge_all()
    });
    let options = NbdOptions { reconnect_interval: Duration::ZERO, ..single() };
    let client = NbdClient::open(&server.address, options).unwrap();
    client.flush().unwrap_err();
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| client.write_at(&[1; 512], 0).unwrap());
        }
    });
    drop(client);
    assert!(server.end().is_ok() && server.end().is_ok());
    assert!(server.ends.try_recv().is_err(), "one of them has connected");
}

#[test]
fn writes_that_a_lost_server_has_not_flushed_are_not_taken_for_written() {
    let server = Scripted::start(|peer, _| {
        peer.handshake(Said::default())?;
        loop {
            let (request, _) = peer.request()?;
            // The disk's last sector kills it.
            if request.command == WRITE && request.offset == DISK - 512 {
                return Ok(());
            }
            peer.simple(request.cookie, 0)?;
        }
    });
    let options = NbdOptions { reconnect_interval: Duration::ZERO, ..single() };
    let client = NbdClient::open(&server.address, options).unwrap();
    let control = client.control();
    client.write_at(&[1; 512], 0).unwrap();
    client.flush().unwrap();
    client.write_at(&[1; 512], DISK - 512).unwrap_err();
    client.flush().expect("all that was acknowledged had been flushed");
    assert!(control.take_lost_writes().is_none());

    client.write_at(&[1; 512], 65536).unwrap();
    client.discard(131_072, 65536).unwrap();
    client.write_at(&[1; 512], DISK - 512).unwrap_err();
    client.write_at(&[1; 512], 0).expect("the next server");
    for _ in 0..2 {
        let error = client.flush().unwrap_err();
        assert!(error.to_string().contains("must be written again"), "{error}");
    }
    let lost = control.take_lost_writes().unwrap();
    let runs: Vec<_> = lost.runs().map(|run| (run.offset_bytes, run.len_bytes)).collect();
    assert_eq!(runs, [(65536, 131_072)]);
    client.flush().expect("the caller knows");
}

#[test]
fn a_client_that_is_dropped_takes_leave_on_each_connection_and_waits_for_nobody() {
    let said = Said { flags: FLAGS | transmission_flag::CAN_MULTI_CONN, ..Said::default() };
    let (sender, left) = channel();
    let server = Scripted::start(move |peer, _| {
        peer.handshake(said)?;
        let (sender, mut peer) =
            (sender.clone(), Peer { stream: peer.stream.try_clone()?, structured: true });
        std::thread::spawn(move || sender.send(peer.acknowledge_all().is_ok()));
        Ok(())
    });
    let client = NbdClient::open(&server.address, with_connections(3)).unwrap();
    assert_eq!(client.connection_count(), 3);
    drop(client);
    for _ in 0..3 {
        assert_eq!(left.recv_timeout(SOON), Ok(true));
    }

    let stuck = Scripted::serve(Said::default(), |peer| peer.drain_slowly());
    let client = NbdClient::open(&stuck.address, quick()).unwrap();
    errors_of_many(&client);
    drop(client);
    let client = NbdClient::open(&stuck.address, NbdOptions::default()).unwrap();
    let began = Instant::now();
    drop(client);
    assert!(began.elapsed() < SHORT, "nothing to wait for");
}
