//! Options and their replies.

use super::*;

fn wants(export: &str, wanted: &[u16]) -> Vec<u8> {
    InfoRequest { export: export.into(), wanted: wanted.to_vec() }.encode()
}

fn queries(export: &str, queries: &[&str]) -> Vec<u8> {
    let queries = queries.iter().map(|&query| query.to_owned()).collect();
    MetaRequest { export: export.into(), queries }.encode()
}

fn names(replies: &[(u32, Vec<u8>)]) -> Vec<String> {
    let (last, contexts) = replies.split_last().unwrap();
    assert_eq!(*last, (reply::ACK, Vec::new()));
    contexts.iter().map(|(_, data)| MetaContext::decode(data).unwrap().name).collect()
}

#[test]
fn an_export_is_listed_and_described() {
    let (fixture, node, _) = Fixture::of_memory(MIB);
    let described = Export { description: "the other one".into(), ..export("e", &node, false) };
    fixture.server().add(described).unwrap();
    let mut client = Client::greeted(&fixture.socket());
    let list = client.option(option::LIST, &[]);
    let list: Vec<_> =
        list[..2].iter().map(|(_, data)| ServerEntry::decode(data).unwrap()).collect();
    assert_eq!((&*list[0].name, &*list[0].description), ("d", ""));
    assert_eq!((&*list[1].name, &*list[1].description), ("e", "the other one"));
    let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 99];
    let replies = client.option(option::INFO, &wants("e", &wanted));
    let (last, infos) = replies.split_last().unwrap();
    assert_eq!(last.0, reply::ACK);
    let infos: Vec<_> = infos.iter().map(|(_, data)| Info::decode(data).unwrap()).collect();
    let flags = transmission_flag::HAS_FLAGS
        | transmission_flag::READ_ONLY
        | transmission_flag::SEND_FLUSH
        | transmission_flag::SEND_FUA
        | transmission_flag::CAN_MULTI_CONN;
    let sizes = BlockSizes { min: 512, preferred: 4096, max: 32 << 20 };
    let expected = [
        Info::Export { len_bytes: MIB, flags },
        Info::Name("e".into()),
        Info::Description("the other one".into()),
        Info::BlockSize(sizes),
    ];
    assert_eq!(infos, expected);
    client.option(option::STRUCTURED_REPLY, &[]);
    let replies = client.option(option::INFO, &wants("d", &[]));
    let Info::Export { flags, .. } = Info::decode(&replies[0].1).unwrap() else { panic!() };
    let writable = transmission_flag::SEND_TRIM
        | transmission_flag::SEND_WRITE_ZEROES
        | transmission_flag::SEND_DF;
    assert_eq!(flags & (writable | transmission_flag::READ_ONLY), writable);
    client.go("d");
}

#[test]
fn the_oldest_way_to_choose_an_export_works_with_and_without_zeroes() {
    let (fixture, _, _) = Fixture::of_memory(MIB);
    for (flags, zeroes) in [(1, EXPORT_NAME_ZEROES), (3, 0)] {
        let mut client = Client::connect(&fixture.socket());
        client.array::<{ Greeting::BYTES }>();
        client.put(&[0, 0, 0, flags]);
        client.put(&OptionHeader { option: option::EXPORT_NAME, len: 1 }.encode());
        client.put(b"d");
        assert_eq!(client.array::<8>(), [0, 0, 0, 0, 0, 0x10, 0, 0]);
        client.array::<2>();
        assert_eq!(client.bytes(u32::try_from(zeroes).unwrap()), vec![0; zeroes]);
        assert_eq!(client.read(512, 512).unwrap(), [0; 512]);
    }
    let mut client = Client::greeted(&fixture.socket());
    client.put(&OptionHeader { option: option::EXPORT_NAME, len: 1 }.encode());
    client.put(b"x");
    assert!(client.is_closed(), "there is no way to refuse");
}

#[test]
fn options_that_cannot_be_done_are_refused_and_the_handshake_goes_on() {
    let (fixture, _, _) = Fixture::of_memory(MIB);
    let mut client = Client::greeted(&fixture.socket());
    let mut refused = |option, data: &[u8]| {
        let replies = client.option(option, data);
        assert_eq!(replies.len(), 1);
        let text = String::from_utf8(replies[0].1.clone()).unwrap();
        assert!(!text.is_empty());
        replies[0].0
    };
    assert_eq!(refused(option::STARTTLS, &[]), reply::ERR_UNSUP);
    assert_eq!(refused(option::EXTENDED_HEADERS, &[]), reply::ERR_UNSUP);
    assert_eq!(refused(4711, b"whatever"), reply::ERR_UNSUP);
    assert_eq!(refused(option::LIST, b"x"), reply::ERR_INVALID);
    assert_eq!(refused(option::STRUCTURED_REPLY, b"x"), reply::ERR_INVALID);
    assert_eq!(refused(option::GO, b""), reply::ERR_INVALID);
    assert_eq!(refused(option::GO, &wants("x", &[])), reply::ERR_UNKNOWN);
    assert_eq!(refused(option::INFO, &wants("", &[])), reply::ERR_UNKNOWN);
    let set = option::SET_META_CONTEXT;
    assert_eq!(refused(set, &queries("d", &[BASE_ALLOCATION])), reply::ERR_INVALID);
    client.option(option::STRUCTURED_REPLY, &[]);
    let mut refused = |option, data: &[u8]| client.option(option, data)[0].0;
    assert_eq!(refused(set, &queries("x", &[])), reply::ERR_UNKNOWN);
    let mut lie = queries("d", &[BASE_ALLOCATION]);
    lie.pop();
    assert_eq!(refused(set, &lie), reply::ERR_INVALID);
    let many = vec!["x"; 257];
    assert_eq!(refused(set, &queries("d", &many)), reply::ERR_INVALID);
    client.go("d");
    client.structured = true;
    assert_eq!(client.command(0, command::BLOCK_STATUS, 0, 512), errno::EINVAL);
}

#[test]
fn metadata_contexts_are_listed_and_selected_by_name() {
    let (fixture, node, _) = Fixture::of_memory(MIB);
    let bitmaps = vec![add_bitmap(&node, "b0", false), add_bitmap(&node, "b1", false)];
    fixture.server().add(Export { bitmaps, ..export("e", &node, false) }).unwrap();
    let mut client = Client::greeted(&fixture.socket());
    client.option(option::STRUCTURED_REPLY, &[]);
    let mut list =
        |asked: &[&str]| names(&client.option(option::LIST_META_CONTEXT, &queries("e", asked)));
    let (b0, b1) = ("qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1");
    assert_eq!(list(&[]), [BASE_ALLOCATION, b0, b1]);
    assert_eq!(list(&["base:"]), [BASE_ALLOCATION]);
    assert_eq!(list(&["qemu:"]), [b0, b1]);
    assert_eq!(list(&["qemu:dirty-bitmap:"]), [b0, b1]);
    assert_eq!(list(&[b1, "x-other:thing", "qemu:dirty-bitmap:b", ""]), [b1]);
    let selected = client.select("e", &["qemu:", b1, BASE_ALLOCATION, "qemu:dirty-bitmap:b2"]);
    let ids: Vec<_> =
        selected[..2].iter().map(|(_, data)| MetaContext::decode(data).unwrap().id).collect();
    assert_eq!(names(&selected), [BASE_ALLOCATION, b1]);
    assert!(ids[0] != ids[1] && ids.iter().all(|id| *id != 0));
    assert_eq!(names(&client.select("e", &["qemu:dirty-bitmap:none"])), Vec::<String>::new());
    assert_eq!(names(&client.select("e", &[b0])), [b0]);
    client.go("e");
    client.structured = true;
    let parts = client.status(0, 0, 4096);
    assert_eq!(parts, [Part::Status(2, vec![Extent { len: 4096, flags: 0 }])]);
    // Contexts of one export are none of another.
    let mut client = Client::greeted(&fixture.socket());
    client.option(option::STRUCTURED_REPLY, &[]);
    client.select("e", &[b0]);
    client.go("d");
    assert_eq!(client.command(0, command::BLOCK_STATUS, 0, 512), errno::EINVAL);
}

#[test]
fn a_client_that_aborts_is_answered_and_let_go() {
    let (fixture, _, _) = Fixture::of_memory(MIB);
    let mut client = Client::greeted(&fixture.socket());
    assert_eq!(client.option(option::ABORT, &[]), [(reply::ACK, Vec::new())]);
    assert!(client.is_closed());
    fixture.wait_for_connections(0);
}
