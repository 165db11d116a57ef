//! `ferry qemu`: QEMU's command line, as test runners write it, translated to the options of `ferry run`.
//!
//! [`table`] has every option and what becomes of it, and reads a command line by it; [`lists`] are QEMU's
//! `key=value` lists. What is said goes to a [`draft`], by way of [`machine`], [`hardware`], [`disks`] and
//! [`console`], which put it together at the end. [`overlay`] makes the temporary images of `-snapshot`, and
//! [`help`] answers what runners ask.

mod console;
mod disks;
mod draft;
mod hardware;
mod help;
mod lists;
mod machine;
mod overlay;
mod table;

use crate::config::{RunConfig, RunOptions};
use crate::error::chain;
use crate::exit_code::{self, Exit};
use draft::Draft;
use overlay::Overlays;
use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use table::Fate;

/// Most arguments of a command line.
const MAX_ARGUMENTS: usize = 4096;
/// Names of links to this program that make it take QEMU's command line.
const LINK_NAMES: [&str; 2] = ["qemu-system-x86_64", "qemu-kvm"];
/// What may stand before `qemu`.
const VERBOSE: [&str; 3] = ["-v", "-vv", "--verbose"];

/// What a command line asks for.
#[derive(Debug)]
pub enum Request {
    /// To print this and end.
    Print(String),
    /// To run a guest.
    Run(Box<Translated>),
}

/// A command line in Ferry's words.
#[derive(Debug)]
pub struct Translated {
    options: RunOptions,
    /// Disks, by index, whose writes are thrown away.
    snapshots: Vec<usize>,
    /// What was ignored.
    pub remarks: Vec<String>,
    /// The number of `-v`.
    pub verbose: u8,
}

/// A guest that can be run.
#[derive(Debug)]
pub struct Prepared {
    /// Its configuration.
    pub config: RunConfig,
    /// Dropped, and so removed, when it has ended.
    pub overlays: Option<Overlays>,
}

/// The arguments that are QEMU's, if this program was called to take such: by the name of a link, or as
/// `ferry qemu`. A `-v` before `qemu` is among them.
pub fn arguments(argv: &[OsString]) -> Option<Vec<OsString>> {
    let (program, rest) = argv.split_first()?;
    let name = Path::new(program).file_name()?.to_str()?;
    if LINK_NAMES.contains(&name) {
        return Some(rest.to_vec());
    }
    let verbose = rest.iter().take_while(|word| VERBOSE.iter().any(|it| *word == it)).count();
    let (before, rest) = rest.split_at(verbose);
    let (verb, rest) = rest.split_first()?;
    (verb == "qemu").then(|| [before, rest].concat())
}

/// Reads QEMU's arguments.
///
/// # Errors
/// Every problem, each with its option's name.
pub fn translate(arguments: &[OsString]) -> Result<Request, Vec<String>> {
    if arguments.len() > MAX_ARGUMENTS {
        return Err(vec![format!("more than {MAX_ARGUMENTS} arguments")]);
    }
    let text = |argument: &OsString| match argument.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(vec![format!("{}: it is not UTF-8", argument.display())]),
    };
    let arguments = arguments.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    let mut draft = Draft::default();
    let mut problems = Vec::new();
    for item in table::lex(&arguments) {
        let given = match item {
            Ok(given) => given,
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        let line = match given.value {
            "" => given.spelling.to_owned(),
            value => format!("{} {value}", given.spelling),
        };
        match given.option.fate {
            Fate::Help(topic) => return Ok(Request::Print(help::text(topic))),
            Fate::Lists(topic, _) if help::is_wanted(given.value) => {
                return Ok(Request::Print(help::text(topic)));
            }
            Fate::Means(translate) | Fate::Lists(_, translate) => {
                if let Err(why) = translate(&mut draft, given.value) {
                    problems.push(format!("{line}: {why}"));
                }
            }
            Fate::Harmless(why) => draft.remark(format!("{line}: ignored: {why}")),
            Fate::Refused(why) => problems.push(format!("{line}: {why}")),
        }
    }
    let translated = finish(draft, &mut problems);
    if problems.is_empty() { Ok(Request::Run(Box::new(translated))) } else { Err(problems) }
}

/// Puts everything together; adds what cannot be to `problems`.
fn finish(mut draft: Draft, problems: &mut Vec<String>) -> Translated {
    machine::check_accelerators(&mut draft, problems);
    if draft.options.kernel.is_none() {
        problems.push("-kernel: give the kernel to boot: Ferry has no firmware".to_owned());
    }
    hardware::finish(&mut draft, problems);
    let snapshots = disks::finish(&mut draft, problems);
    console::finish(&mut draft, problems);
    let Draft { options, remarks, verbose, .. } = draft;
    Translated { options, snapshots, remarks, verbose }
}

impl Translated {
    /// These options, over those that a caller has for all its guests. `-snapshot` is not among them: see
    /// [`Translated::prepare`].
    pub fn over(mut self, general: RunOptions) -> Self {
        self.options = self.options.over(general);
        self
    }

    /// Whether a disk of it has a temporary image.
    pub fn has_snapshots(&self) -> bool {
        !self.snapshots.is_empty()
    }

    /// Its options.
    pub fn into_options(self) -> RunOptions {
        self.options
    }

    /// Checks everything, and makes temporary images.
    ///
    /// # Errors
    /// How the process ends, with the reason.
    pub fn prepare(self) -> Result<Prepared, Exit> {
        let options = self.options.or_environment();
        let config = options.and_then(RunOptions::validate);
        let mut config =
            config.map_err(|problems| Exit::new(exit_code::USAGE, problems.join("; ")))?;
        let kernel = &config.boot.kernel;
        // Runners look for these words when they try out whether anything else would be wrong.
        File::open(kernel).map_err(|error| {
            let why = format!("could not load kernel '{}': {error}", kernel.display());
            Exit::new(exit_code::CANNOT_RUN, why)
        })?;
        let overlays = overlay::cover(&mut config.disks, &self.snapshots);
        let overlays = overlays.map_err(|error| Exit::new(exit_code::CANNOT_RUN, chain(&error)))?;
        // Runners take what is said on standard error for a failure.
        config.host.quiet = true;
        Ok(Prepared { config, overlays })
    }
}

#[cfg(test)]
mod tests;
