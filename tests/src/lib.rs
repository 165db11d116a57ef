//! What the end-to-end tests, the demo and the benchmark share: real processes, their serial lines,
//! their control sockets, and what the guest says about itself.
//!
//! - [`lines`]: a reader thread per pipe; waiting for a line, never polling.
//! - [`process`]: one VMM process with its pipes and control socket, ended by its own id when dropped.
//! - [`proxy`]: a link that counts what passes, and can be cut.
//! - [`bare`]: guests of a few bytes.
//! - [`frames`]: what both sides say to each other, changed or cut off on its way.
//! - [`ferry`]: `ferry run`, `ferry receive`, `ferry migrate` in tests' words.
//! - [`pair`]: a guest that runs and a process that waits for it, and what holds when the move ends.
//! - [`traveller`]: a guest that moves from process to process, and its whole life.
//! - [`linux`]: stock Linux as a guest, where need be in an emulated machine.
//! - [`hanging`]: a disk image whose storage is slow, fails or stops answering.
//! - [`seccomp`]: a process whose unlinks hang, or whose kernel lacks an ioctl.
//! - [`hosts`]: two hosts without shared storage, and guests with disks on them.
//! - [`bitmaps`]: dirty bitmaps, compared with what has changed in an image.
//! - [`steps`]: a guest that tells what it has written, discarded and zeroed.
//! - [`image`]: disk images, filled and compared by the host.
//! - [`qemu`]: the same guest under QEMU, for the benchmark.
//! - [`qmp`]: a small control-socket client that works with both.
//! - [`verdict`]: the guest's own lines, parsed, also across a handover.
//! - [`disk`]: images, and the numbered sectors that the guest writes, read by the host.
//! - [`mod@needs`]: what a test cannot do without, `#[needs(kvm)]`.
//! - [`skip`]: checks that this host cannot run, said loudly.

pub mod bare;
pub mod bitmaps;
pub mod disk;
pub mod ferry;
pub mod frames;
pub mod hanging;
pub mod hosts;
pub mod image;
pub mod jobs;
pub mod lines;
pub mod linux;
pub mod needs;
pub mod pair;
pub mod process;
pub mod proxy;
pub mod qemu;
pub mod qmp;
pub mod seccomp;
pub mod skip;
pub mod steps;
pub mod traveller;
pub mod verdict;

pub use ferry_test_macros::needs;

// What `#[needs(…)]` writes names this crate, in its own tests too.
extern crate self as ferry_tests;
