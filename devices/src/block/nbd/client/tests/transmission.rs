//! Requests and replies: what is right arrives in the right place, what is wrong ends the connection.

use super::scripted::*;
use super::*;
use crate::block::nbd::protocol::{
    self as nbd, CHUNK_DONE, ChunkHeader, ErrorPayload, Request, chunk, encode_data_chunk,
    encode_hole_chunk, encode_status, state,
};
use std::time::Instant;

/// A chunk.
fn chunk(cookie: u64, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    [&ChunkHeader { flags, kind, cookie, len }.encode()[..], payload].concat()
}

fn data(cookie: u64, flags: u16, offset: u64, bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).unwrap();
    [&encode_data_chunk(flags, cookie, offset, len)[..], bytes].concat()
}

/// What the n-th byte of a scripted disk is.
fn byte_at(offset: u64) -> u8 {
    (offset / 512 * 7 + offset) as u8
}

fn bytes_at(offset: u64, len: usize) -> Vec<u8> {
    (offset..).take(len).map(byte_at).collect()
}

/// A reply to a read of 4096 bytes at 4096 or to a write, from a server that has negotiated chunks or not.
type Lie = fn(&mut Peer, Request) -> io::Result<()>;

#[test]
fn a_reply_that_does_not_fit_ends_the_connection_with_a_reason() {
    let reads: &[(bool, &str, Lie)] = &[
        (true, "request 99, which is not in flight", |peer, _| peer.simple(99, 0)),
        (true, "begins with 0x6e6f7065", |peer, _| peer.send("nope, nope, nope")),
        (true, "simple reply where chunks", |peer, request| peer.simple(request.cookie, 0)),
        (false, "in chunks, which were not negotiated", |peer, request| {
            peer.send(data(request.cookie, CHUNK_DONE, 4096, &[1; 4096]))
        }),
        (true, "data for 4095, 4096 bytes", |peer, request| {
            peer.send(data(request.cookie, CHUNK_DONE, 4095, &[1; 4096]))
        }),
        (true, "data for 4096, 4097 bytes", |peer, request| {
            peer.send(data(request.cookie, CHUNK_DONE, 4096, &[1; 4097]))
        }),
        (true, "data for 18446744073709551615, 512 bytes", |peer, request| {
            peer.send(data(request.cookie, CHUNK_DONE, u64::MAX, &[1; 512]))
        }),
        (
            true,
            "data for 4608, 512 bytes, which the request did not ask for, or",
            |peer, request| {
                peer.send(data(request.cookie, 0, 4096, &[1; 1024]))?;
                peer.send(data(request.cookie, 0, 4608, &[1; 512]))
            },
        ),
        (true, "before all its data has arrived", |peer, request| {
            peer.send(data(request.cookie, CHUNK_DONE, 4096, &[1; 4095]))
        }),
        (true, "before all its data has arrived", |peer, request| {
            peer.send(chunk(request.cookie, CHUNK_DONE, chunk::NONE, &[]))
        }),
        (true, "data for 4096, 0 bytes", |peer, request| {
            peer.send(encode_hole_chunk(CHUNK_DONE, request.cookie, 4096, 0))
        }),
        (true, "kind 2 with 13 bytes", |peer, request| {
            peer.send(chunk(request.cookie, 0, chunk::OFFSET_HOLE, &[0; 13]))
        }),
        (true, "kind 1 with 8 bytes", |peer, request| {
            peer.send(chunk(request.cookie, 0, chunk::OFFSET_DATA, &[0; 8]))
        }),
        (true, "kind 0 with 0 bytes", |peer, request| {
            peer.send(chunk(request.cookie, 0, chunk::NONE, &[]))
        }),
        (true, "chunk of kind 5 in the reply", |peer, request| {
            peer.send(chunk(request.cookie, 0, chunk::BLOCK_STATUS, &[0; 12]))
        }),
        (true, "kind 32769 with 4294967295 bytes", |peer, request| {
            let (flags, kind, cookie) = (0, chunk::ERROR, request.cookie);
            peer.send(ChunkHeader { flags, kind, cookie, len: u32::MAX }.encode())
        }),
        (true, "an error is cut short", |peer, request| {
            peer.send(chunk(request.cookie, 0, chunk::ERROR, &[0, 0, 0, 5, 0, 9, b'x']))
        }),
        (true, "more than 16 errors", |peer, request| {
            let error = ErrorPayload { errno: 5, message: String::new(), offset: None }.encode();
            peer.send(chunk(request.cookie, 0, chunk::ERROR, &error).repeat(17))
        }),
        (true, "has closed the connection", |peer, request| {
            peer.send(data(request.cookie, 0, 4096, &[1; 4096]))?;
            peer.stream.shutdown(std::net::Shutdown::Both)
        }),
        (false, "has closed the connection", |peer, request| {
            peer.simple(request.cookie, 0)?;
            peer.send([1; 4095])?;
            peer.stream.shutdown(std::net::Shutdown::Both)
        }),
    ];
    let writes: &[(bool, &str, Lie)] = &[
        (true, "chunk of kind 1 in the reply", |peer, request| {
            peer.send(data(request.cookie, CHUNK_DONE, 4096, &[1; 4096]))
        }),
        (false, "in chunks, which were not negotiated", |peer, request| {
            peer.send(chunk(request.cookie, CHUNK_DONE, chunk::NONE, &[]))
        }),
        (true, "request 1, which is not in flight", |peer, request| {
            // It is in flight once, but is answered twice; the next request finds that.
            peer.simple(request.cookie, 0)?;
            peer.simple(request.cookie, 0)
        }),
    ];
    for (lies, is_write) in [(reads, false), (writes, true)] {
        for (structured, part, lie) in lies {
            let (structured, lie) = (*structured, *lie);
            let server = Scripted::serve(Said { structured, ..Said::default() }, move |peer| {
                let (request, _) = peer.request()?;
                lie(peer, request)?;
                peer.drain().map(drop)
            });
            let client = NbdClient::open(&server.address, single()).unwrap();
            let first = if is_write {
                client.write_at(&[1; 4096], 4096)
            } else {
                client.read_at(&mut [0; 4096], 4096)
            };
            let error = match first {
                Ok(()) => client.write_at(&[1; 4096], 8192).unwrap_err(),
                Err(error) => error,
            };
            assert!(error.to_string().contains(part), "expected {part:?}: {error}");
            let began = Instant::now();
            let later = client.read_at(&mut [0; 512], 0).unwrap_err();
            assert_eq!((later.kind(), later.to_string()), (error.kind(), error.to_string()));
            assert!(began.elapsed() < SOON && !client.control().is_connected());
        }
    }
}

#[test]
fn each_error_of_the_server_becomes_one_of_the_right_kind() {
    use io::ErrorKind as Kind;
    let cases = [
        (1, Kind::PermissionDenied),
        (12, Kind::OutOfMemory),
        (22, Kind::InvalidInput),
        (28, Kind::StorageFull),
        (95, Kind::Unsupported),
        (108, Kind::ConnectionAborted),
    ];
    let server = Scripted::serve(Said::default(), move |peer| {
        for (errno, _) in cases.into_iter().chain([(5, Kind::Other), (4711, Kind::Other)]) {
            let (request, _) = peer.request()?;
            peer.simple(request.cookie, errno)?;
            let (request, _) = peer.request()?;
            let error = ErrorPayload { errno, message: "no more".into(), offset: Some(77) };
            peer.send(chunk(request.cookie, CHUNK_DONE, error.kind(), &error.encode()))?;
        }
        peer.acknowledge_all()
    });
    let client = NbdClient::open(&server.address, single()).unwrap();
    for (_, kind) in cases {
        let error = client.write_at(&[1; 512], 1024).unwrap_err();
        assert_eq!(error.kind(), kind);
        assert!(error.to_string().contains("refuses a write of 512 bytes at 1024"), "{error}");
        let error = client.read_at(&mut [1; 512], 1024).unwrap_err();
        assert_eq!(error.kind(), kind);
        assert!(error.to_string().contains("\"no more\"") && error.to_string().contains("(at 77)"));
    }
    for _ in 0..2 {
        let error = client.write_at(&[1; 512], 1024).unwrap_err();
        assert!(error.to_string().contains("Input/output error"), "{error}");
        client.read_at(&mut [1; 512], 1024).unwrap_err();
    }
    client.flush().expect("the connection has survived them all");
    drop(client);
    server.end().unwrap();
}

#[test]
fn replies_in_any_order_and_in_pieces_reach_the_threads_that_wait_for_them() {
    const THREADS: usize = 8;
    const ROUNDS: usize = 100;
    for structured in [true, false] {
        let server = Scripted::serve(Said { structured, ..Said::default() }, move |peer| {
            let mut random = 88_172_645_463_325_252_u64;
            for _ in 0..ROUNDS {
                // All requests are in flight before the first is answered.
                let mut replies = Vec::new();
                for _ in 0..THREADS {
                    let (request, written) = peer.request()?;
                    let Request { command, cookie, offset, len, .. } = request;
                    if command == command::WRITE {
                        assert_eq!(written, bytes_at(offset, len as usize));
                        replies.push((cookie, peer_reply(cookie)));
                    } else if structured {
                        let all = bytes_at(offset, len as usize);
                        let (first, second) = all.split_at(all.len() / 3);
                        let second_at = offset + first.len() as u64;
                        replies.push((cookie, data(cookie, 0, second_at, second)));
                        replies.push((cookie, data(cookie, 0, offset, first)));
                    } else {
                        let all = bytes_at(offset, len as usize);
                        replies.push((cookie, [peer_reply(cookie), all].concat()));
                    }
                }
                for at in (1..replies.len()).rev() {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    replies.swap(at, (random >> 33) as usize % (at + 1));
                }
                // The end of a reply in chunks comes last of all.
                let mut ends: Vec<u64> = replies.iter().map(|(cookie, _)| *cookie).collect();
                ends.sort_unstable();
                ends.dedup();
                let has_two = |cookie: u64| replies.iter().filter(|(of, _)| *of == cookie).count();
                let ends = ends.into_iter().filter(|cookie| has_two(*cookie) == 2);
                let ends = ends.map(|cookie| chunk(cookie, CHUNK_DONE, chunk::NONE, &[]));
                let bytes: Vec<u8> =
                    replies.iter().map(|(_, bytes)| bytes.clone()).chain(ends).flatten().collect();
                peer.send(bytes)?;
            }
            peer.acknowledge_all()
        });
        // Should a reply get lost, it fails instead of waiting.
        let options = NbdOptions { stall_timeout: SOON, ..single() };
        let client = &NbdClient::open(&server.address, options).unwrap();
        let request = |thread: usize, round: usize| {
            let (offset, len) = (thread as u64 * 65536, 512 * (1 + (thread + round) % 9));
            if thread.is_multiple_of(3) {
                return client.write_at(&bytes_at(offset, len), offset).unwrap();
            }
            let mut buffer = vec![0; len];
            client.read_at(&mut buffer, offset).unwrap();
            assert!(buffer == bytes_at(offset, len), "thread {thread}, round {round}");
        };
        for round in 0..ROUNDS {
            // Nobody comes later and reads for those who wait.
            std::thread::scope(|scope| {
                (0..THREADS).for_each(|thread| drop(scope.spawn(move || request(thread, round))));
            });
        }
    }
}

fn peer_reply(cookie: u64) -> Vec<u8> {
    nbd::SimpleReply { error: 0, cookie }.encode().to_vec()
}

#[test]
fn a_hole_in_a_read_is_zero() {
    let server = Scripted::serve(Said::default(), |peer| {
        let (request, _) = peer.request()?;
        peer.send(encode_hole_chunk(0, request.cookie, 512, 1024))?;
        peer.send(data(request.cookie, CHUNK_DONE, 0, &[3; 512]))?;
        peer.acknowledge_all()
    });
    let client = NbdClient::open(&server.address, single()).unwrap();
    let mut buffer = [9; 1536];
    client.read_at(&mut buffer, 0).unwrap();
    assert!(buffer[..512] == [3; 512] && buffer[512..] == [0; 1024]);
}

#[test]
fn a_block_status_is_asked_for_once_and_again_after_a_write() {
    let server = Scripted::serve(Said::default(), |peer| {
        for flags in [state::HOLE | state::ZERO, 0] {
            let (request, _) = peer.request()?;
            assert_eq!((request.command, request.offset), (command::BLOCK_STATUS, 0));
            assert_eq!(u64::from(request.len), DISK);
            let list = [(65536, flags), (4096, 0), (u32::MAX, state::HOLE)];
            let list = list.map(|(len, flags)| nbd::Extent { len, flags });
            let status = encode_status(CONTEXT, &list);
            peer.send(chunk(request.cookie, CHUNK_DONE, chunk::BLOCK_STATUS, &status))?;
            let (request, _) = peer.request()?;
            assert_eq!(request.command, command::WRITE);
            peer.simple(request.cookie, 0)?;
        }
        let (request, _) = peer.request()?;
        let status = encode_status(CONTEXT + 1, &[nbd::Extent { len: 512, flags: 0 }]);
        peer.send(chunk(request.cookie, CHUNK_DONE, chunk::BLOCK_STATUS, &status))?;
        peer.drain().map(drop)
    });
    let client = NbdClient::open(&server.address, single()).unwrap();
    let extent = |len_bytes, content| Extent { len_bytes, content };
    assert_eq!(client.extent_at(0).unwrap(), extent(65536, Content::Zero));
    assert_eq!(client.extent_at(512).unwrap(), extent(65024, Content::Zero));
    let rest = extent(DISK - 65536, Content::Data);
    assert_eq!(client.extent_at(65536).unwrap(), rest, "a hole without zeroes is data");
    client.write_at(&[1; 512], 0).unwrap();
    assert_eq!(client.extent_at(0).unwrap(), extent(DISK, Content::Data));
    client.write_at(&[1; 512], 0).unwrap();
    let error = client.extent_at(0).unwrap_err();
    assert!(error.to_string().contains("context 8"), "{error}");
}

#[test]
fn what_a_server_cannot_do_is_done_otherwise_or_left() {
    let flags = transmission_flag::HAS_FLAGS;
    let said = Said { flags, structured: false, ..Said::default() };
    let server = Scripted::serve(said, |peer| {
        let (request, written) = peer.request()?;
        assert_eq!((request.command, request.offset), (command::WRITE, 512));
        assert!(written == [0; 2048]);
        peer.simple(request.cookie, 0)?;
        let (request, _) = peer.request()?;
        assert_eq!(request.command, command::DISCONNECT);
        Ok(())
    });
    let client = NbdClient::open(&server.address, single()).unwrap();
    client.write_zeroes(512, 2048, true).unwrap();
    client.discard(0, DISK).unwrap();
    client.flush().unwrap();
    let all = Extent { len_bytes: DISK - 512, content: Content::Data };
    assert_eq!(client.extent_at(512).unwrap(), all);
    for error in [
        client.write_at(&[0; 1024], DISK - 512).unwrap_err(),
        client.discard(u64::MAX, 2).unwrap_err(),
        client.extent_at(DISK).unwrap_err(),
    ] {
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
    }
    drop(client);
    server.end().unwrap();
}

#[test]
fn a_reply_with_any_bit_flipped_ends_in_a_result() {
    // A read in three chunks with an error in it, and a block status after it.
    let valid = |read: u64, status: u64| {
        let error = ErrorPayload { errno: 5, message: "x".into(), offset: Some(512) };
        let extents = [nbd::Extent { len: 4096, flags: 0 }, nbd::Extent { len: 512, flags: 3 }];
        [
            data(read, 0, 0, &[1; 64]),
            encode_hole_chunk(0, read, 64, 448).to_vec(),
            chunk(read, CHUNK_DONE, error.kind(), &error.encode()),
            chunk(status, CHUNK_DONE, chunk::BLOCK_STATUS, &encode_status(CONTEXT, &extents)),
        ]
        .concat()
    };
    let len = valid(1, 2).len();
    let server = Scripted::start(move |peer, number| {
        peer.handshake(Said::default())?;
        let mut bytes = valid(1, 2);
        bytes[number / 8] ^= 1 << (number % 8);
        peer.send(bytes)?;
        peer.stream.shutdown(std::net::Shutdown::Write)
    });
    let began = Instant::now();
    for bit in 0..len * 8 {
        let client = NbdClient::open(&server.address, single()).unwrap();
        let read = client.read_at(&mut [0; 512], 0);
        assert!(read.is_err(), "bit {bit}: it is an error, or the connection is lost");
        let _ = client.extent_at(0);
    }
    assert!(began.elapsed() < 3 * SOON);
}

#[test]
fn a_long_write_is_in_flight_as_a_whole_and_fails_with_any_of_its_parts() {
    const PIECE: u64 = 128 << 10;
    let server = Scripted::serve(Said::default(), |peer| {
        for fails in [false, true] {
            let mut requests: Vec<_> = (0..8).map(|_| peer.request().unwrap()).collect();
            for (at, (request, written)) in requests.iter().enumerate() {
                // The first is shorter, so that the others are cut at multiples.
                let start = if at == 0 { 512 } else { at as u64 * PIECE };
                assert_eq!((request.offset, request.command), (start, command::WRITE));
                assert!(*written == bytes_at(start, request.len as usize));
            }
            requests.reverse();
            for (request, _) in requests {
                let refused = fails && request.offset == 2 * PIECE;
                match (refused, request.offset / PIECE % 2) {
                    (true, _) => {
                        let error =
                            ErrorPayload { errno: 28, message: "full".into(), offset: None };
                        let payload = error.encode();
                        peer.send(chunk(request.cookie, CHUNK_DONE, error.kind(), &payload))?;
                    }
                    (false, 0) => peer.simple(request.cookie, 0)?,
                    (false, _) => {
                        peer.send(chunk(request.cookie, CHUNK_DONE, chunk::NONE, &[]))?;
                    }
                }
            }
        }
        // And a reply to one of them twice.
        let requests: Vec<_> = (0..8).map(|_| peer.request().unwrap().0).collect();
        peer.simple(requests[3].cookie, 0)?;
        peer.simple(requests[3].cookie, 0)?;
        peer.drain().map(drop)
    });
    let client = NbdClient::open(&server.address, single()).unwrap();
    let bytes = bytes_at(512, DISK as usize - 512);
    client.write_at(&bytes, 512).unwrap();
    let error = client.write_at(&bytes, 512).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert!(error.to_string().contains("131072 bytes at 262144"), "{error}");
    let error = client.write_at(&bytes, 512).unwrap_err();
    assert!(error.to_string().contains("not in flight"), "{error}");
}
