//! The boot payload: a kernel with its initrd or modules. Each file is opened once, when the process
//! starts, and read from that descriptor at every reset, so replacing it on disk does not affect a running
//! guest. Files are identified by length and SHA-256, so that a destination recognises those that it
//! already has.
//!
//! The command line is not included: it is part of the machine description. Called by the supervisor, which
//! opens and keeps a payload, and by [`super::load`]; [`file`] is one open file, [`store`] assembles a
//! payload from received files.

pub mod file;
pub mod store;

use super::Format;
use super::layout::MULTIBOOT_MAX_BYTES;
pub use file::BootFile;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Largest kernel file; enough for a vmlinux with debugging symbols.
pub const MAX_KERNEL_BYTES: u64 = 2 << 30;
/// Limit of the initrd or all modules together: they are loaded below 4 GiB.
pub const MAX_INITRD_BYTES: u64 = 4 << 30;
/// Maximum number of files of a payload: a kernel and 63 modules.
pub const MAX_FILES: usize = 64;
/// Limit of all argument strings together: the size of the Multiboot information.
pub const MAX_ARGUMENTS_BYTES: u64 = MULTIBOOT_MAX_BYTES;

/// Why a boot file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    #[error("cannot open {file}")]
    Open {
        file: String,
        #[source]
        source: io::Error,
    },
    /// It is a FIFO, a folder or a device.
    #[error("{file} is not {expected}: it is {kind}, not a regular file")]
    NotRegular { file: String, expected: &'static str, kind: &'static str },
    /// It is larger than the limit.
    #[error("{file} has {len_bytes} bytes: at most {max_bytes} are possible")]
    TooLarge { file: String, len_bytes: u64, max_bytes: u64 },
    /// An invalid list of files.
    #[error("boot files: {reason}")]
    List { reason: String },
    #[error("cannot read {file}")]
    Read {
        file: String,
        #[source]
        source: io::Error,
    },
    /// It was modified after it was opened.
    #[error(
        "{file} has changed on disk since it was opened: replace such a file by renaming another over it"
    )]
    Changed { file: String },
    #[error("cannot keep a copy of the boot files in {folder}")]
    Create {
        folder: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "cannot keep a copy of the boot files in {folder}: they have {needed_bytes} bytes, \
         {free_bytes} are free"
    )]
    NoSpace { folder: String, needed_bytes: u64, free_bytes: u64 },
    #[error("cannot write the copy of {file}")]
    Write {
        file: String,
        #[source]
        source: io::Error,
    },
    /// The received data does not match the announcement.
    #[error("{file}: {reason}")]
    Arrived { file: String, reason: String },
    /// `go_on` returned false.
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
    /// A module of a Multiboot or PVH kernel.
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

/// Identity of a boot file, as announced to another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileIdentity {
    /// Length.
    pub len_bytes: u64,
    /// SHA-256 of the content.
    pub sha256: [u8; 32],
    /// What the guest uses it for.
    pub role: Role,
    /// The Multiboot string: a module's `PATH ARGUMENTS`, or the first word of the kernel's command line.
    /// Text for the guest; never a path to open.
    pub arguments: String,
}

/// Checks that files announced by a peer form a payload: a kernel, then one initrd or any modules, within
/// the limits above.
pub fn check_identities(identities: &[FileIdentity]) -> Result<(), PayloadError> {
    let shapes = identities.iter().map(|file| Shape {
        name: from_source(file.role),
        role: file.role,
        len_bytes: file.len_bytes,
        arguments: &file.arguments,
    });
    check_shapes(&shapes.collect::<Vec<_>>())
}

/// Name of a received file in messages.
fn from_source(role: Role) -> String {
    format!("{role} from the source")
}

/// The properties that the limits apply to.
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

/// A file and what the guest uses it for.
#[derive(Debug, Clone)]
pub struct PayloadFile {
    /// What the guest uses it for.
    pub role: Role,
    /// The Multiboot string; see [`FileIdentity::arguments`].
    pub arguments: String,
    /// The file.
    pub file: Arc<BootFile>,
}

/// The files that a guest boots from, at its start and after each reset.
#[derive(Debug, Clone)]
pub struct BootPayload {
    /// The kernel first.
    files: Vec<PayloadFile>,
}

impl BootPayload {
    /// Opens a kernel and its initrd, or for a Multiboot kernel its modules, `PATH [ARGUMENTS],…` as QEMU
    /// reads them; a comma in a path is doubled. For a PVH kernel, what is not the path of a file is a list of modules,
    /// too.
    pub fn open(kernel: &Path, initrd: Option<&Path>) -> Result<Self, PayloadError> {
        let file = BootFile::open(Role::Kernel, kernel)?;
        let takes_modules =
            initrd.map_or(Ok(false), |initrd| Format::takes_modules(&file, initrd))?;
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
                    let path = arguments.split_once(' ').map_or(&*arguments, |(path, _)| path);
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

    /// A payload of these files, checked.
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

    /// The initrd or the modules.
    pub fn beside_kernel(&self) -> &[PayloadFile] {
        self.files.split_first().map_or(&[], |(_, beside)| beside)
    }

    /// The files' identities, in order; computes missing digests.
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

    /// Finds a file by content, whatever its role. Hashes only files of the same length.
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

    /// Fails if a file has been written, truncated or extended since it was opened.
    pub fn check_unchanged(&self) -> Result<(), PayloadError> {
        self.files.iter().try_for_each(|file| file.file.check_unchanged())
    }
}

/// Splits a list such as `--initrd "PATH ARGUMENTS,PATH,…"` at its commas; a doubled one is a comma.
pub(crate) fn split_list(list: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut characters = list.chars().peekable();
    while let Some(character) = characters.next() {
        let doubled = character == ',' && characters.next_if_eq(&',').is_some();
        match items.last_mut() {
            Some(item) if character != ',' || doubled => item.push(character),
            _ => items.push(String::new()),
        }
    }
    items
}

#[cfg(test)]
mod tests;
