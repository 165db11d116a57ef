//! Names of bitmaps, also the aliases under which they travel.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Longest name in bytes; the wire has one byte for the length.
pub const MAX_NAME_BYTES: usize = 255;

/// A well-formed name: 1 to [`MAX_NAME_BYTES`] bytes, no control character.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BitmapName(String);

/// A name that is not well-formed. QEMU's words where it has the rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("Bitmap name cannot be empty")]
    Empty,
    #[error("Bitmap name too long: {len_bytes} bytes, at most {MAX_NAME_BYTES}")]
    TooLong { len_bytes: usize },
    #[error("Bitmap name {name:?} has a control character")]
    Control { name: String },
}

impl BitmapName {
    /// Checks `name`.
    pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
        let name = name.into();
        match name.len() {
            0 => Err(NameError::Empty),
            len_bytes if len_bytes > MAX_NAME_BYTES => Err(NameError::TooLong { len_bytes }),
            _ if name.chars().any(char::is_control) => Err(NameError::Control { name }),
            _ => Ok(Self(name)),
        }
    }

    /// It as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for BitmapName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl TryFrom<String> for BitmapName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl From<BitmapName> for String {
    fn from(name: BitmapName) -> Self {
        name.0
    }
}

impl fmt::Display for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_1_to_255_bytes_and_no_control_character() {
        for good in ["b", "backup 2", "Sicherung-ä", &"n".repeat(255)] {
            assert_eq!(BitmapName::new(good).unwrap().as_str(), good);
        }
        assert_eq!(BitmapName::new(""), Err(NameError::Empty));
        let long = "ä".repeat(128);
        assert_eq!(BitmapName::new(long), Err(NameError::TooLong { len_bytes: 256 }));
        for bad in ["a\nb", "\0", "a\u{7f}", "\u{85}"] {
            let error = BitmapName::new(bad).unwrap_err();
            assert!(matches!(error, NameError::Control { .. }), "{error}");
            assert!(!error.to_string().contains(bad), "a log line must stay one: {error}");
        }
    }
}
