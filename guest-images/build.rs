//! Builds the guest kernel: one rustc call with the guest's own sources and linker script.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let kernel = out.join("ferry-guest.elf");
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let script = env::current_dir().expect("a folder to build in").join("guest/link.ld");
    let status = Command::new(rustc)
        .args(["--edition=2024", "--crate-type=bin", "--crate-name=ferry_guest", "guest/main.rs"])
        .args(["--target=x86_64-unknown-linux-gnu", "-Copt-level=3", "-Cpanic=abort"])
        .args(["-Crelocation-model=static", "-Cno-redzone=yes", "-Cdebuginfo=0"])
        .arg("-Cstrip=debuginfo")
        .args(["-Cforce-unwind-tables=no", "-Ccodegen-units=1", "-Clink-args=-nostdlib -static"])
        .args(["-Clink-args=-no-pie -nostartfiles -Wl,--build-id=none -Wl,-z,max-page-size=4096"])
        .arg(format!("-Clink-arg=-Wl,-T,{}", script.display()))
        .arg("-o")
        .arg(&kernel)
        .status()
        .expect("rustc starts");
    assert!(status.success(), "the guest kernel does not build");
    println!("cargo::rustc-env=FERRY_GUEST_KERNEL={}", kernel.display());
}
