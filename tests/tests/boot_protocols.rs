//! Every way to be booted, with a kernel of our own that checks what it gets, at rest and while it moves; and kernels of
//! others, as far as the hardware that they want is there.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::needs;
use ferry_tests::needs::foreign_kernel;
use ferry_tests::process::{SOON, Vmm};
use std::path::Path;

/// Boots a kernel with this initrd and command line, moving every 100 ms if told to.
fn boot(kernel: &str, initrd: &str, cmdline: &str, moves: bool) -> Vmm {
    let mut guest = Guest::new(cmdline, 64);
    guest.kernel = kernel.into();
    let way: &[&str] = if moves { &["--migrate-every", "100ms", "-v"] } else { &["-v"] };
    ferry::run_with(&guest, &[&["--initrd", initrd], way].concat()).unwrap()
}

/// Checks what a kernel says, at rest, and with several moves between that and its end.
#[track_caller]
fn assert_says(kernel: &str, initrd: &str, code: i32, lines: &[&str], format: &str) {
    let mut still = boot(kernel, initrd, "test=all", false);
    let ended = still.process.exit_code(SOON).unwrap();
    let (said, told) = (still.serial().text(), still.process.err.text());
    assert_eq!(ended, code << 1 | 1, "{said}{told}");
    for line in lines {
        assert!(said.contains(line), "no {line:?} in {said}");
    }
    assert!(told.contains(format), "-v says what was detected: {told}");

    let mut moving = boot(kernel, initrd, "test=all wait", true);
    moving.wait_line("^WAITING$").unwrap();
    moving.process.err.wait_for(r"\bmove 3: ", SOON).unwrap();
    moving.process.type_in("q").unwrap();
    assert_eq!(moving.process.exit_code(SOON).unwrap(), code << 1 | 1);
}

/// Two files, the list of both as `--initrd`, and what a kernel says of them.
struct Files {
    folder: tempfile::TempDir,
    list: String,
    lines: [String; 2],
}

fn files() -> Files {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    std::fs::write(&first, "one").unwrap();
    std::fs::write(&second, "two").unwrap();
    let (first, second) = (first.display(), second.display());
    Files {
        list: format!("{first} a b,{second}"),
        lines: [format!("MODULE {first} a b HOLDS one\n"), format!("MODULE {second} HOLDS two\n")],
        folder,
    }
}

#[test]
#[needs(kvm)]
fn multiboot_kernels_above_and_below_1_mib_get_their_modules() {
    let files = files();
    for (kernel, format) in [
        (guest_images::MULTIBOOT_ELF, "Multiboot kernel (ELF), entry 0x200"),
        (guest_images::MULTIBOOT_FLAT, "Multiboot kernel (flat), entry 0x200"),
        (guest_images::MULTIBOOT_LOW, "Multiboot kernel (flat), entry 0x80"),
    ] {
        let [first, second] = &files.lines;
        let cmdline = format!("CMDLINE {kernel} test=all\n");
        // Without `wait` the number of modules is the code; so it is after a key.
        assert_says(kernel, &files.list, 2, &[&cmdline, first, second], format);
    }
}

#[test]
#[needs(kvm)]
fn a_multiboot_2_kernel_is_moved_to_where_it_wants_to_be() {
    let files = files();
    let [first, second] = &files.lines;
    let cmdline = format!("CMDLINE {} test=all\n", guest_images::MULTIBOOT2);
    let lines = [&cmdline[..], first, second];
    assert_says(
        guest_images::MULTIBOOT2,
        &files.list,
        2,
        &lines,
        "Multiboot 2 kernel, entry 0x2ff",
    );
    let mut vmm = boot(guest_images::MULTIBOOT2, &files.list, "", false);
    vmm.process.exit_code(SOON).unwrap();
    let told = vmm.process.err.text();
    assert!(told.contains("asks for a framebuffer; it starts without"), "{told}");
}

#[test]
#[needs(kvm)]
fn a_32_bit_elf_with_a_pvh_note_gets_its_ramdisk_or_modules() {
    let files = files();
    let initrd = files.folder.path().join("first").display().to_string();
    let lines = ["CMDLINE test=all", "INITRD one\n"];
    assert_says(guest_images::PVH32, &initrd, 1, &lines, "PVH ELF kernel (32-bit)");
    let [first, second] = &files.lines;
    assert_says(guest_images::PVH32, &files.list, 2, &[first, second], "PVH ELF kernel (32-bit)");
}

#[test]
#[needs(kvm)]
fn a_linux_image_without_64_bit_code_is_entered_in_32_bit_mode() {
    let files = files();
    let initrd = files.folder.path().join("second").display().to_string();
    let lines = ["CMDLINE test=all\n", "INITRD two\n"];
    assert_says(guest_images::LINUX32, &initrd, 3, &lines, "boot protocol 2.6, 32-bit entry");
}

#[test]
#[needs(kvm)]
fn what_cannot_be_booted_is_named_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let changed = |kernel: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = std::fs::read(kernel).unwrap();
        change(&mut bytes);
        let path = folder.path().join("kernel");
        std::fs::write(&path, bytes).unwrap();
        let arguments = ["run", "--kernel", path.to_str().unwrap()];
        ferry::end_of(arguments).unwrap()
    };
    let refused = |kernel, change: &dyn Fn(&mut Vec<u8>), reason: &str| {
        let (code, said) = changed(kernel, change);
        assert_eq!(code, 126, "{said}");
        assert!(said.contains(reason), "no {reason:?} in {said}");
    };
    // The 32-bit entry's address.
    let no_entry = |bytes: &mut Vec<u8>| bytes[0x214..0x218].fill(0);
    refused(guest_images::LINUX32, &no_entry, "its only entry is the 16-bit one");
    let old = |bytes: &mut Vec<u8>| bytes[0x206] = 1;
    refused(guest_images::LINUX32, &old, "older than 2.2");
    // The PVH note's owner.
    let no_note = |bytes: &mut Vec<u8>| {
        let at = bytes.windows(4).position(|word| word == b"Xen\0").unwrap();
        bytes[at] = b'x';
    };
    refused(guest_images::PVH32, &no_note, "does not say how it is entered");
    // The framebuffer tag is no longer optional.
    let needs_display = |bytes: &mut Vec<u8>| {
        let magic = [0xd6, 0x50, 0x52, 0xe8];
        let at = bytes.windows(4).position(|word| word == magic).unwrap();
        bytes[at + 16 + 24 + 2] = 0;
    };
    refused(guest_images::MULTIBOOT2, &needs_display, "requires a framebuffer (tag 5)");
}

/// Runs a kernel of others for two seconds, or until it ends; what Ferry told, and what the kernel said.
fn foreign(kernel: &Path, more: &[&str]) -> (i32, String, String) {
    let mut guest = Guest::new("console=ttyS0,115200", 64);
    guest.kernel = kernel.into();
    let mut vmm = ferry::run_with(&guest, &[&["-v", "--timeout", "2s"], more].concat()).unwrap();
    let code = vmm.process.exit_code(SOON).unwrap();
    (code, vmm.process.err.text(), vmm.serial().text())
}

#[test]
#[needs(kvm, foreign_kernels)]
fn memtest86_is_entered_as_a_linux_image() {
    for (name, format) in [
        ("boot/memtest86+ia32.bin", "boot protocol 2.12, 32-bit entry"),
        ("boot/memtest86+x64.bin", "boot protocol 2.12, 64-bit entry"),
    ] {
        let (code, told, said) = foreign(&foreign_kernel(name), &[]);
        assert!(told.contains(format), "{told}");
        // It begins with FNINIT, which a software KVM does not emulate: there it gets no farther than its start.
        let at_its_fninit =
            told.contains("KVM cannot emulate an instruction") && told.contains("rip 0x100");
        assert!(
            (code == 134 && at_its_fninit) || said.contains("Memtest86+"),
            "{code} {told}{said}"
        );
    }
}

#[test]
#[needs(kvm, foreign_kernels)]
fn kernels_for_grub_run_where_they_ask_to_lie_and_move() {
    for (name, format, rip) in [
        // A game, for a VGA and a keyboard.
        ("boot/invaders.exec", "Multiboot kernel (flat), entry 0x100024", "vCPU 0 at rip 0x10"),
        // GRUB itself, for coreboot: below 1 MiB.
        (
            "usr/lib/grub/i386-coreboot/kernel.img",
            "Multiboot kernel (ELF), entry 0x9000",
            "vCPU 0 at rip 0x9",
        ),
    ] {
        let kernel = foreign_kernel(name);
        for (more, words) in
            [(&[][..], [format, rip]), (&["--migrate-every", "300ms"], [format, "move 2: "])]
        {
            let (code, told, _) = foreign(&kernel, more);
            assert_eq!(code, 124, "{told}");
            assert!(words.iter().all(|word| told.contains(word)), "{name}: {words:?} in {told}");
        }
    }
}

#[test]
#[needs(kvm, foreign_kernels)]
fn ipxes_image_for_a_bios_is_refused_with_the_reason() {
    let (code, told, _) = foreign(&foreign_kernel("boot/ipxe.lkrn"), &[]);
    assert_eq!(code, 126, "{told}");
    assert!(told.contains("its only entry is the 16-bit one, which needs a BIOS"), "{told}");
}
