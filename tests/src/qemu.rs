//! The same guest under QEMU: what the benchmark compares with.

use crate::ferry::Guest;
use crate::process::{Process, SOON, Vmm};
use crate::qmp::Qmp;
use anyhow::{Context, Result};
use serde_json::json;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// One QEMU.
pub struct Qemu {
    program: OsString,
    /// Where its firmware is; `None` if it knows.
    firmware: Option<PathBuf>,
    /// See [`Qemu::cpu`].
    cpu: OnceLock<&'static str>,
}

impl Qemu {
    fn new(program: OsString, firmware: Option<PathBuf>) -> Self {
        Self { program, firmware, cpu: OnceLock::new() }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(folder) = &self.firmware {
            command.arg("-L").arg(folder).args(["-L", "/usr/share/seabios"]);
        }
        command
    }

    /// The CPU model: `host`, without what some hosts offer and then refuse (MSR 0x10a). Tried once.
    fn cpu(&self) -> &'static str {
        self.cpu.get_or_init(|| {
            let works = |cpu: &str| {
                // Stopped from the start; it ends at once if it cannot be built.
                let mut command = self.command();
                command.args(["-M", "microvm", "-accel", "kvm", "-cpu", cpu, "-nodefaults", "-S"]);
                command.args(["-no-user-config", "-display", "none", "-m", "64M", "-qmp", "stdio"]);
                let asked = Process::start(&mut command).and_then(|mut qemu| {
                    qemu.type_in("{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}\n")?;
                    qemu.exit_code(SOON)
                });
                matches!(asked, Ok(0))
            };
            if works("host") {
                return "host";
            }
            eprintln!("QEMU cannot use -cpu host here: host,-arch-capabilities instead");
            "host,-arch-capabilities"
        })
    }

    /// The first line that it prints about itself, or nothing if it is not installed.
    pub fn version(&self) -> Option<String> {
        let output = self.command().arg("--version").output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
    }

    /// Boots `guest`.
    pub fn run(&self, guest: &Guest) -> Result<Vmm> {
        self.start(guest, &[])
    }

    fn start(&self, guest: &Guest, more: &[&str]) -> Result<Vmm> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("qmp");
        let mut command = self.command();
        // With ACPI, QEMU does not tell a kernel of its disks on the command line.
        let machine = if guest.disks.is_empty() { "microvm" } else { "microvm,acpi=off" };
        for disk in &guest.disks {
            let path = disk.split(',').find_map(|pair| pair.strip_prefix("path="));
            let path = path.context("a disk without a path")?;
            let cache = disk
                .split(',')
                .find(|pair| pair.starts_with("cache="))
                .unwrap_or("cache=writeback");
            let drive = format!("id=disk,file={path},format=raw,if=none,aio=io_uring,{cache}");
            command.args(["-object", "iothread,id=io", "-drive", &drive]);
            command.args(["-device", "virtio-blk-device,drive=disk,iothread=io"]);
            command.args(["-global", "virtio-mmio.force-legacy=false"]);
        }
        command
            .args([
                "-M",
                machine,
                "-accel",
                "kvm",
                "-cpu",
                self.cpu(),
                "-nodefaults",
                "-no-user-config",
            ])
            .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
            .args(["-m", &format!("{}M", guest.memory_mb), "-smp", &guest.cpus.to_string()])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-kernel")
            .arg(&guest.kernel)
            .args(["-append", &guest.cmdline])
            .args(more);
        if let Some(initrd) = &guest.initrd {
            command.arg("-initrd").arg(initrd);
        }
        Ok(Vmm::new(Process::start(&mut command)?, socket, folder))
    }

    /// What the runner of a suite has it run: a test kernel that ends by itself, on this machine.
    pub fn test(&self, kernel: &Path, machine: &str) -> Command {
        let mut command = self.command();
        command.args(test_arguments(kernel, machine, self.cpu()));
        command
    }

    /// Waits for `guest` on a free TCP port of the loopback, when `prepare` has said how; returns the process
    /// and its address.
    pub fn receive(
        &self,
        guest: &Guest,
        prepare: impl FnOnce(&mut Qmp) -> Result<()>,
    ) -> Result<(Vmm, String)> {
        let vmm = self.start(guest, &["-incoming", "defer"])?;
        let mut qmp = Vmm::qmp(&vmm)?;
        prepare(&mut qmp)?;
        qmp.execute("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"}))?;
        let info = qmp.execute("query-migrate", json!({}))?;
        let port = info["socket-address"][0]["port"].as_str();
        let port = port.with_context(|| format!("no port within {SOON:?}: {info}"))?;
        Ok((vmm, format!("tcp:127.0.0.1:{port}")))
    }
}

/// QEMU's command line for a test kernel; `ferry qemu` takes it, too.
pub fn test_arguments(kernel: &Path, machine: &str, cpu: &str) -> Vec<OsString> {
    const OPTIONS: [&str; 10] = [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "-enable-kvm",
    ];
    let mut arguments: Vec<OsString> = OPTIONS.map(OsString::from).to_vec();
    arguments.extend(["-machine", machine, "-cpu", cpu, "-m", "128M"].map(OsString::from));
    arguments.extend(["-kernel".into(), kernel.into()]);
    arguments
}

/// `QEMU`, or Debian's.
pub fn qemu() -> &'static Qemu {
    static QEMU: OnceLock<Qemu> = OnceLock::new();
    QEMU.get_or_init(|| {
        let program = std::env::var_os("QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
        Qemu::new(program, None)
    })
}

/// A newer one, to compare with as well: unpacked in the folder `QEMU_NEWER`.
pub fn newer() -> Option<&'static Qemu> {
    static QEMU: OnceLock<Option<Qemu>> = OnceLock::new();
    let newer = QEMU.get_or_init(|| {
        let folder = PathBuf::from(std::env::var_os("QEMU_NEWER")?);
        let program = folder.join("usr/bin/qemu-system-x86_64");
        let firmware = folder.join("usr/share/qemu");
        program.is_file().then(|| Qemu::new(program.into(), Some(firmware)))
    });
    newer.as_ref()
}

/// The program and the firmware with which `microvm` starts a kernel.
pub fn files() -> Result<(PathBuf, Vec<PathBuf>)> {
    let folders = ["/usr/share/qemu", "/usr/share/seabios"].map(Path::new);
    let find = |name: &str| {
        let mut paths = folders.iter().map(|folder| folder.join(name));
        paths.find(|path| path.is_file()).with_context(|| format!("no {name} in {folders:?}"))
    };
    let firmware = ["bios-microvm.bin", "linuxboot_dma.bin", "kvmvapic.bin"].map(find);
    let program = crate::linux::program("qemu-system-x86_64")?;
    Ok((program, firmware.into_iter().collect::<Result<_>>()?))
}
