//! Character devices and what uses them: the serial port, the debug console, control sockets.

use super::draft::{Backend, Chardev, Draft, Monitor};
use super::lists::List;
use crate::config::{DebugconConfig, SerialConfig, SocketPath};
use std::path::PathBuf;

/// `-chardev BACKEND,id=ID,…`
pub(super) fn chardev(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, Some("backend"))?;
    let (backend, id) = (list.need("backend")?, list.need("id")?);
    let backend = read(&backend, &mut list)?;
    if draft.chardevs.iter().any(|other| other.id == id) {
        return Err(format!("id={id}: it is given twice"));
    }
    draft.chardevs.push(Chardev { id, backend });
    Ok(())
}

/// A backend by its name and properties.
fn read(backend: &str, list: &mut List) -> Result<Backend, String> {
    // Whether several share it, and who gets Ctrl-C, is Ferry's own affair.
    list.drop(&["mux", "signal"]);
    let backend = match backend {
        "stdio" => Backend::Stdio,
        "null" => Backend::Null,
        "file" => {
            if list.switch("append")? == Some(true) {
                return Err("append=on: Ferry begins the file anew".to_owned());
            }
            Backend::File(list.need("path")?.into())
        }
        "socket" => {
            let path: PathBuf = list.take("path").filter(|path| !path.is_empty()).map_or_else(
                || Err("Ferry's sockets are Unix ones: path=PATH".to_owned()),
                |path| Ok(path.into()),
            )?;
            let waits = list.switch("wait")?;
            if list.switch("server")? != Some(true) {
                return Err(
                    "Ferry listens, and does not connect: give server=on,wait=off".to_owned()
                );
            }
            if waits != Some(false) {
                return Err("Ferry does not wait for a client: give wait=off".to_owned());
            }
            Backend::Socket(path)
        }
        other => return Err(format!("{other}: Ferry has stdio, null, file and socket")),
    };
    list.done()?;
    Ok(backend)
}

/// A backend in one word: `stdio`, `file:PATH`, `unix:PATH,server=on,wait=off`, `chardev:ID`.
fn resolve(text: &str, chardevs: &[Chardev]) -> Result<Backend, String> {
    let text = text.strip_prefix("mon:").unwrap_or(text);
    match text.split_once(':') {
        None if text == "stdio" => Ok(Backend::Stdio),
        None if matches!(text, "none" | "null") => Ok(Backend::Null),
        Some(("file", path)) if !path.is_empty() => Ok(Backend::File(path.into())),
        Some(("unix", rest)) => {
            let mut list = List::parse(rest, Some("path"))?;
            read("socket", &mut list)
        }
        Some(("chardev", id)) => {
            let found = chardevs.iter().find(|chardev| chardev.id == id);
            found.map(|chardev| chardev.backend.clone()).ok_or_else(|| format!("no -chardev {id}"))
        }
        _ => Err(format!(
            "{text}: Ferry has stdio, null, file:PATH and unix:PATH,server=on,wait=off"
        )),
    }
}

/// `-mon [chardev=]ID,mode=control`
pub(super) fn mon(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, Some("chardev"))?;
    let id = list.need("chardev")?;
    if list.take("mode").as_deref() != Some("control") {
        return Err("Ferry has no human monitor: give mode=control".to_owned());
    }
    list.drop(&["pretty"]);
    list.done()?;
    let monitor = Monitor { option: format!("-mon {value}"), text: format!("chardev:{id}") };
    draft.monitors.push(monitor);
    Ok(())
}

/// `-qmp unix:PATH,server=on,wait=off`
pub(super) fn qmp(draft: &mut Draft, value: &str) -> Result<(), String> {
    let monitor = Monitor { option: format!("-qmp {value}"), text: value.to_owned() };
    draft.monitors.push(monitor);
    Ok(())
}

/// `-debugcon BACKEND`
pub(super) fn debugcon(draft: &mut Draft, value: &str) -> Result<(), String> {
    draft.debugcons.push(value.to_owned());
    Ok(())
}

/// Connects what uses character devices to them.
pub(super) fn finish(draft: &mut Draft, problems: &mut Vec<String>) {
    let (serial, debugcon, qmp) = (serial(draft), debug(draft), control(draft));
    match serial {
        Ok(serial) => draft.options.host.serial = Some(serial),
        Err(problem) => problems.push(problem),
    }
    match debugcon {
        Ok(debugcon) => draft.options.debugcon = debugcon,
        Err(problem) => problems.push(problem),
    }
    match qmp {
        Ok(qmp) => draft.options.host.qmp = qmp,
        Err(problem) => problems.push(problem),
    }
}

fn serial(draft: &Draft) -> Result<SerialConfig, String> {
    let mut first = None;
    for (index, text) in draft.serials.iter().enumerate() {
        let named = |why: String| format!("-serial {text}: {why}");
        let backend = resolve(text, &draft.chardevs).map_err(named)?;
        if index == 0 {
            first = Some(backend);
        } else if backend != Backend::Null {
            return Err(format!("-serial {text}: there is one serial port"));
        }
    }
    Ok(match first {
        None if draft.serial_by_default() => SerialConfig::Stdio,
        None | Some(Backend::Null) => SerialConfig::Null,
        Some(Backend::Stdio) => SerialConfig::Stdio,
        Some(Backend::File(path)) => SerialConfig::File(path),
        Some(Backend::Socket(path)) => SerialConfig::Socket(path),
    })
}

fn debug(draft: &Draft) -> Result<Option<DebugconConfig>, String> {
    let [text] = draft.debugcons.as_slice() else {
        return match draft.debugcons.as_slice() {
            [] => Ok(None),
            _ => Err("-debugcon: there is one debug console".to_owned()),
        };
    };
    let named = |why: String| format!("-debugcon {text}: {why}");
    match resolve(text, &draft.chardevs).map_err(named)? {
        Backend::Stdio => Ok(Some(DebugconConfig::Stdio)),
        Backend::Null => Ok(Some(DebugconConfig::Null)),
        Backend::File(path) => Ok(Some(DebugconConfig::File(path))),
        Backend::Socket(_) => Err(named("it goes to stdio, null or a file".to_owned())),
    }
}

fn control(draft: &Draft) -> Result<Option<SocketPath>, String> {
    let mut socket = None;
    for Monitor { option, text } in &draft.monitors {
        let backend = resolve(text, &draft.chardevs).map_err(|why| format!("{option}: {why}"))?;
        match backend {
            Backend::Null => {}
            Backend::Socket(path) if socket.is_none() => socket = Some(SocketPath(path)),
            Backend::Socket(_) => {
                return Err(format!("{option}: several clients may use one control socket"));
            }
            Backend::Stdio | Backend::File(_) => {
                return Err(format!("{option}: give unix:PATH,server=on,wait=off"));
            }
        }
    }
    Ok(socket)
}
