//! Clients that break the protocol, take what they can, or stop in the middle.

use super::*;
use std::time::Instant;

/// Whether the export `d` still serves others.
fn is_unharmed(fixture: &Fixture) {
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    assert_eq!(client.read(0, 512).unwrap().len(), 512);
}

#[test]
fn requests_that_no_export_takes_are_refused_and_the_connection_goes_on() {
    let (fixture, node, script) = Fixture::of_memory(MIB);
    for structured in [false, true] {
        let socket = fixture.socket();
        let mut client = if structured {
            Client::using(&socket, "d", &[])
        } else {
            Client::simple(&socket, "d")
        };
        let mut is = |errno: u32, flags: u16, command: u16, offset: u64, len: u32| {
            let found = client.command(flags, command, offset, len);
            assert_eq!(found, errno, "{command} {flags:#x} {offset} {len}");
        };
        for command in [command::READ, command::TRIM] {
            is(errno::EINVAL, 0, command, MIB, 512);
            is(errno::EINVAL, 0, command, u64::MAX, 1);
            is(errno::EINVAL, 0, command, u64::MAX - 511, 512);
            is(errno::EINVAL, 0, command, 0, u32::MAX);
            is(errno::EINVAL, 0, command, 1, 512);
            is(errno::EINVAL, 0, command, 0, 511);
            is(errno::EINVAL, 1 << 15, command, 0, 512);
        }
        is(errno::ENOSPC, 0, command::WRITE_ZEROES, u64::MAX - 511, 512);
        is(errno::ENOSPC, 0, command::WRITE_ZEROES, 0, u32::MAX);
        is(errno::EINVAL, command_flag::FAST_ZERO, command::WRITE_ZEROES, 0, 512);
        is(errno::EINVAL, command_flag::REQ_ONE, command::READ, 0, 512);
        is(errno::EINVAL, 0, command::FLUSH, 512, 0);
        is(errno::EINVAL, 0, command::BLOCK_STATUS, 0, 512);
        is(errno::EINVAL, 0, command::CACHE, 0, 512);
        is(errno::EINVAL, 0, 4711, 0, 512);
        if !structured {
            is(errno::EINVAL, command_flag::DF, command::READ, 0, 512);
        }
        // Of no length: nothing to do.
        for command in [command::READ, command::TRIM, command::WRITE_ZEROES, command::WRITE] {
            is(0, 0, command, 512, 0);
            is(0, 0, command, MIB, 0);
        }
        assert_eq!(client.write(0, MIB, &[1; 512]), errno::ENOSPC);
        assert_eq!(client.write(0, u64::MAX - 1023, &[1; 2048]), errno::ENOSPC);
        assert_eq!(client.write(0, 1, &[1; 512]), errno::EINVAL);
        assert_eq!(client.write(command_flag::DF, 0, &[1; 512]), errno::EINVAL);
        assert!(client.read(0, 4096).is_ok());
    }
    assert_eq!(node.stats().written_bytes, 0);
    assert!(script.accesses().iter().all(|range| range.len_bytes == 4096), "the reads at the end");
}

#[test]
fn a_read_larger_than_a_payload_may_be_is_refused_and_such_a_write_ends_the_connection() {
    let fixture = Fixture::new();
    let node = Arc::new(BlockNode::new("d", Box::new(MemoryDisk::without_storage(1 << 40))));
    fixture.server().add(export("d", &node, true)).unwrap();
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    assert_eq!(client.read(0, MAX_PAYLOAD_BYTES + 512), Err(errno::EINVAL));
    client.ask(0, command::WRITE, 0, MAX_PAYLOAD_BYTES + 512);
    assert!(client.is_closed());
    assert_eq!(node.stats().writes, 0);
    is_unharmed(&fixture);
}

#[test]
fn what_is_no_request_ends_the_connection() {
    let (fixture, _, _) = Fixture::of_memory(MIB);
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    assert!(client.read(0, 512).is_ok());
    client.put(&[0x55; Request::BYTES]);
    assert!(client.is_closed());
    is_unharmed(&fixture);
}

#[test]
fn lies_in_the_handshake_end_the_connection() {
    let (fixture, _, _) = Fixture::of_memory(MIB);
    let mut client = Client::connect(&fixture.socket());
    client.put(&[0, 0, 0, 7]);
    assert!(client.is_closed(), "unknown flags");
    let mut client = Client::greeted(&fixture.socket());
    client.put(&[0x55; OptionHeader::BYTES]);
    assert!(client.is_closed(), "no option");
    let mut client = Client::greeted(&fixture.socket());
    client.put(&OptionHeader { option: option::GO, len: u32::MAX }.encode());
    assert!(client.is_closed(), "longer than any option");
    let mut client = Client::greeted(&fixture.socket());
    let name = OptionHeader { option: option::EXPORT_NAME, len: 2 };
    client.put(&name.encode());
    client.put(b"\xff\xfe");
    assert!(client.is_closed(), "no name");
    let mut client = Client::greeted(&fixture.socket());
    let asked = (0..2000).take_while(|_| {
        let sent = client.socket.write_all(&OptionHeader { option: 4711, len: 0 }.encode());
        let mut reply = [0; OptionReply::BYTES];
        let header = sent.and_then(|()| client.socket.read_exact(&mut reply));
        header.is_ok() && {
            let len = OptionReply::decode(&reply).unwrap().len;
            client.bytes(len);
            true
        }
    });
    assert_eq!(asked.count(), 1024, "options without end");
    fixture.wait_for_connections(0);
    is_unharmed(&fixture);
}

#[test]
fn a_handshake_has_one_deadline_however_it_is_dribbled() {
    let handshake = Duration::from_millis(400);
    let fixture = Fixture::with(Limits { handshake, ..Limits::default() });
    let started = Instant::now();
    let mut silent = Client::connect(&fixture.socket());
    let mut dribbling = Client::connect(&fixture.socket());
    dribbling.socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    // An endless option, byte by byte.
    let endless = [&[0, 0, 0, 3][..], &OptionHeader { option: 1, len: 60_000 }.encode()].concat();
    let mut bytes = endless.into_iter().chain(std::iter::repeat(b'x'));
    let mut got = [0; 64];
    loop {
        match dribbling.socket.read(&mut got) {
            Ok(0) => break,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) if error.kind() != ErrorKind::WouldBlock => panic!("{error}"),
            // It may have been closed between the two.
            _ => drop(dribbling.socket.write(&[bytes.next().unwrap()])),
        }
        assert!(started.elapsed() < SOON);
    }
    assert!(started.elapsed() >= handshake);
    assert!(silent.is_closed());
    fixture.wait_for_connections(0);
}

#[test]
fn a_client_that_does_not_read_replies_to_its_options_has_the_same_deadline() {
    let limits = Limits { handshake: Duration::from_millis(400), ..Limits::default() };
    let fixture = Fixture::with(limits);
    let client = Client::greeted(&fixture.socket());
    client.socket.set_nonblocking(true).unwrap();
    // Only what the socket takes: neither side reads.
    let mut asked = 0;
    while (&client.socket).write_all(&OptionHeader { option: 99, len: 0 }.encode()).is_ok() {
        asked += 1;
        if asked > 100_000 {
            break;
        }
    }
    fixture.wait_for_connections(0);
}

#[test]
fn of_a_thousand_connections_those_beyond_the_limit_are_closed_at_once() {
    let (fixture, node, _) = Fixture::of_memory(MIB);
    let mut first = Client::using(&fixture.socket(), "d", &[]);
    let mut admitted = 0;
    let mut held = Vec::new();
    for _ in 0..1000 {
        let mut client = Client::connect(&fixture.socket());
        let mut greeting = [0; Greeting::BYTES];
        match client.socket.read_exact(&mut greeting) {
            Ok(()) => {
                admitted += 1;
                held.push(client);
            }
            Err(_) => assert!(client.is_closed()),
        }
        assert!(first.read(0, 512).is_ok(), "the first client is served on");
    }
    assert_eq!(admitted, DEFAULT_MAX_CONNECTIONS - 1);
    assert_eq!(fixture.server().connections(), DEFAULT_MAX_CONNECTIONS);
    node.write_at(&[1; 512], 0).unwrap();
    drop(held);
    fixture.wait_for_connections(1);
    is_unharmed(&fixture);
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_write_has_not_written() {
    let (fixture, node, script) = Fixture::of_memory(4 * MIB);
    for sent in [0, 1, 511, 4096, (64 << 10) - 1] {
        let mut client = Client::using(&fixture.socket(), "d", &[]);
        client.ask(0, command::WRITE, 0, 64 << 10);
        client.put(&vec![1; sent]);
        drop(client);
        fixture.wait_for_connections(0);
        assert!(script.accesses().is_empty(), "{sent} bytes have reached the disk");
    }
    // Of a long write, what has arrived may have been written, and is marked.
    let tracking = node.track(512).unwrap();
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    client.ask(0, command::WRITE, 0, 1 << 20);
    client.put(&vec![1; 700 << 10]);
    drop(client);
    fixture.wait_for_connections(0);
    let written = script.accesses();
    assert_eq!(written.len(), 2);
    for range in written {
        let marked = |at: &u64| tracking.is_marked(*at);
        assert!((range.offset_bytes..range.end()).step_by(512).all(|at| marked(&at)));
    }
}

#[test]
fn a_client_that_stops_reading_is_ended_with_its_export_and_harms_nobody() {
    let (fixture, node, _) = Fixture::of_memory(64 * MIB);
    fixture.server().add(export("other", &node, false)).unwrap();
    let mut deaf = Vec::new();
    for structured in [false, true] {
        let mut client = match structured {
            true => Client::using(&fixture.socket(), "other", &[]),
            false => Client::simple(&fixture.socket(), "other"),
        };
        client.ask(command_flag::DF * u16::from(structured), command::READ, 0, MAX_PAYLOAD_BYTES);
        // Its reply has begun, and does not fit the socket.
        assert_eq!(client.array::<4>().len(), 4);
        deaf.push(client);
    }
    is_unharmed(&fixture);
    let begun = Instant::now();
    fixture.server().remove("other", RemoveMode::Hard).unwrap();
    assert_eq!(fixture.deleted.recv_timeout(SOON).unwrap(), "other");
    assert!(begun.elapsed() < Duration::from_secs(5), "within moments");
    assert!(deaf.iter_mut().all(Client::is_closed));
    is_unharmed(&fixture);
}

#[test]
fn a_client_that_leaves_before_its_reply_is_let_go() {
    let (fixture, _, script) = Fixture::of_memory(4 * MIB);
    script.hide_extents(true);
    let mut client = Client::simple(&fixture.socket(), "d");
    script.hold(true);
    client.ask(0, command::READ, 0, 1 << 20);
    script.wait_until_held();
    drop(client);
    script.hold(false);
    fixture.wait_for_connections(0);
    assert_eq!(fixture.server().exports()[0].clients, 0);
    is_unharmed(&fixture);
}
