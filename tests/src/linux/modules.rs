//! Kernel modules and what they need, in the order in which they can be loaded. Read from the modules
//! themselves: an unpacked package has no `modules.dep`.

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A module, ready for `insmod`.
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The file's contents, decompressed.
    pub contents: Vec<u8>,
}

/// The modules of one kernel.
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: String,
}

/// `virtio-rng.ko.xz` is the module `virtio_rng`.
fn name_of(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    Some(file.split_once(".ko")?.0.replace('-', "_"))
}

impl Modules {
    /// Looks through a folder such as `/lib/modules/6.1.0-1-amd64`.
    pub fn of(folder: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut folders = vec![folder.join("kernel")];
        while let Some(folder) = folders.pop() {
            let entries = std::fs::read_dir(&folder)
                .with_context(|| format!("no modules in {}", folder.display()))?;
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else if let Some(name) = name_of(&entry.file_name().to_string_lossy()) {
                    files.insert(name, entry.path());
                }
            }
        }
        let builtin = std::fs::read_to_string(folder.join("modules.builtin"))?;
        Ok(Self { files, builtin })
    }

    /// `names` and all that they need. Those that the kernel has built in are left out.
    pub fn in_load_order(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut loaded = Vec::new();
        for name in names {
            self.add(name, &mut loaded)?;
        }
        Ok(loaded)
    }

    fn add(&self, name: &str, loaded: &mut Vec<Module>) -> Result<()> {
        if loaded.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            let builtin = |path: &str| name_of(path).is_some_and(|found| found == name);
            ensure!(self.builtin.lines().any(builtin), "the kernel has no module {name}");
            return Ok(());
        };
        let contents = read(path)?;
        for needed in needed_by(&contents) {
            self.add(&needed, loaded)?;
        }
        loaded.push(Module { name: name.to_owned(), contents });
        Ok(())
    }
}

/// The `depends=` entry of the section `.modinfo`, which is a list of C strings.
fn needed_by(contents: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = contents.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = contents[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value).replace('-', "_");
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => return Ok(std::fs::read(path)?),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => bail!("{} is compressed in an unknown way", path.display()),
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(path)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("{} needs the program {program}", path.display()))?;
    ensure!(output.status.success(), "{program} cannot read {}", path.display());
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_comes_before_it_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel/drivers");
        std::fs::create_dir_all(&kernel).unwrap();
        for (name, needs) in [("a-disk", "ring,bus"), ("ring", "bus"), ("bus", "")] {
            let contents = format!("ELF\0license=GPL\0depends={needs}\0name={name}\0");
            std::fs::write(kernel.join(format!("{name}.ko")), contents).unwrap();
        }
        std::fs::write(folder.path().join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        let modules = Modules::of(folder.path()).unwrap();
        let found = modules.in_load_order(&["ext4", "a_disk", "bus"]).unwrap();
        let names: Vec<_> = found.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["bus", "ring", "a_disk"]);
        assert!(modules.in_load_order(&["floppy"]).is_err());
    }
}
