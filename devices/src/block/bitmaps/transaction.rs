//! Changes of several bitmaps at one moment, all or none.
//!
//! ```text
//! freeze  all nodes at once: bitmaps that are named leave `Writes`, one bitmap per node takes their place
//! draft   the actions, one by one, on a copy of the lists: what is cleared or merged into is a new bitmap
//! thaw    the draft, or the old lists if an action has failed; what was written meanwhile is marked in
//!         each of their bitmaps that record
//! ```
//! So every action sees the marks of the same moment, on all nodes. A write that ends later is in every bitmap
//! that records afterwards, whether the transaction succeeds or not, and never waits for one. There is nothing
//! to undo: failing drops the draft. A bitmap that is busy stays where it is; the action that names it fails.

use super::{BitmapError, BitmapName, Bitmaps, Entry, Frozen, NewBitmap, position};
use crate::block::BlockNode;
use crate::block::bitmap::{DirtyBitmap, MAX_GRANULE_BYTES, MIN_GRANULE_BYTES};
use crate::lock;
use std::sync::{Arc, MutexGuard};

/// A bitmap to merge from.
#[derive(Debug, Clone)]
pub struct MergeSource {
    /// Its disk, if another one; of the same size.
    pub node: Option<Arc<BlockNode>>,
    /// Its name.
    pub name: BitmapName,
}

/// A change of a disk's bitmaps.
#[derive(Debug, Clone)]
pub enum Action {
    /// Adds one.
    Add(NewBitmap),
    /// Removes one.
    Remove(BitmapName),
    /// Clears one.
    Clear(BitmapName),
    /// Starts recording.
    Enable(BitmapName),
    /// Stops recording.
    Disable(BitmapName),
    /// Marks in one what is marked in others.
    Merge {
        /// The one that gets the marks.
        target: BitmapName,
        /// Where they come from. They stay as they are.
        sources: Vec<MergeSource>,
    },
    /// Freezes the marks of one for a job: see [`Frozen`].
    Freeze {
        /// The bitmap.
        name: BitmapName,
        /// Whether the job may clear it at its end.
        may_clear: bool,
    },
}

impl Action {
    /// The bitmap that it changes.
    fn name(&self) -> &BitmapName {
        match self {
            Self::Add(NewBitmap { name, .. })
            | Self::Remove(name)
            | Self::Clear(name)
            | Self::Enable(name)
            | Self::Disable(name)
            | Self::Freeze { name, .. }
            | Self::Merge { target: name, .. } => name,
        }
    }

    /// What it merges from, on a node with `own` bitmaps.
    fn sources<'a>(
        &'a self,
        own: &'a Arc<Bitmaps>,
    ) -> impl Iterator<Item = (&'a Arc<Bitmaps>, &'a BitmapName)> {
        let sources = match self {
            Self::Merge { sources, .. } => sources.as_slice(),
            _ => &[],
        };
        let bitmaps = |node: &'a Option<Arc<BlockNode>>| node.as_ref().map(|node| node.bitmaps());
        sources.iter().map(move |source| (bitmaps(&source.node).unwrap_or(own), &source.name))
    }
}

/// Executes `actions` in their order as if at one moment, or none of them: then returns which one fails and
/// why. Returns what is frozen, in the order of the actions that freeze.
pub fn execute(actions: &[(Arc<BlockNode>, Action)]) -> Result<Vec<Frozen>, (usize, BitmapError)> {
    let actions: Vec<_> = actions.iter().map(|(node, action)| (node.bitmaps(), action)).collect();
    run(&actions)
}

/// The part of a transaction on one node.
struct Part<'a> {
    bitmaps: &'a Arc<Bitmaps>,
    /// Nobody else changes the list.
    _turn: MutexGuard<'a, ()>,
    entries: Vec<Entry>,
    /// Bitmaps that are named by an action, and were not busy before.
    named: Vec<&'a BitmapName>,
    draft: Vec<Entry>,
    /// What is written meanwhile, in the finest granules that are needed.
    meanwhile: Arc<DirtyBitmap>,
}

impl Part<'_> {
    /// Whether this transaction moves the entry out of `Writes` and back.
    fn moves(&self, entry: &Entry) -> bool {
        entry.recording && self.named.contains(&&entry.name)
    }

    fn moved(&self) -> impl Iterator<Item = &Arc<DirtyBitmap>> {
        self.entries.iter().filter(|entry| self.moves(entry)).map(|entry| &entry.bitmap)
    }
}

pub(super) fn run(
    actions: &[(&Arc<Bitmaps>, &Action)],
) -> Result<Vec<Frozen>, (usize, BitmapError)> {
    let mut parts = freeze(actions)?;
    let done = actions.iter().enumerate().try_for_each(|(at, (bitmaps, action))| {
        draft(&mut parts, bitmaps, action).map_err(|error| (at, error))
    });
    let frozen = |(bitmaps, action): &(&Arc<Bitmaps>, &Action)| match action {
        Action::Freeze { name, .. } => {
            let part = parts.iter().find(|part| Arc::ptr_eq(part.bitmaps, bitmaps))?;
            let entry = part.draft.iter().find(|entry| entry.name == *name)?;
            Some((Arc::clone(bitmaps), entry.clone()))
        }
        _ => None,
    };
    let frozen: Vec<_> = match done.is_ok() {
        true => actions.iter().filter_map(frozen).collect(),
        false => Vec::new(),
    };
    for mut part in parts {
        if done.is_ok() {
            part.entries = std::mem::take(&mut part.draft);
            let before = std::mem::replace(&mut *lock(&part.bitmaps.entries), part.entries.clone());
            // Unmapping a large one takes time: not under the lock.
            drop(before);
        }
        let writes = &part.bitmaps.writes;
        let back: Vec<_> = part.moved().cloned().collect();
        writes.exchange(&part.meanwhile, &back);
        back.iter().for_each(|bitmap| bitmap.merge_from(&part.meanwhile));
    }
    done.map(|()| frozen.into_iter().filter_map(|(at, entry)| Frozen::of(at, entry)).collect())
}

/// Locks the bitmaps of all nodes that are named, and takes those that are named out of their writes.
fn freeze<'a>(
    actions: &[(&'a Arc<Bitmaps>, &'a Action)],
) -> Result<Vec<Part<'a>>, (usize, BitmapError)> {
    let mut all: Vec<&Arc<Bitmaps>> = Vec::new();
    for (bitmaps, action) in actions {
        all.push(bitmaps);
        all.extend(action.sources(bitmaps).map(|(bitmaps, _)| bitmaps));
    }
    // Always in the same order, so that two transactions cannot wait for each other.
    all.sort_by_key(|bitmaps| Arc::as_ptr(bitmaps));
    all.dedup_by(|a, b| Arc::ptr_eq(a, b));
    let mut parts = Vec::new();
    for bitmaps in all {
        let turn = lock(&bitmaps.turn);
        let entries = lock(&bitmaps.entries).clone();
        let mut named: Vec<&BitmapName> = Vec::new();
        let mut granules = vec![MAX_GRANULE_BYTES];
        for (own, action) in actions {
            let names = std::iter::once((*own, action.name())).chain(action.sources(own));
            named.extend(names.filter(|(own, _)| Arc::ptr_eq(own, bitmaps)).map(|(_, name)| name));
            if let Action::Add(new) = action
                && Arc::ptr_eq(own, bitmaps)
            {
                granules.push(new.granularity);
            }
        }
        named.retain(|name| !entries.iter().any(|entry| entry.busy && entry.name == **name));
        let moves = entries.iter().filter(|entry| named.contains(&&entry.name));
        granules.extend(moves.map(|entry| entry.bitmap.granule_bytes()));
        // An action that adds one with another granularity fails.
        granules.retain(|granule| granule.is_power_of_two() && *granule >= MIN_GRANULE_BYTES);
        let granule_bytes = granules.into_iter().min().unwrap_or(MAX_GRANULE_BYTES);
        let meanwhile = DirtyBitmap::new(bitmaps.len_bytes, granule_bytes).map(Arc::new);
        let name = || actions[0].1.name().clone();
        let meanwhile = meanwhile.ok_or_else(|| (0, BitmapError::NoMemory { name: name() }))?;
        let draft = entries.clone();
        parts.push(Part { bitmaps, _turn: turn, entries, named, draft, meanwhile });
    }
    // All nodes' writes stand still for as long as it takes to exchange some pointers.
    let mut lists: Vec<_> = parts.iter().map(|part| part.bitmaps.writes.list()).collect();
    for (part, list) in parts.iter().zip(&mut lists) {
        list.retain(|bitmap| !part.moved().any(|moved| Arc::ptr_eq(moved, bitmap)));
        list.push(part.meanwhile.clone());
    }
    drop(lists);
    Ok(parts)
}

/// Executes one action on the drafts.
fn draft(
    parts: &mut [Part<'_>],
    bitmaps: &Arc<Bitmaps>,
    action: &Action,
) -> Result<(), BitmapError> {
    let part = |of: &Arc<Bitmaps>| parts.iter().position(|part| Arc::ptr_eq(part.bitmaps, of));
    let own = part(bitmaps).expect("every node that is named has a part");
    let draft = &parts[own].draft;
    if let Action::Add(new) = action {
        bitmaps.check_storable(new)?;
        let entry = bitmaps.make(draft, new)?;
        parts[own].draft.push(entry);
        return Ok(());
    }
    let at = position(draft, action.name())?;
    let entry = &draft[at];
    match action {
        // Also an inconsistent one.
        Action::Remove(_) if entry.busy => {
            return Err(BitmapError::Busy { name: entry.name.clone() });
        }
        Action::Remove(_) => bitmaps.check_writable(entry)?,
        Action::Freeze { may_clear: false, .. } => entry.check_usable()?,
        _ => bitmaps.check_changeable(entry)?,
    }
    let blank = || bitmaps.blank(&entry.name, entry.bitmap.granule_bytes());
    let changed = match action {
        Action::Add(_) => unreachable!("has returned"),
        Action::Remove(_) => None,
        Action::Clear(_) => Some(Entry { bitmap: blank()?, ..entry.clone() }),
        Action::Freeze { .. } => {
            let (bitmap, frozen) = (blank()?, Some(entry.bitmap.clone()));
            Some(Entry { bitmap, frozen, busy: true, ..entry.clone() })
        }
        Action::Enable(_) => Some(Entry { recording: true, ..entry.clone() }),
        Action::Disable(_) => Some(Entry { recording: false, ..entry.clone() }),
        Action::Merge { .. } => {
            let mut from = Vec::new();
            for (of, name) in action.sources(bitmaps) {
                let draft = &parts[part(of).expect("every node that is named has a part")].draft;
                let source = &draft[position(draft, name)?];
                source.check_usable()?;
                let sizes = (bitmaps.len_bytes, of.len_bytes);
                if sizes.0 != sizes.1 {
                    return Err(BitmapError::Sizes { target: sizes.0, from: sizes.1 });
                }
                from.push(&source.bitmap);
            }
            let merged = entry.bitmap.copy().map(Arc::new);
            let merged =
                merged.ok_or_else(|| BitmapError::NoMemory { name: entry.name.clone() })?;
            from.iter().for_each(|source| merged.merge_from(source));
            Some(Entry { bitmap: merged, ..entry.clone() })
        }
    };
    match changed {
        Some(changed) => parts[own].draft[at] = changed,
        None => drop(parts[own].draft.remove(at)),
    }
    Ok(())
}
