//! Disk options: of `ferry run` and of `ferry receive`.

use devices::block::Format;
use devices::block::failure::ErrorPolicy;
use devices::block::qcow2::{Backing, BackingChoice};
use devices::block::raw::Cache;
use devices::virtio::blk::MAX_QUEUES;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::str::FromStr;

/// A disk: `path=…,id=…,format=raw,readonly=on,queues=4,cache=none`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The image.
    pub path: PathBuf,
    /// Its id; `disk0`, `disk1`… by default.
    pub id: Option<String>,
    /// Image format; never probed.
    pub format: Format,
    /// Its backing file, if not the recorded one.
    pub backing: BackingChoice,
    /// Whether it is read-only for the guest.
    pub read_only: bool,
    /// What to do about failed requests.
    pub errors: ErrorPolicy,
    /// Number of its queues.
    pub queues: u16,
    /// Whether the host's page cache is used.
    pub cache: Cache,
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut path, mut id, mut read_only) = (None, None, false);
        let (mut queues, mut cache, mut format) = (1, Cache::Writeback, Format::Raw);
        let mut errors = ErrorPolicy::default();
        let (mut backing, mut backing_format) = (None, None);
        for pair in text.split(',') {
            match pair.split_once('=') {
                Some(("path" | "file", value)) if !value.is_empty() => path = Some(value.into()),
                Some(("id", value)) => id = Some(value.to_owned()),
                Some(("format", value)) => format = value.parse()?,
                Some(("backing", value)) => backing = Some(value.to_owned()),
                Some(("backing-format", value)) => backing_format = Some(value.parse()?),
                Some(("readonly", "on")) => read_only = true,
                Some(("readonly", "off")) => read_only = false,
                Some(("queues", value)) => queues = parse_queues(value)?,
                Some(("cache", value)) => cache = value.parse()?,
                Some(("rerror", value)) => errors.on_read = value.parse()?,
                Some(("werror", value)) => errors.on_write = value.parse()?,
                _ => {
                    let keys = "path=PATH[,id=ID][,format=raw|qcow2][,backing=none|PATH]\
                                [,backing-format=raw|qcow2][,readonly=on|off][,queues=N]\
                                [,cache=writeback|none][,rerror=report|ignore|stop|enospc][,werror=…]";
                    return Err(format!("{pair:?} in {text:?}: expected {keys}"));
                }
            }
        }
        let path = path.ok_or_else(|| format!("{text:?} has no path=PATH"))?;
        let backing = match (backing.as_deref(), backing_format, format) {
            (None, None, _) => BackingChoice::Recorded,
            (Some("none"), None, Format::Qcow2) => BackingChoice::None,
            (Some(path), Some(format), Format::Qcow2) => {
                BackingChoice::Given(Backing { path: path.into(), format })
            }
            _ => {
                return Err(format!(
                    "{text:?}: a backing file needs format=qcow2 and backing=none, or backing=PATH and \
                     backing-format=raw|qcow2"
                ));
            }
        };
        Ok(Self { path, id, format, backing, read_only, errors, queues, cache })
    }
}

fn parse_queues(text: &str) -> Result<u16, String> {
    let fine = |queues: &u16| (1..=MAX_QUEUES).contains(queues);
    text.parse().ok().filter(fine).ok_or_else(|| format!("queues {text:?}: 1 to {MAX_QUEUES}"))
}

/// Whether `id` can name a disk: no path tricks, and short enough for get-id users to tell apart.
pub fn is_id(id: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    !id.is_empty() && id.len() <= 64 && id.chars().all(fine) && !id.starts_with('.')
}

/// A disk of an incoming guest: `ID=PATH[,format=qcow2][,backing=BASE][,cache=none]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveDisk {
    /// Its id at the source.
    pub id: String,
    /// The image on this host.
    pub path: PathBuf,
    /// Whether this host's page cache is used.
    pub cache: Cache,
    /// Format of the image on this host.
    pub format: Format,
    /// Backing file of a new image.
    pub backing: Option<Backing>,
    /// What to do about failed requests on this host.
    pub errors: ErrorPolicy,
}

impl FromStr for ReceiveDisk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((id, path)) if is_id(id) && !path.is_empty() => {
                let (mut path, mut cache, mut format) = (path, Cache::Writeback, Format::Raw);
                let (mut backing, mut backing_format) = (None, None);
                let mut errors = ErrorPolicy::default();
                // A path may contain commas: only known options at its end are not part of it.
                while let Some((rest, option)) = path.rsplit_once(',') {
                    match option.split_once('=') {
                        Some(("cache", value)) => cache = value.parse()?,
                        Some(("rerror", value)) => errors.on_read = value.parse()?,
                        Some(("werror", value)) => errors.on_write = value.parse()?,
                        Some(("format", value)) => format = value.parse()?,
                        Some(("backing", value)) => backing = Some(PathBuf::from(value)),
                        Some(("backing-format", value)) => backing_format = Some(value.parse()?),
                        _ => break,
                    }
                    path = rest;
                }
                let backing = match (backing, backing_format, format) {
                    (None, None, _) => None,
                    (Some(path), Some(format), Format::Qcow2) => Some(Backing { path, format }),
                    _ => {
                        return Err(format!(
                            "{text:?}: a backing file needs format=qcow2, backing=PATH and \
                             backing-format=raw|qcow2"
                        ));
                    }
                };
                Ok(Self { id: id.to_owned(), path: path.into(), cache, format, backing, errors })
            }
            _ => Err(format!(
                "{text:?}: expected ID=PATH[,format=raw|qcow2][,backing=PATH,backing-format=…][,cache=writeback|none]"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read_and_tricks_refused() {
        let disk: DiskConfig = "path=/a,id=root,format=raw,readonly=on".parse().unwrap();
        assert_eq!((disk.id.as_deref(), disk.read_only), (Some("root"), true));
        assert_eq!((disk.queues, disk.cache), (1, Cache::Writeback));
        let disk: DiskConfig = "path=/a,queues=16,cache=none".parse().unwrap();
        assert_eq!((disk.queues, disk.cache), (16, Cache::None));
        let disk = |more: &str| format!("path=/a,{more}").parse::<DiskConfig>();
        let given = BackingChoice::Given(Backing { path: "/b".into(), format: Format::Raw });
        assert_eq!(disk("format=qcow2").unwrap().backing, BackingChoice::Recorded);
        assert_eq!(disk("format=qcow2,backing=none").unwrap().backing, BackingChoice::None);
        assert_eq!(disk("format=qcow2,backing=/b,backing-format=raw").unwrap().backing, given);
        for bad in ["backing=none", "format=qcow2,backing=/b", "format=qcow2,backing-format=raw"] {
            assert!(disk(bad).unwrap_err().contains("backing"), "{bad}");
        }
        for bad in ["queues=0", "queues=17", "queues=", "queues=-1", "cache=unsafe", "cache="] {
            assert!(format!("path=/a,{bad}").parse::<DiskConfig>().is_err(), "{bad}");
        }
        let given = |text: &str| text.parse::<ReceiveDisk>().map(|disk| (disk.path, disk.cache));
        assert_eq!(given("d=/a"), Ok(("/a".into(), Cache::Writeback)));
        assert_eq!(given("d=/a,b,cache=none"), Ok(("/a,b".into(), Cache::None)));
        assert_eq!(given("d=/a,x=y,cache=none,format=raw"), Ok(("/a,x=y".into(), Cache::None)));
        let disk: ReceiveDisk = "d=/a,format=qcow2,backing=/b,backing-format=raw".parse().unwrap();
        let backing = Backing { path: "/b".into(), format: Format::Raw };
        assert_eq!((disk.path.to_str(), disk.backing), (Some("/a"), Some(backing)));
        for bad in ["backing=/b", "format=qcow2,backing=/b", "backing=/b,backing-format=raw"] {
            assert!(format!("d=/a,{bad}").parse::<ReceiveDisk>().is_err(), "{bad}");
        }
        assert!(given("d=/a,cache=no").is_err() && given("d=/a,format=vmdk").is_err());
        for bad in ["", "id=x", "path=/a,format=vmdk", "path=/a,size=3", "path=/a,readonly=maybe"] {
            assert!(bad.parse::<DiskConfig>().is_err(), "{bad}");
        }
        assert!("../x=/tmp/a".parse::<ReceiveDisk>().is_err());
    }
}
