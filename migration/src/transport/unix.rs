//! Unix sockets that Ferry listens on: control, console, and a destination's.
//!
//! A stale socket of a dead process is replaced; a live one, and any other file at the path, stays. Only
//! the owner can connect at any moment: the mode is set before the path exists.

use socket2::{Domain, SockAddr, Socket, Type};
use std::fs::{File, FileType, Metadata, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// Its owner may connect, nobody else.
const MODE: u32 = 0o600;

/// Listening on a path failed.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("{path} is in use by another process: choose another path")]
    InUse { path: PathBuf },
    /// A file that is not a socket.
    #[error("{path} exists and is {found}, not a socket: choose another path, or remove it")]
    NotASocket {
        path: PathBuf,
        /// The kind of file, with its article.
        found: &'static str,
    },
    #[error("cannot listen on {path}")]
    Host {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The path of a listening socket; removed when dropped, if it is still this socket's.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Until it is removed.
    identity: Mutex<Option<(u64, u64)>>,
}

impl SocketFile {
    /// Removes it, once: another socket that takes the path later may get the same inode.
    pub fn remove(&self) {
        let ours = &mut *devices::lock(&self.identity);
        if let Some(ours) = ours.take()
            && identity(&self.path).is_ok_and(|now| now == ours)
        {
            // Best effort: it may be gone already.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|metadata| inode(&metadata))
}

fn inode(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Listens at `path`, for this user only. Accepted connections block; the listener does, too.
///
/// # Errors
/// If the path is in use or is no socket, each by its own variant, or the host refuses.
pub fn listen_unix(path: &Path) -> Result<(UnixListener, SocketFile), ListenError> {
    remove_stale(path)?;
    let host = |source: io::Error| match source.kind() {
        // Another process was faster.
        ErrorKind::AddrInUse => ListenError::InUse { path: path.to_owned() },
        _ => ListenError::Host { path: path.to_owned(), source },
    };
    bind(path).map_err(host)
}

fn bind(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Linux gives the path the mode that the socket has when it is bound, less the umask. Changing the
    // path's mode afterwards would leave a moment in which others may connect.
    let file = File::from(OwnedFd::from(socket));
    file.set_permissions(Permissions::from_mode(MODE))?;
    let socket = Socket::from(OwnedFd::from(file));
    socket.bind(&SockAddr::unix(path)?)?;
    let identity = Mutex::new(Some(identity(path)?));
    let file = SocketFile { path: path.to_owned(), identity };
    socket.listen(BACKLOG)?;
    Ok((UnixListener::from(OwnedFd::from(socket)), file))
}

/// Removes a socket without a listener.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Host { path: path.to_owned(), source };
    let metadata = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        result => result.map_err(failed)?,
    };
    if !metadata.file_type().is_socket() {
        let found = name(metadata.file_type());
        return Err(ListenError::NotASocket { path: path.to_owned(), found });
    }
    if is_live(path).map_err(failed)? {
        return Err(ListenError::InUse { path: path.to_owned() });
    }
    // Another process may have replaced the dead one meanwhile, by its own.
    if identity(path).is_ok_and(|now| now == inode(&metadata)) {
        std::fs::remove_file(path).map_err(failed)?;
    }
    Ok(())
}

fn is_live(path: &Path) -> io::Result<bool> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A hung owner's backlog may be full: the socket is alive all the same.
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Ok(()) => Ok(true),
        Err(error) => match error.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::NotFound => Ok(false),
            ErrorKind::WouldBlock => Ok(true),
            // A live socket of another type.
            _ if error.raw_os_error() == Some(libc::EPROTOTYPE) => Ok(true),
            _ => Err(error),
        },
    }
}

fn name(found: FileType) -> &'static str {
    match found {
        _ if found.is_file() => "a regular file",
        _ if found.is_dir() => "a directory",
        _ if found.is_symlink() => "a symbolic link",
        _ if found.is_fifo() => "a FIFO",
        _ => "a device",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    #[test]
    fn only_the_owner_may_connect_and_the_file_goes_with_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (listener, file) = listen_unix(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, MODE);
        UnixStream::connect(&path).unwrap();
        drop((listener, file));
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let (listener, _file) = listen_unix(&path).unwrap();
        let error = listen_unix(&path).unwrap_err();
        assert!(matches!(error, ListenError::InUse { .. }), "{error}");
        // Its owner hangs: nobody accepts the connection just made, and no more fit.
        Socket::from(OwnedFd::from(listener.try_clone().unwrap())).listen(0).unwrap();
        let error = listen_unix(&path).unwrap_err();
        assert!(matches!(error, ListenError::InUse { .. }), "{error}");
        let other = folder.path().join("datagram");
        let _datagram = UnixDatagram::bind(&other).unwrap();
        let error = listen_unix(&other).unwrap_err();
        assert!(matches!(error, ListenError::InUse { .. }), "{error}");
    }

    #[test]
    fn whatever_is_no_socket_stays_and_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for (path, word) in
            [(&*file, "regular file"), (folder.path(), "directory"), (&link, "link")]
        {
            let error = listen_unix(path).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        let missing = folder.path().join("missing/socket");
        assert!(matches!(listen_unix(&missing), Err(ListenError::Host { .. })));
    }

    #[test]
    fn a_path_is_removed_once_whatever_inode_is_there_later() {
        let folder = tempfile::tempdir().unwrap();
        let [path, kept] = ["socket", "kept"].map(|name| folder.path().join(name));
        let (_listener, file) = listen_unix(&path).unwrap();
        std::fs::hard_link(&path, &kept).unwrap();
        file.remove();
        assert!(!path.exists());
        // As that of a later socket may be, once the first one's inode is free.
        std::fs::hard_link(&kept, &path).unwrap();
        file.remove();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn a_path_that_another_socket_has_taken_over_is_left_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = listen_unix(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = listen_unix(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
    }
}
