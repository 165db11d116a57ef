//! QEMU's lists of `key=value`, as in `-device virtio-blk-device,drive=d0,serial=a,,b`.
//!
//! A comma in a value is written twice. The first item may be a value alone, of a key that its option
//! implies. A later item without `=` is a switch: `server` is `server=on`, `nowait` is `wait=off`. A list
//! may also be a JSON object, whose inner objects become keys with dots, `file.filename`.

use crate::boot::payload::split_list;
use serde_json::Value;

/// Nesting of a JSON object.
const MAX_DEPTH: usize = 8;

/// A list whose items are taken one by one; what is left at the end, nobody knows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct List {
    pairs: Vec<(String, String)>,
}

impl List {
    /// Reads `text`; `implied` is the key of a first item without one.
    pub fn parse(text: &str, implied: Option<&str>) -> Result<Self, String> {
        if text.starts_with('{') {
            let object = serde_json::from_str(text);
            let object = object.map_err(|error| format!("it is not a JSON object: {error}"))?;
            let mut list = Self::default();
            list.flatten("", &object, 0)?;
            return Ok(list);
        }
        let mut list = Self::default();
        for (index, item) in split_list(text).into_iter().enumerate() {
            let pair = match (item.split_once('='), implied) {
                (Some((key, _)), Some(implied)) if index == 0 && key.is_empty() => {
                    return Err(format!("{item:?} has no {implied}"));
                }
                (Some((key, value)), _) => (key.to_owned(), value.to_owned()),
                (None, Some(implied)) if index == 0 => (implied.to_owned(), item),
                // An empty list, or a comma at the end.
                (None, _) if item.is_empty() => continue,
                (None, _) => match item.strip_prefix("no") {
                    Some(key) if !key.is_empty() => (key.to_owned(), "off".to_owned()),
                    _ => (item, "on".to_owned()),
                },
            };
            list.pairs.push(pair);
        }
        Ok(list)
    }

    fn flatten(&mut self, prefix: &str, value: &Value, depth: usize) -> Result<(), String> {
        let text = match value {
            Value::Object(object) if depth < MAX_DEPTH => {
                for (key, value) in object {
                    let dot = if prefix.is_empty() { "" } else { "." };
                    self.flatten(&format!("{prefix}{dot}{key}"), value, depth + 1)?;
                }
                return Ok(());
            }
            Value::Bool(on) => if *on { "on" } else { "off" }.to_owned(),
            Value::Number(number) => number.to_string(),
            Value::String(text) => text.clone(),
            _ => return Err(format!("JSON: {prefix:?} is neither a text, a number nor a switch")),
        };
        self.pairs.push((prefix.to_owned(), text));
        Ok(())
    }

    /// Takes the value of `key`; the last one counts, as in QEMU.
    pub fn take(&mut self, key: &str) -> Option<String> {
        let mut value = None;
        self.pairs.retain_mut(|(found, text)| {
            let other = found != key;
            if !other {
                value = Some(std::mem::take(text));
            }
            other
        });
        value
    }

    /// Takes the value of `key`, which the list must have.
    pub fn need(&mut self, key: &str) -> Result<String, String> {
        self.take(key).filter(|value| !value.is_empty()).ok_or_else(|| format!("it has no {key}="))
    }

    /// Takes a switch.
    pub fn switch(&mut self, key: &str) -> Result<Option<bool>, String> {
        let is_on = |text: String| match text.as_str() {
            "on" | "yes" | "true" | "y" => Ok(true),
            "off" | "no" | "false" | "n" => Ok(false),
            _ => Err(format!("{key}={text}: neither on nor off")),
        };
        self.take(key).map(is_on).transpose()
    }

    /// Takes a number, decimal or with `0x`.
    pub fn number(&mut self, key: &str) -> Result<Option<u64>, String> {
        let number =
            |text: String| number(&text).ok_or_else(|| format!("{key}={text}: it is not a number"));
        self.take(key).map(number).transpose()
    }

    /// Takes, and forgets, what makes no difference here.
    pub fn drop(&mut self, keys: &[&str]) {
        self.pairs.retain(|(key, _)| !keys.contains(&key.as_str()));
    }

    /// Items that are left.
    pub fn rest(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Fails if anything is left, by name.
    pub fn done(&self) -> Result<(), String> {
        match self.rest().next() {
            None => Ok(()),
            Some((key, value)) => Err(format!("{key}={value} is not there in Ferry")),
        }
    }
}

/// Reads a number, decimal or with `0x`.
pub(super) fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str, implied: Option<&str>) -> Vec<(String, String)> {
        List::parse(text, implied).unwrap().pairs
    }

    fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn lists_are_read_as_qemu_reads_them() {
        let list = "virtio-blk-device,drive=d0,serial=a,,b=c,server,nowait";
        let expected = [
            ("driver", "virtio-blk-device"),
            ("drive", "d0"),
            ("serial", "a,b=c"),
            ("server", "on"),
            ("wait", "off"),
        ];
        assert_eq!(pairs(list, Some("driver")), owned(&expected));
        assert_eq!(pairs("driver=x", Some("driver")), owned(&[("driver", "x")]));
        assert_eq!(pairs("a=1,", None), owned(&[("a", "1")]));
        assert_eq!(pairs("", None), []);
        assert!(List::parse("=x", Some("driver")).is_err());
    }

    #[test]
    fn json_is_a_list_too() {
        let list = r#"{"driver": "raw", "file": {"driver": "file", "filename": "/a,b"}, "ro": true, "n": 3}"#;
        let mut list = List::parse(list, Some("driver")).unwrap();
        assert_eq!(list.take("file.filename").as_deref(), Some("/a,b"));
        assert_eq!((list.switch("ro"), list.number("n")), (Ok(Some(true)), Ok(Some(3))));
        assert!(List::parse("{\"a\": [1]}", None).unwrap_err().contains("\"a\""));
        let deep = "{\"a\":".repeat(100) + "1" + &"}".repeat(100);
        assert!(List::parse(&deep, None).is_err());
        assert!(List::parse("{", None).is_err());
    }

    #[test]
    fn items_are_taken_once_the_last_one_counts_and_the_rest_is_named() {
        let mut list = List::parse("a=1,b=0x10,a=2,c=maybe,d=x", None).unwrap();
        assert_eq!(list.take("a").as_deref(), Some("2"));
        assert_eq!(list.take("a"), None);
        assert_eq!(list.number("b"), Ok(Some(16)));
        assert!(list.switch("c").unwrap_err().contains("c=maybe"));
        assert!(list.done().unwrap_err().contains("d=x"));
        list.drop(&["d"]);
        assert_eq!(list.done(), Ok(()));
    }
}
