//! Stock Linux as a guest: Debian's cloud kernel with a busybox, on the KVM of this host where there is
//! a hardware one, and in an emulated machine with such a KVM elsewhere.
//!
//! - [`check`]: runs the body of a test where a stock kernel can run.
//! - [`boot`]: how long it takes to boot.
//! - [`guest`]: the guest in tests' words: its disk, its lines, its complaints.
//! - [`packages`], [`modules`], [`cpio`]: kernel and busybox, and ramdisks made of them.
//! - [`nested`]: the emulated machine.

pub mod boot;
pub mod cpio;
pub mod guest;
pub mod modules;
pub mod nested;
pub mod packages;

use crate::needs;
use crate::skip::skip;
use anyhow::{Context, Result};
use cpio::Archive;
use modules::Modules;
use nested::{Machine, Payload};
use packages::Packages;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Names the folder with a guest's files to the test program in the emulated machine.
const ASSETS: &str = "FERRY_TEST_LINUX";
const GUEST_MODULES: [&str; 4] = ["virtio_mmio", "virtio_blk", "button", "evdev"];

/// What a Linux guest boots from.
#[derive(Clone)]
pub struct Assets {
    folder: PathBuf,
    /// What its command line needs on this host.
    cmdline: &'static str,
}

impl Assets {
    fn prepare(packages: &Packages, store: &Path) -> Result<Self> {
        let assets = Self { folder: store.join("guest"), cmdline: "" };
        std::fs::create_dir_all(&assets.folder)?;
        replace(&assets.kernel(), &std::fs::read(&packages.kernel)?)?;
        if needs::foreign_kernels().is_ok() {
            let memtest = std::fs::read(needs::foreign_kernel("boot/memtest86+x64.bin"))?;
            replace(&assets.memtest(), &memtest)?;
        }
        let mut archive = Archive::default();
        for folder in ["proc", "sys", "dev", "tmp", "mnt"] {
            archive.folder(folder)?;
        }
        archive.copy("bin/busybox", &packages.busybox)?;
        let modules = Modules::of(&packages.modules)?.in_load_order(&GUEST_MODULES)?;
        for (index, module) in modules.iter().enumerate() {
            archive.file(&format!("modules/{index:02}-{}", module.name), &module.contents)?;
        }
        archive.file("init", include_bytes!("linux/guest-init.sh"))?;
        replace(&assets.initrd(), &archive.finish()?)?;
        Ok(assets)
    }

    /// Those that came with the emulated machine.
    fn in_machine(folder: PathBuf) -> Self {
        // Its CPU does not tell KVM of XSETBV, so KVM cannot know which registers XSAVE would save.
        Self { folder, cmdline: "noxsave" }
    }

    /// Whether they came with the emulated machine.
    pub fn are_emulated(&self) -> bool {
        !self.cmdline.is_empty()
    }

    /// A bzImage.
    pub fn kernel(&self) -> PathBuf {
        self.folder.join("kernel")
    }

    /// Memtest86+, a bzImage, too; not there where its package could not be had.
    pub fn memtest(&self) -> PathBuf {
        self.folder.join("memtest")
    }

    /// Its ramdisk.
    pub fn initrd(&self) -> PathBuf {
        self.folder.join("initrd")
    }
}

/// Where a stock kernel can run.
pub enum Place {
    /// Here, on this host's KVM.
    Here(Assets),
    /// In an emulated machine, which runs the calling program once more: there, it is `Here`.
    Nested(Box<Machine>),
}

impl Place {
    /// Finds out, fetches what is needed, and starts the emulated machine with `payload` if it takes one.
    pub fn find(payload: impl FnOnce() -> Result<Payload>) -> Result<Self> {
        if let Some(folder) = std::env::var_os(ASSETS) {
            return Ok(Self::Here(Assets::in_machine(folder.into())));
        }
        let store = store()?;
        let packages = Packages::find(&store)?;
        for name in ["mke2fs", "e2fsck"] {
            program(name)?;
        }
        let assets = Assets::prepare(&packages, &store)?;
        Ok(if has_hardware_kvm() {
            Self::Here(assets)
        } else {
            Self::Nested(Box::new(Machine::start(&packages, &assets, &store, payload()?)?))
        })
    }
}

/// Runs `body`, the calling test's body, where a stock kernel can run.
///
/// # Panics
/// If the body fails, or nothing can be set up for it.
pub fn check(body: impl FnOnce(&Assets) -> Result<()>) {
    static PLACE: OnceLock<Result<Place>> = OnceLock::new();
    let thread = std::thread::current();
    let test = thread.name().expect("a test runs on a thread of its name");
    let same_tests = || {
        let arguments = std::env::args().skip(1).collect();
        Ok(Payload { arguments, programs: Vec::new(), files: Vec::new() })
    };
    match PLACE.get_or_init(|| Place::find(same_tests)) {
        Ok(Place::Here(assets)) => {
            // Past the name that the test runner prints.
            println!("\nBEGIN {test}");
            let verdict = Verdict(test);
            body(assets).unwrap_or_else(|error| panic!("{error:#}"));
            std::mem::forget(verdict);
            println!("RESULT {test} ok");
        }
        Ok(Place::Nested(machine)) => {
            machine.verdict(test).unwrap_or_else(|error| panic!("{error:#}"));
        }
        Err(reason) => skip(&format!("no Linux guest can run here: {reason:#}")),
    }
}

/// Says that a test has failed, unless forgotten.
struct Verdict<'a>(&'a str);

impl Drop for Verdict<'_> {
    fn drop(&mut self) {
        println!("RESULT {} failed", self.0);
    }
}

/// Writes a file at once: a test program beside this one may be reading the old one.
fn replace(path: &Path, contents: &[u8]) -> Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
    file.write_all(contents)?;
    file.persist(path)?;
    Ok(())
}

/// A stock kernel needs a KVM that runs all of ring 0, which one without VMX or SVM does not.
fn has_hardware_kvm() -> bool {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| cpu.split_whitespace().any(|word| word == flag);
    (has("vmx") || has("svm"))
        && !Path::new("/sys/module/kvm_pvm").exists()
        && Path::new("/dev/kvm").exists()
}

/// `linux-test` in the build's target folder; this program is in `target/debug` or `target/debug/deps`.
fn store() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let profile = own.ancestors().skip(1).find(|folder| !folder.ends_with("deps"));
    let target =
        profile.and_then(Path::parent).context("this program is not in a target folder")?;
    Ok(target.join("linux-test"))
}

/// Path of a program that may lie where only root looks.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    ["/usr/sbin", "/sbin"]
        .iter()
        .map(PathBuf::from)
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("the program {name} is missing"))
}
