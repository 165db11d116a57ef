//! The file beside an image that holds its persistent bitmaps: `IMAGE.bitmaps`, version 1.
//!
//! ```text
//!  0   8  magic "FERRYBMS"
//!  8   4  version, 1
//! 12   4  length of the header, at most MAX_HEADER_BYTES
//! 16   n  header, JSON: disk_bytes; in_use; image: inode, mtime_sec, mtime_nsec when the file was written;
//!         bitmaps: name, granularity, recording, inconsistent of each
//!     for each bitmap of the header, in its order:
//!         chunks with something marked, ascending: offset in the bitmap (8), length (4), bytes
//!         end: an offset of 2^64 - 1 (8)
//!     32  SHA-256 of everything before it; the file ends here
//! ```
//! Numbers are little-endian; a chunk's bytes are those of [`super::super::bitmap::Chunk`]. While a disk is in use
//! the file says so: contents are missing or outdated then.
//!
//! A new file is written under another name, made durable and renamed: there is always a whole one. Nothing of
//! a file is believed before its digest is right.

use super::{BitmapError, BitmapName, Bitmaps, Entry, NewBitmap};
use crate::block::bitmap::{CHUNK_BYTES, Chunk, ChunkError, Content};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const MAGIC: [u8; 8] = *b"FERRYBMS";
const VERSION: u32 = 1;
/// Enough for the most bitmaps with the longest names.
const MAX_HEADER_BYTES: u32 = 1 << 20;
const DIGEST_BYTES: usize = 32;
/// In the place of a chunk's offset.
const END: u64 = u64::MAX;

/// Tells whether an image has been changed or replaced: its inode and the time of its last change. Of two
/// changes within a tick of the kernel's clock, the second may go unnoticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    inode: u64,
    mtime_sec: i64,
    mtime_nsec: i64,
}

impl Identity {
    pub fn of(image: &File) -> io::Result<Self> {
        let metadata = image.metadata()?;
        let (mtime_sec, mtime_nsec) = (metadata.mtime(), metadata.mtime_nsec());
        Ok(Self { inode: metadata.ino(), mtime_sec, mtime_nsec })
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    disk_bytes: u64,
    in_use: bool,
    image: Identity,
    bitmaps: Vec<Record>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    name: BitmapName,
    granularity: u64,
    recording: bool,
    inconsistent: bool,
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it does not hold bitmaps")]
    Magic,
    #[error("it has version {version}, and only version {VERSION} is known")]
    Version { version: u32 },
    #[error("it is of a disk of {disk_bytes} bytes, and this one has {len_bytes}")]
    OtherDisk { disk_bytes: u64, len_bytes: u64 },
    #[error("it is truncated or damaged: its checksum is wrong")]
    Checksum,
    #[error("its header makes no sense")]
    Header(#[source] serde_json::Error),
    #[error("its header has {len_bytes} bytes, more than {MAX_HEADER_BYTES}")]
    LongHeader { len_bytes: u32 },
    #[error("its bitmaps make no sense")]
    Bitmap(#[from] BitmapError),
    #[error("its contents make no sense")]
    Chunk(#[from] ChunkError),
    #[error("chunks are out of order or something follows them")]
    Order,
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
}

/// What a file holds.
#[derive(Debug)]
pub(super) struct Contents {
    /// Its bitmaps are outdated.
    pub in_use: bool,
    /// The image that they are of.
    pub image: Identity,
    /// The bitmaps.
    pub entries: Vec<Entry>,
}

/// Hashes what it reads or writes.
struct Hashing<T> {
    inner: T,
    hash: Sha256,
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Hashing<T> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(bytes)?;
        self.hash.update(&bytes[..read]);
        Ok(read)
    }
}

#[expect(clippy::little_endian_bytes, reason = "the codec")]
fn u32_of(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes).map(|()| u32::from_le_bytes(bytes))
}

#[expect(clippy::little_endian_bytes, reason = "the codec")]
fn u64_of(input: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    input.read_exact(&mut bytes).map(|()| u64::from_le_bytes(bytes))
}

/// Reads the file at `path` for a disk with `bitmaps`; `None` if there is none. What it holds is added to copies
/// of `others`, so that all together respect the limits.
pub(super) fn read(
    path: &Path,
    bitmaps: &Bitmaps,
    others: &[Entry],
) -> Result<Option<Contents>, Damage> {
    let mut options = OpenOptions::new();
    // No symlink is followed, and no FIFO waited for.
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Err(Damage::NotAFile),
        Err(error) => return Err(error.into()),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(Damage::NotAFile);
    }
    let body_bytes = metadata.len().checked_sub(DIGEST_BYTES as u64).ok_or(Damage::Checksum)?;
    let mut file = BufReader::new(file);
    let mut body = Hashing { inner: (&mut file).take(body_bytes), hash: Sha256::new() };
    let contents = match parse(&mut body, bitmaps, others) {
        // They come first, so that a file of another version need not look like this one.
        Err(foreign @ (Damage::Magic | Damage::Version { .. })) => return Err(foreign),
        parsed => parsed,
    };
    io::copy(&mut body, &mut io::sink())?;
    let digest = body.hash.finalize();
    let mut stored = [0; DIGEST_BYTES];
    match file.read_exact(&mut stored) {
        Ok(()) if stored == *digest => contents.map(Some),
        Ok(()) => Err(Damage::Checksum),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(Damage::Checksum),
        Err(error) => Err(error.into()),
    }
}

fn parse(body: &mut impl Read, bitmaps: &Bitmaps, others: &[Entry]) -> Result<Contents, Damage> {
    let mut magic = [0; MAGIC.len()];
    match body.read_exact(&mut magic) {
        Ok(()) if magic == MAGIC => {}
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error.into()),
        _ => return Err(Damage::Magic),
    }
    let version = u32_of(body)?;
    if version != VERSION {
        return Err(Damage::Version { version });
    }
    let len_bytes = u32_of(body)?;
    if len_bytes > MAX_HEADER_BYTES {
        return Err(Damage::LongHeader { len_bytes });
    }
    let mut header = Vec::new();
    body.take(len_bytes.into()).read_to_end(&mut header)?;
    let header: Header = serde_json::from_slice(&header).map_err(Damage::Header)?;
    let Header { disk_bytes, in_use, image, bitmaps: records } = header;
    if disk_bytes != bitmaps.len_bytes {
        return Err(Damage::OtherDisk { disk_bytes, len_bytes: bitmaps.len_bytes });
    }
    let mut entries = others.to_vec();
    for Record { name, granularity, recording, inconsistent } in records {
        let new = NewBitmap { name, granularity, persistent: true, recording };
        let entry = Entry { inconsistent, ..bitmaps.make(&entries, &new)? };
        read_chunks(body, &entry)?;
        entries.push(entry);
    }
    if body.read(&mut [0])? != 0 {
        return Err(Damage::Order);
    }
    entries.drain(..others.len());
    Ok(Contents { in_use, image, entries })
}

fn read_chunks(body: &mut impl Read, entry: &Entry) -> Result<(), Damage> {
    let mut end = 0;
    loop {
        let offset_bytes = u64_of(body)?;
        if offset_bytes == END {
            return Ok(());
        }
        let len = u32_of(body)?;
        if u64::from(len) > CHUNK_BYTES {
            return Err(ChunkError::TooLong { len_bytes: len.into() }.into());
        }
        if offset_bytes < end || len == 0 {
            return Err(Damage::Order);
        }
        let mut bytes = vec![0; len as usize];
        body.read_exact(&mut bytes)?;
        entry.bitmap.load_chunk(&Chunk { offset_bytes, content: Content::Data(bytes) })?;
        end = offset_bytes + u64::from(len);
    }
}

/// Replaces the file at `path`, unless it turns out not to be `wanted` just before. While it is `in_use`, contents
/// are written only if `with_contents`.
pub(super) fn write(
    path: &Path,
    disk_bytes: u64,
    entries: &[Entry],
    image: Identity,
    (in_use, with_contents): (bool, bool),
    wanted: &dyn Fn() -> bool,
) -> io::Result<()> {
    let partial = with_suffix(path, ".partial");
    // Left by a crash. Only who has the image locked comes here.
    if let Err(error) = std::fs::remove_file(&partial)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
    let record = |entry: &Entry| Record {
        name: entry.name.clone(),
        granularity: entry.bitmap.granule_bytes(),
        recording: entry.recording,
        inconsistent: entry.inconsistent,
    };
    let header =
        Header { disk_bytes, in_use, image, bitmaps: entries.iter().map(record).collect() };
    let written = (|| {
        write_body(&file, &header, entries, with_contents)?;
        file.sync_all()?;
        if !wanted() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        std::fs::rename(&partial, path)?;
        sync_folder(path)
    })();
    written.inspect_err(|_| drop(std::fs::remove_file(&partial)))
}

#[expect(clippy::little_endian_bytes, reason = "the codec")]
fn write_body(
    file: &File,
    header: &Header,
    entries: &[Entry],
    with_contents: bool,
) -> io::Result<()> {
    let mut body = BufWriter::new(Hashing { inner: file, hash: Sha256::new() });
    let header = serde_json::to_vec(header)?;
    let header_bytes = u32::try_from(header.len()).map_err(io::Error::other)?;
    body.write_all(&MAGIC)?;
    body.write_all(&VERSION.to_le_bytes())?;
    body.write_all(&header_bytes.to_le_bytes())?;
    body.write_all(&header)?;
    for entry in entries {
        if with_contents && !entry.inconsistent {
            for Chunk { offset_bytes, content } in entry.bitmap.chunks() {
                let Content::Data(bytes) = content else { continue };
                let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
                body.write_all(&offset_bytes.to_le_bytes())?;
                body.write_all(&len.to_le_bytes())?;
                body.write_all(&bytes)?;
            }
        }
        body.write_all(&END.to_le_bytes())?;
    }
    let Hashing { mut inner, hash } = body.into_inner().map_err(io::IntoInnerError::into_error)?;
    inner.write_all(&hash.finalize())
}

/// Removes the file, if there is one. If a crash of the host brings it back, it says "in use".
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a rename durable.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
