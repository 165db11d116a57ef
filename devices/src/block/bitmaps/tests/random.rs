//! Random transactions against a model of flags, and under concurrent writes.

use super::*;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

const LEN: u64 = 200 * 512;

/// Bitmaps of a disk as lists of flags.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model(BTreeMap<String, ModelBitmap>);

#[derive(Debug, Clone, PartialEq)]
struct ModelBitmap {
    granule: u64,
    recording: bool,
    flags: Vec<bool>,
}

impl ModelBitmap {
    fn mark(&mut self, range: ByteRange) {
        for (at, flag) in (0u64..).zip(&mut self.flags) {
            let (start, end) = (at * self.granule, (at + 1) * self.granule);
            *flag |= range.len_bytes > 0 && range.offset_bytes < end && start < range.end();
        }
    }

    fn ranges(&self) -> Vec<ByteRange> {
        let set = (0u64..).zip(&self.flags).filter(|(_, flag)| **flag);
        set.map(|(at, _)| {
            let (start, end) = (at * self.granule, ((at + 1) * self.granule).min(LEN));
            ByteRange { offset_bytes: start, len_bytes: end - start }
        })
        .collect()
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(usize, u64, u64),
    Transaction(Vec<Change>),
}

#[derive(Debug, Clone)]
enum Change {
    Add(usize, usize, u32, bool),
    Remove(usize, usize),
    Clear(usize, usize),
    Enable(usize, usize),
    Disable(usize, usize),
    Merge(usize, usize, Vec<(usize, usize)>),
}

impl Change {
    /// As the node's action. There are four names, and two disks.
    fn action(&self, nodes: &[Arc<BlockNode>; 2]) -> (Arc<BlockNode>, Action) {
        let name = |at: &usize| name(&format!("b{at}"));
        let (on, action) = match self {
            Change::Add(on, at, shift, recording) => {
                let new = NewBitmap { recording: *recording, ..new("x", 1 << shift) };
                (on, Action::Add(NewBitmap { name: name(at), ..new }))
            }
            Change::Remove(on, at) => (on, Action::Remove(name(at))),
            Change::Clear(on, at) => (on, Action::Clear(name(at))),
            Change::Enable(on, at) => (on, Action::Enable(name(at))),
            Change::Disable(on, at) => (on, Action::Disable(name(at))),
            Change::Merge(on, at, from) => {
                let source = |(from, at): &(usize, usize)| MergeSource {
                    node: (from != on).then(|| nodes[*from].clone()),
                    name: name(at),
                };
                let sources = from.iter().map(source).collect();
                (on, Action::Merge { target: name(at), sources })
            }
        };
        (nodes[*on].clone(), action)
    }

    /// `None` if it cannot be done.
    fn apply(&self, models: &mut [Model; 2]) -> Option<()> {
        let name = |at: &usize| format!("b{at}");
        match self {
            Change::Add(on, at, shift, recording) => {
                let (granule, recording) = (1 << shift, *recording);
                if granule < 512 || models[*on].0.contains_key(&name(at)) {
                    return None;
                }
                let flags = vec![false; usize::try_from(LEN.div_ceil(granule)).unwrap()];
                models[*on].0.insert(name(at), ModelBitmap { granule, recording, flags });
            }
            Change::Remove(on, at) => drop(models[*on].0.remove(&name(at))?),
            Change::Clear(on, at) => models[*on].0.get_mut(&name(at))?.flags.fill(false),
            Change::Enable(on, at) => models[*on].0.get_mut(&name(at))?.recording = true,
            Change::Disable(on, at) => models[*on].0.get_mut(&name(at))?.recording = false,
            Change::Merge(on, at, from) => {
                models[*on].0.get(&name(at))?;
                let mut ranges = Vec::new();
                for (from, at) in from {
                    ranges.extend(models[*from].0.get(&name(at))?.ranges());
                }
                let target = models[*on].0.get_mut(&name(at))?;
                ranges.into_iter().for_each(|range| target.mark(range));
            }
        }
        Some(())
    }
}

fn change() -> impl Strategy<Value = Change> {
    let place = || (0..2usize, 0..4usize);
    prop_oneof![
        3 => (place(), 8u32..14, any::<bool>())
            .prop_map(|((on, at), shift, recording)| Change::Add(on, at, shift, recording)),
        1 => place().prop_map(|(on, at)| Change::Remove(on, at)),
        1 => place().prop_map(|(on, at)| Change::Clear(on, at)),
        1 => place().prop_map(|(on, at)| Change::Enable(on, at)),
        1 => place().prop_map(|(on, at)| Change::Disable(on, at)),
        3 => (place(), prop::collection::vec(place(), 0..3))
            .prop_map(|((on, at), from)| Change::Merge(on, at, from)),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = (0..2usize, 0..200u64, 1..20u64)
        .prop_map(|(on, at, sectors)| Step::Write(on, at, sectors.min(200 - at)));
    let transaction = prop::collection::vec(change(), 1..4).prop_map(Step::Transaction);
    prop::collection::vec(prop_oneof![write, transaction], 0..60)
}

proptest! {
    #[test]
    fn transactions_do_all_or_nothing_of_what_the_model_does(steps in steps()) {
        let nodes = [disk(LEN), disk(LEN)];
        let mut models = [Model::default(), Model::default()];
        for step in steps {
            match step {
                Step::Write(on, at, sectors) => {
                    let bytes = vec![0; usize::try_from(sectors * 512).unwrap()];
                    nodes[on].write_at(&bytes, at * 512).unwrap();
                    let range = ByteRange { offset_bytes: at * 512, len_bytes: sectors * 512 };
                    let recording = models[on].0.values_mut().filter(|bitmap| bitmap.recording);
                    recording.for_each(|bitmap| bitmap.mark(range));
                }
                Step::Transaction(changes) => {
                    let mut after = models.clone();
                    let failed = changes.iter().position(|it| it.apply(&mut after).is_none());
                    let actions: Vec<_> = changes.iter().map(|it| it.action(&nodes)).collect();
                    let done = execute(&actions);
                    prop_assert_eq!(done.err().map(|(at, _)| at), failed);
                    if failed.is_none() {
                        models = after;
                    }
                }
            }
            for (node, model) in nodes.iter().zip(&models) {
                let entries = lock(&node.bitmaps().entries);
                prop_assert_eq!(entries.len(), model.0.len());
                let recording = entries.iter().filter(|entry| entry.recording).count();
                prop_assert_eq!(node.writes.list().len(), recording);
                for entry in entries.iter() {
                    let expected = &model.0[entry.name.as_str()];
                    prop_assert_eq!(entry.bitmap.granule_bytes(), expected.granule);
                    prop_assert_eq!(entry.recording, expected.recording);
                    for (at, flag) in (0u64..).zip(&expected.flags) {
                        prop_assert_eq!(entry.bitmap.is_marked(at * expected.granule), *flag);
                    }
                    let count = expected.flags.iter().filter(|flag| **flag).count();
                    prop_assert_eq!(entry.bitmap.marked_granules(), count as u64);
                }
            }
        }
    }
}

/// Dropped, it has the writers end.
struct EndsWriters<'a>(&'a AtomicBool);

impl Drop for EndsWriters<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Writers write sectors of their own, in order, again and again. A transaction hands over from one bitmap to
/// the next on both disks: whatever is written is in one of them.
#[test]
fn no_write_is_lost_between_bitmaps_that_take_turns_in_transactions() {
    const SECTORS: u64 = 4096;
    const ROUNDS: u64 = 400;
    let nodes = [disk(SECTORS * 512), disk(SECTORS * 512)];
    for node in &nodes {
        node.bitmaps().add(new("now", 512)).unwrap();
        node.bitmaps().add(NewBitmap { recording: false, ..new("all", 512) }).unwrap();
        node.bitmaps().add(new("untouched", 512)).unwrap();
    }
    let stop = AtomicBool::new(false);
    let written = [AtomicU64::new(0), AtomicU64::new(0)];
    std::thread::scope(|scope| {
        for (node, written) in nodes.iter().zip(&written) {
            let stop = &stop;
            scope.spawn(move || {
                let mut at = 0;
                while !stop.load(Ordering::SeqCst) || at < SECTORS / 2 {
                    write(node, at % SECTORS * 512);
                    at += 1;
                    written.store(at, Ordering::SeqCst);
                }
            });
        }
        // Also if an assertion fails: the writers would never end.
        let ends = EndsWriters(&stop);
        let on_both = |actions: &dyn Fn() -> Vec<Action>| -> Vec<(Arc<BlockNode>, Action)> {
            let of = |node: &Arc<BlockNode>| {
                actions().into_iter().map(|action| (node.clone(), action)).collect::<Vec<_>>()
            };
            nodes.iter().flat_map(of).collect()
        };
        let turn = || {
            let sources = vec![source("now")];
            vec![
                Action::Merge { target: name("all"), sources },
                Action::Disable(name("now")),
                Action::Clear(name("now")),
                Action::Enable(name("now")),
            ]
        };
        for _ in 0..ROUNDS {
            let before: Vec<_> = written.iter().map(|at| at.load(Ordering::SeqCst)).collect();
            // The same, but the last action fails: as if nothing had been.
            let mut bad = on_both(&turn);
            bad.push((nodes[1].clone(), Action::Clear(name("missing"))));
            assert_eq!(execute(&bad).unwrap_err().0, bad.len() - 1);
            execute(&on_both(&turn)).unwrap();
            for (node, before) in nodes.iter().zip(before) {
                let entries = lock(&node.bitmaps().entries);
                let all = &entries[1].bitmap;
                let missing = (0..before.min(SECTORS)).find(|at| !all.is_marked(at * 512));
                assert_eq!(missing, None, "of {before}");
            }
        }
        drop(ends);
    });
    for (node, written) in nodes.iter().zip(&written) {
        node.bitmaps().merge(&name("all"), vec![source("now")]).unwrap();
        let expected = written.load(Ordering::SeqCst).min(SECTORS) * 512;
        assert_eq!(shown(node)[0].split(' ').nth(2), Some("recording"));
        assert_eq!(
            shown(node)[1..],
            [format!("all {expected}"), format!("untouched {expected} recording")]
        );
        // The order in which they are attached does not matter, their number does.
        assert_eq!(node.writes.list().len(), 2);
    }
}
