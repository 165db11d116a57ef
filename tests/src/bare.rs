//! Guests of a few bytes, in machine code: Multiboot kernels that say one line, wait for a key, look at one
//! thing of their machine and end.

use anyhow::Result;
use std::path::{Path, PathBuf};

/// Prints `!`, and a line's end behind it.
pub const SAY: [u8; 10] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xb0, b'\n', 0xee];
/// Waits for a byte on the serial line: `mov dx, 0x3fd`, then `in al, dx; test al, 1; jz` back to it.
pub const WAIT_FOR_A_KEY: [u8; 9] = [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb];
/// `ud2`, for which there is no handler: the machine crashes.
pub const CRASH: [u8; 2] = [0x0f, 0x0b];
/// Ends with AL: `mov dx, 0xf4; out dx, al; hlt`.
pub const END: [u8; 6] = [0x66, 0xba, 0xf4, 0x00, 0xee, 0xf4];

/// Makes a kernel in `folder` that runs `code`, in 32-bit mode with flat segments, no stack and no IDT.
pub fn kernel(folder: &Path, code: &[&[u8]]) -> Result<PathBuf> {
    const BASE: u32 = 0x10_0000;
    const FLAGS: u32 = 0x1_0000; // The addresses below are given.
    const MAGIC: u32 = 0x1bad_b002;
    let checksum = 0u32.wrapping_sub(MAGIC + FLAGS);
    let header = [MAGIC, FLAGS, checksum, BASE, BASE, 0, 0, BASE + 32];
    let mut bytes: Vec<u8> = header.iter().flat_map(|word| little_endian(*word)).collect();
    bytes.extend(code.concat());
    let path = folder.join("bare-kernel");
    std::fs::write(&path, bytes)?;
    Ok(path)
}

/// Bytes of a number in an instruction.
#[expect(clippy::little_endian_bytes, reason = "machine code")]
pub fn little_endian(word: u32) -> [u8; 4] {
    word.to_le_bytes()
}

/// Where the first virtio device is.
const FIRST_DEVICE: u32 = 0xd000_0000;

/// Loads AL with the kind of the first virtio device: `mov eax, [address]`.
pub fn kind_of_first_device() -> Vec<u8> {
    [&[0xa1][..], &little_endian(FIRST_DEVICE + 8)].concat()
}

/// Loads AL with 1 if the first virtio device has a queue of this number, else 0.
pub fn first_device_has_queue(number: u32) -> Vec<u8> {
    let (select, size) = (little_endian(FIRST_DEVICE + 0x30), little_endian(FIRST_DEVICE + 0x34));
    // mov dword [select], number; mov eax, [size]; test eax, eax; setne al
    let number = little_endian(number);
    [&[0xc7, 0x05][..], &select, &number, &[0xa1], &size, &[0x85, 0xc0, 0x0f, 0x95, 0xc0]].concat()
}

/// Loads AL with 1 if there are ACPI tables, whose pointer is between 0xe0000 and 1 MiB, else 0.
pub const HAS_ACPI: [u8; 36] = [
    0xbe, 0x00, 0x00, 0x0e, 0x00, // mov esi, 0xe0000
    0x81, 0x3e, b'R', b'S', b'D', b' ', // again: cmp dword [esi], "RSD "
    0x74, 0x12, // je found
    0x83, 0xc6, 0x10, // add esi, 16
    0x81, 0xfe, 0x00, 0x00, 0x10, 0x00, // cmp esi, 0x100000
    0x72, 0xed, // jb again
    0xb8, 0x00, 0x00, 0x00, 0x00, // mov eax, 0
    0xeb, 0x05, // jmp behind the next
    0xb8, 0x01, 0x00, 0x00, 0x00, // found: mov eax, 1
];
