//! Hostile device state for tests: arbitrary JSON, and valid state with a few values replaced.

use crate::state::JsonText;
use proptest::prelude::*;
use serde_json::Value;

fn any_scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<u16>().prop_map(Value::from),
        (0u32..64).prop_map(|bit| Value::from(1u64 << bit)),
        any::<i64>().prop_map(Value::from),
        "[a-z_]{0,12}".prop_map(Value::from),
    ]
}

/// Small arbitrary JSON.
pub(crate) fn any_json() -> impl Strategy<Value = Value> {
    any_scalar().prop_recursive(3, 32, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..80).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,12}", inner, 0..6)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// Replacements of a state's values: leaf index and new value.
pub(crate) fn any_changes() -> impl Strategy<Value = Vec<(usize, Value)>> {
    let value = prop_oneof![4 => any_scalar(), 1 => any_json()];
    prop::collection::vec((any::<usize>(), value), 1..5)
}

/// Applies the replacements.
pub(crate) fn change(text: &mut JsonText, changes: &[(usize, Value)]) {
    let mut value: Value = text.decode().expect("a record of ours");
    let state = &mut value;
    for (which, value) in changes {
        let mut leaves = Vec::new();
        collect(state, &mut leaves);
        let count = leaves.len();
        if let Some(leaf) = leaves.into_iter().nth(which % count.max(1)) {
            *leaf = value.clone();
        }
    }
    *text = value.into();
}

fn collect<'a>(value: &'a mut Value, leaves: &mut Vec<&'a mut Value>) {
    match value {
        Value::Object(fields) => fields.values_mut().for_each(|field| collect(field, leaves)),
        Value::Array(items) => {
            items.iter_mut().for_each(|item| collect(item, leaves));
        }
        leaf => leaves.push(leaf),
    }
}
