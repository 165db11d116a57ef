//! Which disks to migrate with the guest: `full`, `top` or `none`, for all disks or per disk. Parsed from
//! the command line and the control socket; the supervisor applies it.

use migration::params::Params;
use serde_json::Value;
use std::str::FromStr;

/// How much of a disk is migrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskMode {
    /// Nothing: both sides share the storage.
    #[default]
    None,
    /// The data above the backing file, which the destination must have, too; everything if there is none.
    Top,
    /// Everything.
    Full,
}

impl DiskMode {
    /// Its name in options.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Top => "top",
            Self::Full => "full",
        }
    }
}

impl FromStr for DiskMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::None, Self::Top, Self::Full];
        let found = all.into_iter().find(|mode| mode.name() == text);
        found.ok_or_else(|| format!("{text:?} is none of full, top and none"))
    }
}

/// The mode of every disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskSelection {
    /// Mode of all disks that are not named.
    pub others: DiskMode,
    /// Modes by disk id.
    pub named: Vec<(String, DiskMode)>,
}

impl DiskSelection {
    /// What the capability `block` and the parameter `block-incremental` say.
    pub fn by_capability(params: &Params) -> Self {
        let others = match (params.block, params.block_incremental) {
            (false, _) => DiskMode::None,
            (true, true) => DiskMode::Top,
            (true, false) => DiskMode::Full,
        };
        Self { others, named: Vec::new() }
    }

    /// The mode of disk `id`.
    pub fn mode_of(&self, id: &str) -> DiskMode {
        let named = self.named.iter().find(|(name, _)| name == id);
        named.map_or(self.others, |(_, mode)| *mode)
    }

    /// The first named disk that is not among `ids`.
    pub fn unknown<'s>(&'s self, ids: &[&str]) -> Option<&'s str> {
        let mut names = self.named.iter().map(|(name, _)| name.as_str());
        names.find(|name| !ids.contains(name))
    }

    /// From QMP: a mode for all, or an object of modes by disk.
    pub fn from_json(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(mode) => Ok(Self { others: mode.parse()?, named: Vec::new() }),
            Value::Object(disks) => {
                let mode = |(id, mode): (&String, &Value)| {
                    let mode = mode.as_str().ok_or_else(|| format!("disk {id:?} has no mode"))?;
                    Ok::<_, String>((id.clone(), mode.parse()?))
                };
                let named = disks.iter().map(mode).collect::<Result<_, _>>()?;
                Ok(Self { others: DiskMode::None, named })
            }
            _ => Err("expected full, top, none or an object of these by disk".into()),
        }
    }
}

impl FromStr for DiskSelection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut selection = Self::default();
        for (index, part) in text.split(',').enumerate() {
            match part.split_once('=') {
                None if index == 0 => selection.others = part.parse()?,
                None => return Err(format!("{part:?} in {text:?}: expected ID=full|top|none")),
                Some((id, _)) if selection.named.iter().any(|(name, _)| name == id) => {
                    return Err(format!("disk {id:?} is there twice"));
                }
                Some((id, mode)) => selection.named.push((id.to_owned(), mode.parse()?)),
            }
        }
        Ok(selection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn disks_are_chosen_all_or_one_by_one() {
        let all: DiskSelection = "full".parse().unwrap();
        assert_eq!((all.mode_of("a"), all.unknown(&[])), (DiskMode::Full, None));
        let some: DiskSelection = "top,data=none,root=full".parse().unwrap();
        assert_eq!(
            ["root", "data", "x"].map(|id| some.mode_of(id).name()),
            ["full", "none", "top"]
        );
        assert_eq!(
            (some.unknown(&["root", "x"]), some.unknown(&["root", "data"])),
            (Some("data"), None)
        );
        let one: DiskSelection = "root=top".parse().unwrap();
        assert_eq!((one.mode_of("root"), one.mode_of("x")), (DiskMode::Top, DiskMode::None));
        for bad in ["", "all", "full,top", "full,a=b", "a=full,a=top", "full,"] {
            assert!(bad.parse::<DiskSelection>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_capability_chooses_for_all() {
        for (block, block_incremental, mode) in [
            (false, false, DiskMode::None),
            (false, true, DiskMode::None),
            (true, false, DiskMode::Full),
            (true, true, DiskMode::Top),
        ] {
            let params = Params { block, block_incremental, ..Params::default() };
            assert_eq!(DiskSelection::by_capability(&params).mode_of("a"), mode);
        }
    }

    #[test]
    fn the_control_socket_chooses_in_the_same_words() {
        assert_eq!(DiskSelection::from_json(&json!("top")).unwrap().mode_of("a"), DiskMode::Top);
        let some = DiskSelection::from_json(&json!({"root": "full"})).unwrap();
        assert_eq!((some.mode_of("root"), some.mode_of("x")), (DiskMode::Full, DiskMode::None));
        for bad in [json!(7), json!({"a": 1}), json!("some"), json!({"a": "x"})] {
            assert!(DiskSelection::from_json(&bad).is_err(), "{bad}");
        }
    }
}
