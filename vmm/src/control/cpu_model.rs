//! `query-cpu-model-expansion`: what a `--cpu` would be on this host, feature by feature.

use super::QmpResult;
use super::arguments::{Arguments, Kind, Member, missing, needed, optional};
use super::message::QmpError;
use crate::machine::cpu::config::{CpuConfig, CpuModel};
use crate::machine::cpu::model::guest_cpuid;
use crate::machine::cpu::names::Feature;
use kvm_bindings::kvm_cpuid_entry2;
use serde_json::{Map, Value, json};

const MODEL: Kind = Kind::Object {
    name: "CpuModelInfo",
    members: &[needed("name", Kind::Text), optional("props", Kind::Any)],
};
/// Its arguments.
pub(super) const EXPANSION: &[Member] = &[
    needed("type", Kind::Choice { name: "CpuModelExpansionType", values: &["static", "full"] }),
    needed("model", MODEL),
];
/// Its reply.
pub(super) const EXPANDED: Kind =
    Kind::Object { name: "CpuModelExpansionInfo", members: &[needed("model", MODEL)] };

/// A model to expand.
#[derive(Debug, Clone, PartialEq)]
pub struct Expansion {
    cpu: CpuConfig,
    /// Whether the expanded model is called as before, rather than `base`, which has no features of its own.
    full: bool,
}

/// Reads the arguments.
pub(super) fn expansion(arguments: &mut Arguments) -> Result<Expansion, QmpError> {
    let full = arguments.text("type").is_some_and(|kind| kind == "full");
    let Some(Value::Object(mut model)) = arguments.any("model") else {
        return Err(missing("model"));
    };
    let name = model.get("name").and_then(Value::as_str).unwrap_or_default();
    let model_named = CpuModel::find(name)
        .ok_or_else(|| QmpError::generic(format!("The CPU definition '{name}' is unknown.")))?;
    let mut cpu = CpuConfig { model: model_named, switches: Vec::new() };
    let props = match model.remove("props") {
        None => Map::new(),
        Some(Value::Object(props)) => props,
        Some(_) => {
            let desc = "Invalid parameter type for 'model.props', expected: object";
            return Err(QmpError::generic(desc));
        }
    };
    for (name, on) in props {
        let feature = Feature::find(&name)
            .ok_or_else(|| QmpError::generic(format!("Property '{name}' not found")))?;
        let on = on.as_bool().ok_or_else(|| {
            let desc = format!("Invalid parameter type for '{name}', expected: boolean");
            QmpError::generic(desc)
        })?;
        cpu.switch(feature, on);
    }
    Ok(Expansion { cpu, full })
}

impl Expansion {
    /// The reply on a host whose KVM offers `supported`.
    pub fn reply(&self, supported: &[kvm_cpuid_entry2]) -> QmpResult {
        let guest = guest_cpuid(&self.cpu, supported)
            .map_err(|error| QmpError::generic(error.to_string()))?;
        let feature = |feature: Feature| (feature.name().to_owned(), feature.is_in(&guest).into());
        let props: Map<String, Value> = Feature::all().into_iter().map(feature).collect();
        let name = if self.full { self.cpu.model.name() } else { "base" };
        Ok(json!({"model": {"name": name, "props": props}}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand(arguments: Value) -> Result<Value, String> {
        let Value::Object(values) = arguments else { panic!("{arguments}") };
        let mut arguments =
            Arguments::new(EXPANSION, values).map_err(|error| format!("{error:?}"))?;
        // SSE 3 with what it needs, FXSR to SSE 2, and CMOV.
        let edx = 1 << 15 | 7 << 24;
        let leaf = kvm_cpuid_entry2 { function: 1, ecx: 1, edx, ..Default::default() };
        let expansion = expansion(&mut arguments).map_err(|error| format!("{error:?}"))?;
        expansion.reply(&[leaf]).map_err(|error| format!("{error:?}"))
    }

    #[test]
    fn a_model_is_expanded_to_all_features() {
        let model = json!({"name": "max", "props": {"cmov": false}});
        let reply = expand(json!({"type": "full", "model": model})).unwrap();
        assert_eq!(reply["model"]["name"], "host");
        let props = &reply["model"]["props"];
        assert_eq!(
            (&props["pni"], &props["cmov"], &props["avx"]),
            (&json!(true), &json!(false), &json!(false))
        );
        let reply = expand(json!({"type": "static", "model": {"name": "host"}})).unwrap();
        assert_eq!(
            (&reply["model"]["name"], &reply["model"]["props"]["cmov"]),
            (&json!("base"), &json!(true))
        );
    }

    #[test]
    fn what_cannot_be_expanded_is_named() {
        for (model, expected) in [
            (json!({"name": "486"}), "'486' is unknown"),
            (json!({"name": "host", "props": {"avx1024": true}}), "'avx1024' not found"),
            (json!({"name": "host", "props": {"avx": 1}}), "expected: boolean"),
            (json!({"name": "host", "props": []}), "expected: object"),
            (json!({"name": "x86-64-v3"}), "avx2"),
            (json!({"props": {}}), "'name' is missing"),
        ] {
            let error = expand(json!({"type": "full", "model": model})).unwrap_err();
            assert!(error.contains(expected), "{error} lacks {expected}");
        }
    }
}
