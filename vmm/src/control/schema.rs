//! The reply to `query-qmp-schema`: the tables of commands and events as QEMU's `SchemaInfo`. Replies of
//! commands with many members are not described: their type is `any`.

use super::arguments::{EMPTY, Kind, Member};
use super::command::COMMANDS;
use super::event::EVENTS;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The types that are not made of others, with JSON's names of them.
const BUILTIN: &[(&str, &str)] =
    &[("str", "string"), ("int", "int"), ("bool", "boolean"), ("any", "value")];

/// The types that commands and events refer to, by name.
#[derive(Default)]
struct Types(BTreeMap<String, Value>);

impl Types {
    /// The name of a type, which is described if it has not been yet.
    fn name(&mut self, kind: Kind) -> String {
        match kind {
            Kind::Text => "str".to_owned(),
            Kind::Whole => "int".to_owned(),
            Kind::Flag => "bool".to_owned(),
            Kind::Any => "any".to_owned(),
            Kind::List(of) => {
                let element = self.name(*of);
                let info = json!({"meta-type": "array", "element-type": element});
                self.add(format!("[{element}]"), info)
            }
            Kind::Choice { name, values } => self.choice(name, values),
            Kind::Object { name, members } => self.object(name.to_owned(), members),
            Kind::Either { name, of } => {
                let of: Vec<_> = of.iter().map(|kind| json!({"type": self.name(*kind)})).collect();
                self.add(name.to_owned(), json!({"meta-type": "alternate", "members": of}))
            }
            Kind::Tagged { name, tag, cases } => {
                let values: Vec<_> = cases.iter().map(|(case, _)| *case).collect();
                let tag = self.choice(tag, &values);
                let variant = |(case, data): &(&str, Kind)| {
                    let data = self.name(*data);
                    let members = json!([{"name": "data", "type": data}]);
                    let info = json!({"meta-type": "object", "members": members});
                    json!({"case": case, "type": self.add(format!("{data}Wrapper"), info)})
                };
                let variants: Vec<_> = cases.iter().map(variant).collect();
                let info = json!({
                    "meta-type": "object",
                    "members": [{"name": "type", "type": tag}],
                    "tag": "type",
                    "variants": variants,
                });
                self.add(name.to_owned(), info)
            }
        }
    }

    fn choice(&mut self, name: &str, values: &[&str]) -> String {
        let members: Vec<_> = values.iter().map(|value| json!({"name": value})).collect();
        let info = json!({"meta-type": "enum", "values": values, "members": members});
        self.add(name.to_owned(), info)
    }

    fn object(&mut self, name: String, members: &[Member]) -> String {
        let member = |member: &Member| {
            let mut info = json!({"name": member.name, "type": self.name(member.kind)});
            // As QEMU says that a member is optional.
            if member.optional {
                info["default"] = Value::Null;
            }
            info
        };
        let members: Vec<_> = members.iter().map(member).collect();
        self.add(name, json!({"meta-type": "object", "members": members}))
    }

    /// The type of what comes with a command or an event called `owner`.
    fn of(&mut self, owner: &str, members: &[Member]) -> String {
        match members {
            [] => self.name(EMPTY),
            _ => self.object(format!("q_obj_{owner}-arg"), members),
        }
    }

    fn add(&mut self, name: String, mut info: Value) -> String {
        info["name"] = name.as_str().into();
        let before = self.0.insert(name.clone(), info);
        debug_assert!(before.is_none_or(|before| before == self.0[&name]), "two types {name}");
        name
    }
}

/// The reply to `query-qmp-schema`.
pub fn schema() -> Value {
    let mut types = Types::default();
    let mut all = Vec::new();
    for entry in COMMANDS {
        all.push(json!({
            "name": entry.name,
            "meta-type": "command",
            "arg-type": types.of(entry.name, entry.arguments),
            "ret-type": types.name(entry.returns),
            "allow-oob": false,
        }));
    }
    for (name, members) in EVENTS {
        let arg_type = types.of(name, members);
        all.push(json!({"name": name, "meta-type": "event", "arg-type": arg_type}));
    }
    let builtin = |(name, json_type): &(&str, &str)| json!({"name": name, "meta-type": "builtin", "json-type": json_type});
    all.extend(BUILTIN.iter().map(builtin));
    all.extend(types.0.into_values());
    all.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entity<'s>(schema: &'s Value, name: &str) -> &'s Value {
        let mut named = schema.as_array().unwrap().iter().filter(|one| one["name"] == name);
        let found = named.next().unwrap_or_else(|| panic!("nothing is called {name}"));
        assert!(named.next().is_none(), "two are called {name}");
        found
    }

    #[test]
    fn the_schema_has_every_command_and_event_and_each_type_once() {
        let schema = schema();
        for entry in COMMANDS {
            assert_eq!(entity(&schema, entry.name)["meta-type"], "command");
        }
        for (name, _) in EVENTS {
            assert_eq!(entity(&schema, name)["meta-type"], "event");
        }
        for one in schema.as_array().unwrap() {
            let inner = [&one["members"], &one["variants"]].into_iter().filter_map(Value::as_array);
            let inner = inner.flatten().map(|of| &of["type"]);
            let types = [&one["arg-type"], &one["ret-type"], &one["element-type"]];
            for name in types.into_iter().chain(inner).filter_map(Value::as_str) {
                let meta = &entity(&schema, name)["meta-type"];
                assert!(meta != "command" && meta != "event", "{one}: {name} is a {meta}");
            }
        }
    }

    #[test]
    fn arguments_are_described_in_qemus_form() {
        let schema = schema();
        let migrate = entity(&schema, entity(&schema, "migrate")["arg-type"].as_str().unwrap());
        let members = migrate["members"].as_array().unwrap();
        assert!(members.contains(&json!({"name": "uri", "type": "str"})), "{migrate}");
        let optional = json!({"name": "blk", "type": "bool", "default": null});
        assert!(members.contains(&optional), "{migrate}");
        let unit = json!(["second", "millisecond"]);
        assert_eq!(entity(&schema, "TimeUnit")["values"], unit);
        assert_eq!(entity(&schema, "stop")["arg-type"], "q_empty");
        assert_eq!(entity(&schema, "q_empty")["members"], json!([]));
        let list = entity(&schema, "[MigrationCapabilityStatus]");
        assert_eq!(list["element-type"], "MigrationCapabilityStatus");
        assert_eq!(entity(&schema, "int")["json-type"], "int");
        assert_eq!(entity(&schema, "RESET")["arg-type"], "q_obj_RESET-arg");
    }

    #[test]
    fn unions_and_alternates_are_described_in_qemus_form() {
        let schema = schema();
        let action = entity(&schema, "TransactionAction");
        assert_eq!((&action["meta-type"], &action["tag"]), (&json!("object"), &json!("type")));
        assert_eq!(action["members"], json!([{"name": "type", "type": "TransactionActionKind"}]));
        let variant =
            json!({"case": "block-dirty-bitmap-merge", "type": "BlockDirtyBitmapMergeWrapper"});
        assert!(action["variants"].as_array().unwrap().contains(&variant), "{action}");
        let wrapper = entity(&schema, "BlockDirtyBitmapMergeWrapper");
        assert_eq!(wrapper["members"], json!([{"name": "data", "type": "BlockDirtyBitmapMerge"}]));
        let either = entity(&schema, "BlockDirtyBitmapOrStr");
        assert_eq!(either["meta-type"], "alternate");
        assert_eq!(either["members"], json!([{"type": "str"}, {"type": "BlockDirtyBitmap"}]));
    }

    #[test]
    fn what_qemu_does_not_have_begins_with_x() {
        let of_qemu = |command: &str| -> &[&str] {
            match command {
                "qmp_capabilities" => &["enable"],
                "query-named-block-nodes" => &["flat"],
                "query-blockstats" => &["query-nodes"],
                "query-cpu-model-expansion" => &["type", "model"],
                "migrate" => &["uri", "blk", "inc", "detach", "resume"],
                "migrate-set-capabilities" => &["capabilities"],
                "migrate-set-cache-size" => &["value"],
                "migrate-set-parameters" => &[
                    "max-bandwidth",
                    "downtime-limit",
                    "multifd-channels",
                    "multifd-compression",
                    "multifd-zlib-level",
                    "multifd-zstd-level",
                    "compress-level",
                    "compress-threads",
                    "decompress-threads",
                    "compress-wait-thread",
                    "block-incremental",
                    "xbzrle-cache-size",
                    "throttle-trigger-threshold",
                    "cpu-throttle-initial",
                    "cpu-throttle-increment",
                    "max-cpu-throttle",
                    "cpu-throttle-tailslow",
                    "block-bitmap-mapping",
                ],
                "calc-dirty-rate" => &["calc-time", "calc-time-unit", "sample-pages", "mode"],
                "query-dirty-rate" => &["calc-time-unit"],
                "block-dirty-bitmap-add" => {
                    &["node", "name", "granularity", "persistent", "disabled"]
                }
                "block-dirty-bitmap-remove"
                | "block-dirty-bitmap-clear"
                | "block-dirty-bitmap-enable"
                | "block-dirty-bitmap-disable" => &["node", "name"],
                "block-dirty-bitmap-merge" => &["node", "target", "bitmaps"],
                "transaction" => &["actions", "properties"],
                "drive-mirror" | "blockdev-mirror" => &[
                    "job-id",
                    "device",
                    "target",
                    "sync",
                    "format",
                    "node-name",
                    "filter-node-name",
                    "replaces",
                    "mode",
                    "speed",
                    "granularity",
                    "buf-size",
                    "on-source-error",
                    "on-target-error",
                    "unmap",
                    "copy-mode",
                    "auto-finalize",
                    "auto-dismiss",
                ],
                "blockdev-add" => &[
                    "driver",
                    "node-name",
                    "read-only",
                    "cache",
                    "file",
                    "filename",
                    "server",
                    "export",
                ],
                "drive-backup" | "blockdev-backup" => &[
                    "job-id",
                    "device",
                    "target",
                    "sync",
                    "format",
                    "mode",
                    "bitmap",
                    "bitmap-mode",
                    "compress",
                    "speed",
                    "on-source-error",
                    "on-target-error",
                    "auto-finalize",
                    "auto-dismiss",
                    "filter-node-name",
                ],
                "blockdev-del" => &["node-name"],
                "block-job-change" => &["id", "type", "copy-mode"],
                "block-job-finalize" | "block-job-dismiss" => &["id"],
                name if name.starts_with("block-job-") => &["device", "speed", "force"],
                name if name.starts_with("job-") => &["id"],
                "nbd-server-start" => &["addr", "max-connections", "handshake-max-seconds"],
                "nbd-server-add" => &["device", "name", "description", "writable", "bitmap"],
                "nbd-server-remove" => &["name", "mode"],
                "block-export-add" => {
                    &["type", "id", "node-name", "name", "description", "writable", "bitmaps"]
                }
                "block-export-del" => &["id", "mode"],
                _ => &[],
            }
        };
        for entry in COMMANDS.iter().filter(|entry| !entry.name.starts_with("x-")) {
            for name in entry.arguments.iter().map(|member| member.name) {
                let known = name.starts_with("x-") || of_qemu(entry.name).contains(&name);
                assert!(known, "{}: {name}", entry.name);
            }
        }
        for (name, _) in EVENTS {
            let upper = name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
            assert_eq!(upper, !name.starts_with("x-"), "{name}");
        }
    }
}
