//! The configuration of `ferry run` as one value that another process gets whole, and what of it that
//! process uses. Every structure is taken apart by name, so that a new option does not compile before
//! somebody has decided where it goes.

use super::{BootFiles, DiskConfig, HostConfig, ReceiveConfig, ReceiveDisk, RunConfig};
use super::{SerialConfig, SocketPath};
use crate::limits::Limits;
use devices::block::qcow2::BackingChoice;
use migration::transport::Address;
use std::path::PathBuf;

impl RunConfig {
    /// Of a child process that boots the guest, with its control socket at `control`.
    pub fn of_first_child(self, control: PathBuf) -> Self {
        Self { migrate_every: None, host: self.host.of_child(control), ..self }
    }

    /// Of a child process that receives the guest at `address`, with its control socket at `control`.
    pub fn of_next_child(self, address: PathBuf, control: PathBuf) -> ReceiveConfig {
        let Self {
            // What it boots from comes with it: by now the files may be gone, or be others.
            boot: BootFiles { kernel: _, initrd: _ },
            // These come with it, too, in the machine description.
            cmdline: _,
            acpi: _,
            rng: _,
            cpu: _,
            name: _,
            hardware: _,
            // It arrives as it was.
            paused: _,
            memory_bytes,
            cpus,
            disks,
            migrate_every: _,
            host,
        } = self;
        ReceiveConfig {
            address: Address::Unix(address),
            disks: disks.into_iter().map(|(id, disk)| disk.at_destination(id)).collect(),
            disk_dir: None,
            nbd: None,
            overwrite: false,
            paused: false,
            // The guest has its memory on this host already.
            limits: Limits { memory_bytes: Some(memory_bytes), cpus: Some(cpus) },
            boot: None,
            host: host.of_child(control),
        }
    }
}

impl HostConfig {
    fn of_child(self, control: PathBuf) -> Self {
        // The parent has the user's console and control socket, and looks at the clock and at the output.
        let Self {
            serial: _,
            debugcon,
            qmp: _,
            timeout: _,
            expect: _,
            with_parent: _,
            quiet: _,
            no_reboot,
        } = self;
        Self {
            serial: SerialConfig::Stdio,
            debugcon,
            qmp: Some(SocketPath(control)),
            timeout: None,
            expect: None,
            no_reboot,
            with_parent: true,
            // The parent reads how it ended.
            quiet: false,
        }
    }
}

impl DiskConfig {
    /// The same image for the disk `id` of a guest that arrives.
    fn at_destination(self, id: String) -> ReceiveDisk {
        // The machine description has the number of queues and whether it is read-only; the id is given.
        let Self { path, format, backing, errors, cache, id: _, read_only: _, queues: _ } = self;
        let backing = match backing {
            BackingChoice::Given(backing) => Some(backing),
            // `--migrate-every` refuses disks whose backing file is left out.
            BackingChoice::Recorded | BackingChoice::None => None,
        };
        ReceiveDisk { id, path, cache, format, backing, errors }
    }
}

/// Paths that need not be UTF-8, as those on the command line.
pub(super) mod os_path {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::ffi::OsString;
    use std::path::{Path, PathBuf};

    pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        OsString::deserialize(deserializer).map(PathBuf::from)
    }
}

/// The same for a path that may be missing.
pub(super) mod optional_os_path {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::ffi::OsString;
    use std::path::PathBuf;

    pub fn serialize<S: Serializer>(path: &Option<PathBuf>, to: S) -> Result<S::Ok, S::Error> {
        path.as_ref().map(|path| path.as_os_str()).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
        Ok(Option::<OsString>::deserialize(from)?.map(PathBuf::from))
    }
}

/// A regular expression as its text.
pub(super) mod pattern {
    use regex_lite::Regex;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub fn serialize<S: Serializer>(pattern: &Option<Regex>, to: S) -> Result<S::Ok, S::Error> {
        pattern.as_ref().map(Regex::as_str).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Regex>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| Regex::new(&text).map_err(D::Error::custom)).transpose()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::{DebugExitConfig, DebugconConfig, HardwareConfig, RunOptions};
    use devices::block::Format;
    use devices::block::failure::{ErrorPolicy, OnError};
    use devices::block::qcow2::Backing;
    use devices::block::raw::Cache;
    use regex_lite::Regex;
    use serde_json::Value;
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;
    use std::time::Duration;

    /// Nothing in it is as by default. Without `..`, so that a new option has to be added here.
    pub(crate) fn nothing_by_default() -> RunConfig {
        let disk = DiskConfig {
            path: "/images/a,b.qcow2".into(),
            id: Some("root".into()),
            format: Format::Qcow2,
            backing: BackingChoice::Given(Backing { path: "/base".into(), format: Format::Qcow2 }),
            read_only: true,
            errors: ErrorPolicy { on_read: OnError::Enospc, on_write: OnError::Stop },
            queues: 7,
            cache: Cache::None,
        };
        RunConfig {
            boot: BootFiles {
                kernel: OsString::from_vec(b"/boot/\xff".to_vec()).into(),
                initrd: Some(OsString::from_vec(b"/initrd \xfe".to_vec()).into()),
            },
            cmdline: "a \"b\"".into(),
            acpi: false,
            rng: true,
            memory_bytes: 12345 << 12,
            cpus: 11,
            cpu: "x86-64-v2,+aes".parse().unwrap(),
            disks: vec![("root".into(), disk)],
            hardware: HardwareConfig {
                testdev: true,
                fw_cfg: vec!["name=opt/x,file=/f".parse().unwrap()],
                debug_exit: DebugExitConfig::Off,
            },
            name: Some("vm1".into()),
            paused: true,
            migrate_every: Some(Duration::from_millis(1501)),
            host: HostConfig {
                serial: SerialConfig::Socket("/serial".into()),
                debugcon: DebugconConfig::File("/debug".into()),
                qmp: Some(SocketPath("/qmp".into())),
                timeout: Some(Duration::from_nanos(1_000_000_001)),
                expect: Some(Regex::new("^HB [0-9]+").unwrap()),
                no_reboot: true,
                with_parent: true,
                quiet: true,
            },
        }
    }

    /// Fails where both have the same value.
    fn assert_differs_everywhere(path: &str, one: &Value, other: &Value) {
        match (one, other) {
            (Value::Object(one), Value::Object(other)) if one.keys().eq(other.keys()) => {
                for (key, value) in one {
                    assert_differs_everywhere(&format!("{path}.{key}"), value, &other[key]);
                }
            }
            (Value::Array(one), Value::Array(other)) if one.len() == other.len() => {
                for (one, other) in one.iter().zip(other) {
                    assert_differs_everywhere(path, one, other);
                }
            }
            _ => assert_ne!(one, other, "{path} is as by default: a hop could lose it"),
        }
    }

    #[test]
    fn every_field_of_a_configuration_arrives_as_it_left() {
        let sent = nothing_by_default();
        let text = serde_json::to_string(&sent).unwrap();
        let arrived: RunConfig = serde_json::from_str(&text).unwrap();
        let by_default = RunOptions {
            kernel: Some("k".into()),
            disk: vec!["path=d".parse().unwrap()],
            ..RunOptions::default()
        };
        let by_default = serde_json::to_value(by_default.validate().unwrap()).unwrap();
        assert_differs_everywhere("config", &serde_json::to_value(&sent).unwrap(), &by_default);
        // Taken apart, so that what is not serialised is compared as well, and nothing is forgotten.
        let RunConfig {
            boot: BootFiles { kernel, initrd },
            cmdline,
            acpi,
            rng,
            memory_bytes,
            cpus,
            cpu,
            disks,
            hardware,
            name,
            paused,
            migrate_every,
            host:
                HostConfig { serial, debugcon, qmp, timeout, expect, no_reboot, with_parent, quiet },
        } = arrived;
        assert_eq!((kernel, initrd), (sent.boot.kernel, sent.boot.initrd));
        assert_eq!((cmdline, acpi, rng), (sent.cmdline, sent.acpi, sent.rng));
        assert_eq!((memory_bytes, cpus, disks), (sent.memory_bytes, sent.cpus, sent.disks));
        assert_eq!((name, migrate_every, cpu), (sent.name, sent.migrate_every, sent.cpu));
        assert_eq!(hardware, sent.hardware);
        assert_eq!((serial, qmp), (sent.host.serial, sent.host.qmp));
        assert_eq!(debugcon, sent.host.debugcon);
        assert_eq!((timeout, no_reboot), (sent.host.timeout, sent.host.no_reboot));
        assert_eq!((with_parent, quiet), (sent.host.with_parent, sent.host.quiet));
        assert_eq!(paused, sent.paused);
        let text = |pattern: Option<Regex>| pattern.map(|it| it.as_str().to_owned());
        assert_eq!(text(expect), text(sent.host.expect));
    }

    #[test]
    fn a_child_has_the_guests_options_and_none_of_the_users_terminal() {
        let config = nothing_by_default();
        let (_, disk) = config.disks[0].clone();
        let first = config.clone().of_first_child("/c1".into());
        let next = config.of_next_child("/m2".into(), "/c2".into());
        assert_eq!((first.memory_bytes, first.cpus, first.rng), (12345 << 12, 11, true));
        assert_eq!(first.disks, [("root".to_owned(), disk.clone())]);
        assert_eq!(first.migrate_every, None, "it is a child, not a shuttle");
        let ReceiveConfig { address, disks, disk_dir, nbd, overwrite, paused, limits, boot, host } =
            next;
        assert_eq!(nbd, None);
        assert_eq!(address, Address::Unix("/m2".into()));
        let backing = Some(Backing { path: "/base".into(), format: Format::Qcow2 });
        let DiskConfig { path, format, errors, cache, .. } = disk;
        let id = "root".to_owned();
        assert_eq!(disks, [ReceiveDisk { id, path, cache, format, backing, errors }]);
        assert!(disk_dir.is_none() && !overwrite && !paused && boot.is_none());
        assert_eq!(limits, Limits { memory_bytes: Some(12345 << 12), cpus: Some(11) });
        for (host, control) in [(first.host, "/c1"), (host, "/c2")] {
            assert_eq!(
                (host.serial, host.qmp),
                (SerialConfig::Stdio, Some(SocketPath(control.into())))
            );
            assert_eq!(host.debugcon, DebugconConfig::File("/debug".into()));
            assert!(host.no_reboot && host.with_parent && !host.quiet);
            assert!(host.timeout.is_none() && host.expect.is_none(), "the parent's");
        }
    }
}
