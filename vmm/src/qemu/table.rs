//! QEMU's options, and what becomes of each: one table, and the lexer that reads a command line by it.
//!
//! What changes nothing that a guest or a runner could see is ignored, and said with `-v`. What would change
//! what is tested is refused, with what there is instead. The list is that of QEMU 7.2, and what came since.

use super::draft::Draft;

/// What is asked for in place of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Topic {
    Options,
    Version,
    Devices,
    Machines,
    Cpus,
    Accelerators,
}

/// Adds an option's value to a draft.
pub(super) type Translate = fn(&mut Draft, &str) -> Result<(), String>;

/// What becomes of an option.
#[derive(Clone, Copy)]
pub(super) enum Fate {
    /// It is translated.
    Means(Translate),
    /// The same, but for `help` and `?`, which ask for a list.
    Lists(Topic, Translate),
    /// It asks for a text.
    Help(Topic),
    /// It is ignored, for this reason.
    Harmless(&'static str),
    /// It is refused, with this remark.
    Refused(&'static str),
}

/// An option.
pub(super) struct Opt {
    /// Its names, without `-`; the first is said.
    pub names: &'static [&'static str],
    /// Whether a value follows.
    pub takes_value: bool,
    /// What becomes of it.
    pub fate: Fate,
}

const fn switch(names: &'static [&'static str], fate: Fate) -> Opt {
    Opt { names, takes_value: false, fate }
}

const fn with_value(names: &'static [&'static str], fate: Fate) -> Opt {
    Opt { names, takes_value: true, fate }
}

use Fate::{Harmless, Help, Lists, Means, Refused};

const NO_FIRMWARE: &str = "Ferry has no firmware and boots -kernel";
const NO_NETWORK: &str = "Ferry has no network card yet; -nic none is fine";
const NO_DISPLAY: &str = "Ferry has no display: give -display none";
const NO_SOUND: &str = "Ferry has no sound card";
const NO_IDE: &str =
    "Ferry has no IDE or floppy controller: give -drive file=FILE,format=raw,if=virtio";
const NO_GDB: &str = "Ferry has no debugger stub";
const NO_HMP: &str =
    "Ferry has no human monitor: give -qmp unix:PATH,server=on,wait=off, and use `ferry ctl PATH`";
const NO_SNAPSHOTS: &str = "Ferry has no saved states";
const FOR_TCG: &str = "it is for emulated CPUs, and Ferry has KVM only";
const NO_XEN: &str = "Ferry is for KVM";
const NO_SHARED_FOLDERS: &str = "Ferry has no shared folders: give a disk or an -initrd";
const FOREGROUND: &str = "Ferry stays in the foreground: start it with & instead";

/// All options.
pub(super) const OPTIONS: &[Opt] = &[
    switch(&["h", "help"], Help(Topic::Options)),
    switch(&["version"], Help(Topic::Version)),
    // The machine.
    with_value(&["machine", "M"], Lists(Topic::Machines, super::machine::machine)),
    with_value(&["cpu"], Lists(Topic::Cpus, super::machine::cpu)),
    with_value(&["accel"], Lists(Topic::Accelerators, super::machine::accel)),
    switch(&["enable-kvm"], Means(|draft, _| super::machine::accel(draft, "kvm"))),
    with_value(&["smp"], Means(super::machine::smp)),
    with_value(&["m"], Means(super::machine::memory)),
    switch(&["mem-prealloc"], Harmless("memory is mapped as the guest touches it")),
    with_value(&["mem-path"], Harmless("memory is anonymous")),
    with_value(&["overcommit"], Harmless("memory is neither locked nor reserved")),
    with_value(&["numa"], Refused("Ferry's guests have one NUMA node")),
    with_value(&["device"], Lists(Topic::Devices, super::hardware::device)),
    with_value(&["global"], Means(super::machine::global)),
    with_value(&["object"], Means(super::hardware::object)),
    with_value(&["set"], Refused("give the property where the thing is made")),
    with_value(&["add-fd"], Refused("Ferry opens files by their paths")),
    with_value(&["name"], Means(super::machine::name)),
    with_value(&["uuid"], Harmless("a guest sees no UUID")),
    with_value(&["smbios"], Refused("Ferry's guests have no SMBIOS tables")),
    with_value(&["acpitable"], Refused("Ferry's ACPI tables are its own")),
    switch(&["no-acpi"], Means(|draft, _| draft.set_acpi(false))),
    switch(&["no-hpet"], Harmless("there is no HPET")),
    with_value(&["fw_cfg"], Means(super::machine::fw_cfg)),
    with_value(&["rtc"], Means(super::machine::rtc)),
    with_value(&["icount"], Refused(FOR_TCG)),
    with_value(&["action"], Means(super::machine::action)),
    with_value(&["watchdog-action"], Harmless("there is no watchdog")),
    with_value(&["watchdog"], Refused("Ferry has no watchdog")),
    switch(&["usb"], Harmless("there is no USB device")),
    with_value(&["usbdevice"], Refused("Ferry has no USB")),
    with_value(&["tpmdev"], Refused("Ferry has no TPM")),
    switch(&["win2k-hack"], Harmless("there is no IDE")),
    switch(&["no-fd-bootchk"], Harmless("there is no firmware")),
    // Boot.
    with_value(&["kernel"], Means(|draft, path| draft.set_kernel(path))),
    with_value(&["initrd"], Means(|draft, path| draft.set_initrd(path))),
    with_value(&["append"], Means(|draft, text| draft.set_cmdline(text))),
    with_value(&["boot"], Harmless("there is no firmware: -kernel boots")),
    with_value(&["bios"], Refused(NO_FIRMWARE)),
    with_value(&["pflash"], Refused(NO_FIRMWARE)),
    with_value(&["option-rom"], Refused(NO_FIRMWARE)),
    with_value(&["dtb"], Refused("Ferry's machine has no device tree")),
    with_value(&["shim"], Refused(NO_FIRMWARE)),
    with_value(&["L"], Harmless("there is no firmware to look for")),
    // Disks.
    with_value(&["drive"], Means(super::disks::drive)),
    with_value(&["blockdev"], Means(super::disks::blockdev)),
    switch(&["snapshot"], Means(|draft, _| draft.snapshot_all())),
    with_value(&["hda", "hdb", "hdc", "hdd"], Refused(NO_IDE)),
    with_value(&["fda", "fdb", "cdrom", "mtdblock", "sd"], Refused(NO_IDE)),
    with_value(&["iscsi"], Refused("Ferry's disks are files, block devices and NBD mirrors")),
    with_value(&["fsdev", "virtfs"], Refused(NO_SHARED_FOLDERS)),
    // Network.
    with_value(&["netdev"], Refused(NO_NETWORK)),
    with_value(&["net", "nic"], Means(no_network_only)),
    // Consoles and control.
    with_value(&["serial"], Means(|draft, text| draft.add_serial(text))),
    with_value(&["chardev"], Means(super::console::chardev)),
    with_value(&["mon"], Means(super::console::mon)),
    with_value(&["qmp", "qmp-pretty"], Means(super::console::qmp)),
    with_value(&["monitor"], Means(no_monitor_only)),
    with_value(&["debugcon"], Means(super::console::debugcon)),
    with_value(&["parallel"], Means(no_parallel_only)),
    switch(&["nographic"], Means(|draft, _| draft.set_nographic())),
    with_value(&["display"], Means(no_display_only)),
    with_value(&["vnc"], Means(no_display_only)),
    with_value(&["vga"], Means(no_display_only)),
    with_value(&["spice"], Refused(NO_DISPLAY)),
    switch(&["curses", "sdl"], Refused(NO_DISPLAY)),
    switch(&["full-screen", "portrait"], Refused(NO_DISPLAY)),
    with_value(&["rotate"], Refused(NO_DISPLAY)),
    with_value(&["k"], Harmless("there is no keyboard")),
    with_value(&["audio", "soundhw"], Refused(NO_SOUND)),
    with_value(&["audiodev"], Means(no_audio_only)),
    switch(&["audio-help"], Refused(NO_SOUND)),
    with_value(&["echr"], Refused("on a terminal Ctrl-A x ends Ferry")),
    with_value(&["gdb"], Means(no_gdb_only)),
    switch(&["s"], Refused(NO_GDB)),
    // The process.
    switch(&["no-reboot"], Means(|draft, _| draft.set_no_reboot())),
    switch(&["no-shutdown"], Harmless("Ferry ends with its guest")),
    switch(&["S"], Means(|draft, _| draft.set_paused())),
    switch(&["preconfig", "-preconfig"], Refused("give -S: the guest waits for `cont`")),
    switch(&["nodefaults"], Means(|draft, _| draft.set_nodefaults())),
    switch(&["no-user-config"], Harmless("Ferry reads no configuration of its own")),
    switch(&["nodefconfig"], Harmless("Ferry reads no configuration of its own")),
    with_value(&["readconfig", "writeconfig"], Refused("give `ferry run --config FILE` its own")),
    with_value(&["pidfile"], Refused("a shell has the process id in $!")),
    switch(&["daemonize"], Refused(FOREGROUND)),
    with_value(&["chroot", "runas"], Refused(FOREGROUND)),
    with_value(&["run-with"], Refused(FOREGROUND)),
    switch(&["async-teardown"], Harmless("it is about how memory is given back")),
    with_value(&["sandbox"], Harmless("it confines QEMU, not the guest")),
    with_value(&["seed"], Harmless("QEMU's random numbers are not there")),
    with_value(&["msg"], Harmless("it is about messages")),
    with_value(&["compat"], Harmless("it is about QEMU's own interfaces")),
    with_value(&["d", "D", "dfilter", "trace"], Harmless("Ferry logs with -v")),
    with_value(&["plugin"], Refused(FOR_TCG)),
    switch(&["singlestep", "one-insn-per-tb", "perfmap", "jitdump"], Refused(FOR_TCG)),
    with_value(&["tb-size"], Harmless(FOR_TCG)),
    switch(&["enable-sync-profile"], Harmless("it is about QEMU itself")),
    with_value(&["dump-vmstate"], Refused("`ferry inspect` knows Ferry's stream")),
    with_value(&["loadvm"], Refused(NO_SNAPSHOTS)),
    with_value(
        &["incoming"],
        Refused("give `ferry receive ADDRESS`, which learns the machine from the stream"),
    ),
    switch(&["only-migratable"], Harmless("every device of Ferry migrates")),
    with_value(&["xen-domid"], Refused(NO_XEN)),
    switch(&["xen-attach", "xen-domid-restrict"], Refused(NO_XEN)),
    switch(&["semihosting"], Refused(FOR_TCG)),
    with_value(&["semihosting-config", "prom-env"], Refused(FOR_TCG)),
    // Not QEMU's, which has no option of this name.
    switch(&["v", "verbose"], Means(|draft, _| draft.set_verbose())),
    switch(&["vv"], Means(|draft, _| draft.set_verbose().and_then(|()| draft.set_verbose()))),
];

/// The option of this name.
fn find(name: &str) -> Option<&'static Opt> {
    OPTIONS.iter().find(|option| option.names.contains(&name))
}

/// An option of a command line: as it is written, what it is, and its value, empty if it takes none.
pub(super) struct Given<'a> {
    /// With its `-`, for messages.
    pub spelling: &'a str,
    /// What it is.
    pub option: &'static Opt,
    /// Its value.
    pub value: &'a str,
}

/// Reads a command line; each item is an option or a problem.
pub(super) fn lex(arguments: &[String]) -> Vec<Result<Given<'_>, String>> {
    let mut items = Vec::new();
    let mut arguments = arguments.iter().map(String::as_str);
    while let Some(spelling) = arguments.next() {
        // QEMU takes two dashes for one.
        let name = spelling.strip_prefix('-').map(|name| name.strip_prefix('-').unwrap_or(name));
        items.push(match name {
            None => Err(format!("{spelling:?}: a disk without an option: {NO_IDE}")),
            Some(name) => match find(name) {
                None => Err(format!("{spelling}: an option that neither QEMU 7.2 nor Ferry has")),
                Some(option) if !option.takes_value => Ok(Given { spelling, option, value: "" }),
                Some(option) => match arguments.next() {
                    Some(value) => Ok(Given { spelling, option, value }),
                    None => Err(format!("{spelling}: it needs a value")),
                },
            },
        });
    }
    items
}

fn only(value: &str, fine: &[&str], otherwise: &str) -> Result<(), String> {
    if fine.contains(&value) { Ok(()) } else { Err(otherwise.to_owned()) }
}

fn no_network_only(_: &mut Draft, value: &str) -> Result<(), String> {
    only(value, &["none"], NO_NETWORK)
}

fn no_monitor_only(_: &mut Draft, value: &str) -> Result<(), String> {
    only(value, &["none", "null", "/dev/null"], NO_HMP)
}

fn no_parallel_only(_: &mut Draft, value: &str) -> Result<(), String> {
    only(value, &["none", "null"], "Ferry has no parallel port")
}

fn no_display_only(_: &mut Draft, value: &str) -> Result<(), String> {
    only(value, &["none"], NO_DISPLAY)
}

fn no_audio_only(_: &mut Draft, value: &str) -> Result<(), String> {
    let is_none = value == "none" || value.starts_with("none,");
    if is_none { Ok(()) } else { Err(NO_SOUND.to_owned()) }
}

fn no_gdb_only(_: &mut Draft, value: &str) -> Result<(), String> {
    only(value, &["none"], NO_GDB)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn one_dash_or_two_and_a_value_that_looks_like_an_option() {
        let line = arguments(&["-kernel", "k", "--append", "-x y", "-no-reboot", "-M", "pc"]);
        let items: Vec<_> = lex(&line).into_iter().map(Result::unwrap).collect();
        let read: Vec<_> = items.iter().map(|it| (it.option.names[0], it.value)).collect();
        assert_eq!(
            read,
            [("kernel", "k"), ("append", "-x y"), ("no-reboot", ""), ("machine", "pc")]
        );
        assert_eq!(items[1].spelling, "--append");
    }

    #[test]
    fn what_is_no_option_is_named() {
        for (line, word) in
            [(&["disk.img"][..], "disk.img"), (&["-frobnicate"], "-frobnicate"), (&["-m"], "-m: ")]
        {
            let line = arguments(line);
            let problem = lex(&line).remove(0).err().unwrap();
            assert!(problem.contains(word), "{problem}");
        }
    }

    #[test]
    fn every_name_has_one_fate() {
        let names: Vec<_> = OPTIONS.iter().flat_map(|option| option.names).collect();
        for (index, name) in names.iter().enumerate() {
            assert!(!names[..index].contains(name), "{name}");
        }
    }

    /// QEMU 7.2's own list, if it is installed: with and without a value as here.
    #[test]
    fn qemu_has_the_same_options() {
        let Ok(help) = std::process::Command::new("qemu-system-x86_64").arg("--help").output()
        else {
            return;
        };
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        for line in help.lines().filter(|line| line.starts_with('-')) {
            let mut words = line.split_whitespace();
            let names = words.next().unwrap().trim_start_matches('-');
            for name in names.split('/').map(|name| name.trim_start_matches('-')) {
                assert!(find(name).is_some(), "{name}: {line}");
            }
        }
    }
}
