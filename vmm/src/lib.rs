//! The program: KVM, boot, threads, control socket.

pub mod boot;
pub mod kvm;
