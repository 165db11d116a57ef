//! The table of exports: adding, removing, and who uses what.

use super::*;

#[test]
fn what_qemu_refuses_is_refused_in_its_words() {
    let (fixture, node, _) = Fixture::of_memory(MIB);
    let server = fixture.server();
    let said = |export: Export| server.add(export).unwrap_err().to_string();
    assert_eq!(said(export("d", &node, true)), "Block export id 'd' is already in use");
    let other_id = Export { id: "e".into(), ..export("d", &node, true) };
    assert_eq!(said(other_id), "NBD server already has export named 'd'");
    let read_only = BlockNode::new("r", Box::new(MemoryDisk::new(MIB).into_read_only()));
    let read_only = Arc::new(read_only);
    let refused = said(export("r", &read_only, true));
    assert_eq!(refused, "Cannot export read-only node as writable");
    let with = |bitmap: &BitmapName, writable| Export {
        bitmaps: vec![bitmap.clone()],
        ..export("b", &node, writable)
    };
    let missing = BitmapName::new("none").unwrap();
    assert_eq!(said(with(&missing, false)), "Bitmap 'none' is not found");
    let bitmap = add_bitmap(&node, "b0", true);
    let refused = said(with(&bitmap, false));
    assert_eq!(refused, "Enabled bitmap 'b0' incompatible with readonly export");
    let twice =
        Export { bitmaps: vec![bitmap.clone(), bitmap.clone()], ..export("b", &node, true) };
    assert_eq!(said(twice), "Bitmap 'b0' is named twice");
    let long = Export { description: "x".repeat(5000), ..export("b", &node, true) };
    assert!(said(long).starts_with("description 'xxxx"));
    let nul = Export { name: "a\0b".into(), ..export("b", &node, true) };
    assert_eq!(said(nul), "export name must not contain NUL");
    assert!(!node.bitmaps().info()[0].busy, "a refused export holds nothing");
    node.bitmaps().disable(&bitmap).unwrap();
    server.add(with(&bitmap, false)).unwrap();
    assert!(node.bitmaps().info()[0].busy);
    let again = Export { id: "c".into(), name: "c".into(), ..with(&bitmap, false) };
    let refused = said(again);
    assert_eq!(refused, "Bitmap 'b0' is currently in use by another operation and cannot be used");
    let unknown = server.remove("x", RemoveMode::Hard).unwrap_err();
    assert_eq!(unknown.to_string(), "Export 'x' is not found");
}

#[test]
fn an_export_that_is_removed_frees_its_bitmaps_and_is_reported_once() {
    let (fixture, node, _) = Fixture::of_memory(MIB);
    let bitmap = add_bitmap(&node, "b", false);
    let with = Export { bitmaps: vec![bitmap], ..export("e", &node, false) };
    fixture.server().add(with).unwrap();
    let mut client = Client::using(&fixture.socket(), "e", &[]);
    let in_use = fixture.server().remove("e", RemoveMode::Safe).unwrap_err();
    assert_eq!(in_use.to_string(), "export 'e' still in use");
    assert_eq!(in_use.hint(), Some("Use mode='hard' to force client disconnect"));
    assert!(client.read(0, 512).is_ok(), "a refused removal harms nobody");
    fixture.server().remove("e", RemoveMode::Hard).unwrap();
    assert!(client.is_closed());
    assert_eq!(fixture.deleted.recv_timeout(SOON).unwrap(), "e");
    assert!(!node.bitmaps().info()[0].busy);
    let left: Vec<_> = fixture.server().exports().into_iter().map(|export| export.id).collect();
    assert_eq!(left, ["d"]);
    fixture.server().remove("d", RemoveMode::Safe).unwrap();
    assert_eq!(fixture.deleted.recv_timeout(SOON).unwrap(), "d");
    assert!(fixture.deleted.try_recv().is_err());
}

#[test]
fn an_export_whose_disk_hangs_is_shutting_down_until_the_disk_answers() {
    let (fixture, node, script) = Fixture::of_memory(MIB);
    let mut client = Client::using(&fixture.socket(), "d", &[]);
    script.hold(true);
    client.ask(0, command::WRITE, 0, 512);
    client.put(&[7; 512]);
    script.wait_until_held();
    fixture.server().remove("d", RemoveMode::Hard).unwrap();
    let info = &fixture.server().exports()[0];
    assert!(info.shutting_down && info.clients == 1);
    let again = fixture.server().add(export("d", &node, false)).unwrap_err();
    assert_eq!(again.to_string(), "Block export id 'd' is already in use");
    assert!(fixture.deleted.try_recv().is_err());
    let mut late = Client::greeted(&fixture.socket());
    let request = InfoRequest { export: "d".into(), wanted: Vec::new() };
    assert_eq!(late.option(option::GO, &request.encode())[0].0, reply::ERR_UNKNOWN);
    script.hold(false);
    assert_eq!(fixture.deleted.recv_timeout(SOON).unwrap(), "d");
    assert!(fixture.server().exports().is_empty());
}

#[test]
fn a_server_that_is_dropped_ends_its_connections_in_whatever_state_they_are() {
    let (mut fixture, _, _) = Fixture::of_memory(64 * MIB);
    let mut silent = Client::connect(&fixture.socket());
    let mut choosing = Client::greeted(&fixture.socket());
    let mut idle = Client::using(&fixture.socket(), "d", &[]);
    let mut deaf = Client::simple(&fixture.socket(), "d");
    deaf.ask(0, command::READ, 0, MAX_PAYLOAD_BYTES);
    let mut half = Client::using(&fixture.socket(), "d", &[]);
    half.ask(0, command::WRITE, 0, 4096);
    half.put(&[1; 100]);
    fixture.wait_for_connections(5);
    drop(fixture.server.take());
    for client in [&mut silent, &mut choosing, &mut idle, &mut deaf, &mut half] {
        assert!(client.is_closed());
    }
    assert_eq!(fixture.deleted.recv_timeout(SOON).unwrap(), "d");
    assert!(UnixStream::connect(fixture.socket()).is_err(), "nobody listens any more");
}

#[test]
fn a_server_that_is_closed_takes_no_exports() {
    let (fixture, node, _) = Fixture::of_memory(MIB);
    fixture.server().close();
    let refused = fixture.server().add(export("e", &node, true)).unwrap_err();
    assert_eq!(refused.to_string(), "NBD server not running");
}
