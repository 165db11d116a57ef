//! Whole migrations without KVM: a fake guest, links that are cut, peers that lie.

mod bad_destinations;
mod bitmaps;
mod cancel;
mod converge;
mod disk_channels;
mod disk_lies;
mod disks;
mod fake;
mod fake_disks;
mod frame_lies;
mod lies;
mod modes;
mod postcopy;
mod stops;
mod strangers;
mod whole;

pub use fake::write_all;
