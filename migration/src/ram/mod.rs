//! RAM as a participant. One picture of the data path:
//!
//! ```text
//! dirty log ─▶ outgoing: bits ─▶ shards ┬▶ shard: scan: runs, zero or raw ─▶ frame ─▶ data channel
//!              dirty, populated ┘       ├▶ shard …            zero, simd ┘             │
//!                                       └▶ …                                           │
//! guest RAM ◀── straight into place, or left untouched if zero ◀── incoming ◀─ … ◀─────┘
//! ```
//!
//! **Clear, then look, then send.** A page's bit is cleared in the dirty log before the page is read,
//! and the page is sent straight from guest RAM: the only copy is the kernel's, into the socket. That
//! is safe although the guest goes on writing. Whatever it writes after the clear sets the bit again,
//! so the page is sent again; a torn page, or one that tested as zero and no longer is, was written
//! after the clear. Frames arrive in the order of sending, so the last version wins, and that one is sent
//! while the guest is stopped. (An encoder that reads the bytes twice, as XBZRLE does, needs a private
//! copy; zero and raw pages do not.)
//!
//! **Untouched pages.** In the first round every page is dirty, and most of an idle guest's pages were
//! never touched. [`populated`] finds them without reading them, which would allocate them; the
//! destination does not write zeroes to pages that were never written there.

pub mod adaptive;
pub mod cache;
pub mod compress;
pub mod decode;
pub mod digest;
pub mod dirty;
pub mod encode;
pub mod error;
pub mod frame;
pub mod incoming;
pub mod outgoing;
mod pace;
pub mod page;
pub mod page_receiver;
mod patch;
pub mod populated;
mod receivers;
pub mod scan;
pub mod shard;
pub mod shards;
pub mod simd;
pub mod watch;
pub mod xbzrle;
pub mod zero;
