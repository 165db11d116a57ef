//! What of a disk need not be copied, because the copy's blank disk holds it already: ranges that read as zeroes or,
//! if only the top layer is copied, from the backing file. Used by migrations and jobs before their first pass.

use super::BlockNode;
use super::backend::{ByteRange, Content, Extent, GoOn};
use super::bitmap::DirtyBitmap;
use std::io;

/// Clears the bits of `dirty` for the ranges of `node` that hold `skipped`; `dirty` tracks its writes. A large image
/// may have millions of holes: tells `searched` after each extent how far it has come, in bytes, and returns early
/// once `go_on` returns false. Where the storage does not say what it holds, all counts as data.
pub fn clear(
    node: &BlockNode,
    dirty: &DirtyBitmap,
    skipped: Content,
    go_on: GoOn<'_>,
    searched: &mut dyn FnMut(u64),
) {
    let mut at = 0;
    while at < node.len_bytes() && go_on() {
        let extent = match extent(node, at) {
            Ok(extent) => extent,
            Err(error) => {
                log::warn!("disk {}: its holes are copied as data: {error}", node.id());
                return;
            }
        };
        let end = at + extent.len_bytes;
        if extent.content == skipped {
            let cleared = ByteRange { offset_bytes: at, len_bytes: end - at };
            dirty.clear_within(cleared);
            // A write before the clear is in the storage by now, and a later one marks its granules. So look once
            // more for data written between the query and the clear.
            mark_written(node, dirty, cleared, skipped, go_on);
        }
        at = end;
        searched(at);
    }
}

/// Marks what is not `skipped` in `range`; what it has not looked at counts as data.
fn mark_written(
    node: &BlockNode,
    dirty: &DirtyBitmap,
    range: ByteRange,
    skipped: Content,
    go_on: GoOn<'_>,
) {
    let mut at = range.offset_bytes;
    while at < range.end() {
        let rest = ByteRange { offset_bytes: at, len_bytes: range.end() - at };
        let extent = if go_on() { extent(node, at).ok() } else { None };
        let Some(extent) = extent else {
            dirty.mark(rest);
            return;
        };
        let end = (at + extent.len_bytes).min(range.end());
        if extent.content != skipped {
            dirty.mark(ByteRange { offset_bytes: at, len_bytes: end - at });
        }
        at = end;
    }
}

fn extent(node: &BlockNode, at: u64) -> io::Result<Extent> {
    let mut extent = node.extent_at(at)?;
    // Clamped, so that the loop ends whatever the backend returns.
    extent.len_bytes = extent.len_bytes.clamp(1, node.len_bytes() - at);
    Ok(extent)
}
