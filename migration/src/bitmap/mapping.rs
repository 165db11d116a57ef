//! Under which names bitmaps travel: QEMU's `block-bitmap-mapping`.
//!
//! At the source it says which bitmaps of which disks travel, and what they are called on the wire; at the
//! destination what is called so on the wire becomes which bitmap of which disk. Pure: no I/O.

use devices::block::bitmaps::BitmapName;
use std::collections::HashSet;

/// Longest alias, as of a name.
pub const MAX_ALIAS_BYTES: usize = 255;

/// A bitmap of a [`MappedNode`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedBitmap {
    pub name: String,
    /// On the wire.
    pub alias: String,
    /// QEMU's `transform.persistent`: what it is to be at the other end; `None`: as it was.
    pub persistent: Option<bool>,
}

/// A disk whose bitmaps travel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedNode {
    pub node_name: String,
    /// On the wire.
    pub alias: String,
    pub bitmaps: Vec<MappedBitmap>,
}

/// A mapping that is the same in both directions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mapping(Vec<MappedNode>);

/// Why a mapping is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    #[error("The node name '{name}' is mapped twice")]
    NodeTwice { name: String },
    #[error("The node alias '{alias}' is used twice")]
    NodeAliasTwice { alias: String },
    #[error("The bitmap '{node}'/'{name}' is mapped twice")]
    BitmapTwice { node: String, name: String },
    #[error("The bitmap alias '{node}'/'{alias}' is used twice")]
    AliasTwice { node: String, alias: String },
    #[error("'{alias}' is no alias: {why}")]
    Alias { alias: String, why: String },
}

fn check_alias(alias: &str) -> Result<(), MappingError> {
    // The rules of a bitmap's name are an alias's, too.
    BitmapName::new(alias).map(drop).map_err(|error| {
        let shown = alias.chars().take(32).collect();
        MappingError::Alias { alias: shown, why: error.to_string() }
    })
}

impl Mapping {
    /// Checks it in both directions.
    pub fn new(nodes: Vec<MappedNode>) -> Result<Self, MappingError> {
        let (mut names, mut aliases) = (HashSet::new(), HashSet::new());
        for node in &nodes {
            check_alias(&node.alias)?;
            if !names.insert(&node.node_name) {
                return Err(MappingError::NodeTwice { name: node.node_name.clone() });
            }
            if !aliases.insert(&node.alias) {
                return Err(MappingError::NodeAliasTwice { alias: node.alias.clone() });
            }
            let (mut names, mut aliases) = (HashSet::new(), HashSet::new());
            for bitmap in &node.bitmaps {
                check_alias(&bitmap.alias)?;
                let node = || node.node_name.clone();
                if !names.insert(&bitmap.name) {
                    let name = bitmap.name.clone();
                    return Err(MappingError::BitmapTwice { node: node(), name });
                }
                if !aliases.insert(&bitmap.alias) {
                    let alias = bitmap.alias.clone();
                    return Err(MappingError::AliasTwice { node: node(), alias });
                }
            }
        }
        Ok(Self(nodes))
    }

    /// The disks.
    pub fn nodes(&self) -> &[MappedNode] {
        &self.0
    }

    /// The aliases of a bitmap on the wire, and whether it is to be persistent there. `None`: it stays behind.
    pub fn there(&self, disk: &str, bitmap: &str) -> Option<(String, String, Option<bool>)> {
        let node = self.0.iter().find(|node| node.node_name == disk)?;
        let found = node.bitmaps.iter().find(|one| one.name == bitmap)?;
        Some((node.alias.clone(), found.alias.clone(), found.persistent))
    }

    /// A disk or bitmap that is mapped and not in `there`, which has the bitmaps of a disk.
    pub fn unknown(&self, there: impl Fn(&str) -> Option<Vec<String>>) -> Option<String> {
        self.0.iter().find_map(|node| {
            let Some(names) = there(&node.node_name) else { return Some(node.node_name.clone()) };
            let missing = node.bitmaps.iter().find(|one| !names.contains(&one.name))?;
            Some(format!("{}/{}", node.node_name, missing.name))
        })
    }

    /// The disk and bitmap here for aliases on the wire, and whether that is to be persistent.
    pub fn here(&self, disk: &str, bitmap: &str) -> Option<(String, String, Option<bool>)> {
        let node = self.0.iter().find(|node| node.alias == disk)?;
        let found = node.bitmaps.iter().find(|one| one.alias == bitmap)?;
        Some((node.node_name.clone(), found.name.clone(), found.persistent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, alias: &str, bitmaps: &[(&str, &str)]) -> MappedNode {
        let bitmap = |(name, alias): &(&str, &str)| MappedBitmap {
            name: (*name).into(),
            alias: (*alias).into(),
            persistent: None,
        };
        let bitmaps = bitmaps.iter().map(bitmap).collect();
        MappedNode { node_name: name.into(), alias: alias.into(), bitmaps }
    }

    #[test]
    fn a_mapping_is_the_same_in_both_directions() {
        let error = |nodes: Vec<MappedNode>| Mapping::new(nodes).unwrap_err().to_string();
        let twice = error(vec![node("a", "x", &[]), node("a", "y", &[])]);
        assert_eq!(twice, "The node name 'a' is mapped twice");
        let twice = error(vec![node("a", "x", &[]), node("b", "x", &[])]);
        assert_eq!(twice, "The node alias 'x' is used twice");
        let twice = error(vec![node("a", "x", &[("one", "1"), ("one", "2")])]);
        assert_eq!(twice, "The bitmap 'a'/'one' is mapped twice");
        let twice = error(vec![node("a", "x", &[("one", "1"), ("two", "1")])]);
        assert_eq!(twice, "The bitmap alias 'a'/'1' is used twice");
        assert!(error(vec![node("a", &"x".repeat(256), &[])]).contains("is no alias"));
        assert!(error(vec![node("a", "x", &[("one", "")])]).contains("is no alias"));
        let nodes = [node("a", "x", &[("one", "1")]), node("b", "y", &[("one", "1")])];
        let good = Mapping::new(nodes.into()).unwrap();
        assert_eq!(good.here("y", "1"), Some(("b".into(), "one".into(), None)));
        assert_eq!(good.there("b", "one"), Some(("y".into(), "1".into(), None)));
        assert_eq!(good.there("b", "1"), None);
        assert_eq!((good.here("a", "1"), good.here("x", "one")), (None, None));
    }

    #[test]
    fn what_is_mapped_and_not_there_is_named() {
        let bitmap =
            |name: &str| MappedBitmap { name: name.into(), alias: name.into(), persistent: None };
        let node = |bitmaps| MappedNode { node_name: "root".into(), alias: "r".into(), bitmaps };
        let mapping = Mapping::new(vec![node(vec![bitmap("a"), bitmap("b")])]).unwrap();
        let there = |names: &'static [&'static str]| {
            move |id: &str| (id == "root").then(|| names.iter().map(|&it| it.to_owned()).collect())
        };
        assert_eq!(mapping.unknown(there(&["b", "a", "c"])), None);
        assert_eq!(mapping.unknown(there(&["a"])), Some("root/b".into()));
        assert_eq!(mapping.unknown(|_| None), Some("root".into()));
    }
}
