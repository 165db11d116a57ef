//! QMP framing: splits a byte stream into JSON requests and encodes replies and events. Used by `control`.
//! As in QEMU, strings may have single quotes, and `\'` is an apostrophe in both kinds.

use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::fmt;

/// Longest request.
pub const MAX_REQUEST_BYTES: usize = 1 << 20;

/// How the error of a command begins that a running migration does not allow. QEMU's words.
pub const MIGRATION_IN_PROGRESS: &str = "There's a migration process in progress";

/// A QMP error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpError {
    /// `GenericError`, `CommandNotFound`…
    pub class: &'static str,
    /// Human-readable description.
    pub desc: String,
    /// What to do about it, Ferry's own: `x-hint`. QEMU has hints, but does not send them.
    pub hint: Option<&'static str>,
}

impl QmpError {
    /// A `GenericError`.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: "GenericError", desc: desc.into(), hint: None }
    }

    /// A `CommandNotFound`.
    pub fn not_active(desc: impl Into<String>) -> Self {
        Self { class: "DeviceNotActive", desc: desc.into(), hint: None }
    }

    /// A command that does not exist.
    pub fn not_found(desc: impl Into<String>) -> Self {
        Self { class: "CommandNotFound", desc: desc.into(), hint: None }
    }
}

/// A request that is not parsed into a command yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The command's name.
    pub execute: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
    /// Echoed in the reply.
    pub id: Option<Value>,
}

/// Malformed input, with its id if that could be read.
#[derive(Debug, Clone, PartialEq)]
pub struct BadRequest {
    /// Echoed in the reply.
    pub id: Option<Value>,
    /// What is wrong.
    pub error: QmpError,
    /// Whether the stream is out of sync.
    pub fatal: bool,
}

/// Splits incoming bytes into requests. Requests need no newline between them, so values are delimited by
/// their brackets.
#[derive(Debug, Default)]
pub struct Framer {
    bytes: Vec<u8>,
    depth: usize,
    /// In a string: the quote that ends it.
    quote: Option<u8>,
    escaped: bool,
}

impl Framer {
    /// Appends bytes; returns the values that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Result<Request, BadRequest>> {
        let mut found = Vec::new();
        for byte in bytes {
            if self.bytes.is_empty() && byte.is_ascii_whitespace() {
                continue;
            }
            self.bytes.push(*byte);
            if self.ends_value(*byte) {
                let value = std::mem::take(self).bytes;
                found.push(parse(&value));
            } else if self.bytes.len() > MAX_REQUEST_BYTES {
                *self = Self::default();
                let desc = format!("request is longer than {MAX_REQUEST_BYTES} bytes");
                let error = QmpError::generic(desc);
                found.push(Err(BadRequest { id: None, error, fatal: true }));
                break;
            }
        }
        found
    }

    /// Whether the byte just added ends a value: its closing bracket, or the end of a line without one. A
    /// string ends with its line, too: JSON has no line breaks in strings, so that is an error.
    fn ends_value(&mut self, byte: u8) -> bool {
        if let Some(quote) = self.quote {
            match byte {
                b'\n' => return true,
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                _ if byte == quote => self.quote = None,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' | b'\'' => self.quote = Some(byte),
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            b'\n' => return self.depth == 0,
            _ => {}
        }
        false
    }
}

/// Rewrites strings with single quotes as JSON has them.
fn double_quoted(bytes: &[u8]) -> Cow<'_, [u8]> {
    if !bytes.contains(&b'\'') {
        return bytes.into();
    }
    let mut json = Vec::with_capacity(bytes.len());
    let (mut quote, mut escaped) = (None, false);
    for byte in bytes.iter().copied() {
        match (quote, byte) {
            (Some(_), b'\'') if escaped => json.push(byte),
            (Some(_), _) if escaped => json.extend([b'\\', byte]),
            (Some(_), b'\\') => {
                escaped = true;
                continue;
            }
            (Some(end), _) if byte == end => {
                quote = None;
                json.push(b'"');
            }
            // The other kind of quote is a character like any other.
            (Some(_), b'"') => json.extend(br#"\""#),
            (None, b'"' | b'\'') => {
                quote = Some(byte);
                json.push(b'"');
            }
            _ => json.push(byte),
        }
        escaped = false;
    }
    json.into()
}

/// A JSON value without duplicate keys at any depth, which `serde_json` would accept.
struct Unique(Value);

impl<'de> de::Deserialize<'de> for Unique {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueKeys).map(Self)
    }
}

struct UniqueKeys;

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(Unique(element)) = elements.next_element()? {
            array.push(element);
        }
        Ok(array.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = members.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(de::Error::custom(format!("key {key:?} is there twice")));
            }
            let Unique(value) = members.next_value()?;
            object.insert(key, value);
        }
        Ok(object.into())
    }
}

fn parse(bytes: &[u8]) -> Result<Request, BadRequest> {
    let bad = |id: Option<&Value>, desc: String| {
        Err(BadRequest { id: id.cloned(), error: QmpError::generic(desc), fatal: false })
    };
    let mut object = match serde_json::from_slice::<Unique>(&double_quoted(bytes)) {
        Ok(Unique(Value::Object(object))) => object,
        Ok(Unique(_)) => return bad(None, "QMP input must be a JSON object".into()),
        Err(error) => return bad(None, format!("Invalid JSON syntax: {error}")),
    };
    let id = object.remove("id");
    if object.contains_key("exec-oob") {
        return bad(id.as_ref(), "QMP input member 'exec-oob' is unexpected".into());
    }
    let execute = match object.remove("execute") {
        Some(Value::String(name)) => name,
        Some(_) => return bad(id.as_ref(), "QMP input member 'execute' must be a string".into()),
        None => return bad(id.as_ref(), "QMP input lacks member 'execute'".into()),
    };
    let arguments = match object.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => {
            return bad(id.as_ref(), "QMP input member 'arguments' must be an object".into());
        }
    };
    if let Some(key) = object.keys().next() {
        return bad(id.as_ref(), format!("QMP input member '{key}' is unexpected"));
    }
    Ok(Request { execute, arguments, id })
}

/// One message, as one line.
pub fn line(value: &Value) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    bytes.extend_from_slice(b"\r\n");
    bytes
}

/// The greeting. No capabilities are offered.
pub fn greeting() -> Value {
    json!({"QMP": {"version": version(), "capabilities": []}})
}

/// The reply to `query-version`, with Ferry's own version numbers.
pub fn version() -> Value {
    let number = |text: &str| text.parse::<u32>().expect("cargo checks version numbers");
    json!({
        "qemu": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("ferry-", env!("CARGO_PKG_VERSION")),
    })
}

/// A reply.
pub fn reply(id: Option<Value>, result: Result<Value, QmpError>) -> Value {
    let mut answer = match result {
        Ok(value) => json!({"return": value}),
        Err(QmpError { class, desc, hint }) => {
            let mut error = json!({"class": class, "desc": desc});
            if let Some(hint) = hint {
                error["x-hint"] = hint.into();
            }
            json!({"error": error})
        }
    };
    if let Some(id) = id {
        answer["id"] = id;
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_hint_is_a_member_of_its_own() {
        let plain = QmpError::generic("broken");
        let error = json!({"error": {"class": "GenericError", "desc": "broken"}, "id": 7});
        assert_eq!(reply(Some(7.into()), Err(plain.clone())), error);
        let hinted = QmpError { hint: Some("mend it"), ..plain };
        assert_eq!(reply(None, Err(hinted))["error"]["x-hint"], "mend it");
    }

    #[test]
    fn requests_need_no_newline_and_may_come_in_pieces() {
        let mut framer = Framer::default();
        assert!(framer.push(br#"{"execute":"a","argu"#).is_empty());
        let found = framer.push(br#"ments":{"x":"}{"},"id":1}{"execute":"b"}"#);
        let names: Vec<_> = found.iter().map(|r| r.as_ref().unwrap().execute.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(found[0].as_ref().unwrap().id, Some(json!(1)));
    }

    #[test]
    fn strings_may_have_single_quotes_as_in_qemu() {
        let input = br#"{'execute':'a','arguments':{'x':{"y":'}"{','z':"it's"}},"id":'don\'t \"\u0041\\'}{'execute':"b"}"#;
        // In one piece, and byte by byte.
        for size in [input.len(), 1] {
            let mut framer = Framer::default();
            let found: Vec<_> = input.chunks(size).flat_map(|piece| framer.push(piece)).collect();
            let [Ok(first), Ok(second)] = found.as_slice() else { panic!("{found:?}") };
            assert_eq!((first.execute.as_str(), second.execute.as_str()), ("a", "b"));
            assert_eq!(first.arguments["x"], json!({"y": "}\"{", "z": "it's"}));
            assert_eq!(first.id, Some(json!("don't \"A\\")));
        }
        let found = Framer::default().push(br#"{"execute":"isn\'t"}"#);
        assert_eq!(found[0].as_ref().unwrap().execute, "isn't");
    }

    #[test]
    fn a_string_without_an_end_is_an_error_once_its_line_or_the_limit_is_reached() {
        let mut framer = Framer::default();
        for bad in [r#"{"execute":'a"}"#, r#"{'execute":"a"}"#, r#"{'execute':'a\'}"#, "don't"] {
            assert!(framer.push(bad.as_bytes()).is_empty(), "{bad}");
            let found = framer.push(b"\n{'execute':'b'}");
            let [Err(bad), Ok(good)] = found.as_slice() else { panic!("{bad}: {found:?}") };
            assert!(bad.error.desc.starts_with("Invalid JSON syntax") && !bad.fatal, "{bad:?}");
            assert_eq!(good.execute, "b");
        }
        let found = framer.push(&vec![b'\''; MAX_REQUEST_BYTES | 1]);
        assert!(matches!(found.as_slice(), [Err(BadRequest { fatal: true, .. })]), "{found:?}");
        assert!(framer.bytes.is_empty());
    }

    #[test]
    fn what_is_no_request_is_answered_with_an_error() {
        for bad in [
            "[1]",
            "garbage\n",
            r#"{"execute":1}"#,
            "{}",
            r#"{"execute":"a","x":1}"#,
            r#"{"execute":"a","execute":"b"}"#,
            r#"{"exec-oob":"a"}"#,
            "}",
            "{'execute':'a' 'b'}",
            r#"{'execute':'a','execute':"b"}"#,
        ] {
            let found = Framer::default().push(bad.as_bytes());
            assert!(matches!(found.as_slice(), [Err(_)]), "{bad}: {found:?}");
        }
    }

    #[test]
    fn a_key_that_is_there_twice_is_refused_by_name_at_any_depth() {
        for bad in [
            r#"{"execute":"a","id":1,"id":2}"#,
            r#"{"execute":"a","arguments":{"id":1,"x":null,"id":2}}"#,
            r#"{"execute":"a","arguments":{"x":[1.5,{"y":{"id":-1,"id":true}}]}}"#,
        ] {
            let found = Framer::default().push(bad.as_bytes());
            let [Err(bad)] = found.as_slice() else { panic!("{bad}: {found:?}") };
            assert!(bad.error.desc.contains("key \"id\" is there twice"), "{bad:?}");
        }
        let good =
            json!({"id": [null, true, -1, 1.5, u64::MAX, "x", {"id": {"id": []}}], "x": {"id": 1}});
        let found = Framer::default()
            .push(json!({"execute": "a", "arguments": good}).to_string().as_bytes());
        assert_eq!(Value::from(found[0].as_ref().unwrap().arguments.clone()), good);
    }

    #[test]
    fn an_endless_request_is_cut_off() {
        let mut framer = Framer::default();
        let found = framer.push(&vec![b'['; MAX_REQUEST_BYTES + 10]);
        assert!(matches!(found.as_slice(), [Err(BadRequest { fatal: true, .. })]));
        assert!(framer.bytes.is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_are_survived(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..9)) {
            let mut framer = Framer::default();
            for piece in pieces { let _ = framer.push(&piece); }
        }

        #[test]
        fn any_text_is_read_in_either_kind_of_quotes(text in any::<String>()) {
            let double = Value::from(text.as_str()).to_string();
            let inner = double[1..double.len() - 1].replace("\\\"", "\"").replace('\'', "\\'");
            for quoted in [double, format!("'{inner}'")] {
                let request = format!("{{'execute':{quoted}}}");
                let found = Framer::default().push(request.as_bytes());
                let [Ok(found)] = found.as_slice() else { panic!("{request}: {found:?}") };
                prop_assert_eq!(&found.execute, &text);
            }
        }
    }
}
