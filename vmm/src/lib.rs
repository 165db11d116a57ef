//! The virtual machine monitor: KVM, boot, threads, control socket.
//!
//! [`cli`] and [`config`] parse the options. The [`supervisor`] runs on the main thread's [`event_loop`]
//! and owns the one [`machine`] of a process, which is built on [`kvm`] and loaded by [`boot`]; [`console`]
//! and [`control`] connect it to the user. [`images`] prepares the disks of an incoming guest. The
//! [`shuttle`] migrates a guest between child processes again and again. [`qemu`] takes QEMU's command line,
//! and [`suite`] runs many test kernels. [`client`] talks to another
//! process's control socket, and [`doctor`] checks the host.

pub mod boot;
pub mod cli;
pub mod client;
pub mod config;
pub mod console;
pub mod control;
pub mod disk_selection;
pub mod doctor;
pub mod error;
pub mod event_loop;
pub mod exit_code;
pub mod footprint;
pub mod images;
pub mod kvm;
pub mod limits;
pub mod log_queue;
pub mod machine;
pub mod qemu;
pub mod setup;
pub mod shuttle;
pub mod suite;
pub mod supervisor;
pub mod targets;
