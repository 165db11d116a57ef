//! Requests that are right, and disks that fail.

use super::*;
use crate::block::backend::ByteRange;

use super::super::transmission::{MAX_WORKERS, PIECE_BYTES};

const PIECE: u64 = PIECE_BYTES as u64;

#[test]
fn what_is_written_is_read_back_through_either_kind_of_reply() {
    let (fixture, node, script) = Fixture::of_memory(4 * MIB);
    let data = pattern(600 << 10);
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    assert_eq!(client.write(0, 512, &data), 0);
    let mut simple = Client::simple(&fixture.socket(), "d");
    let len = u32::try_from(data.len()).unwrap();
    assert!(client.read(512, len).unwrap() == data && simple.read(512, len).unwrap() == data);
    client.ask(command_flag::DF, command::READ, 512, len);
    assert!(client.parts() == [Part::Data(512, data.clone())]);
    // A whole write in pieces, and then those of the reads.
    let written = script.accesses()[..3].iter().map(|range| range.len_bytes).collect::<Vec<_>>();
    assert_eq!(written, [256 * KIB, 256 * KIB, 88 * KIB]);
    assert_eq!(node.stats().reads, 0, "they are not the guest's");
    assert_eq!(client.command(command_flag::NO_HOLE, command::WRITE_ZEROES, 512, len), 0);
    assert_eq!(client.command(0, command::TRIM, MIB, 512), 0);
    assert!(simple.read(512, len).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn flush_and_forced_unit_access_reach_the_disk() {
    let (fixture, node, script) = Fixture::of_memory(MIB);
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    assert_eq!(client.write(0, 0, &[1; 512]), 0);
    assert_eq!(script.flush_count(), 0);
    assert!(node.has_unsynced_writes());
    assert_eq!(client.command(0, command::FLUSH, 0, 0), 0);
    assert!(script.flush_count() == 1 && !node.has_unsynced_writes());
    assert_eq!(client.write(command_flag::FUA, 0, &[1; 512]), 0);
    assert_eq!(client.command(command_flag::FUA, command::WRITE_ZEROES, 0, 512), 0);
    assert_eq!(client.command(command_flag::FUA, command::TRIM, 0, 512), 0);
    assert_eq!(script.flush_count(), 4);
}

#[test]
fn a_clients_writes_mark_the_disks_bitmaps_as_the_guests_do() {
    let (fixture, node, _) = Fixture::of_memory(MIB);
    let tracking = node.track(64 * KIB).unwrap();
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    client.write(0, 64 * KIB, &[1; 512]);
    client.command(0, command::TRIM, 256 * KIB, 512);
    client.command(0, command::WRITE_ZEROES, 512 * KIB, 512);
    let starts: Vec<_> = tracking.runs().map(|run| run.offset_bytes / KIB).collect();
    assert_eq!(starts, [64, 256, 512]);
}

#[test]
fn large_holes_are_not_sent() {
    let (fixture, node, _) = Fixture::of_memory(4 * MIB);
    node.write_at(&[7; 4096], MIB).unwrap();
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    client.ask(0, command::READ, 0, 4 << 20);
    let data = |offset: u64, bytes: Vec<u8>| Part::Data(offset, bytes);
    let hole = |offset: u64, end: u64| Part::Hole(offset, u32::try_from(end - offset).unwrap());
    let expected = [hole(0, MIB), data(MIB, vec![7; 4096]), hole(MIB + 4096, 4 * MIB)];
    assert!(client.parts() == expected);
    client.ask(0, command::READ, MIB - 4096, 12 << 10);
    let near = [vec![0; 4096], vec![7; 4096], vec![0; 4096]].concat();
    assert!(client.parts() == [data(MIB - 4096, near)], "a small hole is sent");
    client.ask(command_flag::DF, command::READ, 0, 128 << 10);
    assert!(client.parts() == [data(0, vec![0; 128 << 10])]);
    // What was a hole may be one no more.
    node.write_at(&[9; 512], 0).unwrap();
    assert_eq!(client.read(0, 1 << 20).unwrap()[..512], [9; 512]);
}

#[test]
fn a_disk_that_does_not_tell_of_its_holes_is_read() {
    let (fixture, node, script) = Fixture::of_memory(MIB);
    node.write_at(&[7; 512], 512 * KIB).unwrap();
    script.hide_extents(true);
    let mut client = Client::using(&fixture.socket(), "d", &[BASE_ALLOCATION]);
    let all = client.read(0, 1 << 20).unwrap();
    assert_eq!(all[512 << 10], 7);
    assert!(matches!(client.status(0, 0, 4096)[..], [Part::Error(errno::ENOTSUP, None)]));
}

#[test]
fn block_status_tells_of_holes_and_of_dirty_blocks() {
    let disk = MemoryDisk::new(4 * MIB);
    let node = Arc::new(BlockNode::new("d", Box::new(disk)));
    let bitmap = add_bitmap(&node, "b", true);
    node.write_at(&[7; 4096], MIB).unwrap();
    node.write_zeroes(2 * MIB + 512, 512, true).unwrap();
    let fixture = Fixture::new();
    let with = Export { bitmaps: vec![bitmap], ..export("d", &node, true) };
    fixture.server().add(with).unwrap();
    let contexts = [BASE_ALLOCATION, "qemu:dirty-bitmap:b"];
    let mut client = Client::using(&fixture.socket(), "d", &contexts);
    let extents = |lens: &[(u64, u32)]| {
        let extent =
            |(len, flags): &(u64, u32)| Extent { len: u32::try_from(*len).unwrap(), flags: *flags };
        lens.iter().map(extent).collect::<Vec<_>>()
    };
    let all = client.status(0, 0, 4 << 20);
    let allocation = extents(&[(MIB, 3), (4096, 0), (3 * MIB - 4096, 3)]);
    let dirty =
        [(MIB, 0), (64 * KIB, 1), (MIB - 64 * KIB, 0), (64 * KIB, 1), (2 * MIB - 64 * KIB, 0)];
    assert_eq!(all, [Part::Status(1, allocation), Part::Status(2, extents(&dirty))]);
    let one = client.status(command_flag::REQ_ONE, MIB, 1 << 20);
    let first = |id, len, flags| Part::Status(id, extents(&[(len, flags)]));
    assert_eq!(one, [first(1, 4096, 0), first(2, 64 * KIB, 1)]);
    let within = client.status(0, MIB + 512, 1024);
    assert_eq!(within, [first(1, 1024, 0), first(2, 1024, 1)], "no extent exceeds the request");
    assert_eq!(client.command(0, command::BLOCK_STATUS, 0, 0), errno::EINVAL);
    assert_eq!(client.command(0, command::BLOCK_STATUS, 4 * MIB, 512), errno::EINVAL);
}

#[test]
fn the_disks_errors_are_told_and_the_connection_goes_on() {
    let (fixture, _, script) = Fixture::of_memory(4 * MIB);
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    let mut simple = Client::simple(&fixture.socket(), "d");
    script.hide_extents(true);
    script.fail(true);
    client.ask(0, command::READ, MIB, 512);
    assert_eq!(client.parts(), [Part::Error(errno::EIO, Some(MIB))]);
    assert_eq!(simple.read(0, 512), Err(errno::EIO));
    assert_eq!(client.write(0, 0, &pattern(600 << 10)), errno::EIO);
    assert_eq!(simple.write(0, 0, &pattern(600 << 10)), errno::EIO);
    for command in [command::TRIM, command::WRITE_ZEROES] {
        assert_eq!(client.command(0, command, 0, 512), errno::EIO);
    }
    assert_eq!(client.command(0, command::FLUSH, 0, 0), errno::EIO);
    script.fail(false);
    assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
    assert_eq!(simple.read(0, 512).unwrap(), [0; 512]);
}

/// Has the disk fail from the second piece of `client`'s next read on.
fn fail_second_piece(client: &mut Client, script: &Script, ask: impl FnOnce(&mut Client)) {
    script.hold_after(1);
    ask(client);
    script.wait_until_held();
    script.fail(true);
    script.hold(false);
}

#[test]
fn a_disk_that_fails_in_the_middle_of_a_read_is_never_taken_for_data() {
    let (fixture, _, script) = Fixture::of_memory(4 * MIB);
    script.hide_extents(true);
    let (len, piece) = (600 << 10, PIECE);
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    fail_second_piece(&mut client, &script, |client| client.ask(0, command::READ, 0, len));
    let parts = client.parts();
    let first = Part::Data(0, vec![0; usize::try_from(piece).unwrap()]);
    assert!(parts == [first, Part::Error(errno::EIO, Some(piece))]);
    script.fail(false);
    fail_second_piece(&mut client, &script, |client| {
        client.ask(command_flag::DF, command::READ, 0, len);
    });
    let parts = client.parts();
    assert_eq!(parts.len(), 2);
    assert!(matches!(&parts[0], Part::Data(0, all) if all.len() == 600 << 10), "padded");
    assert_eq!(parts[1], Part::Error(errno::EIO, Some(piece)));
    script.fail(false);
    let mut simple = Client::simple(&fixture.socket(), "d");
    fail_second_piece(&mut simple, &script, |client| client.ask(0, command::READ, 0, len));
    assert_eq!(simple.verdict(), 0);
    assert!(simple.is_closed(), "there is no other way to tell");
}

#[test]
fn many_requests_may_wait_in_line() {
    let (fixture, node, _) = Fixture::of_memory(MIB);
    let data = pattern(64 << 10);
    node.write_at(&data, 0).unwrap();
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    for sector in 0..128 {
        client.ask(0, command::READ, sector * 512, 512);
    }
    // In any order.
    let mut replies: Vec<_> = (0..128).flat_map(|_| client.parts()).collect();
    replies.sort_by_key(|part| if let Part::Data(offset, _) = part { *offset } else { u64::MAX });
    for (sector, (expected, reply)) in data.chunks(512).zip(replies).enumerate() {
        assert!(reply == Part::Data(sector as u64 * 512, expected.to_vec()));
    }
    client.ask(0, command::DISCONNECT, 0, 0);
    assert!(client.is_closed());
}

#[test]
fn a_few_requests_of_a_connection_are_served_at_a_time_and_no_more() {
    let (fixture, _, script) = Fixture::of_memory(MIB);
    script.hide_extents(true);
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    script.hold(true);
    for sector in 0..8 {
        client.ask(0, command::WRITE, sector * 512, 512);
        client.put(&[7; 512]);
    }
    script.wait_until_held_by(MAX_WORKERS);
    assert_eq!(script.held(), MAX_WORKERS);
    script.hold(false);
    for _ in 0..8 {
        assert_eq!(client.verdict(), 0);
    }
    assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
    // What was sent before the client says that it leaves is done.
    script.hold(true);
    for sector in 0..3 {
        client.ask(0, command::WRITE, sector * 512, 512);
        client.put(&[8; 512]);
    }
    script.wait_until_held();
    client.ask(0, command::DISCONNECT, 0, 0);
    script.hold(false);
    let verdicts: Vec<_> = (0..3).map(|_| client.verdict()).collect();
    assert_eq!(verdicts, [0, 0, 0]);
    assert!(client.is_closed());
}

#[test]
fn overlapping_writes_of_several_connections_leave_whole_writes() {
    let (fixture, node, _) = Fixture::of_memory(MIB);
    let write = |byte: u8| {
        let mut client = Client::using(&fixture.socket(), "d", &[]);
        move || {
            for _ in 0..50 {
                assert_eq!(client.write(0, 4096, &[byte; 128 << 10]), 0);
            }
        }
    };
    std::thread::scope(|scope| {
        for byte in 1..=4 {
            scope.spawn(write(byte));
        }
    });
    let mut all = vec![0; 128 << 10];
    node.copy_at(&mut all, 4096).unwrap();
    assert!((1..=4).contains(&all[0]) && all.iter().all(|byte| *byte == all[0]));
}

#[test]
fn tcp_clients_are_served_too() {
    let node = Arc::new(BlockNode::new("d", Box::new(MemoryDisk::new(MIB))));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = NbdServer::start(Listener::Tcp(listener), Limits::default(), Arc::new(|_| ()));
    let server = server.unwrap();
    server.add(export("d", &node, true)).unwrap();
    let mut socket = std::net::TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    let mut greeting = [0; Greeting::BYTES];
    socket.read_exact(&mut greeting).unwrap();
    assert!(Greeting::decode(&greeting).is_ok());
    drop(server);
    assert_eq!(socket.read(&mut [0; 1]).unwrap(), 0);
    assert!(std::net::TcpStream::connect(address).is_err());
}

#[test]
fn a_read_only_export_of_a_writable_disk_is_not_written() {
    let (fixture, node, script) = Fixture::of_memory(MIB);
    fixture.server().add(export("r", &node, false)).unwrap();
    let mut client = Client::using(&fixture.socket(), "r", &[]);
    assert_eq!(client.write(0, 0, &[1; 4096]), errno::EPERM);
    assert_eq!(client.command(0, command::TRIM, 0, 512), errno::EPERM);
    assert_eq!(client.command(0, command::WRITE_ZEROES, 0, 512), errno::EPERM);
    assert_eq!(client.command(0, command::FLUSH, 0, 0), 0);
    assert_eq!(client.read(0, 4096).unwrap(), [0; 4096]);
    let range = ByteRange { offset_bytes: 0, len_bytes: 4096 };
    assert_eq!(script.accesses(), [range], "the read only");
}
