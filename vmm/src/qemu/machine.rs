//! Options of the machine itself: type, CPUs, memory, clock, fw_cfg.

use super::draft::Draft;
use super::lists::List;
use crate::boot::payload::split_list;
use crate::config::parse_size;
use crate::machine::description::MAX_CPUS;

/// Bytes of MiB, the unit of a plain number.
const MIB: u64 = 1 << 20;
/// Machine types whose kernels run here; what they need of PCI they do not find.
const TYPES: [&str; 3] = ["pc", "q35", "microvm"];
/// Properties of machines and accelerators that change nothing here, whatever they say.
const HARMLESS: [&str; 21] = [
    "dump-guest-core",
    "mem-merge",
    "usb",
    "graphics",
    "smm",
    "sata",
    "smbus",
    "i8042",
    "pcie",
    "isa-serial",
    "auto-kernel-cmdline",
    "x-option-roms",
    "option-roms",
    "fd-bootchk",
    "suppress-vmdesc",
    "notify-vmexit",
    "notify-window",
    "dirty-ring-size",
    "x-south-bridge",
    "nvdimm-persistence",
    "hpet-msi",
];
/// Features of `-cpu` that say something of QEMU.
const OF_QEMU: [&str; 8] = [
    "migratable",
    "host-phys-bits",
    "enforce",
    "check",
    "kvm",
    "l3-cache",
    "host-cache-info",
    "x-force-features",
];

/// `-machine [type=]TYPE[,PROPERTY=VALUE]…`
pub(super) fn machine(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, Some("type"))?;
    if let Some(name) = list.take("type") {
        let versioned = name.starts_with("pc-i440fx-") || name.starts_with("pc-q35-");
        if !versioned && !TYPES.contains(&name.as_str()) {
            return Err(format!(
                "{name}: Ferry has one machine, for kernels of {}",
                TYPES.join(", ")
            ));
        }
        draft.remark(format!("-machine {name}: it is Ferry's own machine, which has no PCI"));
    }
    if let Some(names) = list.take("accel") {
        draft.accelerators.extend(names.split(':').map(str::to_owned));
    }
    irqchip(&mut list)?;
    if let Some(on) = list.switch("acpi")? {
        draft.set_acpi(on)?;
    }
    for (key, why) in [
        ("vmport", "Ferry has no VMware port"),
        ("hpet", "Ferry has no HPET"),
        ("nvdimm", "Ferry has no NVDIMM"),
        ("xen-gnttab", "Ferry is for KVM"),
    ] {
        // Others than on are QEMU's defaults: off and auto.
        if list.take(key).is_some_and(|value| value == "on") {
            return Err(format!("{key}=on: {why}"));
        }
    }
    for (key, why) in [("pit", "the PIT is there"), ("pic", "the PIC is there")] {
        if list.switch(key)? == Some(false) {
            return Err(format!("{key}=off: {why}"));
        }
    }
    ignore(draft, "-machine", &mut list, &HARMLESS);
    if list.switch("rtc")?.is_some() {
        draft.remark("-machine rtc: ignored".to_owned());
    }
    list.done()
}

fn irqchip(list: &mut List) -> Result<(), String> {
    for key in ["kernel_irqchip", "kernel-irqchip"] {
        if let Some(value) = list.take(key).filter(|value| value != "on") {
            return Err(format!(
                "{key}={value}: Ferry's interrupt controllers are all in KVM (on)"
            ));
        }
    }
    Ok(())
}

/// Takes what is harmless, aloud.
fn ignore(draft: &mut Draft, option: &str, list: &mut List, keys: &[&str]) {
    for key in keys {
        if let Some(value) = list.take(key) {
            draft.remark(format!("{option} {key}={value}: ignored"));
        }
    }
}

/// `-accel NAME[,PROPERTY=VALUE]…`
pub(super) fn accel(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, Some("accel"))?;
    let name = list.need("accel")?;
    let is_kvm = name == "kvm";
    draft.accelerators.push(name);
    if !is_kvm {
        // Another may follow: what this one is told is of no concern.
        return Ok(());
    }
    irqchip(&mut list)?;
    ignore(draft, "-accel", &mut list, &HARMLESS);
    list.done()
}

/// `-cpu MODEL[,FEATURE]…`
pub(super) fn cpu(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut words = split_list(value).into_iter();
    let mut kept = vec![words.next().unwrap_or_default()];
    for word in words {
        let (name, set) = word.split_once('=').unwrap_or((&word, "on"));
        if OF_QEMU.contains(&name.trim_start_matches(['+', '-'])) {
            draft.remark(format!("-cpu {name}={set}: ignored"));
        } else {
            kept.push(word);
        }
    }
    draft.options.cpu = Some(kept.join(",").parse()?);
    Ok(())
}

/// `-smp [cpus=]N[,maxcpus=N][,sockets=N][,cores=N][,threads=N]`
pub(super) fn smp(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, Some("cpus"))?;
    let given = list.number("cpus")?;
    let most = list.number("maxcpus")?;
    let mut product = 1u64;
    let mut topology = Vec::new();
    for key in ["drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads"] {
        if let Some(count) = list.number(key)? {
            product = product.saturating_mul(count);
            topology.push(format!("{key}={count}"));
        }
    }
    list.done()?;
    let cpus = given.or(most).unwrap_or(product);
    if most.is_some_and(|most| most != cpus) {
        return Err("maxcpus: Ferry adds no CPUs to a running guest".to_owned());
    }
    if !topology.is_empty() {
        let topology = topology.join(",");
        draft
            .remark(format!("-smp {topology}: every CPU is a core of one package of its own kind"));
    }
    // Runners that look for the most that there can be search for these words.
    let fine = u8::try_from(cpus).ok().filter(|cpus| (1..=MAX_CPUS).contains(cpus));
    let cpus = fine.ok_or_else(|| match cpus {
        0 => "a guest needs a CPU".to_owned(),
        _ => format!("{cpus} exceeds max CPUs, which are {MAX_CPUS}"),
    })?;
    draft.options.cpus = Some(cpus);
    Ok(())
}

/// `-m [size=]SIZE[,slots=N,maxmem=SIZE]`; a plain number is MiB.
pub(super) fn memory(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, Some("size"))?;
    let size = list.take("size");
    for key in ["slots", "maxmem"] {
        if let Some(value) = list.take(key).filter(|value| value != "0") {
            return Err(format!("{key}={value}: Ferry adds no memory to a running guest"));
        }
    }
    list.done()?;
    if let Some(size) = size {
        draft.options.memory = Some(format!("{}B", parse_size(&size, MIB)?));
    }
    Ok(())
}

/// `-name [guest=]NAME[,…]`
pub(super) fn name(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, Some("guest"))?;
    draft.options.name = list.take("guest").or(draft.options.name.take());
    ignore(draft, "-name", &mut list, &["process", "debug-threads"]);
    list.done()
}

/// `-global DRIVER.PROPERTY=VALUE`
pub(super) fn global(draft: &mut Draft, value: &str) -> Result<(), String> {
    let harmless = ["kvm-pit.lost_tick_policy=", "virtio-mmio.force-legacy=", "PIIX4_PM.disable_s"];
    if harmless.iter().any(|start| value.starts_with(start)) {
        draft.remark(format!("-global {value}: ignored"));
        return Ok(());
    }
    Err("give the property with its -device, if Ferry has that".to_owned())
}

/// `-fw_cfg [name=]NAME,file=PATH|string=TEXT`
pub(super) fn fw_cfg(draft: &mut Draft, value: &str) -> Result<(), String> {
    draft.options.fw_cfg.push(value.parse()?);
    Ok(())
}

/// `-rtc [base=utc][,clock=host][,driftfix=…]`
pub(super) fn rtc(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, None)?;
    if let Some(base) = list.take("base").filter(|base| base != "utc") {
        return Err(format!("base={base}: time is the host's, in UTC"));
    }
    if let Some(clock) = list.take("clock").filter(|clock| clock != "host") {
        return Err(format!("clock={clock}: time is the host's"));
    }
    ignore(draft, "-rtc", &mut list, &["driftfix"]);
    list.done()
}

/// `-action EVENT=ACTION…`
pub(super) fn action(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, None)?;
    match list.take("reboot").as_deref() {
        None | Some("reset") => {}
        Some("shutdown") => draft.set_no_reboot()?,
        Some(other) => return Err(format!("reboot={other}: reset or shutdown")),
    }
    if let Some(action) = list.take("panic").filter(|action| action == "none") {
        return Err(format!("panic={action}: Ferry ends when its guest panics"));
    }
    ignore(draft, "-action", &mut list, &["shutdown", "watchdog"]);
    list.done()
}

/// Whether one of the accelerators is the one that there is.
pub(super) fn check_accelerators(draft: &mut Draft, problems: &mut Vec<String>) {
    let names = draft.accelerators.join(":");
    if names.is_empty() {
        draft.remark("no -accel kvm: Ferry runs its guests with KVM all the same".to_owned());
    } else if !draft.accelerators.iter().any(|name| name == "kvm") {
        problems.push(format!("-accel {names}: Ferry has kvm only"));
    }
}
