//! Addresses of exports, as users write them: `nbd:…` as QEMU has it, and URIs as `doc/uri.md` of the
//! NetworkBlockDevice project has them. Parsed here, resolved by the [`super::client`].
//!
//! ```text
//! nbd:unix:PATH[:exportname=NAME]       nbd:HOST[:PORT][:exportname=NAME]      taken literally
//! nbd+unix:///[NAME]?socket=PATH        nbd://HOST[:PORT][/NAME]               with %XX escapes
//! ```
//! An address displays as the URI that QEMU shows for it, with escapes where the text would be ambiguous
//! otherwise; so what it displays as parses to the same address.

use super::protocol::{MAX_STRING_BYTES, PORT};
use std::fmt::{self, Write};
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Longest path of a Unix socket in bytes (`unix(7)`, `sun_path` with its final NUL).
const MAX_PATH_BYTES: usize = 107;
/// Longest host name (RFC 1035, 2.3.4).
const MAX_HOST_BYTES: usize = 255;

/// Text that is no address of an export.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error(
        "{text:?} is no NBD address: write nbd:unix:PATH:exportname=NAME, nbd:HOST:PORT:exportname=NAME, \
         nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH"
    )]
    Form { text: String },
    #[error(
        "{scheme}:// needs TLS, which is not supported: use {scheme_without}:// on a trusted network"
    )]
    Tls { scheme: &'static str, scheme_without: &'static str },
    #[error("the NBD address names no host")]
    NoHost,
    #[error(
        "host {host:?} of the NBD address is no name and no address; IPv6 stands in brackets, [::1]"
    )]
    Host { host: String },
    #[error("port {port:?} of the NBD address is no number from 1 to 65535")]
    Port { port: String },
    #[error("the NBD address names no socket: nbd+unix:///NAME?socket=PATH")]
    NoSocket,
    #[error(
        "nbd+unix:// has no host, but this has {host:?}: write a third slash, nbd+unix:///NAME?socket=PATH"
    )]
    UnixHost { host: String },
    #[error("socket path {path:?} has {len} bytes; the host takes 1 to {MAX_PATH_BYTES}")]
    PathLength { path: PathBuf, len: usize },
    #[error("the export's name has {len} bytes; NBD takes up to {MAX_STRING_BYTES}")]
    ExportLength { len: usize },
    #[error("the {what} of the NBD address contains a NUL")]
    Nul { what: &'static str },
    #[error("the NBD address has an escape that is not % and two hexadecimal digits: {at:?}")]
    Escape { at: String },
    #[error("the escapes of the NBD address are no valid UTF-8")]
    Text,
    #[error("parameter {name:?} of the NBD address is unknown, or given twice")]
    Parameter { name: String },
    #[error("the NBD address has {what}, which means nothing here")]
    Surplus { what: &'static str },
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NbdServer {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port of a host name or of an IP address, without brackets.
    Tcp { host: String, port: u16 },
}

/// An export of a server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NbdAddress {
    server: NbdServer,
    export: String,
}

impl NbdAddress {
    /// The export called `export` of a server; an empty name is that of the default export.
    ///
    /// # Errors
    /// If a name or path is too long for its protocol, or contains a NUL.
    pub fn new(server: NbdServer, export: impl Into<String>) -> Result<Self, AddressError> {
        let export = export.into();
        if export.len() > MAX_STRING_BYTES {
            return Err(AddressError::ExportLength { len: export.len() });
        }
        let has_nul = |bytes: &[u8]| bytes.contains(&0);
        if has_nul(export.as_bytes()) {
            return Err(AddressError::Nul { what: "export's name" });
        }
        match &server {
            NbdServer::Unix(path) => {
                let bytes = path.as_os_str().as_encoded_bytes();
                if has_nul(bytes) {
                    return Err(AddressError::Nul { what: "socket path" });
                }
                if bytes.is_empty() || bytes.len() > MAX_PATH_BYTES {
                    let (path, len) = (path.clone(), bytes.len());
                    return Err(AddressError::PathLength { path, len });
                }
            }
            NbdServer::Tcp { host, port } => {
                if *port == 0 {
                    return Err(AddressError::Port { port: port.to_string() });
                }
                check_host(host)?;
            }
        }
        Ok(Self { server, export })
    }

    /// The server.
    pub fn server(&self) -> &NbdServer {
        &self.server
    }

    /// Name of the export; empty for the default one.
    pub fn export(&self) -> &str {
        &self.export
    }

    /// Whether `text` can only be meant as an address of an export, right or wrong: it begins with a scheme.
    pub fn is_meant_by(text: &str) -> bool {
        ["nbd:", "nbds:", "nbd+", "nbds+"].iter().any(|scheme| text.starts_with(scheme))
    }
}

fn check_host(host: &str) -> Result<(), AddressError> {
    if host.is_empty() {
        return Err(AddressError::NoHost);
    }
    let wrong = || AddressError::Host { host: host.chars().take(MAX_HOST_BYTES).collect() };
    if host.len() > MAX_HOST_BYTES {
        return Err(wrong());
    }
    if host.contains(':') {
        // The zone is for the resolver to judge.
        let address = host.split_once('%').map_or(host, |(address, _)| address);
        return address.parse::<Ipv6Addr>().map(drop).map_err(|_| wrong());
    }
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"/?#[]@%,\\\"".contains(&byte);
    if host.bytes().all(is_plain) { Ok(()) } else { Err(wrong()) }
}

/// Host and port of `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`.
fn host_and_port(text: &str) -> Result<(&str, u16), AddressError> {
    let wrong = || AddressError::Host { host: text.chars().take(MAX_HOST_BYTES).collect() };
    let (host, port) = match text.strip_prefix('[') {
        Some(bracketed) => {
            let (host, rest) = bracketed.split_once(']').ok_or_else(wrong)?;
            if !host.contains(':') {
                return Err(wrong());
            }
            let port = rest.strip_prefix(':');
            (host, port.or(rest.is_empty().then_some("")).ok_or_else(wrong)?)
        }
        None => {
            let (host, port) = text.split_once(':').unwrap_or((text, ""));
            if port.contains(':') {
                return Err(wrong());
            }
            (host, port)
        }
    };
    // Only digits: a number may have a sign.
    let number =
        port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse()).and_then(Result::ok);
    match number {
        _ if port.is_empty() => Ok((host, PORT)),
        Some(number) if number > 0 => Ok((host, number)),
        _ => Err(AddressError::Port { port: port.chars().take(16).collect() }),
    }
}

/// Replaces `%XX`.
fn unescaped(text: &str) -> Result<String, AddressError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut left = text.as_bytes();
    while let Some((first, rest)) = left.split_first() {
        left = rest;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digit = |at: usize| rest.get(at).and_then(|byte| char::from(*byte).to_digit(16));
        let (Some(high), Some(low)) = (digit(0), digit(1)) else {
            let at = String::from_utf8_lossy(&rest[..rest.len().min(2)]);
            return Err(AddressError::Escape { at: format!("%{at}") });
        };
        bytes.push(u8::try_from(high * 16 + low).expect("two digits"));
        left = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| AddressError::Text)
}

impl FromStr for NbdAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let form = || AddressError::Form { text: text.chars().take(MAX_HOST_BYTES).collect() };
        match text.split_once("://") {
            Some(("nbds", _)) => Err(AddressError::Tls { scheme: "nbds", scheme_without: "nbd" }),
            Some(("nbds+unix", _)) => {
                Err(AddressError::Tls { scheme: "nbds+unix", scheme_without: "nbd+unix" })
            }
            Some(("nbd" | "nbd+tcp", rest)) => from_uri(rest, false),
            Some(("nbd+unix", rest)) => from_uri(rest, true),
            _ => from_qemu(text.strip_prefix("nbd:").ok_or_else(form)?),
        }
    }
}

fn from_uri(rest: &str, is_unix: bool) -> Result<NbdAddress, AddressError> {
    if rest.contains('#') {
        return Err(AddressError::Surplus { what: "a fragment (write # as %23)" });
    }
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, export) = place.split_once('/').unwrap_or((place, ""));
    if authority.contains('@') {
        return Err(AddressError::Surplus { what: "a user" });
    }
    let mut socket = None;
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        if !is_unix || name != "socket" || socket.is_some() {
            return Err(AddressError::Parameter { name: name.chars().take(64).collect() });
        }
        socket = Some(unescaped(value)?);
    }
    let server = match is_unix {
        true if !authority.is_empty() => {
            return Err(AddressError::UnixHost { host: authority.into() });
        }
        true => NbdServer::Unix(socket.ok_or(AddressError::NoSocket)?.into()),
        false => {
            let (host, port) = host_and_port(authority)?;
            NbdServer::Tcp { host: unescaped(host)?, port }
        }
    };
    NbdAddress::new(server, unescaped(export)?)
}

fn from_qemu(rest: &str) -> Result<NbdAddress, AddressError> {
    let (place, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    let server = match place.strip_prefix("unix:") {
        Some(path) => NbdServer::Unix(path.into()),
        None => {
            let (host, port) = host_and_port(place)?;
            NbdServer::Tcp { host: host.to_owned(), port }
        }
    };
    NbdAddress::new(server, export)
}

/// Writes `text` with escapes for what is not plain in a URI's path and query alike.
fn escape(text: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in text {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => f.write_char((*byte).into())?,
            byte if b"-._~/:@!$'()*,;=".contains(byte) => f.write_char((*byte).into())?,
            byte => write!(f, "%{byte:02X}")?,
        }
    }
    Ok(())
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.server {
            NbdServer::Unix(_) => f.write_str("nbd+unix://")?,
            NbdServer::Tcp { host, port } if host.contains(':') => {
                // A zone's % is an escape of its own (RFC 6874).
                write!(f, "nbd://[{}]:{port}", host.replace('%', "%25"))?;
            }
            NbdServer::Tcp { host, port } => write!(f, "nbd://{host}:{port}")?,
        }
        if !self.export.is_empty() {
            f.write_char('/')?;
            escape(self.export.as_bytes(), f)?;
        }
        match &self.server {
            NbdServer::Unix(path) => {
                f.write_str("?socket=")?;
                escape(Path::as_os_str(path).as_encoded_bytes(), f)
            }
            NbdServer::Tcp { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
