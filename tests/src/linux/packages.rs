//! A stock kernel, its modules and a static busybox: from the environment, or from the packages of Debian or
//! Ubuntu, unpacked beside the build and kept there. Nothing is installed, no version is chosen here.

use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What distributions call their kernel for virtual machines, themselves and those made of them.
const KERNEL_PACKAGES: [(&str, &str); 2] =
    [("ubuntu", "linux-image-virtual"), ("debian", "linux-image-cloud-amd64")];
const BUSYBOX_PACKAGE: &str = "busybox-static";
const OS_RELEASE: &str = "/etc/os-release";
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
                let host = std::fs::read_to_string(OS_RELEASE)
                    .with_context(|| format!("{OS_RELEASE}: {}", remedy()))?;
                let folder = unpacked(store, kernel_package(&host)?)?;
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
    let from_distribution = || -> Result<()> {
        let work = tempfile::tempdir_in(store)?;
        // The host's lists of packages may be missing or too old, and it may not be ours to renew them.
        if let Err(error) = download(work.path(), package, &[]) {
            eprintln!("{error:#}; trying again with lists of our own");
            let own = own_lists(store)?;
            download(work.path(), package, &own)?;
        }
        let contents = tempfile::tempdir_in(store)?;
        for file in std::fs::read_dir(work.path())? {
            let file = file?.path();
            run("dpkg", &[OsStr::new("-x"), file.as_os_str(), contents.path().as_os_str()], store)?;
        }
        Ok(std::fs::rename(contents.keep(), &done)?)
    };
    from_distribution().with_context(|| format!("cannot get package {package}: {}", remedy()))?;
    Ok(done)
}

fn remedy() -> String {
    format!(
        "if it cannot be had, set {KERNEL} (a bzImage), {MODULES} (its /lib/modules/VERSION) and {BUSYBOX} (a static \
         busybox)"
    )
}

/// The kernel's package on a host with this `/etc/os-release`.
fn kernel_package(os_release: &str) -> Result<&'static str> {
    let value = |key: &str| {
        let line = os_release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        // A distribution that is like no other does not say so.
        line.unwrap_or_default().trim_matches(['"', '\''])
    };
    let (id, like) = (value("ID"), value("ID_LIKE"));
    // What it is like best comes first.
    let mut names = std::iter::once(id).chain(like.split_whitespace());
    let known = names.find_map(|name| KERNEL_PACKAGES.iter().find(|(known, _)| *known == name));
    let (_, package) =
        known.with_context(|| format!("no kernel package is known for {id:?}: {}", remedy()))?;
    Ok(package)
}

/// `package` and those that have its parts: a meta package depends on the kernel itself, and that may have
/// its modules in a package of their own. `depends` gives what `apt-cache depends` says of one.
fn with_parts(package: &str, depends: impl Fn(&str) -> Result<String>) -> Result<Vec<String>> {
    let is_part = |name: &str| {
        // Drivers of real hardware.
        let extra = name.starts_with("linux-modules-extra-");
        (name.starts_with("linux-image-") || name.starts_with("linux-modules-")) && !extra
    };
    let mut packages = vec![package.to_owned()];
    let mut next = 0;
    while let Some(package) = packages.get(next) {
        let said = depends(package)?;
        let mut another_will_do = false;
        for line in said.lines().map(str::trim) {
            // All alternatives but the last have a bar before them: the first one is taken.
            let (will_do, line) = match line.strip_prefix('|') {
                Some(line) => (true, line),
                None => (false, line),
            };
            let is_alternative = std::mem::replace(&mut another_will_do, will_do);
            let Some(name) = line.strip_prefix("Depends: ") else { continue };
            if is_part(name) && !is_alternative && !packages.iter().any(|known| known == name) {
                packages.push(name.to_owned());
            }
        }
        next += 1;
    }
    Ok(packages)
}

fn download(folder: &Path, package: &str, options: &[String]) -> Result<()> {
    let with = |words: &[&str]| -> Vec<String> {
        options.iter().cloned().chain(words.iter().map(|word| (*word).to_owned())).collect()
    };
    let depends = |package: &str| run("apt-cache", &with(&["depends", package]), folder);
    let packages = with_parts(package, depends)?;
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    run("apt-get", &with(&[&["download"], &packages[..]].concat()), folder).map(drop)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_distribution_has_its_kernel_and_others_are_told_what_to_do() {
        let debian =
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_ID=\"12\"\nID=debian\n";
        let ubuntu = "NAME=\"Ubuntu\"\nVERSION_ID=\"24.04\"\nID=ubuntu\nID_LIKE=debian\n";
        let mint = "NAME=\"Linux Mint\"\nID=linuxmint\nID_LIKE=\"ubuntu debian\"\n";
        let mint_of_debian = "NAME=\"LMDE\"\nID=linuxmint\nID_LIKE=debian\n";
        for (host, package) in [
            (debian, "linux-image-cloud-amd64"),
            (ubuntu, "linux-image-virtual"),
            (mint, "linux-image-virtual"),
            (mint_of_debian, "linux-image-cloud-amd64"),
        ] {
            assert_eq!(kernel_package(host).unwrap(), package, "{host}");
        }
        for host in ["NAME=Fedora\nID=fedora\n", "ID=almalinux\nID_LIKE=\"rhel centos\"\n", ""] {
            let error = kernel_package(host).unwrap_err().to_string();
            assert!(error.contains("FERRY_TEST_KERNEL"), "{error}");
        }
    }

    /// What `apt-cache depends` says of packages.
    fn parts(package: &str, known: &[(&str, &str)]) -> Vec<String> {
        let depends = |package: &str| {
            let found = known.iter().find(|(name, _)| *name == package);
            Ok(found.unwrap_or_else(|| panic!("asked for {package}")).1.to_owned())
        };
        with_parts(package, depends).unwrap()
    }

    #[test]
    fn a_kernel_comes_with_its_modules_wherever_they_are() {
        let debian = [
            (
                "linux-image-cloud-amd64",
                "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-37-cloud-amd64\n",
            ),
            (
                "linux-image-6.1.0-37-cloud-amd64",
                "linux-image-6.1.0-37-cloud-amd64\n  Depends: kmod\n  Depends: linux-base\n |Depends: initramfs-tools\n  \
                 Depends: <linux-initramfs-tool>\n    dracut\n  Recommends: firmware-linux-free\n  Suggests: linux-doc-6.1\n",
            ),
        ];
        let expected = ["linux-image-cloud-amd64", "linux-image-6.1.0-37-cloud-amd64"];
        assert_eq!(parts("linux-image-cloud-amd64", &debian), expected);
        let (image, modules) = ("linux-image-6.8.0-45-generic", "linux-modules-6.8.0-45-generic");
        let other = "linux-image-unsigned-6.8.0-45-generic";
        let meta = format!(
            "linux-image-virtual\n |Depends: {image}\n  Depends: {other}\n  Depends: linux-modules-extra-6.8.0-45-generic\n"
        );
        let of_image =
            format!("{image}\n  Depends: kmod\n  Depends: {modules}\n  Suggests: fdutils\n");
        let ubuntu = [
            ("linux-image-virtual", &*meta),
            (image, &*of_image),
            (modules, "linux-modules-6.8.0-45-generic\n"),
        ];
        assert_eq!(parts("linux-image-virtual", &ubuntu), ["linux-image-virtual", image, modules]);
        assert_eq!(
            parts("busybox-static", &[("busybox-static", "busybox-static\n")]),
            ["busybox-static"]
        );
    }
}
