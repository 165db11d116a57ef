//! A buffer that direct I/O accepts.

/// A page: an alignment that every device accepts.
const ALIGNMENT: usize = 4096;

/// Bytes that start at a page boundary.
#[derive(Debug)]
pub struct AlignedBuffer {
    /// Over-allocated so that an aligned part fits; never reallocated.
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// A zeroed buffer of `len` bytes.
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { bytes, start, len }
    }
}

impl std::ops::Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_start_at_a_page_and_have_the_length_asked_for() {
        for len in [0, 1, 512, 4096, 100_000] {
            let mut buffer = AlignedBuffer::new(len);
            assert_eq!((buffer.as_ptr().addr() % 4096, buffer.len()), (0, len));
            buffer.fill(7);
        }
    }
}
