//! Arguments of the commands for named dirty bitmaps, and of the actions of a transaction. Used by `command`;
//! the supervisor executes them.

use super::arguments::{Arguments, Kind, Member, missing, needed, optional};
use super::backup::{BLOCKDEV_BACKUP, DRIVE_BACKUP};
use super::message::{QmpError, Request};
use devices::block::bitmap::DEFAULT_GRANULE_BYTES;
use devices::block::bitmaps::{BitmapName, NewBitmap};
use serde_json::Value;

/// Most actions of a transaction, and most bitmaps that one of them merges from.
pub const MAX_ACTIONS: usize = 1024;

/// A change of a disk's bitmaps.
#[derive(Debug, Clone, PartialEq)]
pub struct BitmapAction {
    /// The disk.
    pub node: String,
    /// What becomes of its bitmaps.
    pub change: BitmapChange,
}

/// What becomes of a disk's bitmaps.
#[derive(Debug, Clone, PartialEq)]
pub enum BitmapChange {
    /// `block-dirty-bitmap-add`
    Add(NewBitmap),
    /// `block-dirty-bitmap-remove`
    Remove(BitmapName),
    /// `block-dirty-bitmap-clear`
    Clear(BitmapName),
    /// `block-dirty-bitmap-enable`
    Enable(BitmapName),
    /// `block-dirty-bitmap-disable`
    Disable(BitmapName),
    /// `block-dirty-bitmap-merge`
    Merge {
        /// Gets the marks.
        target: BitmapName,
        /// Where they come from: the disk, if another one, and the bitmap.
        sources: Vec<(Option<String>, BitmapName)>,
    },
}

const NODE: Member = needed("node", Kind::Text);
/// What `block-dirty-bitmap-add` takes.
pub const ADD: &[Member] = &[
    NODE,
    needed("name", Kind::Text),
    optional("granularity", Kind::Whole),
    optional("persistent", Kind::Flag),
    optional("disabled", Kind::Flag),
];
/// What names a bitmap.
pub const NAMED: &[Member] = &[NODE, needed("name", Kind::Text)];
/// A bitmap's name with its disk's.
pub const BITMAP: Kind = Kind::Object { name: "BlockDirtyBitmap", members: NAMED };
/// What `block-dirty-bitmap-merge` takes.
pub const MERGE: &[Member] = &[
    NODE,
    needed("target", Kind::Text),
    needed(
        "bitmaps",
        Kind::List(&Kind::Either { name: "BlockDirtyBitmapOrStr", of: &[Kind::Text, BITMAP] }),
    ),
];
/// What `transaction` takes.
pub const TRANSACTION: &[Member] = &[
    needed("actions", Kind::List(&ACTION)),
    optional(
        "properties",
        Kind::Object {
            name: "TransactionProperties",
            members: &[optional(
                "completion-mode",
                Kind::Choice { name: "ActionCompletionMode", values: &[INDIVIDUAL, "grouped"] },
            )],
        },
    ),
];
const INDIVIDUAL: &str = "individual";
/// An action: a command and its arguments.
const ACTION: Kind = Kind::Tagged {
    name: "TransactionAction",
    tag: "TransactionActionKind",
    cases: &[
        ("block-dirty-bitmap-add", Kind::Object { name: "BlockDirtyBitmapAdd", members: ADD }),
        ("block-dirty-bitmap-remove", BITMAP),
        ("block-dirty-bitmap-clear", BITMAP),
        ("block-dirty-bitmap-enable", BITMAP),
        ("block-dirty-bitmap-disable", BITMAP),
        (
            "block-dirty-bitmap-merge",
            Kind::Object { name: "BlockDirtyBitmapMerge", members: MERGE },
        ),
        ("drive-backup", Kind::Object { name: "DriveBackup", members: DRIVE_BACKUP }),
        ("blockdev-backup", Kind::Object { name: "BlockdevBackup", members: BLOCKDEV_BACKUP }),
    ],
};

fn text(arguments: &mut Arguments, name: &str) -> Result<String, QmpError> {
    arguments.text(name).ok_or_else(|| missing(name))
}

fn bitmap_name(name: &str) -> Result<BitmapName, QmpError> {
    BitmapName::new(name).map_err(|error| QmpError::generic(error.to_string()))
}

/// Reads what names a bitmap.
pub fn named(arguments: &mut Arguments) -> Result<(String, BitmapName), QmpError> {
    let (node, name) = (text(arguments, "node")?, text(arguments, "name")?);
    Ok((node, bitmap_name(&name)?))
}

/// Reads what needs only a name.
pub fn simple(
    arguments: &mut Arguments,
    change: fn(BitmapName) -> BitmapChange,
) -> Result<BitmapAction, QmpError> {
    let (node, name) = named(arguments)?;
    Ok(BitmapAction { node, change: change(name) })
}

/// Reads `block-dirty-bitmap-add`.
pub fn add(arguments: &mut Arguments) -> Result<BitmapAction, QmpError> {
    let (node, name) = named(arguments)?;
    let new = NewBitmap {
        name,
        granularity: arguments.number("granularity").unwrap_or(DEFAULT_GRANULE_BYTES),
        persistent: arguments.flag("persistent").unwrap_or(false),
        recording: !arguments.flag("disabled").unwrap_or(false),
    };
    Ok(BitmapAction { node, change: BitmapChange::Add(new) })
}

/// Reads `block-dirty-bitmap-merge`.
pub fn merge(arguments: &mut Arguments) -> Result<BitmapAction, QmpError> {
    let (node, target) = (text(arguments, "node")?, text(arguments, "target")?);
    let sources = arguments.list("bitmaps").ok_or_else(|| missing("bitmaps"))?;
    check_count("bitmaps", &sources)?;
    let source = |source: &Value| match source {
        Value::String(name) => Ok((None, bitmap_name(name)?)),
        other => {
            let name = other["name"].as_str().ok_or_else(|| missing("name"))?;
            Ok((other["node"].as_str().map(str::to_owned), bitmap_name(name)?))
        }
    };
    let sources = sources.iter().map(source).collect::<Result<_, QmpError>>()?;
    Ok(BitmapAction {
        node,
        change: BitmapChange::Merge { target: bitmap_name(&target)?, sources },
    })
}

fn check_count(name: &str, list: &[Value]) -> Result<(), QmpError> {
    match list.len() {
        0..=MAX_ACTIONS => Ok(()),
        count => Err(QmpError::generic(format!(
            "Parameter '{name}' expects at most {MAX_ACTIONS} elements, not {count}"
        ))),
    }
}

/// Reads `transaction`: an action is a request of its own.
pub fn transaction(arguments: &mut Arguments) -> Result<Vec<Request>, QmpError> {
    let actions = arguments.list("actions").ok_or_else(|| missing("actions"))?;
    check_count("actions", &actions)?;
    let properties = arguments.object("properties").unwrap_or_default();
    let mode = properties.get("completion-mode").and_then(Value::as_str).unwrap_or(INDIVIDUAL);
    let read = |mut action: Value| {
        let execute = action["type"].as_str().ok_or_else(|| missing("type"))?.to_owned();
        let Value::Object(arguments) = action["data"].take() else { return Err(missing("data")) };
        if mode != INDIVIDUAL {
            // Jobs do not wait for each other here.
            return Err(QmpError::generic(format!(
                "Action '{execute}' does not support transaction property completion-mode = {mode}"
            )));
        }
        Ok(Request { execute, arguments, id: None })
    };
    actions.into_iter().map(read).collect()
}
