//! The way of a page: dirty log -> [`bitmap`] -> runs -> zero or raw -> connection -> guest RAM.
//!
//! **Clear, then look, then send.** A page's dirty bit is cleared in KVM's log before the page is read.
//! Whatever the guest writes after that sets the bit again and the page is sent again in a later
//! round, so a page that changes between the zero test and the send, or while the kernel copies it,
//! does no harm: the frame that decides is the last one, and it is sent while the guest is stopped.
//! So pages go from guest RAM to the socket without a copy of our own.

pub mod bitmap;
pub mod incoming;
pub mod outgoing;
pub mod populated;
