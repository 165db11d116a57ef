//! Block status: what a range of an export consists of, for one metadata context.

use super::exports::{Context, Exported};
use crate::block::BlockNode;
use crate::block::backend::Content;
use crate::block::bitmap::DirtyBitmap;
use crate::block::nbd::protocol::{Extent, state};
use std::io;

/// Most extents of a reply for one context. The client asks again from their end on.
pub const MAX_EXTENTS: usize = 4096;
/// Most questions to the disk for one reply: neighbours may be alike.
const MAX_LOOKUPS: usize = 4096;

/// Extents of `len` bytes from `offset` on, neighbours different, at most `most`. They cover at least one byte,
/// and may end early.
///
/// # Errors
/// If the disk does not tell.
pub fn extents(
    export: &Exported,
    context: Context,
    offset: u64,
    len: u32,
    most: usize,
) -> io::Result<Vec<Extent>> {
    let most = most.min(MAX_EXTENTS);
    match context {
        Context::Allocation => collect(offset, len, most, |at| allocation(&export.node, at)),
        Context::Bitmap(index) => {
            let bitmap: &DirtyBitmap = &export.bitmaps[index];
            collect(offset, len, most, |at| {
                let (is_marked, len_bytes) = bitmap.run_at(at);
                Ok((len_bytes, if is_marked { state::DIRTY } else { 0 }))
            })
        }
    }
}

/// Length in bytes and flags of what the disk has at `at`.
fn allocation(node: &BlockNode, at: u64) -> io::Result<(u64, u32)> {
    let extent = node.extent_at(at)?;
    let flags = match extent.content {
        // The backing file may have data there.
        Content::Data | Content::Backing => 0,
        Content::Zero => state::HOLE | state::ZERO,
    };
    Ok((extent.len_bytes, flags))
}

fn collect(
    offset: u64,
    len: u32,
    most: usize,
    look: impl Fn(u64) -> io::Result<(u64, u32)>,
) -> io::Result<Vec<Extent>> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut done = 0;
    for _ in 0..MAX_LOOKUPS {
        if done == len {
            break;
        }
        let (found, flags) = match look(offset + u64::from(done)) {
            Ok(found) => found,
            // What is known is of use.
            Err(_) if !extents.is_empty() => break,
            Err(error) => return Err(error),
        };
        let rest = len - done;
        let len = u32::try_from(found).map_or(rest, |found| found.min(rest));
        let count = extents.len();
        match extents.last_mut() {
            Some(last) if last.flags == flags => last.len += len,
            _ if count == most => break,
            _ => extents.push(Extent { len, flags }),
        }
        done += len;
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_that_are_alike_are_one_extent() {
        let look = |at| Ok((512, u32::from((1024..2048).contains(&at))));
        let all = collect(0, 4096, 10, look).unwrap();
        let extent = |len, flags| Extent { len, flags };
        assert_eq!(all, [extent(1024, 0), extent(1024, 1), extent(2048, 0)]);
        assert_eq!(collect(0, 4096, 1, look).unwrap(), [extent(1024, 0)]);
        assert_eq!(collect(1536, 1024, 2, look).unwrap(), [extent(512, 1), extent(512, 0)]);
        assert_eq!(collect(0, 512, 9, |_| Ok((u64::MAX, 3))).unwrap(), [extent(512, 3)]);
    }

    #[test]
    fn a_reply_is_bounded_in_extents_and_in_questions() {
        let alternating = |at: u64| Ok((512, u32::from(at / 512 % 2 == 1)));
        assert_eq!(collect(0, u32::MAX, MAX_EXTENTS, alternating).unwrap().len(), MAX_EXTENTS);
        let alike = collect(0, u32::MAX, MAX_EXTENTS, |_| Ok((512, 0))).unwrap();
        assert_eq!(alike, [Extent { len: 512 * 4096, flags: 0 }]);
    }

    #[test]
    fn an_error_ends_the_reply_early_unless_nothing_is_known() {
        let fails_at = |bad: u64| {
            move |at: u64| if at == bad { Err(io::Error::other("broken")) } else { Ok((512, 0)) }
        };
        assert_eq!(collect(0, 4096, 9, fails_at(1024)).unwrap(), [Extent { len: 1024, flags: 0 }]);
        assert!(collect(0, 4096, 9, fails_at(0)).is_err());
    }
}
