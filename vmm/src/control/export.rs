//! Arguments of the commands for NBD exports. Used by `command`; the supervisor executes them.

use super::arguments::{Arguments, Kind, Member, missing, needed, optional};
use super::bitmap::{BITMAP, MAX_ACTIONS};
use super::message::QmpError;
use devices::block::bitmaps::BitmapName;
use devices::block::nbd::server::{DEFAULT_MAX_CONNECTIONS, Limits, RemoveMode};
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

/// Most connections that a server can be allowed.
const MAX_CONNECTIONS: usize = 1024;
/// Longest time that a handshake can be allowed.
const MAX_HANDSHAKE_SECONDS: usize = 3600;

/// A command about exports.
#[derive(Debug, Clone, PartialEq)]
pub enum ExportCommand {
    /// `nbd-server-start`
    Start {
        /// Where clients connect.
        address: NbdAddress,
        /// What they may take.
        limits: Limits,
    },
    /// `nbd-server-stop`
    Stop,
    /// `block-export-add` or `nbd-server-add`
    Add(NewExport),
    /// `block-export-del` or `nbd-server-remove`
    Remove {
        /// The export.
        id: String,
        /// Whether its clients matter.
        mode: RemoveMode,
    },
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdAddress {
    /// On a TCP port.
    Inet {
        /// Name or address.
        host: String,
        /// 0 for any free port.
        port: u16,
    },
    /// On a socket of this path.
    Unix(PathBuf),
}

/// An export to be added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewExport {
    /// Its id.
    pub id: String,
    /// The disk.
    pub node: String,
    /// Its name for clients.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Whether clients may write.
    pub writable: bool,
    /// Bitmaps that clients may read.
    pub bitmaps: Vec<BitmapName>,
}

const ADDRESS: Kind = Kind::Tagged {
    name: "SocketAddressLegacy",
    tag: "SocketAddressType",
    cases: &[
        (
            "inet",
            Kind::Object {
                name: "InetSocketAddress",
                members: &[needed("host", Kind::Text), needed("port", Kind::Text)],
            },
        ),
        (
            "unix",
            Kind::Object { name: "UnixSocketAddress", members: &[needed("path", Kind::Text)] },
        ),
    ],
};
/// What `nbd-server-start` takes.
pub const START: &[Member] = &[
    needed("addr", ADDRESS),
    optional("max-connections", Kind::Whole),
    optional("handshake-max-seconds", Kind::Whole),
];
/// Whether to wait for clients.
pub const MODE: Member =
    optional("mode", Kind::Choice { name: "BlockExportRemoveMode", values: &["safe", "hard"] });
/// What `nbd-server-add` takes.
pub const NBD_ADD: &[Member] = &[
    needed("device", Kind::Text),
    optional("name", Kind::Text),
    optional("description", Kind::Text),
    optional("writable", Kind::Flag),
    optional("bitmap", Kind::Text),
];
const TYPE: Kind = Kind::Choice { name: "BlockExportType", values: &["nbd"] };
/// What `block-export-add` takes.
pub const ADD: &[Member] = &[
    needed("type", TYPE),
    needed("id", Kind::Text),
    needed("node-name", Kind::Text),
    optional("name", Kind::Text),
    optional("description", Kind::Text),
    optional("writable", Kind::Flag),
    optional(
        "bitmaps",
        Kind::List(&Kind::Either { name: "BlockDirtyBitmapOrStr", of: &[Kind::Text, BITMAP] }),
    ),
];
/// An element of the reply to `query-block-exports`.
pub const INFO: Kind = Kind::Object {
    name: "BlockExportInfo",
    members: &[
        needed("id", Kind::Text),
        needed("type", TYPE),
        needed("node-name", Kind::Text),
        needed("shutting-down", Kind::Flag),
    ],
};

fn text(arguments: &mut Arguments, name: &str) -> Result<String, QmpError> {
    arguments.text(name).ok_or_else(|| missing(name))
}

/// Reads `nbd-server-start`.
pub fn start(arguments: &mut Arguments) -> Result<ExportCommand, QmpError> {
    let address = arguments.object("addr").ok_or_else(|| missing("addr"))?;
    let data = |name: &str| {
        let text = address.get("data").and_then(|data| data.get(name)).and_then(Value::as_str);
        text.ok_or_else(|| missing(name))
    };
    let address = match address.get("type").and_then(Value::as_str) {
        Some("unix") => NbdAddress::Unix(data("path")?.into()),
        _ => {
            let port = data("port")?;
            let port = port.parse().map_err(|_| {
                QmpError::generic(format!("Parameter 'port' expects a number, not '{port}'"))
            })?;
            NbdAddress::Inet { host: data("host")?.to_owned(), port }
        }
    };
    let max_connections = arguments.count("max-connections", MAX_CONNECTIONS)?;
    let seconds = arguments.count("handshake-max-seconds", MAX_HANDSHAKE_SECONDS)?;
    let standard = Limits::default();
    let limits = Limits {
        max_connections: max_connections.unwrap_or(DEFAULT_MAX_CONNECTIONS),
        handshake: seconds.map_or(standard.handshake, |count| Duration::from_secs(count as u64)),
    };
    Ok(ExportCommand::Start { address, limits })
}

fn bitmap_name(name: &str) -> Result<BitmapName, QmpError> {
    BitmapName::new(name).map_err(|error| QmpError::generic(error.to_string()))
}

/// QEMU's rule for ids: letters, digits, `-`, `.` and `_`, beginning with a letter.
fn check_id(id: &str) -> Result<(), QmpError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.chars().all(fits) && id.len() < 256 {
        return Ok(());
    }
    Err(QmpError::generic("Invalid block export id"))
}

/// `nbd-server-add`: the export's name is its id, too.
pub fn nbd_add(arguments: &mut Arguments) -> Result<ExportCommand, QmpError> {
    let node = text(arguments, "device")?;
    let name = arguments.text("name").unwrap_or_else(|| node.clone());
    check_id(&name)?;
    let bitmap = arguments.text("bitmap").map(|name| bitmap_name(&name)).transpose()?;
    Ok(ExportCommand::Add(NewExport {
        id: name.clone(),
        node,
        name,
        description: arguments.text("description").unwrap_or_default(),
        writable: arguments.flag("writable").unwrap_or(false),
        bitmaps: bitmap.into_iter().collect(),
    }))
}

/// Reads `block-export-add`.
pub fn add(arguments: &mut Arguments) -> Result<ExportCommand, QmpError> {
    // There is only one.
    arguments.text("type");
    let (id, node) = (text(arguments, "id")?, text(arguments, "node-name")?);
    check_id(&id)?;
    let bitmaps = arguments.list("bitmaps").unwrap_or_default();
    if bitmaps.len() > MAX_ACTIONS {
        let desc = format!("Parameter 'bitmaps' expects at most {MAX_ACTIONS} elements");
        return Err(QmpError::generic(desc));
    }
    let bitmap = |bitmap: &Value| {
        let name = match bitmap {
            Value::String(name) => name,
            other => {
                let of = other["node"].as_str().unwrap_or_default();
                if of != node {
                    let desc = format!("Bitmap of node '{of}' cannot be exported with '{node}'");
                    return Err(QmpError::generic(desc));
                }
                other["name"].as_str().ok_or_else(|| missing("name"))?
            }
        };
        bitmap_name(name)
    };
    let bitmaps = bitmaps.iter().map(bitmap).collect::<Result<_, _>>()?;
    Ok(ExportCommand::Add(NewExport {
        id,
        name: arguments.text("name").unwrap_or_else(|| node.clone()),
        node,
        description: arguments.text("description").unwrap_or_default(),
        writable: arguments.flag("writable").unwrap_or(false),
        bitmaps,
    }))
}

/// Reads what removes the export that the argument `named` names.
pub fn remove(arguments: &mut Arguments, named: &str) -> Result<ExportCommand, QmpError> {
    let id = text(arguments, named)?;
    let mode = match arguments.text("mode").as_deref() {
        Some("hard") => RemoveMode::Hard,
        _ => RemoveMode::Safe,
    };
    Ok(ExportCommand::Remove { id, mode })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::command::Command;
    use crate::control::message::Request;
    use serde_json::json;

    fn parse(execute: &str, arguments: Value) -> Result<ExportCommand, String> {
        let Value::Object(arguments) = arguments else { panic!("{arguments}") };
        let request = Request { execute: execute.to_owned(), arguments, id: None };
        match Command::parse(&request) {
            Ok(Command::Export(command)) => Ok(command),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.desc),
        }
    }

    #[test]
    fn a_server_listens_on_a_path_or_a_port_and_has_limits() {
        let unix = json!({"type": "unix", "data": {"path": "/run/nbd"}});
        let limits = Limits::default();
        let started = parse("nbd-server-start", json!({"addr": unix}));
        let address = NbdAddress::Unix("/run/nbd".into());
        assert_eq!(started, Ok(ExportCommand::Start { address, limits }));
        let inet = json!({"type": "inet", "data": {"host": "::1", "port": "10809"}});
        let more = json!({"addr": inet, "max-connections": 1, "handshake-max-seconds": 2});
        let limits = Limits { max_connections: 1, handshake: Duration::from_secs(2) };
        let address = NbdAddress::Inet { host: "::1".into(), port: 10809 };
        let started = parse("nbd-server-start", more);
        assert_eq!(started, Ok(ExportCommand::Start { address, limits }));
        for (arguments, refusal) in [
            (json!({}), "Parameter 'addr' is missing"),
            (
                json!({"addr": {"type": "fd", "data": {"str": "3"}}}),
                "Parameter 'type' does not accept value 'fd', only: inet, unix",
            ),
            (json!({"addr": {"type": "unix", "data": {}}}), "Parameter 'path' is missing"),
            (
                json!({"addr": {"type": "inet", "data": {"host": "h", "port": "nbd"}}}),
                "Parameter 'port' expects a number, not 'nbd'",
            ),
            (
                json!({"addr": unix, "max-connections": 0}),
                "Parameter 'max-connections' expects an integer in the range of 1 to 1024",
            ),
            (
                json!({"addr": unix, "handshake-max-seconds": 4000}),
                "Parameter 'handshake-max-seconds' expects an integer in the range of 1 to 3600",
            ),
        ] {
            assert_eq!(parse("nbd-server-start", arguments), Err(refusal.to_owned()));
        }
    }

    #[test]
    fn either_command_adds_an_export() {
        let bitmap = BitmapName::new("b").unwrap();
        let export = NewExport {
            id: "root".into(),
            node: "root".into(),
            name: "root".into(),
            description: String::new(),
            writable: true,
            bitmaps: vec![bitmap.clone()],
        };
        let old = json!({"device": "root", "writable": true, "bitmap": "b"});
        assert_eq!(parse("nbd-server-add", old), Ok(ExportCommand::Add(export.clone())));
        let new = json!({
            "type": "nbd", "id": "e0", "node-name": "root", "name": "n", "description": "d",
            "bitmaps": ["b", {"node": "root", "name": "c"}],
        });
        let other = BitmapName::new("c").unwrap();
        let expected = NewExport {
            id: "e0".into(),
            name: "n".into(),
            description: "d".into(),
            writable: false,
            bitmaps: vec![bitmap, other],
            ..export
        };
        assert_eq!(parse("block-export-add", new), Ok(ExportCommand::Add(expected)));
        let add = |id: &str, bitmaps: Value| {
            let new = json!({"type": "nbd", "id": id, "node-name": "root", "bitmaps": bitmaps});
            parse("block-export-add", new).unwrap_err()
        };
        for id in ["", "0", "a b", "ä", &"x".repeat(300)] {
            assert_eq!(add(id, json!([])), "Invalid block export id");
        }
        let elsewhere = add("e", json!([{"node": "data", "name": "b"}]));
        assert_eq!(elsewhere, "Bitmap of node 'data' cannot be exported with 'root'");
        assert!(add("e", json!(vec!["b"; 1025])).starts_with("Parameter 'bitmaps' expects"));
        let vhost = json!({"type": "vhost-user-blk", "id": "e", "node-name": "root"});
        assert!(parse("block-export-add", vhost).unwrap_err().contains("only: nbd"));
    }

    #[test]
    fn removing_is_safe_unless_it_shall_be_hard() {
        let remove = |mode| Ok(ExportCommand::Remove { id: "e".into(), mode });
        assert_eq!(parse("block-export-del", json!({"id": "e"})), remove(RemoveMode::Safe));
        let hard = json!({"name": "e", "mode": "hard"});
        assert_eq!(parse("nbd-server-remove", hard), remove(RemoveMode::Hard));
        assert_eq!(parse("nbd-server-stop", json!({})), Ok(ExportCommand::Stop));
    }
}
