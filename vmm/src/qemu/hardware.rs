//! `-device` and `-object`: one table of QEMU's devices that are there.

use super::draft::{Device, Draft};
use super::lists::List;
use crate::config::DebugExitConfig;
use std::fmt::Write;

/// Properties of any device that say where it is and how it is called.
const ANYWHERE: [&str; 8] = [
    "id",
    "bus",
    "addr",
    "multifunction",
    "disable-legacy",
    "disable-modern",
    "romfile",
    "iothread",
];

/// A device that is there.
struct Kind {
    /// QEMU's names; the first is listed.
    names: &'static [&'static str],
    /// What QEMU calls its bus.
    bus: &'static str,
    add: fn(&mut Draft, &mut List) -> Result<(), String>,
}

const KINDS: &[Kind] = &[
    Kind { names: &["isa-debug-exit"], bus: "ISA", add: debug_exit },
    Kind { names: &["pc-testdev"], bus: "ISA", add: testdev },
    Kind { names: &["pvpanic"], bus: "ISA", add: pvpanic },
    Kind { names: &["isa-debugcon"], bus: "ISA", add: debugcon },
    Kind { names: &["isa-serial"], bus: "ISA", add: serial },
    Kind {
        names: &[
            "virtio-blk-device",
            "virtio-blk",
            "virtio-blk-pci",
            "virtio-blk-pci-non-transitional",
            "virtio-blk-pci-transitional",
        ],
        bus: "virtio-bus",
        add: super::disks::virtio_blk,
    },
    Kind {
        names: &[
            "virtio-rng-device",
            "virtio-rng",
            "virtio-rng-pci",
            "virtio-rng-pci-non-transitional",
            "virtio-rng-pci-transitional",
        ],
        bus: "virtio-bus",
        add: rng,
    },
];

/// What `-device help` prints, in QEMU's format, which runners search.
pub(super) fn help() -> String {
    let mut text = String::from("Devices of Ferry that QEMU has, too:\n");
    for kind in KINDS {
        // Writing to a String does not fail.
        let _ = writeln!(text, "name {:?}, bus {}", kind.names[0], kind.bus);
    }
    text
}

/// `-device DRIVER[,PROPERTY=VALUE]…`; put in place at the end, as it may refer to what comes later.
pub(super) fn device(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, Some("driver"))?;
    let driver = list.need("driver")?;
    let kind = find(&driver)?;
    if driver.contains("-pci") || matches!(driver.as_str(), "virtio-blk" | "virtio-rng") {
        draft.remark(format!("-device {driver}: it is {} here, as there is no PCI", kind.names[0]));
    }
    list.drop(&ANYWHERE);
    draft.devices.push(Device { driver, text: value.to_owned(), list });
    Ok(())
}

fn find(driver: &str) -> Result<&'static Kind, String> {
    let kind = KINDS.iter().find(|kind| kind.names.contains(&driver));
    kind.ok_or_else(|| refusal(driver))
}

/// Why there is no such device, and what there is.
fn refusal(driver: &str) -> String {
    if driver.starts_with("virtio-net") || driver.starts_with("e1000") || driver.contains("rtl8139")
    {
        return "Ferry has no network card yet".to_owned();
    }
    let names: Vec<_> = KINDS.iter().map(|kind| kind.names[0]).collect();
    format!("Ferry has no such device, but {}", names.join(", "))
}

/// Puts the devices in place.
pub(super) fn finish(draft: &mut Draft, problems: &mut Vec<String>) {
    for Device { driver, text, mut list } in std::mem::take(&mut draft.devices) {
        let added = find(&driver).and_then(|kind| (kind.add)(draft, &mut list));
        if let Err(error) = added.and_then(|()| list.done()) {
            problems.push(format!("-device {text}: {error}"));
        }
    }
}

fn port(list: &mut List, key: &str, default: u16) -> Result<u16, String> {
    let Some(number) = list.number(key)? else { return Ok(default) };
    u16::try_from(number).map_err(|_| format!("{key}={number}: ports go to 0xffff"))
}

fn debug_exit(draft: &mut Draft, list: &mut List) -> Result<(), String> {
    if draft.options.debug_exit != Some(DebugExitConfig::Off) {
        return Err("there is one already".to_owned());
    }
    // QEMU's defaults.
    let (iobase, iosize) = (port(list, "iobase", 0x501)?, port(list, "iosize", 2)?);
    draft.options.debug_exit = Some(DebugExitConfig::At { iobase, iosize });
    Ok(())
}

fn testdev(draft: &mut Draft, _: &mut List) -> Result<(), String> {
    draft.options.testdev = true;
    Ok(())
}

fn pvpanic(_: &mut Draft, list: &mut List) -> Result<(), String> {
    // It is always there.
    match port(list, "ioport", 0x505)? {
        0x505 => Ok(()),
        other => Err(format!("ioport={other:#x}: it is at 0x505")),
    }
}

fn debugcon(draft: &mut Draft, list: &mut List) -> Result<(), String> {
    let at = port(list, "iobase", 0xe9)?;
    if at != 0xe9 {
        return Err(format!("iobase={at:#x}: the debug console is at 0xe9"));
    }
    list.drop(&["readback"]);
    draft.debugcons.push(format!("chardev:{}", list.need("chardev")?));
    Ok(())
}

fn serial(draft: &mut Draft, list: &mut List) -> Result<(), String> {
    let at = port(list, "iobase", 0x3f8)?;
    if at != 0x3f8 || list.number("index")?.is_some_and(|index| index != 0) {
        return Err("there is one serial port, at 0x3f8".to_owned());
    }
    draft.serials.push(format!("chardev:{}", list.need("chardev")?));
    Ok(())
}

fn rng(draft: &mut Draft, list: &mut List) -> Result<(), String> {
    list.drop(&["rng"]);
    for key in ["max-bytes", "period"] {
        if let Some(value) = list.take(key) {
            draft.remark(format!("-device virtio-rng {key}={value}: it is not slowed down"));
        }
    }
    draft.options.rng = true;
    Ok(())
}

/// `-object TYPE,id=ID[,PROPERTY=VALUE]…`
pub(super) fn object(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, Some("qom-type"))?;
    let name = list.need("qom-type")?;
    match name.as_str() {
        "rng-builtin" | "iothread" | "throttle-group" => {}
        "rng-random" => match list.take("filename").as_deref() {
            None | Some("/dev/urandom" | "/dev/random" | "/dev/hwrng") => {}
            Some(other) => return Err(format!("filename={other}: it is the kernel's own source")),
        },
        "memory-backend-ram" | "memory-backend-memfd" | "memory-backend-file" => {
            return Err(format!("{name}: give the size of memory with -m"));
        }
        _ => return Err(format!("{name}: Ferry has no such object")),
    }
    draft.remark(format!("-object {value}: ignored"));
    Ok(())
}
