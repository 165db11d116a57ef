use super::*;
use proptest::prelude::*;

#[test]
fn headers_have_the_bytes_of_the_specification() {
    let greeting = Greeting { flags: FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES };
    assert_eq!(&greeting.encode(), b"NBDMAGICIHAVEOPT\0\x03");
    assert_eq!(Greeting::decode(&greeting.encode()), Ok(greeting));
    let header = OptionHeader { option: option::GO, len: 0x102 };
    assert_eq!(&header.encode(), b"IHAVEOPT\0\0\0\x07\0\0\x01\x02");
    // Older versions of the specification have other numbers; clients have these.
    let metadata = [option::LIST_META_CONTEXT, option::SET_META_CONTEXT, option::EXTENDED_HEADERS];
    assert_eq!(metadata, [9, 10, 11]);
    let reply = OptionReply { option: 7, kind: reply::ERR_UNKNOWN, len: 3 };
    let bytes = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\x80\0\0\x06\0\0\0\x03";
    assert_eq!((&reply.encode(), reply.is_error()), (bytes, true));
    let request = Request { flags: 1, command: 6, cookie: 0x0102, offset: 0x0300, len: 0x0400 };
    let bytes = b"\x25\x60\x95\x13\0\x01\0\x06\0\0\0\0\0\0\x01\x02\0\0\0\0\0\0\x03\0\0\0\x04\0";
    assert_eq!(&request.encode(), bytes);
    let simple = SimpleReply { error: errno::EIO, cookie: 9 };
    assert_eq!(&simple.encode(), b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\0\0\0\0\x09");
    let data = encode_data_chunk(CHUNK_DONE, 9, 0x1000, 512);
    let bytes = b"\x66\x8e\x33\xef\0\x01\0\x01\0\0\0\0\0\0\0\x09\0\0\x02\x08\0\0\0\0\0\0\x10\0";
    assert_eq!(&data, bytes);
    let hole = encode_hole_chunk(0, 9, 0x1000, 512);
    assert_eq!(&hole[16..], b"\0\0\0\x0c\0\0\0\0\0\0\x10\0\0\0\x02\0");
    assert_eq!(decode_hole(&hole[20..]), Ok((0x1000, 512)));
}

#[test]
fn what_is_encoded_decodes_to_the_same() {
    let meta =
        MetaRequest { export: "d0".into(), queries: vec![BASE_ALLOCATION.into(), "x".into()] };
    assert_eq!(MetaRequest::decode(&meta.encode()), Ok(meta));
    let wanted = InfoRequest { export: "ä".into(), wanted: vec![info::BLOCK_SIZE, 77] };
    assert_eq!(InfoRequest::decode(&wanted.encode()), Ok(wanted));
    let sizes = BlockSizes { min: 512, preferred: 4096, max: MAX_PAYLOAD_BYTES };
    let infos = [
        Info::Export { len_bytes: 1 << 40, flags: 0x1ff },
        Info::Name("disk".into()),
        Info::Description(String::new()),
        Info::BlockSize(sizes),
        Info::Other(9),
    ];
    for info in infos {
        assert_eq!(Info::decode(&info.encode()), Ok(info));
    }
    let entry = ServerEntry { name: "d0".into(), description: "the root disk".into() };
    assert_eq!(ServerEntry::decode(&entry.encode()), Ok(entry));
    let context = MetaContext { id: 3, name: format!("{QEMU_DIRTY_BITMAP}b") };
    assert_eq!(MetaContext::decode(&context.encode()), Ok(context));
    let extents = vec![Extent { len: 512, flags: 3 }, Extent { len: u32::MAX, flags: 0 }];
    assert_eq!(decode_status(&encode_status(7, &extents)), Ok((7, extents)));
    for offset in [None, Some(4096)] {
        let error = ErrorPayload { errno: errno::EIO, message: "broken".into(), offset };
        assert_eq!(ErrorPayload::decode(error.kind(), &error.encode()), Ok(error));
    }
    let chunk = ChunkHeader { flags: CHUNK_DONE, kind: chunk::ERROR, cookie: 5, len: 6 };
    assert_eq!(ChunkHeader::decode(&chunk.encode()), Ok(chunk));
    assert!(chunk.is_last() && chunk.is_error());
    let first = chunk.encode().first_chunk().copied().unwrap();
    assert_eq!(ReplyHeader::decode(&first), Ok(ReplyHeader::Chunk));
    let simple = SimpleReply { error: 0, cookie: 5 };
    assert_eq!(ReplyHeader::decode(&simple.encode()), Ok(ReplyHeader::Simple(simple)));
}

#[test]
fn lies_about_lengths_are_refused_before_anything_is_allocated() {
    let mut meta = MetaRequest { export: "d".into(), queries: Vec::new() }.encode();
    *meta.last_mut().unwrap() = 9;
    assert!(matches!(MetaRequest::decode(&meta), Err(ProtocolError::Short { .. })));
    let many = [&0_u32.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat();
    assert!(matches!(MetaRequest::decode(&many), Err(ProtocolError::TooMany { .. })));
    let long = [&u32::MAX.to_be_bytes()[..], b"d"].concat();
    assert!(matches!(InfoRequest::decode(&long), Err(ProtocolError::TooMany { .. })));
    let few = InfoRequest { export: String::new(), wanted: vec![1] }.encode();
    assert!(InfoRequest::decode(&few[..few.len() - 1]).is_err());
    assert!(InfoRequest::decode(&[&few[..], b"x"].concat()).is_err());
    let not_text = [&1_u32.to_be_bytes()[..], b"\xff\0\0"].concat();
    assert!(matches!(InfoRequest::decode(&not_text), Err(ProtocolError::Text { .. })));
    assert!(decode_status(&encode_status(1, &[])).is_err());
    assert!(decode_status(&encode_status(1, &[Extent { len: 0, flags: 0 }])).is_err());
    assert!(ErrorPayload::decode(chunk::ERROR, &[0, 0, 0, 5, 0, 9, b'x']).is_err());
    for (min, preferred, max) in
        [(3, 4, 9), (512, 256, 9), (1 << 17, 1 << 17, 1 << 20), (512, 512, 1)]
    {
        let sizes = Info::BlockSize(BlockSizes { min, preferred, max });
        assert!(Info::decode(&sizes.encode()).is_err(), "{sizes:?}");
    }
    let text = "ä".repeat(MAX_STRING_BYTES);
    let error = ErrorPayload { errno: 5, message: text, offset: None };
    let back = ErrorPayload::decode(chunk::ERROR, &error.encode()).unwrap();
    assert_eq!(back.message.len(), MAX_STRING_BYTES);
}

#[test]
fn errors_of_the_host_keep_their_meaning_across_the_wire() {
    for host in [libc::EPERM, libc::EIO, libc::ENOMEM, libc::EINVAL, libc::ENOSPC, libc::ESHUTDOWN]
    {
        let error = io_error(host);
        assert_eq!(error_of(errno_of(&error)).raw_os_error(), Some(host));
    }
    assert_eq!(errno_of(&io_error(libc::EDQUOT)), errno::ENOSPC);
    assert_eq!(errno_of(&io_error(libc::EROFS)), errno::EPERM);
    assert_eq!(errno_of(&std::io::ErrorKind::UnexpectedEof.into()), errno::EIO);
    assert_eq!(error_of(9999).raw_os_error(), Some(libc::EIO));
}

fn io_error(host: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(host)
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), kind: u16) {
        let _ = MetaRequest::decode(&bytes);
        let _ = InfoRequest::decode(&bytes);
        let _ = Info::decode(&bytes);
        let _ = ServerEntry::decode(&bytes);
        let _ = MetaContext::decode(&bytes);
        let _ = decode_status(&bytes);
        let _ = decode_hole(&bytes);
        let _ = ErrorPayload::decode(kind, &bytes);
        if let Some(first) = bytes.first_chunk() {
            let _ = Request::decode(first);
        }
        if let Some(first) = bytes.first_chunk() {
            let _ = ReplyHeader::decode(first);
        }
        if let Some(first) = bytes.first_chunk() {
            let _ = OptionReply::decode(first);
        }
    }
}
