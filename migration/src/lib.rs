//! Moves a running machine to another process or host. Knows no KVM.
#![deny(unsafe_code)]

pub mod guest;
pub mod params;
