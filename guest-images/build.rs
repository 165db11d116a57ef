//! Builds the guest kernels: one rustc call each, with the guest's own sources and linker script.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The loaders read 32-bit ELF, whatever the objects were; of the linkers only GNU ld writes it.
const ELF_32: &str = "-Clink-args=-fuse-ld=bfd -Wl,--oformat,elf32-i386";
const BINARY: &str = "-Clink-args=-Wl,--oformat,binary";

fn main() {
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=multiboot");
    println!("cargo::rerun-if-changed=testdevices");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=vmlinux");
    println!("cargo::rerun-if-changed=print_byte.s");
    println!("cargo::rerun-if-changed=build.rs");
    let guest = build("guest", "ferry-guest.elf", &["-Clink-args=-Wl,-z,max-page-size=4096"]);
    println!("cargo::rustc-env=FERRY_GUEST_KERNEL={}", guest.display());
    let elf = build("multiboot", "multiboot.elf", &[ELF_32]);
    println!("cargo::rustc-env=FERRY_MULTIBOOT_ELF={}", elf.display());
    let flat = ["--cfg=flat", BINARY, "-Cstrip=none"];
    let test_devices = build("testdevices", "testdevices.bin", &flat);
    println!("cargo::rustc-env=FERRY_TEST_DEVICES={}", test_devices.display());
    let below_1_mib = [&flat[..], &["-Clink-args=-Wl,--defsym=base=0x8000"]].concat();
    let flat = build("multiboot", "multiboot.bin", &flat);
    println!("cargo::rustc-env=FERRY_MULTIBOOT_FLAT={}", flat.display());
    let low = build("multiboot", "multiboot-low.bin", &below_1_mib);
    println!("cargo::rustc-env=FERRY_MULTIBOOT_LOW={}", low.display());
    for (name, variable) in
        [("multiboot2", "FERRY_MULTIBOOT2"), ("pvh32", "FERRY_PVH32"), ("cpus", "FERRY_CPUS")]
    {
        let which = format!("--cfg={name}");
        let kernel = build("kernels", &format!("{name}.elf"), &[&which, ELF_32]);
        println!("cargo::rustc-env={variable}={}", kernel.display());
    }
    let script = "kernels/link-bzimage.ld";
    let more = ["--cfg=linux32", BINARY, "-Cstrip=none"];
    let linux32 = build_with(script, "kernels", "linux32.bin", &more);
    println!("cargo::rustc-env=FERRY_LINUX32={}", linux32.display());
    let vmlinux = build("vmlinux", "vmlinux.elf", &["-Clink-args=-Wl,-z,max-page-size=4096"]);
    println!("cargo::rustc-env=FERRY_VMLINUX={}", vmlinux.display());
}

fn build(folder: &str, name: &str, more: &[&str]) -> PathBuf {
    build_with(&format!("{folder}/link.ld"), folder, name, more)
}

fn build_with(script: &str, folder: &str, name: &str, more: &[&str]) -> PathBuf {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let kernel = out.join(name);
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let here = env::current_dir().expect("a folder to build in");
    let script = here.join(script);
    let status = Command::new(rustc)
        .args(["--edition=2024", "--crate-type=bin"])
        .arg(format!("--crate-name={}", name.replace(['-', '.'], "_")))
        .arg(Path::new(folder).join("main.rs"))
        .args(["--target=x86_64-unknown-linux-gnu", "-Copt-level=3", "-Cpanic=abort"])
        .args(["-Crelocation-model=static", "-Cno-redzone=yes", "-Cdebuginfo=0"])
        .arg("-Cstrip=debuginfo")
        .args(["-Cforce-unwind-tables=no", "-Ccodegen-units=1", "-Clink-args=-nostdlib -static"])
        .args(["-Clink-args=-no-pie -nostartfiles -Wl,--build-id=none"])
        .arg(format!("-Clink-arg=-Wl,-T,{}", script.display()))
        .args(more)
        .arg("-o")
        .arg(&kernel)
        .status()
        .expect("rustc starts");
    assert!(status.success(), "the guest kernel {name} does not build");
    kernel
}
