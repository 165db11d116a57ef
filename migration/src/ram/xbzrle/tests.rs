//! Every kernel against an encoder that is too simple to be wrong, and the decoder against anything.
#![expect(clippy::cast_possible_truncation, reason = "made-up bytes")]

use super::*;
use proptest::prelude::*;
use proptest::sample::select;

/// A byte at a time.
fn naive(old: &Page, new: &Page) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut at = 0;
    loop {
        let start = at;
        while at < PAGE_BYTES && old[at] == new[at] {
            at += 1;
        }
        if at == PAGE_BYTES {
            return (out.len() <= PAGE_BYTES).then_some(out);
        }
        let changed = at;
        while at < PAGE_BYTES && old[at] != new[at] {
            at += 1;
        }
        for count in [changed - start, at - changed] {
            if count > 0x7f {
                out.extend([0x80 | (count % 128) as u8, (count / 128) as u8]);
            } else {
                out.push(count as u8);
            }
        }
        out.extend_from_slice(&new[changed..at]);
    }
}

fn check(old: &Page, new: &Page) {
    let expected = naive(old, new);
    for kernel in Kernel::all() {
        let mut encoder = Encoder::new(kernel);
        let mut into = [0xa5; PAGE_BYTES];
        let encoded = encoder.encode(old, new, &mut into);
        let name = kernel.name();
        match &expected {
            None => assert_eq!(encoded, Encoded::Overflow, "{name}"),
            Some(delta) if delta.is_empty() => assert_eq!(encoded, Encoded::Unchanged, "{name}"),
            Some(delta) => {
                assert_eq!(encoded, Encoded::Bytes(delta.len()), "{name}");
                assert_eq!(&into[..delta.len()], delta, "{name}");
                let mut page = *old;
                assert_eq!(decode(delta, &mut page), Ok(()));
                assert!(page == *new);
                // Exactly as much room as it takes, and one byte less.
                let mut exact = vec![0; delta.len()];
                assert_eq!(encoder.encode(old, new, &mut exact), encoded, "{name}");
                assert_eq!(&exact, delta, "{name}");
                exact.pop();
                assert_eq!(encoder.encode(old, new, &mut exact), Encoded::Overflow, "{name}");
            }
        }
    }
}

#[test]
fn the_published_example_comes_out_as_published() {
    let (mut old, mut new) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
    for at in 0..15 {
        // 05…13 turns into 01…0f.
        old[1001 + at] = 5 + at as u8;
        new[1001 + at] = 1 + at as u8;
    }
    old[1016..1022].copy_from_slice(&[0x68, 0, 0, 0x6b, 0, 0x6d]);
    new[1016..1022].copy_from_slice(&[0x68, 0, 0, 0x67, 0, 0x69]);
    let mut expected = vec![0xe9, 0x07, 0x0f];
    expected.extend(1..=0x0f);
    expected.extend([3, 1, 0x67, 1, 1, 0x69]);
    assert_eq!(expected.len(), 24);
    assert_eq!(naive(&old, &new), Some(expected));
    check(&old, &new);
}

#[test]
fn the_corners_come_out_right() {
    let old = [0; PAGE_BYTES];
    check(&old, &old);
    check(&old, &[1; PAGE_BYTES]);
    for (start, end) in [(0, 1), (4095, 4096), (1, 4096), (0, 4095), (63, 64), (64, 65), (63, 65)] {
        let mut new = old;
        new[start..end].fill(1);
        check(&old, &new);
    }
    // Runs and gaps of every length around the limit of a count's first byte.
    for gap in [1, 2, 15, 16, 17, 126, 127, 128, 129, 255, 256] {
        for run in [1, 2, 15, 16, 17, 126, 127, 128, 129, 255, 256] {
            let new: Vec<u8> = (0..PAGE_BYTES).map(|at| (at % (gap + run) >= gap).into()).collect();
            check(&old, new.first_chunk().unwrap());
            check(new.first_chunk().unwrap(), &old);
        }
    }
}

#[test]
fn a_page_changed_at_every_other_byte_overflows() {
    let new: Vec<u8> = (0..PAGE_BYTES).map(|at| (at % 2) as u8).collect();
    let encoded =
        Encoder::default().encode(&[0; PAGE_BYTES], new.first_chunk().unwrap(), &mut [0; 4096]);
    assert_eq!(encoded, Encoded::Overflow);
}

#[test]
fn every_lie_has_its_name() {
    let decode = |delta: &[u8]| decode(delta, &mut [0; PAGE_BYTES]);
    assert_eq!(decode(&[]), Err(XbzrleError::Empty));
    assert_eq!(decode(&[0, 1]), Err(XbzrleError::Truncated { at: 0 }));
    assert_eq!(decode(&[0x80]), Err(XbzrleError::Truncated { at: 0 }));
    assert_eq!(decode(&[0, 0x81]), Err(XbzrleError::Truncated { at: 0 }));
    assert_eq!(decode(&[0x81, 0x81, 1]), Err(XbzrleError::BadCount { at: 0 }));
    assert_eq!(decode(&[0x81, 0, 1, 7]), Err(XbzrleError::BadCount { at: 0 }));
    assert_eq!(decode(&[3, 0, 7]), Err(XbzrleError::EmptyRun { at: 0 }));
    assert_eq!(decode(&[0, 1, 7, 0, 1, 7]), Err(XbzrleError::EmptyRun { at: 3 }));
    assert_eq!(decode(&[0, 1, 7, 5]), Err(XbzrleError::TrailingUnchanged { at: 3 }));
    let mut tail = vec![0, 1, 7, 5];
    tail.resize(100, 0);
    assert_eq!(decode(&tail), Err(XbzrleError::EmptyRun { at: 3 }));
    // 4095 bytes unchanged, and two changed.
    let past = XbzrleError::PastPage { at: 0, end: 4097 };
    assert_eq!(decode(&[0xff, 0x1f, 2, 7, 7]), Err(past));
    // Unchanged bytes alone reach past the end.
    let past = XbzrleError::PastPage { at: 0, end: 0x3fff + 1 };
    assert_eq!(decode(&[0xff, 0x7f, 1, 7]), Err(past));
    let mut long = vec![0; 64];
    long[..5].copy_from_slice(&[0xfe, 0x1f, 1, 7, 3]);
    long[5] = 1;
    assert_eq!(decode(&long), Err(XbzrleError::PastPage { at: 4, end: 4099 }));
}

/// A page and what became of it: runs and gaps of all lengths, with bytes that happen to stay.
fn change() -> impl Strategy<Value = (Box<Page>, Box<Page>)> {
    let lengths = select(vec![3usize, 20, 200, 2000]);
    (any::<u64>(), lengths.clone(), lengths, any::<bool>()).prop_map(|(seed, gap, run, flip)| {
        let mut state = seed;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        let mut old = Box::new([0; PAGE_BYTES]);
        old.fill_with(|| random(256) as u8);
        let mut new = old.clone();
        let mut at = if flip { 0 } else { random(gap) };
        while at < PAGE_BYTES {
            let end = (at + 1 + random(run)).min(PAGE_BYTES);
            new[at..end].fill_with(|| random(256) as u8);
            at = end + 1 + random(gap);
        }
        (old, new)
    })
}

proptest! {
    #[test]
    fn all_kernels_agree_with_the_naive_encoder((old, new) in change()) {
        check(&old, &new);
    }

    #[test]
    fn arbitrary_bytes_never_panic(delta in prop::collection::vec(any::<u8>(), 0..5000)) {
        let _ = decode(&delta, &mut [0; PAGE_BYTES]);
    }

    #[test]
    fn a_damaged_delta_never_panics(
        (old, new) in change(),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        if let Some(mut delta) = naive(&old, &new).filter(|delta| !delta.is_empty()) {
            let at = at.index(delta.len());
            delta[at] = byte;
            let _ = decode(&delta, &mut old.clone());
            delta.truncate(at);
            let _ = decode(&delta, &mut old.clone());
        }
    }
}
