//! What several modules do with plain bytes: test them for zeroes, fill them with randomness. Imports
//! nothing of this crate. Guest memory, which the guest may write meanwhile, has its own zero test in
//! [`crate::ram::zero`].

use std::fs::File;
use std::io::{self, Read};

/// Bytes compared at once; the compiler turns each comparison into vector instructions.
const BLOCK_BYTES: usize = 64;

/// Whether all of `bytes` are zero. Stops at the first 64-byte block that is not.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<BLOCK_BYTES>();
    blocks.iter().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// `N` bytes from the kernel's random number generator.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_bit_anywhere_is_not_zero() {
        for len in [0, 1, 63, 64, 65, 200] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 1 << (at % 8);
                assert!(!is_zero(&bytes), "byte {at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
