//! Disk images, and the numbered, checksummed sectors that the guest's `disk` work leaves in them.

use anyhow::{Result, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Size of a sector.
pub const SECTOR_BYTES: u64 = 512;
const MAGIC: u64 = 0x4645_5252_5953_4543;
const WORDS: usize = 64;

/// Makes an empty image.
pub fn create(path: &Path, bytes: u64) -> Result<()> {
    File::create(path)?.set_len(bytes)?;
    Ok(())
}

/// The generation that a sector proves to hold; `Err` says what is wrong with it.
fn generation(bytes: &[u8], sector: u64) -> Result<u64> {
    let words: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|chunk| chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)))
        .collect();
    ensure!(words.len() == WORDS && words[0] == MAGIC, "sector {sector} was never written");
    ensure!(words[1] == sector, "sector {sector} holds sector {}", words[1]);
    let sum = words[..WORDS - 1]
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum: u64, word| (sum ^ word).wrapping_mul(0x100_0000_01b3));
    ensure!(words[WORDS - 1] == sum, "sector {sector} is torn");
    Ok(words[2])
}

/// Reads every sector of an image and checks that each is whole and its own. Returns the sum of their
/// generations: how many sector writes the image has seen.
pub fn verify(path: &Path) -> Result<u64> {
    let file = File::open(path)?;
    let count = file.metadata()?.len() / SECTOR_BYTES;
    let mut sum = 0;
    let mut bytes = [0; WORDS * 8];
    for sector in 0..count {
        file.read_exact_at(&mut bytes, sector * SECTOR_BYTES)?;
        sum += generation(&bytes, sector)?;
    }
    Ok(sum)
}
