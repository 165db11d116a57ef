//! `ferry ctl SOCKET bitmap …`: named dirty bitmaps, for people. Translates words into QMP for `ctl`, and shows
//! what comes back.

use super::request::Request;
use crate::config::parse_size;
use clap::{Args, Parser};
use serde_json::{Value, json};

/// Named dirty bitmaps of disks, for incremental backups
#[derive(Debug, Parser)]
#[command(name = "bitmap", bin_name = "ferry ctl SOCKET bitmap")]
enum Bitmap {
    /// Show all bitmaps
    List,
    /// Add a bitmap: writes of the guest mark it from now on
    Add {
        #[command(flatten)]
        named: Named,
        /// Bytes that a bit stands for, such as 64K: a power of two from 512 to 64M
        #[arg(long, value_name = "SIZE", value_parser = |text: &str| parse_size(text, 1))]
        granularity: Option<u64>,
        /// Keep it in a file beside the image
        #[arg(long)]
        persistent: bool,
        /// Do not record writes until it is enabled
        #[arg(long)]
        disabled: bool,
    },
    /// Remove a bitmap
    Remove(Named),
    /// Clear a bitmap
    Clear(Named),
    /// Have writes mark a bitmap
    Enable(Named),
    /// Have writes mark a bitmap no more
    Disable(Named),
    /// Mark in a bitmap what is marked in others, which stay as they are
    Merge {
        /// The disk
        disk: String,
        /// The bitmap that gets the marks
        target: String,
        /// The bitmaps that they come from
        #[arg(required = true, value_name = "BITMAP")]
        bitmaps: Vec<String>,
        /// They are bitmaps of this disk
        #[arg(long, value_name = "DISK")]
        from: Option<String>,
    },
    /// Write the persistent bitmaps of a disk to their file now, not only at the end
    Store {
        /// The disk
        disk: String,
    },
    /// Print the SHA-256 of a bitmap's content
    Sha256(Named),
}

/// A bitmap.
#[derive(Debug, Args)]
struct Named {
    /// The disk
    disk: String,
    /// The bitmap
    name: String,
}

impl Named {
    fn arguments(&self) -> Value {
        json!({"node": self.disk, "name": self.name})
    }
}

/// The request that `words`, the first of which is `bitmap`, stand for.
pub fn request(words: &[&str]) -> Result<Request, clap::Error> {
    let change =
        |verb: &str, arguments| Request::new(format!("block-dirty-bitmap-{verb}"), arguments);
    Ok(match Bitmap::try_parse_from(words)? {
        Bitmap::List => {
            Request { show: table, ..Request::new("query-named-block-nodes", json!({})) }
        }
        Bitmap::Add { named, granularity, persistent, disabled } => {
            let mut arguments = named.arguments();
            if let Some(bytes) = granularity {
                arguments["granularity"] = bytes.into();
            }
            arguments["persistent"] = persistent.into();
            arguments["disabled"] = disabled.into();
            change("add", arguments)
        }
        Bitmap::Remove(named) => change("remove", named.arguments()),
        Bitmap::Clear(named) => change("clear", named.arguments()),
        Bitmap::Enable(named) => change("enable", named.arguments()),
        Bitmap::Disable(named) => change("disable", named.arguments()),
        Bitmap::Merge { disk, target, bitmaps, from } => {
            let source = |name: &String| match &from {
                None => json!(name),
                Some(node) => json!({"node": node, "name": name}),
            };
            let bitmaps: Vec<_> = bitmaps.iter().map(source).collect();
            change("merge", json!({"node": disk, "target": target, "bitmaps": bitmaps}))
        }
        Bitmap::Store { disk } => Request::new("x-block-dirty-bitmap-store", json!({"node": disk})),
        Bitmap::Sha256(named) => {
            let arguments = named.arguments();
            let digest = |answer: &Value| answer["sha256"].as_str().unwrap_or_default().to_owned();
            Request { show: digest, ..Request::new("x-debug-block-dirty-bitmap-sha256", arguments) }
        }
    })
}

/// A size as `--granularity` takes it.
fn size(bytes: u64) -> String {
    match bytes {
        0 => "0".to_owned(),
        _ if bytes.is_multiple_of(1 << 20) => format!("{}M", bytes >> 20),
        _ if bytes.is_multiple_of(1 << 10) => format!("{}K", bytes >> 10),
        _ => bytes.to_string(),
    }
}

/// What `bitmap list` prints: a line per bitmap.
fn table(nodes: &Value) -> String {
    let mut rows = vec![["DISK", "NAME", "GRANULARITY", "DIRTY BYTES", "FLAGS"].map(str::to_owned)];
    for node in nodes.as_array().into_iter().flatten() {
        for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
            let is = |flag: &&str| bitmap[*flag] == true;
            let off = (bitmap["recording"] == false).then_some("disabled");
            let set = ["recording", "busy", "persistent", "inconsistent"].into_iter().filter(is);
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let number = |name: &str| bitmap[name].as_u64().unwrap_or_default();
            rows.push([
                text(&node["node-name"]),
                text(&bitmap["name"]),
                size(number("granularity")),
                number("count").to_string(),
                off.into_iter().chain(set).collect::<Vec<_>>().join(","),
            ]);
        }
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths = [0, 1, 2, 3].map(|column| width(column).unwrap_or_default());
    let line = |[disk, name, granularity, dirty, flags]: &[String; 5]| {
        let [a, b, c, d] = widths;
        format!("{disk:a$}  {name:b$}  {granularity:>c$}  {dirty:>d$}  {flags}")
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(words: &str) -> (String, Value) {
        let words: Vec<_> = words.split(' ').collect();
        let request = request(&words).unwrap();
        (request.command, request.arguments)
    }

    #[test]
    fn words_become_commands() {
        let add = json!({
            "node": "root", "name": "b0",
            "granularity": 65_536, "persistent": true, "disabled": true,
        });
        assert_eq!(
            of("bitmap add root b0 --granularity 64K --persistent --disabled"),
            ("block-dirty-bitmap-add".into(), add)
        );
        // Without a granularity: the default of the VMM.
        let plain = json!({"node": "root", "name": "b0", "persistent": false, "disabled": false});
        assert_eq!(of("bitmap add root b0").1, plain);
        for verb in ["remove", "clear", "enable", "disable"] {
            let named = json!({"node": "root", "name": "b0"});
            let expected = (format!("block-dirty-bitmap-{verb}"), named);
            assert_eq!(of(&format!("bitmap {verb} root b0")), expected);
        }
        let merge = json!({"node": "root", "target": "all", "bitmaps": ["a", "b"]});
        assert_eq!(of("bitmap merge root all a b").1, merge);
        let merge = json!({
            "node": "root", "target": "all", "bitmaps": [{"node": "data", "name": "a"}],
        });
        assert_eq!(of("bitmap merge root all --from data a").1, merge);
        assert_eq!(of("bitmap sha256 root b0").0, "x-debug-block-dirty-bitmap-sha256");
        assert_eq!(of("bitmap store root").0, "x-block-dirty-bitmap-store");
        assert_eq!(of("bitmap list").0, "query-named-block-nodes");
        for bad in ["bitmap", "bitmap add root", "bitmap add root b --granularity 64X"] {
            let words: Vec<_> = bad.split(' ').collect();
            assert!(request(&words).is_err(), "{bad}");
        }
    }

    #[test]
    fn bitmaps_are_listed_in_columns() {
        let bitmap = |name: &str, count: u64, granularity: u64, recording: bool| {
            json!({
                "name": name, "count": count, "granularity": granularity,
                "recording": recording, "busy": false, "persistent": false,
            })
        };
        let mut lost = bitmap("lost", 0, 64 << 20, false);
        lost["inconsistent"] = true.into();
        lost["persistent"] = true.into();
        let nodes = json!([
            {"node-name": "root", "dirty-bitmaps": [bitmap("b0", 1_048_576, 65_536, true), lost]},
            {"node-name": "none"},
            {"node-name": "data", "dirty-bitmaps": [bitmap("täglich", 512, 512, false)]},
        ]);
        let expected = "\
DISK  NAME     GRANULARITY  DIRTY BYTES  FLAGS
root  b0               64K      1048576  recording
root  lost             64M            0  disabled,persistent,inconsistent
data  täglich          512          512  disabled";
        assert_eq!(table(&nodes), expected);
    }
}
