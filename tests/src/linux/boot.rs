//! How long a VMM takes to boot a stock kernel to `/init`: a row of the benchmark. Where the kernel runs
//! in an emulated machine, so does the whole measurement, both VMMs beside each other; this side reads
//! the figures from that machine's serial port.

use super::guest::LIMIT;
use super::nested::Payload;
use super::{Assets, Place};
use crate::ferry::Guest;
use crate::process::Vmm;
use crate::qemu;
use anyhow::{Context, Result};
use std::sync::{Mutex, OnceLock};

/// A VMM under measurement.
pub struct Contender {
    /// Its name, in figures.
    pub name: &'static str,
    /// Boots a guest.
    pub run: fn(&Guest) -> Result<Vmm>,
}

/// Seconds from the start of the process to the first line of `/init`. `arguments` make this program
/// take the same measures once more, as often.
pub fn seconds(contender: &Contender, arguments: impl FnOnce() -> Vec<String>) -> Result<f64> {
    static PLACE: OnceLock<Result<Place>> = OnceLock::new();
    let payload = || {
        let (qemu, firmware) = qemu::files()?;
        Ok(Payload { arguments: arguments(), programs: vec![qemu], files: firmware })
    };
    match PLACE.get_or_init(|| Place::find(payload)) {
        Ok(Place::Here(assets)) => {
            let seconds = measure(contender, assets)?;
            println!("\nFIGURE {} {seconds}", contender.name);
            Ok(seconds)
        }
        Ok(Place::Nested(machine)) => {
            static NEXT: Mutex<usize> = Mutex::new(0);
            let mut next = NEXT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let pattern = format!("^FIGURE {} |^bench: ", contender.name);
            let line = machine.wait_from(*next, &pattern)?;
            *next = line.index + 1;
            let figure = line.text.strip_prefix("FIGURE ").and_then(|text| text.split(' ').nth(1));
            Ok(figure.with_context(|| line.text.clone())?.parse()?)
        }
        Err(reason) => anyhow::bail!("no Linux guest can run here: {reason:#}"),
    }
}

fn measure(contender: &Contender, assets: &Assets) -> Result<f64> {
    let cmdline = format!("console=ttyS0 panic=-1 work=none {}", assets.cmdline);
    let mut guest = Guest::new(&cmdline, 256);
    guest.kernel = assets.kernel();
    guest.initrd = Some(assets.initrd());
    let vmm = (contender.run)(&guest)?;
    let started = vmm.serial().wait_for("^INIT$", LIMIT);
    started.with_context(|| format!("errors of {}: {}", contender.name, vmm.process.err.tail()))?;
    Ok(vmm.process.started().elapsed().as_secs_f64())
}
