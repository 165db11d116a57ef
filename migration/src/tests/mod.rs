//! Whole migrations without KVM: a fake guest, links that are cut, peers that lie.

mod cancel;
mod converge;
mod disks;
mod fake;
mod fake_disks;
mod lies;
mod whole;
