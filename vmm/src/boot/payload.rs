//! The boot payload: the kernel and what lies beside it in RAM when a guest starts. Each file is opened
//! once, when the process starts, and read from that open file at every reset, so that replacing it on
//! disk changes nothing for a guest that runs. A file is known by its length and SHA-256, which is how a
//! destination recognises one that it has already.
//!
//! The command line is not here: it is part of the machine's description. Called by the supervisor, which
//! opens and keeps a payload, and by [`super::load`]; [`store`] makes one out of files that arrive.

pub mod store;

use super::layout::{MULTIBOOT_END, MULTIBOOT_INFO};
use super::multiboot::split_list;
use super::{Format, HEAD_BYTES};
use sha2::{Digest, Sha256};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// Largest kernel file: a vmlinux with all its debugging symbols stays below it.
pub const MAX_KERNEL_BYTES: u64 = 2 << 30;
/// Most that initrd or modules have together: they lie below 4 GiB in guest memory.
pub const MAX_INITRD_BYTES: u64 = 4 << 30;
/// Most files of a payload: a kernel and 63 modules.
pub const MAX_FILES: usize = 64;
/// Most bytes of all argument strings together: the area that Multiboot's structures have.
pub const MAX_ARGUMENTS_BYTES: u64 = MULTIBOOT_END - MULTIBOOT_INFO;
/// Files are read, and hashed, in pieces of this size; between two of them a reader can be cancelled.
const PIECE_BYTES: usize = 256 << 10;

/// Why a boot file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// It cannot be opened.
    #[error("cannot open {file}")]
    Open {
        /// Which file.
        file: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It is a FIFO, a folder or a device.
    #[error("{file} is not {expected}: it is {kind}, not a regular file")]
    NotRegular {
        /// Which file.
        file: String,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        kind: &'static str,
    },
    /// It is larger than any that can be booted.
    #[error("{file} has {len_bytes} bytes: at most {max_bytes} are possible")]
    TooLarge {
        /// Which file, or which files together.
        file: String,
        /// Length.
        len_bytes: u64,
        /// Longest possible.
        max_bytes: u64,
    },
    /// A list of files that no loader could have made.
    #[error("boot files: {reason}")]
    List {
        /// What is wrong with it.
        reason: String,
    },
    /// It cannot be read.
    #[error("cannot read {file}")]
    Read {
        /// Which file.
        file: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It is not the file that was opened any more.
    #[error(
        "{file} has changed on disk since it was opened: replace such a file by renaming another over it"
    )]
    Changed {
        /// Which file.
        file: String,
    },
    /// No place for a copy.
    #[error("cannot keep a copy of the boot files in {folder}")]
    Create {
        /// Where.
        folder: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Too little space for a copy.
    #[error(
        "cannot keep a copy of the boot files in {folder}: they have {needed_bytes} bytes, \
         {free_bytes} are free"
    )]
    NoSpace {
        /// Where.
        folder: String,
        /// What the copies need.
        needed_bytes: u64,
        /// What is free.
        free_bytes: u64,
    },
    /// A copy cannot be written.
    #[error("cannot write the copy of {file}")]
    Write {
        /// Which file.
        file: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// What arrives is not what was announced.
    #[error("{file}: {reason}")]
    Arrived {
        /// Which file.
        file: String,
        /// How it differs.
        reason: String,
    },
    /// `go_on` said no.
    #[error("cancelled")]
    Cancelled,
}

/// What a guest uses a file for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The kernel: the first file of every payload.
    Kernel,
    /// The initial ramdisk; alone beside its kernel.
    Initrd,
    /// A Multiboot module.
    Module,
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::Module => "module",
        })
    }
}

/// A boot file as it is announced to another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileIdentity {
    /// Length.
    pub len_bytes: u64,
    /// SHA-256 of the content.
    pub sha256: [u8; 32],
    /// What the guest uses it for.
    pub role: Role,
    /// What a Multiboot guest is told with it: a module's `PATH ARGUMENTS`, and for the kernel the first
    /// word of its command line. Text for the guest; never a path to open.
    pub arguments: String,
}

/// Checks that files announced by a peer make a payload: a kernel, then one initrd or any modules, within
/// the bounds above.
pub fn check_identities(identities: &[FileIdentity]) -> Result<(), PayloadError> {
    let shapes = identities.iter().map(|file| Shape {
        name: from_source(file.role),
        role: file.role,
        len_bytes: file.len_bytes,
        arguments: &file.arguments,
    });
    check_shapes(&shapes.collect::<Vec<_>>())
}

/// What an arriving file is called in messages.
fn from_source(role: Role) -> String {
    format!("{role} from the source")
}

/// What the bounds are about.
struct Shape<'a> {
    name: String,
    role: Role,
    len_bytes: u64,
    arguments: &'a str,
}

fn check_shapes(files: &[Shape<'_>]) -> Result<(), PayloadError> {
    let list = |reason: String| PayloadError::List { reason };
    if files.len() > MAX_FILES {
        return Err(list(format!("{} files, at most {MAX_FILES} are possible", files.len())));
    }
    let Some((kernel, others)) =
        files.split_first().filter(|(first, _)| first.role == Role::Kernel)
    else {
        return Err(list("the first is not a kernel".into()));
    };
    let one_initrd = matches!(others, [Shape { role: Role::Initrd, .. }]);
    if !one_initrd && others.iter().any(|file| file.role != Role::Module) {
        return Err(list("beside a kernel there may be one initrd, or modules".into()));
    }
    if kernel.len_bytes > MAX_KERNEL_BYTES {
        let (file, len_bytes) = (kernel.name.clone(), kernel.len_bytes);
        return Err(PayloadError::TooLarge { file, len_bytes, max_bytes: MAX_KERNEL_BYTES });
    }
    let mut sum_bytes: u64 = 0;
    for file in others {
        sum_bytes = sum_bytes.saturating_add(file.len_bytes);
        if sum_bytes > MAX_INITRD_BYTES {
            let (file, max_bytes) = (file.name.clone(), MAX_INITRD_BYTES);
            return Err(PayloadError::TooLarge { file, len_bytes: sum_bytes, max_bytes });
        }
    }
    let arguments_bytes: u64 = files.iter().map(|file| file.arguments.len() as u64).sum();
    if arguments_bytes > MAX_ARGUMENTS_BYTES {
        return Err(list(format!(
            "arguments of {arguments_bytes} bytes, at most {MAX_ARGUMENTS_BYTES} are possible"
        )));
    }
    if files.iter().any(|file| file.arguments.contains('\0')) {
        return Err(list("arguments with a NUL character".into()));
    }
    Ok(())
}

/// Length and time of the last write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    len_bytes: u64,
    modified: (i64, i64),
}

impl Stamp {
    // Not the time of the last status change: a rename over the file moves that too, and leaves the open
    // file as it was.
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        Ok(Self { len_bytes: metadata.len(), modified })
    }
}

/// An open file that a guest boots from. It is only read at given offsets, so any number of threads may.
#[derive(Debug)]
pub struct BootFile {
    /// What it is called in messages.
    name: String,
    file: File,
    stamp: Stamp,
    sha256: OnceLock<[u8; 32]>,
}

impl BootFile {
    /// Opens the file at `path`. Never waits, as opening a FIFO would.
    pub fn open(role: Role, path: &Path) -> Result<Self, PayloadError> {
        let (label, expected) = match role {
            Role::Kernel => ("kernel", "a kernel"),
            Role::Initrd => ("--initrd", "an initrd"),
            Role::Module => ("--initrd", "a module"),
        };
        let name = format!("{label} {}", path.display());
        let open_error = |source| PayloadError::Open { file: name.clone(), source };
        let mut options = OpenOptions::new();
        // A terminal that is opened must not become this process's own.
        options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let file = options.open(path).map_err(open_error)?;
        let kind = file.metadata().map_err(open_error)?.file_type();
        if !kind.is_file() {
            let kind = match () {
                () if kind.is_dir() => "a folder",
                () if kind.is_fifo() => "a FIFO",
                () if kind.is_block_device() || kind.is_char_device() => "a device",
                () => "a special file",
            };
            return Err(PayloadError::NotRegular { file: name, expected, kind });
        }
        let stamp = Stamp::of(&file).map_err(open_error)?;
        Ok(Self { name, file, stamp, sha256: OnceLock::new() })
    }

    /// A copy that is complete, with the digest that it was checked against.
    fn arrived(name: String, file: File, sha256: [u8; 32]) -> Result<Self, PayloadError> {
        let stamp =
            Stamp::of(&file).map_err(|source| PayloadError::Read { file: name.clone(), source })?;
        Ok(Self { name, file, stamp, sha256: OnceLock::from(sha256) })
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its length when it was opened.
    pub fn len_bytes(&self) -> u64 {
        self.stamp.len_bytes
    }

    /// Fails if the file has been written, cut or extended since it was opened.
    pub fn check_unchanged(&self) -> Result<(), PayloadError> {
        let now = Stamp::of(&self.file).map_err(|source| self.read_error(source))?;
        if now != self.stamp {
            return Err(PayloadError::Changed { file: self.name.clone() });
        }
        Ok(())
    }

    /// Fills `buffer` from `offset_bytes`. What lies past the length at opening is
    /// [`io::ErrorKind::UnexpectedEof`], also if the file has grown.
    pub fn read_at(&self, offset_bytes: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset_bytes.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.len_bytes()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.file.read_exact_at(buffer, offset_bytes)
    }

    /// SHA-256 of the content: computed once, in pieces, as long as `go_on` says yes between them.
    pub fn sha256(&self, go_on: &dyn Fn() -> bool) -> Result<[u8; 32], PayloadError> {
        self.check_unchanged()?;
        if let Some(digest) = self.sha256.get() {
            return Ok(*digest);
        }
        let mut hash = Sha256::new();
        let read = self.in_pieces(0, self.len_bytes(), go_on, |_, piece| {
            hash.update(piece);
            Ok::<(), PayloadError>(())
        });
        // That it has shrunk says more than that a read came to an early end.
        if !matches!(read, Err(PayloadError::Cancelled)) {
            self.check_unchanged()?;
        }
        read?;
        Ok(*self.sha256.get_or_init(|| hash.finalize().into()))
    }

    /// The first bytes, at most `max_bytes`.
    pub(super) fn head(&self, max_bytes: u64) -> Result<Vec<u8>, PayloadError> {
        let len = usize::try_from(self.len_bytes().min(max_bytes))
            .map_err(|error| self.read_error(io::Error::other(error)))?;
        let mut head = vec![0; len];
        self.read_at(0, &mut head).map_err(|source| self.read_error(source))?;
        Ok(head)
    }

    /// Hands `len_bytes` from `offset_bytes` to `take` in pieces, each with its distance from the first.
    pub(super) fn in_pieces<E: From<PayloadError>>(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        go_on: &dyn Fn() -> bool,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = Vec::new();
        let mut done: u64 = 0;
        while done < len_bytes {
            if !go_on() {
                return Err(PayloadError::Cancelled.into());
            }
            let left = len_bytes - done;
            let count = usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            buffer.resize(count, 0);
            self.read_at(offset_bytes + done, &mut buffer)
                .map_err(|source| self.read_error(source))?;
            take(done, &buffer)?;
            done += count as u64;
        }
        Ok(())
    }

    /// A reader with a cursor of its own, at the start.
    pub(super) fn reader<'a>(&'a self, go_on: &'a dyn Fn() -> bool) -> Reader<'a> {
        Reader { file: self, at: 0, go_on, buffer: Vec::new(), failed: None }
    }

    fn read_error(&self, source: io::Error) -> PayloadError {
        PayloadError::Read { file: self.name.clone(), source }
    }
}

/// Reads a boot file for linux-loader, which wants a stream.
pub(super) struct Reader<'a> {
    file: &'a BootFile,
    at: u64,
    go_on: &'a dyn Fn() -> bool,
    buffer: Vec<u8>,
    /// What a read failed with: linux-loader's errors do not say.
    failed: Option<PayloadError>,
}

impl Reader<'_> {
    /// What a read failed with, if one did.
    pub fn into_failure(self) -> Option<PayloadError> {
        self.failed
    }

    fn fail(&mut self, error: PayloadError) -> io::Error {
        let text = error.to_string();
        self.failed = Some(error);
        io::Error::other(text)
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !(self.go_on)() {
            return Err(self.fail(PayloadError::Cancelled));
        }
        let left = self.file.len_bytes().saturating_sub(self.at);
        let most = buffer.len().min(PIECE_BYTES);
        let count = usize::try_from(left).map_or(most, |left| left.min(most));
        if count == 0 {
            return Ok(0);
        }
        if let Err(source) = self.file.read_at(self.at, &mut buffer[..count]) {
            return Err(self.fail(self.file.read_error(source)));
        }
        self.at += count as u64;
        Ok(count)
    }
}

impl ReadVolatile for Reader<'_> {
    // Through a buffer that stays in the cache: a read straight into guest memory at an offset would need
    // unsafe code here, to save some 0.1 ms per MiB.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        to: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(to.len().min(PIECE_BYTES), 0);
        let count = self.read(&mut buffer).map_err(VolatileMemoryError::IOError);
        if let Ok(count) = count {
            to.copy_from(&buffer[..count]);
        }
        self.buffer = buffer;
        count
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(distance) => self.file.len_bytes().checked_add_signed(distance),
            SeekFrom::Current(distance) => self.at.checked_add_signed(distance),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// A file and what the guest uses it for.
#[derive(Debug, Clone)]
pub struct PayloadFile {
    /// What the guest uses it for.
    pub role: Role,
    /// What a Multiboot guest is told with it; see [`FileIdentity::arguments`].
    pub arguments: String,
    /// The file.
    pub file: Arc<BootFile>,
}

/// What a guest boots from, at its start and after each reset.
#[derive(Debug, Clone)]
pub struct BootPayload {
    /// The kernel first.
    files: Vec<PayloadFile>,
}

impl BootPayload {
    /// Opens a kernel and its initrd, or for a Multiboot kernel its modules, `PATH [ARGUMENTS],…` as QEMU
    /// reads them; a comma in a path is doubled.
    pub fn open(kernel: &Path, initrd: Option<&Path>) -> Result<Self, PayloadError> {
        let file = BootFile::open(Role::Kernel, kernel)?;
        let takes_modules = Format::of(&file.head(HEAD_BYTES)?).is_some_and(Format::takes_modules);
        let arguments = kernel.display().to_string();
        let mut files = vec![PayloadFile { role: Role::Kernel, arguments, file: Arc::new(file) }];
        match initrd {
            None => {}
            Some(list) if takes_modules => {
                let list = list.to_str().ok_or_else(|| PayloadError::List {
                    reason: format!("--initrd {} is not UTF-8", list.display()),
                })?;
                let modules = split_list(list);
                if modules.len() >= MAX_FILES {
                    let reason = format!("--initrd names more than {} modules", MAX_FILES - 1);
                    return Err(PayloadError::List { reason });
                }
                for arguments in modules {
                    let path = arguments.split(' ').next().unwrap_or_default();
                    let file = Arc::new(BootFile::open(Role::Module, Path::new(path))?);
                    files.push(PayloadFile { role: Role::Module, arguments, file });
                }
            }
            Some(path) => {
                let file = Arc::new(BootFile::open(Role::Initrd, path)?);
                files.push(PayloadFile { role: Role::Initrd, arguments: String::new(), file });
            }
        }
        Self::new(files)
    }

    /// A payload of these files, if they make one.
    fn new(files: Vec<PayloadFile>) -> Result<Self, PayloadError> {
        let shapes = files.iter().map(|PayloadFile { role, arguments, file }| Shape {
            name: file.name().to_owned(),
            role: *role,
            len_bytes: file.len_bytes(),
            arguments,
        });
        check_shapes(&shapes.collect::<Vec<_>>())?;
        Ok(Self { files })
    }

    /// All files, the kernel first.
    pub fn files(&self) -> &[PayloadFile] {
        &self.files
    }

    /// The kernel.
    pub fn kernel(&self) -> Result<&PayloadFile, PayloadError> {
        self.files.first().ok_or_else(|| PayloadError::List { reason: "there is no kernel".into() })
    }

    /// What follows the kernel: an initrd, or modules.
    pub fn beside_kernel(&self) -> &[PayloadFile] {
        self.files.get(1..).unwrap_or_default()
    }

    /// How another process would recognise these files, in their order; hashes what was not hashed yet.
    pub fn identities(&self, go_on: &dyn Fn() -> bool) -> Result<Vec<FileIdentity>, PayloadError> {
        let identity = |PayloadFile { role, arguments, file }: &PayloadFile| {
            Ok(FileIdentity {
                len_bytes: file.len_bytes(),
                sha256: file.sha256(go_on)?,
                role: *role,
                arguments: arguments.clone(),
            })
        };
        self.files.iter().map(identity).collect()
    }

    /// The file with this content, whatever it is used for. Only files of the same length are hashed.
    pub fn find(
        &self,
        identity: &FileIdentity,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<Arc<BootFile>>, PayloadError> {
        for PayloadFile { file, .. } in &self.files {
            if file.len_bytes() == identity.len_bytes && file.sha256(go_on)? == identity.sha256 {
                return Ok(Some(file.clone()));
            }
        }
        Ok(None)
    }

    /// Fills `buffer` from `offset_bytes` of file `index`.
    pub fn read_at(&self, index: usize, offset_bytes: u64, buffer: &mut [u8]) -> io::Result<()> {
        let file = self.files.get(index).ok_or(io::ErrorKind::NotFound)?;
        file.file.read_at(offset_bytes, buffer)
    }

    /// Fails if a file has been written, cut or extended since it was opened.
    pub fn check_unchanged(&self) -> Result<(), PayloadError> {
        self.files.iter().try_for_each(|file| file.file.check_unchanged())
    }
}

#[cfg(test)]
mod tests;
