//! Accesses through a real ring, to files and to pipes.

use super::*;
use crate::ram::{GuestAddress, PAGE_SIZE};
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use vm_memory::{Bytes, GuestMemoryRegion};

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 20), 1 << 20)]).unwrap()
}

/// A ring for a test, or `None` where io_uring is not available: then the test is skipped.
pub(crate) fn ring_or_skip<T>(ram: GuestRam, depth: u16) -> Option<Ring<T>> {
    Ring::new(ram, depth)
        .map_err(|error| ferry_tests::skip::skip(&format!("no io_uring here: {error}")))
        .ok()
}

fn ring(depth: u16) -> Option<Ring<u64>> {
    ring_or_skip(ram(), depth)
}

fn image(len: usize) -> Arc<File> {
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..len).map(|at| u8::try_from(at / 512 % 251).unwrap()).collect();
    file.write_all(&bytes).unwrap();
    Arc::new(file)
}

fn segments(ram: &GuestRam, pieces: &[(u64, usize)]) -> Segments {
    let mut segments = Segments::default();
    for (address, len) in pieces {
        assert!(segments.push(ram, GuestAddress(*address), *len));
    }
    segments
}

fn transfer(file: &Arc<File>, operation: Operation, offset_bytes: u64) -> Transfer {
    Transfer { access: Access::to(file.clone(), 1), operation, offset_bytes }
}

fn finish(ring: &mut Ring<u64>) -> Vec<(u64, io::Result<()>)> {
    let mut ended = Vec::new();
    while ring.in_flight() > 0 {
        ring.wait().unwrap();
        while let Some(Completion { token, end, .. }) = ring.next_completion(false) {
            let result = match end {
                End::Done => Ok(()),
                End::Failed(error) => Err(error),
                End::Interrupted => panic!("access {token} was not to be interrupted"),
            };
            ended.push((token, result));
        }
    }
    ended.sort_by_key(|(token, _)| *token);
    ended
}

fn marked(ram: &GuestRam, address: u64) -> bool {
    let region = ram.find_region(GuestAddress(address)).unwrap();
    let offset = address - region.start_addr().0;
    region.bitmap().dirty_at(usize::try_from(offset).unwrap())
}

#[test]
fn large_reads_beside_each_other_all_find_their_own_bytes() {
    let (Some(mut ring), file) = (ring(4), image(4 * MUCH_TO_COPY)) else { return };
    let ram = ring.ram.clone();
    for round in 0..8u64 {
        let len = MUCH_TO_COPY as u64;
        // In reverse, so that no block ends up in its place by accident.
        for part in 0..4 {
            let read = Operation::Read(segments(&ram, &[(part * len, MUCH_TO_COPY)]));
            assert!(ring.push(transfer(&file, read, (3 - part) * len), part).is_ok());
        }
        let ended = finish(&mut ring);
        assert!(ended.iter().all(|(_, result)| result.is_ok()), "round {round}: {ended:?}");
        assert_eq!(ended.len(), 4);
        for at in (0..4 * len).step_by(512) {
            let from = (3 - at / len) * len + at % len;
            let expected = u8::try_from(from / 512 % 251).unwrap();
            assert_eq!(ram.read_obj::<u8>(GuestAddress(at)).unwrap(), expected, "at {at:#x}");
            ram.write_obj(0xffu8, GuestAddress(at)).unwrap();
        }
    }
}

#[test]
fn a_read_fills_pieces_of_ram_across_regions_and_marks_them_only() {
    let (Some(mut ring), file) = (ring(4), image(64 << 10)) else { return };
    let ram = ring.ram.clone();
    let read = segments(&ram, &[(0x3000, 512), ((1 << 20) - 512, 1024), (0x5100, 512)]);
    assert!(ring.push(transfer(&file, Operation::Read(read), 512), 7).is_ok());
    assert!(matches!(finish(&mut ring)[..], [(7, Ok(()))]));
    let sector = |address| ram.read_obj::<u8>(GuestAddress(address)).unwrap();
    let starts = [0x3000, (1 << 20) - 512, 1 << 20, 0x5100];
    assert_eq!(starts.map(sector), [1, 2, 3, 4]);
    let pages = [0x2000, 0x3000, 0x4000, 0x5000, (1 << 20) - PAGE_SIZE, 1 << 20];
    assert_eq!(pages.map(|page| marked(&ram, page)), [false, true, false, true, true, true]);
}

#[test]
fn many_writes_are_in_flight_and_mark_nothing() {
    let (Some(mut ring), file) = (ring(16), image(64 << 10)) else { return };
    let ram = ring.ram.clone();
    for index in 0..16u64 {
        let address = 0x1000 * (index + 1);
        let fill = [u8::try_from(index).unwrap() + 100; 512];
        ram.write_slice(&fill, GuestAddress(address)).unwrap();
    }
    ram.iter().for_each(|region| region.get_mmap().bitmap().reset());
    for index in 0..16u64 {
        let data = segments(&ram, &[(0x1000 * (index + 1), 512)]);
        let write = Operation::Write { data, durable: index == 3 };
        assert!(ring.push(transfer(&file, write, 1024 * index), index).is_ok());
    }
    assert!(!ring.has_room());
    assert!(ring.push(transfer(&file, Operation::Flush, 0), 99).is_err(), "it is full");
    assert!(finish(&mut ring).iter().all(|(_, result)| result.is_ok()));
    assert!(ring.push(transfer(&file, Operation::Flush, 0), 16).is_ok());
    assert!(matches!(finish(&mut ring)[..], [(16, Ok(()))]));
    let mut back = vec![0; 64 << 10];
    std::os::unix::fs::FileExt::read_exact_at(&*file, &mut back, 0).unwrap();
    for index in 0..16 {
        let fill = u8::try_from(index).unwrap() + 100;
        assert!(back[1024 * index..][..512].iter().all(|byte| *byte == fill), "write {index}");
    }
    assert!((0..32).all(|page| !marked(&ram, page * PAGE_SIZE)));
}

#[test]
fn a_file_that_shrank_fails_the_read_after_its_end() {
    let (Some(mut ring), file) = (ring(4), image(4096)) else { return };
    let ram = ring.ram.clone();
    let read = segments(&ram, &[(0x1000, 4096), (0x8000, 4096)]);
    assert!(ring.push(transfer(&file, Operation::Read(read), 0), 1).is_ok());
    let ended = finish(&mut ring);
    let error = ended[0].1.as_ref().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert!(marked(&ram, 0x1000) && marked(&ram, 0x8000), "whatever may have been written");
}

#[test]
fn an_access_that_comes_in_parts_is_put_together() {
    let Some(mut ring) = ring(4) else { return };
    let ram = ring.ram.clone();
    // A pipe returns what it has; the rest is waited for.
    let (reader, mut writer) = io::pipe().unwrap();
    let file = Arc::new(File::from(std::os::fd::OwnedFd::from(reader)));
    let read = segments(&ram, &[(0x1000, 100), (0x2000, 100)]);
    writer.write_all(&[1; 150]).unwrap();
    assert!(ring.push(transfer(&file, Operation::Read(read), 0), 1).is_ok());
    ring.wait().unwrap();
    assert!(ring.next_completion(true).is_none(), "a short access goes on to its end");
    ring.submit().unwrap();
    assert_eq!(ring.in_flight(), 1);
    writer.write_all(&[2; 50]).unwrap();
    assert!(matches!(finish(&mut ring)[..], [(1, Ok(()))]));
    assert_eq!(ram.read_obj::<u8>(GuestAddress(0x2000 + 49)).unwrap(), 1);
    assert_eq!(ram.read_obj::<u8>(GuestAddress(0x2000 + 50)).unwrap(), 2);
}

#[test]
fn what_is_abandoned_in_flight_is_waited_for_and_marked() {
    let Some(mut ring) = ring(4) else { return };
    let ram = ring.ram.clone();
    let (reader, mut writer) = io::pipe().unwrap();
    let file = Arc::new(File::from(std::os::fd::OwnedFd::from(reader)));
    let read = segments(&ram, &[(0x1000, 512)]);
    assert!(ring.push(transfer(&file, Operation::Read(read), 0), 1).is_ok());
    ring.submit().unwrap();
    let (sender, dropped) = std::sync::mpsc::channel();
    let dropping = std::thread::spawn(move || {
        drop(ring);
        sender.send(()).unwrap();
    });
    let early = dropped.recv_timeout(std::time::Duration::from_millis(50));
    assert!(early.is_err(), "one is in flight");
    writer.write_all(&[3; 512]).unwrap();
    dropping.join().unwrap();
    assert_eq!(ram.read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 3);
    assert!(marked(&ram, 0x1000));
}

#[test]
fn what_the_kernel_would_refuse_is_given_back() {
    let (Some(mut ring), file) = (ring(4), image(64 << 10)) else { return };
    let ram = ring.ram.clone();
    let many = vec![(0x1000, 1); MOST_PIECES + 1];
    for (pieces, alignment) in
        [(&many[..], 1), (&[], 1), (&[(0x1001, 512)], 512), (&[(0x1000, 511)], 512)]
    {
        let operation = Operation::Read(segments(&ram, pieces));
        let access = Access::to(file.clone(), alignment);
        let given = Transfer { access, operation, offset_bytes: 0 };
        let (back, token) = ring.push(given, 5).unwrap_err();
        assert_eq!((back.operation, token), (Operation::Read(segments(&ram, pieces)), 5));
    }
    assert_eq!(ring.in_flight(), 0);
}
