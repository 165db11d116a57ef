//! How long a VMM takes to boot a stock kernel to `/init`: a row of the benchmark. Where the kernel runs
//! in an emulated machine, so does the whole measurement, both VMMs beside each other; this side reads
//! the figures from that machine's serial port.

use super::nested::Payload;
use super::{Assets, Place};
use crate::ferry::Guest;
use crate::process::Vmm;
use crate::qemu;
use crate::skip::say;
use anyhow::{Context, Result};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

/// A VMM under measurement.
pub struct Contender {
    /// Its name, in figures.
    pub name: &'static str,
    /// Boots a guest.
    pub run: fn(&Guest) -> Result<Vmm>,
}

/// Longest time for a boot; under emulation it takes 5 to 30 s.
const LIMIT: Duration = Duration::from_secs(60);
/// How often a guest is booted for one figure in the emulated machine. Its virtualisation is not free of
/// faults: now and then a guest crashes or stands still on its way, under QEMU as under Ferry.
const MOST_BOOTS: u32 = 4;
/// A boot there ends within [`LIMIT`] or is repeated, and both are said.
const LONGEST_SILENCE: Duration = Duration::from_secs(80);
/// Begins a line about a boot there that gave no figure.
const AGAIN: &str = "AGAIN ";

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
            let boots = if assets.are_emulated() { MOST_BOOTS } else { 1 };
            let mut left = boots;
            let seconds = loop {
                left -= 1;
                match measure(contender, assets) {
                    Err(error) if left > 0 => {
                        println!("\n{AGAIN}{}", format!("{error:#}").replace('\n', " | "));
                    }
                    result => break result?,
                }
            };
            println!("\nFIGURE {} {seconds}", contender.name);
            Ok(seconds)
        }
        Ok(Place::Nested(machine)) => {
            static NEXT: Mutex<usize> = Mutex::new(0);
            let mut next = NEXT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let pattern = format!("^FIGURE {} |^{AGAIN}|^bench: ", contender.name);
            loop {
                let line = machine.next_line(&mut next, &pattern, LONGEST_SILENCE)?;
                if let Some(why) = line.strip_prefix(AGAIN) {
                    say(&format!("a boot in the emulated machine is repeated: {why}"));
                    continue;
                }
                let figure = line.strip_prefix("FIGURE ");
                let figure = figure.and_then(|text| text.split(' ').nth(1));
                return Ok(figure.with_context(|| line.clone())?.parse()?);
            }
        }
        Err(reason) => anyhow::bail!("no Linux guest can run here: {reason:#}"),
    }
}

fn measure(contender: &Contender, assets: &Assets) -> Result<f64> {
    let cmdline = format!("console=ttyS0 panic=-1 work=none {}", assets.cmdline);
    let mut guest = Guest::new(&cmdline, 256);
    guest.kernel = assets.kernel();
    guest.initrd = Some(assets.initrd());
    let mut vmm = (contender.run)(&guest)?;
    if let Err(error) = vmm.serial().wait_for("^INIT$", LIMIT) {
        let end = vmm.process.exit_code(Duration::ZERO);
        let end = end.map_or_else(|_| "still runs".to_owned(), |code| format!("exit code {code}"));
        let said = vmm.process.err.tail();
        return Err(error.context(format!("{}: {end}; errors: {said:?}", contender.name)));
    }
    Ok(vmm.process.started().elapsed().as_secs_f64())
}
