//! Servers that do not shake hands as they should.

use super::scripted::*;
use super::*;
use crate::block::nbd::protocol::{
    BlockSizes, FLAG_FIXED_NEWSTYLE, GREETING_MAGIC, Greeting, Info, MetaContext, OptionReply,
    option, reply,
};
use std::time::Instant;

type Script = fn(&mut Peer) -> io::Result<()>;

fn refused_with(options: NbdOptions, script: Script) -> String {
    let server = Scripted::start(move |peer, _| script(peer));
    let began = Instant::now();
    let error = NbdClient::open(&server.address, options).unwrap_err();
    assert!(began.elapsed() < SOON);
    let error = text(&error);
    assert!(error.starts_with("cannot use nbd+unix:///disk?socket=") && error.len() < 6000);
    error
}

fn go_with(peer: &mut Peer, said: Said) -> io::Result<()> {
    peer.handshake(said)?;
    peer.drain().map(drop)
}

fn size(len_bytes: u64) -> Said {
    Said { len_bytes, ..Said::default() }
}

fn blocks(min: u32, preferred: u32, max: u32) -> Said {
    Said { sizes: Some(BlockSizes { min, preferred, max }), ..Said::default() }
}

#[test]
fn a_server_that_lies_is_refused_with_a_reason() {
    let cases: &[(&str, Script)] = &[
        ("closed the connection", |_| Ok(())),
        ("the server's greeting begins with 0x5353482d", |peer| {
            peer.send("SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
        }),
        // The oldstyle handshake: another second magic number.
        ("begins with 0x420281861253", |peer| {
            let magics = [GREETING_MAGIC, 0x0000_4202_8186_1253].map(u64::to_be_bytes).concat();
            peer.send([magics, vec![0; 136]].concat())
        }),
        ("fixed newstyle", |peer| peer.send(Greeting { flags: 2 }.encode())),
        ("begins with 0x6e6f7065", |peer| {
            peer.greet()?;
            peer.option()?;
            peer.send("nope, nope, nope, nope")
        }),
        ("NBD_OPT_STRUCTURED_REPLY with a reply to NBD_OPT_GO", |peer| {
            peer.greet()?;
            peer.option()?;
            peer.answer(option::GO, reply::ACK, &[])
        }),
        ("with the unknown kind 2", |peer| {
            peer.greet()?;
            peer.option()?;
            peer.answer(option::STRUCTURED_REPLY, reply::SERVER, &[0; 4])
        }),
        ("4294967295 bytes; at most 65536", |peer| {
            peer.until_go(true)?;
            let (option, kind, len) = (option::GO, reply::ERR_UNKNOWN, u32::MAX);
            peer.send(OptionReply { option, kind, len }.encode())
        }),
        ("answers NBD_OPT_GO without end", |peer| {
            peer.until_go(true)?;
            loop {
                peer.info(&Info::Export { len_bytes: DISK, flags: FLAGS })?;
            }
        }),
        ("does not say how large", |peer| {
            peer.until_go(false)?;
            peer.answer(option::GO, reply::ACK, &[])
        }),
        ("cut short", |peer| {
            peer.until_go(false)?;
            peer.answer(option::GO, reply::INFO, &[0, 0, 0, 0])
        }),
        ("no export \"disk\" (it says \"who?\")", |peer| {
            peer.until_go(true)?;
            peer.answer(option::GO, reply::ERR_UNKNOWN, b"who?")
        }),
        ("wants TLS", |peer| {
            peer.greet()?;
            peer.option()?;
            peer.answer(option::STRUCTURED_REPLY, reply::ERR_TLS_REQD, b"")
        }),
        ("does not know NBD_OPT_GO", |peer| {
            peer.until_go(true)?;
            peer.answer(option::GO, reply::ERR_UNSUP, &[0xff; 4])
        }),
        ("NBD_OPT_GO: not allowed (it says \"not you\")", |peer| {
            peer.until_go(true)?;
            peer.answer(option::GO, reply::ERR_POLICY, b"not you")
        }),
        ("is empty", |peer| go_with(peer, size(0))),
        ("513 bytes, not a multiple of 512", |peer| go_with(peer, size(513))),
        ("more than any disk", |peer| go_with(peer, size(u64::MAX - 511))),
        ("whole blocks of 4096 bytes", |peer| go_with(peer, blocks(4096, 4096, 1 << 20))),
        ("at most 256 bytes", |peer| go_with(peer, blocks(1, 512, 256))),
        ("invalid value 3", |peer| go_with(peer, blocks(3, 4096, 1 << 20))),
        ("invalid value 131072", |peer| go_with(peer, blocks(1 << 17, 1 << 17, 1 << 20))),
        ("invalid value 512", |peer| go_with(peer, blocks(512, 4096, 0))),
    ];
    for (part, script) in cases {
        let error = refused_with(NbdOptions::default(), *script);
        assert!(error.contains(part), "expected {part:?}: {error}");
    }
}

#[test]
fn a_server_that_says_nothing_or_too_little_is_given_up_in_time() {
    let scripts: [Script; 2] = [
        |peer| peer.drain().map(drop),
        |peer| {
            // The second is a byte every few milliseconds: progress, but none that counts.
            let greeting = Greeting { flags: FLAG_FIXED_NEWSTYLE };
            for byte in greeting.encode() {
                peer.send([byte])?;
                peer.stream.set_read_timeout(Some(SHORT / 4))?;
                let mut none = [0];
                let _ = io::Read::read(&mut peer.stream, &mut none);
            }
            Ok(())
        },
    ];
    for script in scripts {
        let options = NbdOptions { connect_timeout: SHORT, ..NbdOptions::default() };
        let error = refused_with(options, script);
        assert!(error.contains("did not answer in time"), "{error}");
    }
}

#[test]
fn a_listener_that_never_accepts_is_given_up_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    socket.bind(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
    socket.listen(0).unwrap();
    let options = NbdOptions { connect_timeout: SHORT, ..NbdOptions::default() };
    // The queue takes one; the next waits to be queued.
    let _queued = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let began = Instant::now();
    let error = text(&NbdClient::open(&unix(&path, ""), options).unwrap_err());
    assert!(error.contains("cannot connect") && error.contains("in time"), "{error}");
    assert!(began.elapsed() >= SHORT && began.elapsed() < SOON);
}

#[test]
fn nobody_listens() {
    let folder = tempfile::tempdir().unwrap();
    let error = NbdClient::open(&unix(&folder.path().join("s"), ""), single()).unwrap_err();
    assert!(text(&error).contains("No such file"), "{}", text(&error));
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address: NbdAddress = format!("nbd://127.0.0.1:{free}/x").parse().unwrap();
    let error = NbdClient::open(&address, single()).unwrap_err();
    assert!(text(&error).contains("refused"), "{}", text(&error));
    let address: NbdAddress = "nbd://name.invalid/x".parse().unwrap();
    let error = NbdClient::open(&address, single()).unwrap_err();
    assert!(matches!(error.reason, OpenReason::Connect(_)), "{}", text(&error));
}

#[test]
fn what_a_server_says_is_what_the_disk_is() {
    let server = Scripted::serve(
        Said { flags: FLAGS | transmission_flag::READ_ONLY, ..blocks(1, 4096, 70_000) },
        Peer::acknowledge_all,
    );
    let client = NbdClient::open(&server.address, NbdOptions::default()).unwrap();
    assert_eq!((client.len_bytes(), client.read_only()), (DISK, true));
    assert_eq!((client.format(), client.location()), ("raw", server.address.to_string()));
    assert!(client.plain_file().is_none() && client.backing().is_none());
    assert_eq!(client.connection_count(), 1, "it does not say that it shares");
    drop(client);
    server.end().expect("it took leave");
}

#[test]
fn a_handshake_with_any_bit_flipped_or_cut_anywhere_ends_in_a_result() {
    let reply = |option, kind, data: &[u8]| {
        let len = u32::try_from(data.len()).unwrap();
        [&OptionReply { option, kind, len }.encode()[..], data].concat()
    };
    let context = MetaContext { id: CONTEXT, name: "base:allocation".into() }.encode();
    let export = Info::Export { len_bytes: DISK, flags: FLAGS }.encode();
    let sizes = Info::BlockSize(BlockSizes { min: 1, preferred: 4096, max: 1 << 25 }).encode();
    let valid = [
        Greeting { flags: FLAG_FIXED_NEWSTYLE }.encode().to_vec(),
        reply(option::STRUCTURED_REPLY, reply::ACK, &[]),
        reply(option::SET_META_CONTEXT, reply::META_CONTEXT, &context),
        reply(option::SET_META_CONTEXT, reply::ACK, &[]),
        reply(option::GO, reply::INFO, &export),
        reply(option::GO, reply::INFO, &sizes),
        reply(option::GO, reply::ACK, &[]),
    ]
    .concat();
    let len = valid.len();
    let server = Scripted::start(move |peer, number| {
        let mut bytes = valid.clone();
        match number.checked_sub(len * 8) {
            None => bytes[number / 8] ^= 1 << (number % 8),
            Some(cut) => bytes.truncate(cut),
        }
        peer.send(bytes)?;
        peer.stream.shutdown(std::net::Shutdown::Write)?;
        peer.drain().map(drop)
    });
    let began = Instant::now();
    let results: Vec<bool> =
        (0..len * 9).map(|_| NbdClient::open(&server.address, single()).is_ok()).collect();
    assert!(began.elapsed() < 3 * SOON);
    let (flipped, cut) = results.split_at(len * 8);
    assert!(cut.iter().all(|opened| !opened), "none of them is whole");
    // What is ignored may be anything: flags, the context's number, most bits of sizes.
    let refused = flipped.iter().filter(|opened| !**opened).count();
    assert!(refused > len * 5, "{refused} of {}", len * 8);
}
