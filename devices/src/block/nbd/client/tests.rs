//! A disk on an NBD server: with real servers, and with scripted ones that lie.

#![expect(clippy::cast_possible_truncation, reason = "sizes and bytes of a test")]

mod handshake;
mod loss;
mod real;
mod real_failures;
mod scripted;
mod transmission;

use super::*;
use crate::block::nbd::address::NbdServer;
use std::path::Path;

/// Short enough for a test to wait for.
const SHORT: Duration = Duration::from_millis(300);
/// What a loaded host may add to it.
const SOON: Duration = Duration::from_secs(20);

fn unix(path: &Path, export: &str) -> NbdAddress {
    NbdAddress::new(NbdServer::Unix(path.into()), export).unwrap()
}

fn single() -> NbdOptions {
    with_connections(1)
}

fn with_connections(count: usize) -> NbdOptions {
    NbdOptions { max_connections: Some(count), ..NbdOptions::default() }
}

/// All of an error's causes.
fn text(error: &dyn std::error::Error) -> String {
    failure::chain(error)
}
