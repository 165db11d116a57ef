//! Untrusted JSON that is kept as text until its type is known, and sequences with a maximum: what a stream
//! can make us allocate is limited before it is allocated. A tree of JSON values, in contrast, takes up to a
//! hundred times as many bytes as its text.

use serde::de::{DeserializeOwned, Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};
use std::fmt;
use std::marker::PhantomData;

/// A JSON value as its text.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JsonText(Box<RawValue>);

impl JsonText {
    /// Encodes plain data.
    ///
    /// # Panics
    /// If it does not serialise, which is a bug in its type.
    pub fn of(data: &impl Serialize) -> Self {
        Self(to_raw_value(data).expect("plain data serialises"))
    }

    /// Bytes of text.
    pub fn len_bytes(&self) -> usize {
        self.0.get().len()
    }

    /// Decodes it.
    pub fn decode<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_str(self.0.get())
    }
}

impl From<Value> for JsonText {
    fn from(value: Value) -> Self {
        Self::of(&value)
    }
}

/// Whether they say the same, in whatever order.
impl PartialEq for JsonText {
    fn eq(&self, other: &Self) -> bool {
        let value = |text: &Self| text.decode::<Value>().ok();
        self.0.get() == other.0.get() || value(self) == value(other)
    }
}

/// For `deserialize_with`: a sequence of at most `MAX` elements. The next one is an error before it is read.
pub fn at_most<'de, T, D, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    deserializer.deserialize_seq(AtMost::<T, MAX>(PhantomData))
}

/// Reads a sequence of at most `MAX` elements.
pub(crate) struct AtMost<T, const MAX: usize>(pub PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for AtMost<T, MAX> {
    type Value = Vec<T>;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "at most {MAX} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Vec<T>, A::Error> {
        let mut all = Vec::new();
        while let Some(element) = elements.next_element_seed(Next::<T> {
            is_too_many: all.len() >= MAX,
            most: MAX,
            of: PhantomData,
        })? {
            all.push(element);
        }
        Ok(all)
    }
}

/// One element, unless that is one too many.
struct Next<T> {
    is_too_many: bool,
    most: usize,
    of: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> serde::de::DeserializeSeed<'de> for Next<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        if self.is_too_many {
            return Err(D::Error::custom(format_args!("more than {} elements", self.most)));
        }
        T::deserialize(deserializer)
    }
}

/// For `deserialize_with`: a text of at most `MAX` bytes.
pub fn short_text<'de, D: Deserializer<'de>, const MAX: usize>(
    deserializer: D,
) -> Result<String, D::Error> {
    struct Short<const MAX: usize>;

    impl<const MAX: usize> Visitor<'_> for Short<MAX> {
        type Value = String;

        fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(to, "a text of at most {MAX} bytes")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
            if text.len() > MAX {
                return Err(E::invalid_length(text.len(), &self));
            }
            Ok(text.to_owned())
        }
    }

    deserializer.deserialize_str(Short::<MAX>)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Both {
        #[serde(deserialize_with = "at_most::<_, _, 3>")]
        list: Vec<u8>,
        #[serde(deserialize_with = "short_text::<_, 4>")]
        name: String,
    }

    #[test]
    fn one_element_or_byte_too_many_is_refused() {
        let read = |text: &str| serde_json::from_str::<Both>(text);
        let most = read(r#"{"list":[1,2,3],"name":"abcd"}"#).unwrap();
        assert_eq!((most.list, most.name), (vec![1, 2, 3], "abcd".to_owned()));
        let error = read(r#"{"list":[1,2,3,"x"],"name":""}"#).unwrap_err().to_string();
        assert!(error.contains("more than 3 elements"), "before it is read: {error}");
        let error = read(r#"{"list":[],"name":"abcde"}"#).unwrap_err().to_string();
        assert!(error.contains("invalid length 5, expected a text of at most 4 bytes"), "{error}");
    }

    #[test]
    fn texts_that_say_the_same_are_equal() {
        let text = |text: &str| serde_json::from_str::<JsonText>(text).unwrap();
        assert_eq!(text(r#"{"a":1, "b":[2]}"#), text(r#"{"b":[2],"a":1}"#));
        assert_ne!(text("1"), text("2"));
    }
}
