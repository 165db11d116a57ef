//! What arguments a command takes, and reading them. Tables of [`Member`]s say it once: requests are checked
//! against them here, and `schema` shows them to clients.

use super::message::QmpError;
use serde_json::{Map, Value};

/// What a value is.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// A string.
    Text,
    /// An integer that is not negative.
    Whole,
    /// A boolean.
    Flag,
    /// One of these strings.
    Choice {
        /// The type's name.
        name: &'static str,
        /// Its values.
        values: &'static [&'static str],
    },
    /// An object.
    Object {
        /// The type's name.
        name: &'static str,
        /// What it has.
        members: &'static [Member],
    },
    /// An object with a `type`, one of `cases`, and the `data` of that case; a union in QEMU's schema.
    Tagged {
        /// The type's name.
        name: &'static str,
        /// The name of the type of `type`.
        tag: &'static str,
        /// What `type` can be, and its `data`: an object.
        cases: &'static [(&'static str, Kind)],
    },
    /// One of several kinds, which differ in their JSON type; an alternate in QEMU's schema.
    Either {
        /// The type's name.
        name: &'static str,
        /// The kinds.
        of: &'static [Kind],
    },
    /// An array.
    List(&'static Kind),
    /// Anything: its reader checks it.
    Any,
}

/// An object without members, as most commands return it.
pub const EMPTY: Kind = Kind::Object { name: "q_empty", members: &[] };

/// A member of an object.
#[derive(Debug, Clone, Copy)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// Its value.
    pub kind: Kind,
    /// Whether it can be left out.
    pub optional: bool,
}

/// A member that must be there.
pub const fn needed(name: &'static str, kind: Kind) -> Member {
    Member { name, kind, optional: false }
}

/// A member that can be left out.
pub const fn optional(name: &'static str, kind: Kind) -> Member {
    Member { name, kind, optional: true }
}

/// That an argument is missing, in QEMU's words.
pub fn missing(name: &str) -> QmpError {
    QmpError::generic(format!("Parameter '{name}' is missing"))
}

fn wrong_type(name: &str, expected: &str) -> QmpError {
    QmpError::generic(format!("Invalid parameter type for '{name}', expected: {expected}"))
}

/// That a string is none of those that are known.
fn check_choice(name: &str, chosen: &str, known: &[&str]) -> Result<(), QmpError> {
    match known.contains(&chosen) {
        true => Ok(()),
        false => Err(QmpError::generic(format!(
            "Parameter '{name}' does not accept value '{chosen}', only: {}",
            known.join(", ")
        ))),
    }
}

impl Kind {
    /// Whether `value` is of this kind's JSON type, and what errors call that.
    fn json_type(self, value: &Value) -> (bool, &'static str) {
        match self {
            Self::Text | Self::Choice { .. } => (value.is_string(), "string"),
            Self::Whole => (value.is_u64(), "integer"),
            Self::Flag => (value.is_boolean(), "boolean"),
            Self::Object { .. } | Self::Tagged { .. } => (value.is_object(), "object"),
            Self::Either { name, of } => (of.iter().any(|kind| kind.json_type(value).0), name),
            Self::List(_) => (value.is_array(), "array"),
            Self::Any => (true, "value"),
        }
    }

    /// Whether `value` is of this kind; the error names it `name`, in QEMU's words.
    fn check(self, name: &str, value: &Value) -> Result<(), QmpError> {
        let (fits, expected) = self.json_type(value);
        if !fits {
            return Err(wrong_type(name, expected));
        }
        match (self, value) {
            (Self::Choice { values, .. }, Value::String(chosen)) => {
                check_choice(name, chosen, values)
            }
            (Self::Object { members, .. }, Value::Object(object)) => check(members, object),
            (Self::Tagged { cases, .. }, Value::Object(object)) => check_tagged(cases, object),
            (Self::List(of), Value::Array(list)) => {
                list.iter().try_for_each(|element| of.check(name, element))
            }
            (Self::Either { of, .. }, value) => {
                let fitting = of.iter().find(|kind| kind.json_type(value).0);
                fitting.map_or(Ok(()), |kind| kind.check(name, value))
            }
            _ => Ok(()),
        }
    }
}

fn check_tagged(
    cases: &[(&'static str, Kind)],
    object: &Map<String, Value>,
) -> Result<(), QmpError> {
    let tag = object.get("type").ok_or_else(|| missing("type"))?;
    let Some(chosen) = tag.as_str() else { return Err(wrong_type("type", "string")) };
    let known: Vec<_> = cases.iter().map(|(name, _)| *name).collect();
    check_choice("type", chosen, &known)?;
    let data = cases.iter().find(|(name, _)| *name == chosen).map(|(_, data)| *data);
    check(&[needed("type", Kind::Text), needed("data", data.unwrap_or(EMPTY))], object)
}

/// Whether `object` has what it must have, and nothing that is not in `members`.
fn check(members: &[Member], object: &Map<String, Value>) -> Result<(), QmpError> {
    for Member { name, kind, optional } in members {
        match object.get(*name) {
            Some(value) => kind.check(name, value)?,
            None if *optional => {}
            None => return Err(missing(name)),
        }
    }
    let unexpected = |name: &&String| !members.iter().any(|member| member.name == name.as_str());
    match object.keys().find(unexpected) {
        None => Ok(()),
        Some(name) => Err(QmpError::generic(format!("Parameter '{name}' is unexpected"))),
    }
}

/// Arguments that have passed the check, to be read one by one.
pub struct Arguments {
    members: &'static [Member],
    values: Map<String, Value>,
}

impl Arguments {
    /// Checks arguments against what a command takes.
    pub fn new(members: &'static [Member], values: Map<String, Value>) -> Result<Self, QmpError> {
        check(members, &values)?;
        Ok(Self { members, values })
    }

    /// An argument of any kind.
    pub fn any(&mut self, name: &str) -> Option<Value> {
        debug_assert!(
            self.members.iter().any(|member| member.name == name),
            "{name} is not listed"
        );
        self.values.remove(name)
    }

    /// An integer.
    pub fn number(&mut self, name: &str) -> Option<u64> {
        self.any(name)?.as_u64()
    }

    /// An integer from 1 to `most`.
    pub fn count(&mut self, name: &str, most: usize) -> Result<Option<usize>, QmpError> {
        let Some(number) = self.number(name) else { return Ok(None) };
        let fitting = usize::try_from(number).ok().filter(|number| (1..=most).contains(number));
        fitting.map(Some).ok_or_else(|| {
            let desc = format!("Parameter '{name}' expects an integer in the range of 1 to {most}");
            QmpError::generic(desc)
        })
    }

    /// A percentage or level. Saturates at 255: the range check comes later and refuses that.
    pub fn small(&mut self, name: &str) -> Option<u8> {
        self.number(name).map(|number| u8::try_from(number).unwrap_or(u8::MAX))
    }

    /// A boolean.
    pub fn flag(&mut self, name: &str) -> Option<bool> {
        self.any(name)?.as_bool()
    }

    /// A string, or one of the strings of a choice.
    pub fn text(&mut self, name: &str) -> Option<String> {
        match self.any(name)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// An array.
    pub fn list(&mut self, name: &str) -> Option<Vec<Value>> {
        match self.any(name)? {
            Value::Array(list) => Some(list),
            _ => None,
        }
    }

    /// An object.
    pub fn object(&mut self, name: &str) -> Option<Map<String, Value>> {
        match self.any(name)? {
            Value::Object(object) => Some(object),
            _ => None,
        }
    }

    /// Whether all have been read: one that is listed but without effect would be a bug.
    pub fn are_read(&self) -> bool {
        self.values.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_checked_at_every_depth() {
        const INNER: Kind = Kind::Object { name: "x", members: &[needed("a", Kind::Flag)] };
        const ALL: &[Member] = &[
            needed("kind", Kind::Choice { name: "y", values: &["one", "two"] }),
            optional("list", Kind::List(&INNER)),
            optional("either", Kind::Either { name: "z", of: &[Kind::Text, INNER] }),
            optional("tagged", Kind::Tagged { name: "t", tag: "u", cases: &[("x", INNER)] }),
        ];
        let read = |value: Value| {
            let read = Arguments::new(ALL, value.as_object().cloned().unwrap());
            read.map(|mut arguments| arguments.list("list")).map_err(|error| error.desc)
        };
        assert_eq!(read(json!({"kind": "one"})), Ok(None));
        let list = json!([{"a": true}, {"a": false}]);
        for more in [
            json!({"either": "text"}),
            json!({"either": {"a": true}}),
            json!({"tagged": {"type": "x", "data": {"a": true}}}),
        ] {
            let mut whole = more;
            whole["kind"] = "one".into();
            assert_eq!(read(whole), Ok(None));
        }
        assert_eq!(read(json!({"kind": "two", "list": list})), Ok(list.as_array().cloned()));
        for (value, refusal) in [
            (json!({}), "Parameter 'kind' is missing"),
            (
                json!({"kind": "six"}),
                "Parameter 'kind' does not accept value 'six', only: one, two",
            ),
            (json!({"kind": 1}), "Invalid parameter type for 'kind', expected: string"),
            (json!({"kind": "one", "x": 1}), "Parameter 'x' is unexpected"),
            (
                json!({"kind": "one", "list": 1}),
                "Invalid parameter type for 'list', expected: array",
            ),
            (
                json!({"kind": "one", "list": [1]}),
                "Invalid parameter type for 'list', expected: object",
            ),
            (json!({"kind": "one", "list": [{}]}), "Parameter 'a' is missing"),
            (
                json!({"kind": "one", "either": 1}),
                "Invalid parameter type for 'either', expected: z",
            ),
            (json!({"kind": "one", "either": {}}), "Parameter 'a' is missing"),
            (json!({"kind": "one", "tagged": {}}), "Parameter 'type' is missing"),
            (
                json!({"kind": "one", "tagged": {"type": 1}}),
                "Invalid parameter type for 'type', expected: string",
            ),
            (
                json!({"kind": "one", "tagged": {"type": "y"}}),
                "Parameter 'type' does not accept value 'y', only: x",
            ),
            (json!({"kind": "one", "tagged": {"type": "x"}}), "Parameter 'data' is missing"),
            (
                json!({"kind": "one", "tagged": {"type": "x", "data": {}, "b": 1}}),
                "Parameter 'a' is missing",
            ),
            (
                json!({"kind": "one", "tagged": {"type": "x", "data": {"a": true}, "b": 1}}),
                "Parameter 'b' is unexpected",
            ),
            (json!({"kind": "one", "list": [{"a": true, "b": 1}]}), "Parameter 'b' is unexpected"),
        ] {
            assert_eq!(read(value), Err(refusal.to_owned()));
        }
    }
}
