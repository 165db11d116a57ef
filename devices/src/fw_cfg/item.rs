//! Names and contents of fw_cfg's files, and what may be among them. Checked for the command line and for a
//! description that arrives with the same functions.

use std::sync::Arc;

/// Longest name of a file: the directory has 56 bytes for it, the last of them a NUL.
pub const MAX_NAME_BYTES: usize = 55;
/// Most files that a user may add.
pub const MAX_USER_ITEMS: usize = 32;
/// Most bytes of one of them, and of all together: they travel in the machine description.
pub const MAX_USER_BYTES: usize = 256 << 10;
/// What names of users' files should begin with: others are QEMU's own.
pub const USER_PREFIX: &str = "opt/";
/// The memory map, which is there in any case.
pub const E820_FILE: &str = "etc/e820";

/// A file that the user has added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserItem {
    /// Its name.
    pub name: String,
    /// Its content.
    pub content: Arc<[u8]>,
}

/// Whether there can be a file of this name.
///
/// # Errors
/// Names it and says why not.
pub fn check_name(name: &str) -> Result<(), String> {
    match name.len() {
        0 => Err("an item of fw_cfg needs a name".into()),
        len if len > MAX_NAME_BYTES => {
            Err(format!("{name:?} has {len} bytes, at most {MAX_NAME_BYTES} are possible"))
        }
        _ if !name.chars().all(|c| c.is_ascii_graphic()) => {
            Err(format!("{name:?} may have printable ASCII characters, and no space"))
        }
        _ if name == E820_FILE => Err(format!("{name:?} is Ferry's own")),
        _ => Ok(()),
    }
}

/// Whether these names can be beside each other.
///
/// # Errors
/// Names the one that cannot.
pub fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let mut seen: Vec<&str> = Vec::new();
    for name in names {
        check_name(name)?;
        if seen.contains(&name) {
            return Err(format!("{name:?} is given twice"));
        }
        if seen.len() >= MAX_USER_ITEMS {
            return Err(format!("more than {MAX_USER_ITEMS} items"));
        }
        seen.push(name);
    }
    Ok(())
}

/// Whether files of these lengths may be beside each other.
///
/// # Errors
/// If they have more than [`MAX_USER_BYTES`] together.
pub fn check_lengths(mut lengths: impl Iterator<Item = usize>) -> Result<(), String> {
    match lengths.try_fold(0, |sum: usize, len| sum.checked_add(len)) {
        Some(sum) if sum <= MAX_USER_BYTES => Ok(()),
        _ => Err(format!("more than {MAX_USER_BYTES} bytes in all items together")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_directory_cannot_hold_are_refused() {
        let longest = "n".repeat(MAX_NAME_BYTES);
        assert_eq!(check_name(&longest), Ok(()));
        for bad in ["", "a b", "a\0", "\u{e9}", E820_FILE, &format!("{longest}n")] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_names(["a", "b", "a"].into_iter()).unwrap_err().contains("twice"));
        let many: Vec<_> = (0..=MAX_USER_ITEMS).map(|n| n.to_string()).collect();
        let names = || many.iter().map(String::as_str);
        assert_eq!(check_names(names().skip(1)), Ok(()));
        assert!(check_names(names()).is_err());
    }

    #[test]
    fn contents_are_bounded_together() {
        assert_eq!(check_lengths([MAX_USER_BYTES - 1, 1].into_iter()), Ok(()));
        assert!(check_lengths([MAX_USER_BYTES, 1].into_iter()).is_err());
        assert!(check_lengths([usize::MAX, 1].into_iter()).is_err());
    }
}
