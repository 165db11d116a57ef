//! Serves an image over NBD on a unix socket until its standard input ends: what the benchmark compares with
//! `qemu-nbd`.
//!
//! `nbd_export IMAGE raw|qcow2 writeback|none SOCKET`

use devices::block::nbd::server::{Export, Limits, Listener, NbdServer};
use devices::block::qcow2::BackingChoice;
use devices::block::{BlockNode, open_image};
use std::error::Error;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [image, format, cache, socket] = &arguments[..] else {
        return Err("nbd_export IMAGE raw|qcow2 writeback|none SOCKET".into());
    };
    let backing = BackingChoice::default();
    let disk = open_image(Path::new(image), format.parse()?, false, cache.parse()?, backing)?;
    let node = Arc::new(BlockNode::new("disk", disk));
    let listener = Listener::Unix(UnixListener::bind(socket)?);
    let server = NbdServer::start(listener, Limits::default(), Arc::new(|_| ()))?;
    let (id, name, description) = ("disk".into(), String::new(), String::new());
    let bitmaps = Vec::new();
    server.add(Export { id, name, description, node, writable: true, bitmaps })?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
