//! A stock kernel, its modules and a static busybox: from the environment, or from Debian's packages,
//! unpacked beside the build and kept there. Nothing is installed, no version is chosen here.

use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";
const KERNEL: &str = "FERRY_TEST_KERNEL";
const MODULES: &str = "FERRY_TEST_MODULES";
const BUSYBOX: &str = "FERRY_TEST_BUSYBOX";

/// Where things are.
#[derive(Debug, Clone)]
pub struct Packages {
    /// A bzImage.
    pub kernel: PathBuf,
    /// Its folder of modules.
    pub modules: PathBuf,
    /// A busybox without shared libraries.
    pub busybox: PathBuf,
}

impl Packages {
    /// Finds everything; downloads into `store` what is neither there nor in the environment.
    pub fn find(store: &Path) -> Result<Self> {
        std::fs::create_dir_all(store)?;
        // Another test process may be about to do the same.
        let lock = File::create(store.join("lock"))?;
        lock.lock()?;
        let given = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let (kernel, modules) = match (given(KERNEL), given(MODULES)) {
            (Some(kernel), Some(modules)) => (kernel, modules),
            (None, None) => {
                let folder = unpacked(store, KERNEL_PACKAGE)?;
                let kernel = only_entry(&[folder.join("boot")], "vmlinuz-")?;
                let modules =
                    only_entry(&[folder.join("lib/modules"), folder.join("usr/lib/modules")], "")?;
                (kernel, modules)
            }
            _ => bail!("{KERNEL} and {MODULES} belong together: set both or neither"),
        };
        let busybox = match given(BUSYBOX) {
            Some(busybox) => busybox,
            None => {
                let folder = unpacked(store, BUSYBOX_PACKAGE)?;
                only_entry(&[folder.join("bin"), folder.join("usr/bin")], "busybox")?
            }
        };
        Ok(Self { kernel, modules, busybox })
    }
}

/// The entry of the first of `folders` that exists whose name begins with `prefix`.
fn only_entry(folders: &[PathBuf], prefix: &str) -> Result<PathBuf> {
    for folder in folders.iter().filter(|folder| folder.is_dir()) {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                return Ok(entry.path());
            }
        }
    }
    bail!("{prefix}* is not in {folders:?}");
}

fn run<S: AsRef<OsStr>>(program: &str, arguments: &[S], folder: &Path) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder);
    let output = command.output().with_context(|| format!("cannot start {program}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The folder with the contents of `package`, or of the one package that it stands for.
fn unpacked(store: &Path, package: &str) -> Result<PathBuf> {
    let done = store.join(package);
    if done.is_dir() {
        return Ok(done);
    }
    let from_debian = || -> Result<()> {
        let work = tempfile::tempdir_in(store)?;
        // The host's lists of packages may be missing or too old, and it may not be ours to renew them.
        if let Err(error) = download(work.path(), package, &[]) {
            eprintln!("{error:#}; trying again with lists of our own");
            let own = own_lists(store)?;
            download(work.path(), package, &own)?;
        }
        let file = only_entry(&[work.path().to_owned()], "")?;
        let contents = tempfile::tempdir_in(store)?;
        run("dpkg", &[OsStr::new("-x"), file.as_os_str(), contents.path().as_os_str()], store)?;
        Ok(std::fs::rename(contents.keep(), &done)?)
    };
    from_debian().with_context(|| {
        format!(
            "cannot get Debian's package {package}. Where there is none, set {KERNEL} (a bzImage), \
             {MODULES} (its /lib/modules/VERSION) and {BUSYBOX} (a static busybox)"
        )
    })?;
    Ok(done)
}

fn download(folder: &Path, package: &str, options: &[String]) -> Result<()> {
    let with = |words: &[&str]| -> Vec<String> {
        options.iter().cloned().chain(words.iter().map(|word| (*word).to_owned())).collect()
    };
    let needs = run("apt-cache", &with(&["depends", package]), folder)?;
    // A meta package depends on the package with the kernel in it.
    let real = needs
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|needed| needed.starts_with("linux-image-"))
        .unwrap_or(package);
    run("apt-get", &with(&["download", real]), folder).map(drop)
}

/// Fetches lists of packages into a folder of our own; returns the options that make apt use it.
fn own_lists(store: &Path) -> Result<Vec<String>> {
    let state = store.join("apt");
    std::fs::create_dir_all(state.join("lists/partial"))?;
    std::fs::create_dir_all(state.join("cache/archives/partial"))?;
    let option = |name: &str, value: &str| ["-o".to_owned(), format!("{name}={value}")];
    let place = |folder: &str| state.join(folder).display().to_string();
    let options = [
        option("Dir::State::Lists", &place("lists")),
        option("Dir::Cache", &place("cache")),
        // Nobody but us may write into our folder.
        option("APT::Sandbox::User", ""),
    ]
    .concat();
    let mut update = options.clone();
    update.push("update".to_owned());
    run("apt-get", &update, store)?;
    Ok(options)
}
