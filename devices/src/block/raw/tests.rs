//! What a raw image has to do as a disk.

use super::*;
use std::io::Write;

fn image(len: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&vec![0; len]).unwrap();
    file
}

#[test]
fn one_writer_or_many_readers_hold_an_image() {
    let file = image(512);
    let writer = RawFile::open(file.path(), false, Cache::Writeback).unwrap();
    let other = RawFile::open(file.path(), false, Cache::Writeback).unwrap();
    let readers = [(); 2].map(|()| RawFile::open(file.path(), true, Cache::Writeback).unwrap());
    writer.lock().unwrap();
    writer.lock().unwrap();
    let error = other.lock().unwrap_err().to_string();
    assert!(error.contains("in use by another virtual machine"), "{error}");
    assert!(readers[0].lock().is_err());
    writer.unlock();
    assert!(readers.iter().all(|reader| reader.lock().is_ok()));
    assert!(other.lock().is_err());
}

/// Allocated bytes of the file.
fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// Here, and on a file system in memory, which has holes but cannot zero a range.
fn images(len: usize) -> Vec<tempfile::NamedTempFile> {
    let in_memory = tempfile::NamedTempFile::new_in("/dev/shm");
    let fill = |mut file: tempfile::NamedTempFile| {
        file.write_all(&vec![0xa5; len]).unwrap();
        file
    };
    std::iter::once(image(0)).chain(in_memory).map(fill).collect()
}

#[test]
fn zeroed_and_discarded_ranges_read_as_zeroes_and_nothing_else_changes() {
    type Zero = fn(&RawFile, u64, u64) -> io::Result<()>;
    let ways: [Zero; 4] = [
        RawFile::discard,
        |raw, offset, len| raw.write_zeroes(offset, len, true),
        |raw, offset, len| raw.write_zeroes(offset, len, false),
        |raw, offset, len| write_zeroes_as_data(raw, offset, len),
    ];
    let size = 4 << 20;
    for (way, zero) in ways.iter().enumerate() {
        for file in images(size) {
            let raw = RawFile::open(file.path(), false, Cache::Writeback).unwrap();
            let (start, end) = (512 * 3, size - 512);
            zero(&raw, start as u64, (end - start) as u64).unwrap();
            let mut expected = vec![0xa5; size];
            expected[start..end].fill(0);
            assert!(std::fs::read(file.path()).unwrap() == expected, "way {way}");
        }
    }
}

#[test]
fn space_is_freed_only_where_the_guest_allows_it() {
    for (may_unmap, freed) in [(true, true), (false, false)] {
        for file in images(1 << 20) {
            let raw = RawFile::open(file.path(), false, Cache::Writeback).unwrap();
            raw.write_zeroes(0, 1 << 20, may_unmap).unwrap();
            raw.flush().unwrap();
            assert_eq!(allocated(file.path()) == 0, freed, "may unmap: {may_unmap}");
        }
    }
}

#[test]
fn direct_io_takes_buffers_from_anywhere() {
    // Where the host's file systems have no direct I/O, the refusal is what is tested.
    for file in images(64 << 10) {
        let raw = match RawFile::open(file.path(), false, Cache::None) {
            Ok(raw) => raw,
            Err(error) => {
                assert!(error.to_string().contains("cache=writeback"), "{error}");
                continue;
            }
        };
        let mut buffer = AlignedBuffer::new(8 << 10);
        for (start, len, offset) in [(0, 4096, 0), (512, 512, 512), (1, 1024, 1536)] {
            buffer.fill(0x11);
            let piece = &mut buffer[start..start + len];
            raw.write_at(piece, offset).unwrap();
            piece.fill(0);
            raw.read_at(piece, offset).unwrap();
            assert!(piece.iter().all(|byte| *byte == 0x11), "{len} bytes at {start}");
        }
        raw.write_zeroes(512, 1024, false).unwrap();
        write_zeroes_as_data(&raw, 2048, 512).unwrap();
        raw.flush().unwrap();
        let mut expected = vec![0xa5; 64 << 10];
        expected[..4096].fill(0x11);
        expected[512..1536].fill(0);
        expected[2048..2560].fill(0);
        assert!(std::fs::read(file.path()).unwrap() == expected);
    }
}

#[test]
fn holes_are_found_and_data_is_never_called_a_hole() {
    for directory in [std::env::temp_dir(), "/dev/shm".into()] {
        let Ok(file) = tempfile::NamedTempFile::new_in(directory) else { continue };
        let size = 8 << 20;
        file.as_file().set_len(size).unwrap();
        let raw = RawFile::open(file.path(), false, Cache::Writeback).unwrap();
        let all = |content| Extent { len_bytes: size, content };
        assert_eq!(raw.extent_at(0).unwrap(), all(Content::Zero));
        raw.write_at(&[1; 4096], 2 << 20).unwrap();
        raw.write_at(&[1; 4096], size - 4096).unwrap();
        let (mut at, mut data) = (0, Vec::new());
        while at < size {
            let extent = raw.extent_at(at).unwrap();
            assert!(extent.len_bytes > 0 && at + extent.len_bytes <= size);
            if extent.content == Content::Data {
                data.push(at..at + extent.len_bytes);
            }
            at += extent.len_bytes;
        }
        for written in [2 << 20, size - 4096] {
            assert!(data.iter().any(|range| range.contains(&written)), "{written}: {data:?}");
        }
        let bytes: u64 = data.iter().map(|range| range.end - range.start).sum();
        assert!(bytes <= 256 << 10, "{bytes} bytes of data");
        raw.discard(0, size).unwrap();
        assert_eq!(raw.extent_at(512).unwrap().content, Content::Zero);
        // Somebody truncates it: what is gone is read, and the read says so.
        file.as_file().set_len(1 << 20).unwrap();
        assert_eq!(raw.extent_at(4 << 20).unwrap().content, Content::Data);
        assert!(raw.read_at(&mut [0; 512], 4 << 20).is_err());
    }
}

#[test]
fn a_file_system_without_direct_io_is_refused_with_a_remedy() {
    let path = Path::new("/sys/kernel/uevent_seqnum");
    let error = RawFile::open(path, true, Cache::None).unwrap_err().to_string();
    assert!(error.contains("refuses O_DIRECT") && error.contains("cache=writeback"), "{error}");
    assert_eq!("none".parse(), Ok(Cache::None));
    assert!("unsafe".parse::<Cache>().is_err());
}

#[test]
fn a_lock_goes_with_its_file() {
    let file = image(512);
    RawFile::open(file.path(), false, Cache::Writeback).unwrap().lock().unwrap();
    assert!(RawFile::open(file.path(), false, Cache::Writeback).unwrap().lock().is_ok());
}

#[test]
fn images_that_cannot_be_disks_are_refused_with_a_remedy() {
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(
        RawFile::open(&directory.path().join("none"), false, Cache::Writeback),
        Err(OpenError::Open { .. })
    ));
    assert!(matches!(
        RawFile::open(directory.path(), true, Cache::Writeback),
        Err(OpenError::NotAFile { .. })
    ));
    let odd = RawFile::open(image(700).path(), false, Cache::Writeback).unwrap_err().to_string();
    assert!(odd.contains("700 bytes") && odd.contains("truncate"), "{odd}");
    assert!(matches!(
        RawFile::open(image(0).path(), false, Cache::Writeback),
        Err(OpenError::Empty { .. })
    ));
}
