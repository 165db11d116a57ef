//! Moves a running machine to another process or host. Knows no KVM.
//!
//! ```text
//! source                                              destination
//!   ── control connection ──
//! Hello ──────────────────────────────────────────▶   ◀── Hello
//! Machine ────────────────────────────────────────▶   build it, paused ◀── Accepted | Refused
//!   ── participants: ram, block (if disks migrate), boot; the guest runs ──
//! setup: announce, start dirty tracking ──────────▶   setup: check, start receiving
//! iterate: boot payload, once ────────────────────▶   unlinked files (missing ones only)
//!          disks: chunks, Mark ───────────────────▶   images, flushed ◀── Flushed
//!          RAM: pages, Mark (one round) ──────────▶   guest RAM ◀── Mark
//!          … round after round, until the rest fits into the downtime limit
//!   ── pause: one deadline for everything up to Go ──
//! device records ─────────────────────────────────▶   restored while the last pages arrive
//! complete: last pages and chunks, End ───────────▶   finish: compare counts, flush
//! release disk locks, Eof(attempt) ───────────────▶   lock disks ◀── Ready(attempt) | Refused
//!   │ too slow? CalledOff, the guest runs on, back to iterate
//!   ▼ give up the right to run
//! Go ─────────────────────────────────────────────▶   run ◀── Running | Declined
//!   ── moved; only if something could wait (dirty bitmaps): postcopy ──
//! Postcopy…, AllSent ─────────────────────────────▶   merge, while the guest runs ◀── Complete
//! ```
//! Both sides send KeepAlive every second; Abort and Refused may come at any time before `Go`.
//!
//! | term | meaning |
//! |---|---|
//! | source, destination | the side that has the guest, the side that gets it |
//! | transport | a byte stream between the two: a TCP or Unix socket, or memory in tests ([`transport`]) |
//! | channel | a transport with deadlines, stall detection and cancel ([`transport::channel`]) |
//! | control connection | the one connection for frames both ways, with one reader ([`control`]) |
//! | data channel | carries pages of RAM, one way |
//! | disk channel | carries chunks of disks one way, and answers to marks the other; as many as data channels |
//! | link | the network path that all connections share; has one bandwidth and one cap ([`pace`]) |
//! | frame | the unit on any connection: a header and a payload ([`wire`], `frame` of each participant) |
//! | section | a named, versioned frame of one participant on the control connection ([`wire::section`]) |
//! | participant | a part of the machine that migrates: RAM, disks, dirty bitmaps, boot payload ([`participant`]) |
//! | record | the state of one device |
//! | shard | a share of RAM with its own encoders and data channel ([`ram::shard`]) |
//! | chunk, granule | 1 MiB of a disk, the unit of work; 16 KiB, the unit of dirty tracking ([`block`]) |
//! | moved, complete | the guest runs at the destination; everything has arrived ([`source`]'s postcopy) |
//! | dirty bitmap | a named bitmap of a disk's writes, for backups; moves with it ([`bitmap`]) |
//! | boot payload | kernel, initrd and modules, needed again at a reset ([`boot`]) |
//! | round, pass | everything dirty is sent once, while the guest runs |
//! | mark | ends a round on a channel; answered when everything before it is in place |
//! | pause, downtime | the guest's vCPUs are stopped |
//! | stop, attempt | a pause meant to end in a handover; attempts are counted from 1 |
//! | called-off stop | a stop that took too long: the guest runs on, and the source backs off |
//! | handover | `Go` and its answer: the right to run moves ([`guest::RunPermit`]) |
//! | capability | an optional part of the protocol, negotiated in Hello |
//! | parameter | a setting that the user may change, with QEMU's name ([`params`]) |
//!
//! Start with [`source`] and [`destination`], the drivers; [`guest`] is what they need of the machine,
//! [`policy`] decides.
#![deny(unsafe_code)]

pub mod bitmap;
pub mod block;
pub mod boot;
pub mod bytes;
pub mod cancel;
pub mod control;
pub mod destination;
pub mod error;
pub mod guest;
pub mod pace;
pub mod params;
pub mod participant;
pub mod policy;
mod priority;
pub mod ram;
pub mod source;
pub mod stats;
pub mod transport;
pub mod units;
pub mod wire;

#[cfg(test)]
mod tests;
