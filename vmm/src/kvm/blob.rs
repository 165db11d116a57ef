//! KVM structures as hex strings, for saved state whose layout only the kernel defines.

pub use devices::state::HexBytes as Bytes;
use devices::state::{Hex, to_hex};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A plain kernel structure, serialised as the hex digits of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob<T>(pub T);

impl<T: IntoBytes + Immutable> Serialize for Blob<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&to_hex(self.0.as_bytes()))
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Blob<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let size = size_of::<T>();
        let bytes = deserializer.deserialize_str(Hex(size..=size))?;
        // Cannot fail: the length was checked.
        T::read_from_bytes(&bytes)
            .map(Self)
            .map_err(|_| D::Error::invalid_length(bytes.len(), &"T"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_length_than_the_kernels_is_refused() {
        assert!(serde_json::from_str::<Blob<u32>>("\"00112233\"").is_ok());
        let error = serde_json::from_str::<Blob<u32>>("\"001122\"").unwrap_err();
        assert!(error.to_string().contains("length 3, expected 4 bytes in hex"), "{error}");
    }
}
