//! `ferry backup --verify`: every file is as it was written, and lies on the one that the manifest says.

use super::Error;
use super::digest::sha256;
use super::manifest::{Folder, Saved, SavedDisk};
use devices::block::backend::BlockBackend;
use devices::block::qcow2::{BackingChoice, Qcow2File};
use devices::block::raw::Cache;
use std::path::Path;

/// Checks all files, and says what is wrong with each.
pub fn run(path: &Path) -> Result<(), Error> {
    let folder = Folder::open(path)?;
    let manifest = folder.read()?;
    let mut problems = 0;
    let mut files = 0;
    for (disk, saved) in &manifest.disks {
        for file in &saved.files {
            files += 1;
            if let Err(why) = check_file(&folder, file) {
                problems += 1;
                eprintln!("ferry: disk {disk}: {}: {why}", file.file);
            }
        }
        if let Err(why) = check_chain(&folder, saved) {
            problems += 1;
            eprintln!("ferry: disk {disk}: {why}");
        }
    }
    if problems > 0 {
        return Err(Error::Unusable(format!(
            "{problems} problems in {}: what is named above cannot be restored",
            path.display()
        )));
    }
    if files == 0 {
        return Err(Error::Unusable(format!("{} has no backup yet", path.display())));
    }
    println!("{files} files of {} disks are as they were saved", manifest.disks.len());
    Ok(())
}

/// Checks the newest image of a disk and those below it.
pub fn check_newest(folder: &Folder, saved: &SavedDisk) -> Result<(), String> {
    for file in saved.chain()? {
        check_file(folder, file).map_err(|why| format!("{}: {why}", file.file))?;
    }
    check_chain(folder, saved)
}

fn check_file(folder: &Folder, saved: &Saved) -> Result<(), String> {
    let (bytes, digest) = sha256(&folder.path(&saved.file)).map_err(|error| error.to_string())?;
    if bytes != saved.bytes {
        return Err(format!("it has {bytes} bytes instead of {}", saved.bytes));
    }
    if digest != saved.sha256 {
        return Err(format!("its SHA-256 is {digest} instead of {}", saved.sha256));
    }
    Ok(())
}

/// Checks that the images lie on each other as the manifest says.
fn check_chain(folder: &Folder, saved: &SavedDisk) -> Result<(), String> {
    let chain = saved.chain()?;
    let Some((top, below)) = chain.split_first() else { return Ok(()) };
    let image =
        Qcow2File::open(&folder.path(&top.file), true, Cache::Writeback, BackingChoice::Recorded);
    let image = image.map_err(|error| crate::error::chain(&error))?;
    if image.len_bytes() != saved.size {
        let is = image.len_bytes();
        return Err(format!("{} is of a disk of {is} bytes instead of {}", top.file, saved.size));
    }
    let recorded = image.backing().map(|chain| chain.files()).unwrap_or_default();
    let expected: Vec<_> = below.iter().map(|saved| folder.path(&saved.file)).collect();
    let same = recorded.len() == expected.len()
        && recorded.iter().zip(&expected).all(|(one, other)| Path::new(one) == other);
    match same {
        true => Ok(()),
        false => Err(format!("{} lies on other files: {}", top.file, recorded.join(", "))),
    }
}
