//! The program: KVM, boot, threads, control socket.
//!
//! [`cli`] and [`config`] say what is asked for; the [`supervisor`] on the main thread owns the one
//! [`machine`] of a process, which is built on [`kvm`] and entered as [`boot`] says; [`console`] and
//! [`control`] are its ways in and out, which meet at a [`event_loop`]. The [`shuttle`] moves a guest between
//! processes of its own again and again. [`client`] talks to another process's control socket, and
//! [`doctor`] looks at the host.

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
pub mod images;
pub mod kvm;
pub mod log_queue;
pub mod machine;
pub mod shuttle;
pub mod supervisor;
