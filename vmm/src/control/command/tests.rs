use super::*;
use migration::params::Params;
use serde_json::{Map, Value, json};

fn parse(execute: &str, arguments: Value) -> Result<Command, QmpError> {
    let arguments = arguments.as_object().cloned().unwrap_or_default();
    Command::parse(&Request { execute: execute.into(), arguments, id: None })
}

#[test]
fn errors_have_qemus_words() {
    let desc = |execute, arguments| parse(execute, arguments).unwrap_err().desc;
    assert_eq!(desc("migrate", json!({})), "Parameter 'uri' is missing");
    assert_eq!(desc("stop", json!({"x": 1})), "Parameter 'x' is unexpected");
    assert_eq!(
        desc("migrate", json!({"uri": 7})),
        "Invalid parameter type for 'uri', expected: string"
    );
    assert_eq!(parse("nonesuch", json!({})).unwrap_err().class, "CommandNotFound");
}

#[test]
fn disks_are_chosen_in_qemus_words_or_one_by_one() {
    let choose = |mut arguments: Value| {
        arguments["uri"] = "unix:/x".into();
        match parse("migrate", arguments) {
            Ok(Command::Migrate { disks, .. }) => {
                Ok(disks.map(|disks| ["root", "data"].map(|id| disks.mode_of(id).name())))
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.desc),
        }
    };
    for (arguments, expected) in [
        (json!({}), None),
        (json!({"blk": false, "inc": false}), None),
        (json!({"blk": true}), Some(["full", "full"])),
        (json!({"blk": true, "inc": true}), Some(["top", "top"])),
        (json!({"x-disks": "top"}), Some(["top", "top"])),
        (json!({"x-disks": "none"}), Some(["none", "none"])),
        (json!({"x-disks": {"data": "full"}}), Some(["none", "full"])),
        (json!({"blk": true, "x-disks": {"data": "none"}}), Some(["full", "none"])),
    ] {
        assert_eq!(choose(arguments.clone()), Ok(expected), "{arguments}");
    }
    assert!(choose(json!({"blk": true, "x-disks": "top"})).unwrap_err().contains("already"));
    assert!(choose(json!({"x-disks": {"data": "half"}})).unwrap_err().contains("half"));
    assert!(choose(json!({"x-disk-reads": 17})).unwrap_err().contains("1 to 16"));
    assert!(choose(json!({"x-disk-buffers": 0})).unwrap_err().contains("1 to 512"));
}

/// Values that fit, of which at least one is accepted.
fn samples(member: &Member) -> Vec<Value> {
    fn of(kind: Kind) -> Vec<Value> {
        match kind {
            // The second is also the name of a CPU model.
            Kind::Text => vec!["x".into(), "host".into()],
            Kind::Whole => vec![10.into()],
            Kind::Flag => vec![false.into(), true.into()],
            Kind::Choice { values, .. } => values.iter().map(|value| json!(value)).collect(),
            Kind::Object { members, .. } => {
                let of = |pick: fn(Vec<Value>) -> Option<Value>| {
                    let pick = |one: &Member| (one.name.to_owned(), pick(samples(one)).unwrap());
                    Value::Object(members.iter().map(pick).collect())
                };
                vec![of(|samples| samples.into_iter().next()), of(|mut samples| samples.pop())]
            }
            Kind::Either { of: kinds, .. } => kinds.iter().flat_map(|kind| of(*kind)).collect(),
            Kind::Tagged { cases, .. } => {
                let case =
                    |(case, data): &(&str, Kind)| json!({"type": case, "data": of(*data)[0]});
                cases.iter().map(case).collect()
            }
            Kind::List(kind) => {
                let mut lists = vec![json!([])];
                lists.extend(of(*kind).into_iter().map(|one| json!([one])));
                lists
            }
            Kind::Any => vec!["full".into(), json!({})],
        }
    }
    of(member.kind)
}

#[test]
fn every_command_of_the_table_reads_the_arguments_that_it_lists() {
    for entry in COMMANDS {
        assert_eq!(COMMANDS.iter().filter(|other| other.name == entry.name).count(), 1);
        let needed = entry.arguments.iter().filter(|member| !member.optional);
        let needed: Map<_, _> =
            needed.map(|member| (member.name.to_owned(), samples(member).pop().unwrap())).collect();
        assert!(parse(entry.name, json!(needed)).is_ok(), "{}", entry.name);
        for member in entry.arguments {
            // That it is read and no other is listed, `Command::parse` asserts.
            let accepted = samples(member).into_iter().any(|value| {
                let mut arguments = needed.clone();
                arguments.insert(member.name.to_owned(), value);
                parse(entry.name, arguments.into()).is_ok()
            });
            assert!(accepted, "{}: {}", entry.name, member.name);
            let mut lacking = needed.clone();
            let refused = parse(entry.name, {
                lacking.remove(member.name);
                lacking.into()
            });
            assert_eq!(refused.is_err(), !member.optional, "{}: {}", entry.name, member.name);
        }
        let mut more = needed;
        more.insert("nonesuch".to_owned(), true.into());
        let refused = parse(entry.name, more.into()).unwrap_err();
        assert_eq!(refused.desc, "Parameter 'nonesuch' is unexpected", "{}", entry.name);
    }
}

#[test]
fn the_time_of_a_measurement_is_checked() {
    let parsed = parse("calc-dirty-rate", json!({"calc-time": 1}));
    assert_eq!(parsed.unwrap(), Command::CalcDirtyRate(Duration::from_secs(1)));
    for arguments in [
        json!({"calc-time": 0}),
        json!({"calc-time": 61}),
        json!({"calc-time": 49, "calc-time-unit": "millisecond"}),
        json!({"calc-time": 1, "calc-time-unit": "hour"}),
        json!({"calc-time": 1, "mode": "page-sampling"}),
        json!({"calc-time": u64::MAX}),
    ] {
        assert!(parse("calc-dirty-rate", arguments.clone()).is_err(), "{arguments}");
    }
}

#[test]
fn the_cache_size_has_commands_of_its_own() {
    let set = parse("migrate-set-cache-size", json!({"value": 1 << 20}));
    let Ok(Command::SetParameters(change)) = set else { panic!("{set:?}") };
    assert_eq!(change.apply(Params::default()).unwrap().xbzrle_cache_size, 1 << 20);
    let too_small = ParameterChange { xbzrle_cache_size: Some(0), ..change };
    assert!(too_small.apply(Params::default()).is_err());
    assert_eq!(parse("query-migrate-cache-size", json!({})), Ok(Command::QueryCacheSize));
}

#[test]
fn parameters_are_checked() {
    let change = parse("migrate-set-parameters", json!({"downtime-limit": 2_000_001}));
    let Ok(Command::SetParameters(change)) = change else { panic!("{change:?}") };
    assert!(change.apply(Params::default()).is_err());
    for (name, value) in [
        ("throttle-trigger-threshold", 0),
        ("cpu-throttle-initial", 100),
        ("cpu-throttle-increment", 1_000_000),
        ("max-cpu-throttle", 19),
    ] {
        let change = parse("migrate-set-parameters", json!({name: value}));
        let Ok(Command::SetParameters(change)) = change else { panic!("{change:?}") };
        let refused = change.apply(Params::default()).unwrap_err().desc;
        assert!(refused.contains(name), "{refused}");
    }
}

fn bitmap(name: &str) -> BitmapName {
    BitmapName::new(name).unwrap()
}

#[test]
fn a_transaction_is_made_of_the_commands_of_the_same_names() {
    let of = |name: &str| json!({"node": "root", "name": name});
    let named = |kind: &str, name: &str| json!({"type": kind, "data": of(name)});
    let merge = json!({
        "node": "root",
        "target": "a",
        "bitmaps": ["b", {"node": "data", "name": "c"}],
    });
    let actions = json!([
        named("block-dirty-bitmap-add", "a"),
        named("block-dirty-bitmap-remove", "b"),
        named("block-dirty-bitmap-clear", "c"),
        named("block-dirty-bitmap-enable", "d"),
        named("block-dirty-bitmap-disable", "e"),
        {"type": "block-dirty-bitmap-merge", "data": merge},
    ]);
    let all = parse("transaction", json!({"actions": actions})).unwrap();
    let one_by_one = actions.as_array().unwrap().iter().flat_map(|action| {
        match parse(action["type"].as_str().unwrap(), action["data"].clone()) {
            Ok(Command::ChangeBitmaps(one)) => one,
            other => panic!("{other:?}"),
        }
    });
    assert_eq!(all, Command::ChangeBitmaps(one_by_one.collect()));
    let Command::ChangeBitmaps(all) = all else { panic!("{all:?}") };
    let sources = vec![(None, bitmap("b")), (Some("data".to_owned()), bitmap("c"))];
    let change = BitmapChange::Merge { target: bitmap("a"), sources };
    assert_eq!(all[5], BitmapAction { node: "root".to_owned(), change });
    let properties = json!({"completion-mode": "individual"});
    let empty = parse("transaction", json!({"actions": [], "properties": properties}));
    assert_eq!(empty, Ok(Command::ChangeBitmaps(Vec::new())));
}

#[test]
fn a_transaction_of_other_things_is_refused() {
    let desc = |arguments| parse("transaction", arguments).unwrap_err().desc;
    let clear = json!({"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "b"}});
    let grouped = json!({"actions": [clear], "properties": {"completion-mode": "grouped"}});
    assert_eq!(
        desc(grouped),
        "Action 'block-dirty-bitmap-clear' does not support transaction property completion-mode = \
         grouped"
    );
    let unknown = desc(json!({"actions": [clear, {"type": "drive-mirror", "data": {}}]}));
    assert!(unknown.contains("'type' does not accept value 'drive-mirror'"), "{unknown}");
    let nested = desc(json!({"actions": [{"type": "transaction", "data": {"actions": []}}]}));
    assert!(nested.contains("'type' does not accept value 'transaction'"), "{nested}");
    let many = desc(json!({"actions": vec![clear; bitmap::MAX_ACTIONS + 1]}));
    assert!(many.contains("at most 1024 elements, not 1025"), "{many}");
    let data = json!({"node": "n", "name": "b", "granularity": -1});
    let negative = desc(json!({"actions": [{"type": "block-dirty-bitmap-add", "data": data}]}));
    assert_eq!(negative, "Invalid parameter type for 'granularity', expected: integer");
}

#[test]
fn a_transaction_with_backups_keeps_the_order_of_its_actions() {
    let clear = json!({"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "b"}});
    let data = json!({"device": "n", "target": "/x", "sync": "full"});
    let save = json!({"type": "drive-backup", "data": data});
    let actions = json!({"actions": [clear, save, clear]});
    let Ok(Command::Backup(steps)) = parse("transaction", actions) else {
        panic!("it is not a transaction with a backup");
    };
    let are_bitmaps: Vec<_> =
        steps.iter().map(|step| matches!(step, BackupStep::Bitmap(_))).collect();
    assert_eq!(are_bitmaps, [true, false, true]);
    let BackupStep::Backup(spec) = &steps[1] else { unreachable!() };
    assert_eq!((spec.device.as_str(), spec.job.id.as_str()), ("n", "n"));
}

#[test]
fn names_of_bitmaps_are_checked() {
    for (name, refusal) in [
        ("", "Bitmap name cannot be empty"),
        (&*"n".repeat(256), "Bitmap name too long: 256 bytes, at most 255"),
        ("a\nb", "Bitmap name \"a\\nb\" has a control character"),
    ] {
        let good = "b";
        for (execute, arguments) in [
            ("block-dirty-bitmap-add", json!({"node": "n", "name": name})),
            ("block-dirty-bitmap-remove", json!({"node": "n", "name": name})),
            ("x-debug-block-dirty-bitmap-sha256", json!({"node": "n", "name": name})),
            ("block-dirty-bitmap-merge", json!({"node": "n", "target": name, "bitmaps": [good]})),
            ("block-dirty-bitmap-merge", json!({"node": "n", "target": good, "bitmaps": [name]})),
            (
                "block-dirty-bitmap-merge",
                json!({"node": "n", "target": good, "bitmaps": [{"node": "n", "name": name}]}),
            ),
        ] {
            assert_eq!(parse(execute, arguments).unwrap_err().desc, refusal, "{execute}");
        }
    }
}
