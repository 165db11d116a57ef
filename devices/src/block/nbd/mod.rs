//! NBD, the network block device protocol: disks for other programs, and other programs' disks.
//!
//! ```text
//!  export    guest ─▶ BlockNode ◀── copy_at, write_at ── server ◀── socket ◀── nbdcopy, qemu-img, nbdinfo
//!                        └─ named bitmaps ── block status ──┘
//!  import    mirror ─▶ BlockNode ─▶ client (a backend) ──▶ socket ──▶ qemu-nbd, nbdkit, another Ferry
//! ```
//! [`protocol`] is what both sides put on the wire, and reads no socket.
//!
//! The wire format is our own, after the protocol's specification: the `nbd` crate knows neither structured
//! replies nor block status, `libnbd` binds a C library that has no server, and neither lets a caller bound
//! the memory that its peer may cost.

pub mod address;
pub mod client;
pub mod protocol;
pub mod server;
