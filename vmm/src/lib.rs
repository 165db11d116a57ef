//! The program: KVM, boot, threads, control socket.
