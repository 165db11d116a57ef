//! Where a destination listens: `tcp:HOST:PORT` or `unix:PATH`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A destination's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Host (a name, an IPv4 address, or an IPv6 address in brackets) and port, with a colon.
    Tcp(String),
    /// A socket in the file system.
    Unix(PathBuf),
}

/// Text that names no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not an address: expected tcp:HOST:PORT (an IPv6 address in brackets, tcp:[::1]:PORT) or \
     unix:PATH"
)]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = || AddressError(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return (!path.is_empty()).then(|| Self::Unix(path.into())).ok_or_else(error);
        }
        let host_port = text.strip_prefix("tcp:").ok_or_else(error)?;
        let (host, port) = host_port.rsplit_once(':').ok_or_else(error)?;
        let bracketed = host.starts_with('[') && host.ends_with(']');
        if host.is_empty() || port.parse::<u16>().is_err() || host.contains(':') != bracketed {
            return Err(error());
        }
        Ok(Self::Tcp(host_port.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host_port) => write!(f, "tcp:{host_port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_written() {
        for text in ["tcp:host-b:4444", "tcp:127.0.0.1:0", "tcp:[::1]:4444", "unix:/run/vm1"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in
            ["", "host:1", "tcp:host", "tcp::1", "tcp:h:99999", "tcp:::1:4", "unix:", "ssh:h"]
        {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
