//! The guest's CPU model: [`names`] knows the features of CPUID, [`config`] parses `--cpu`, [`model`] turns it
//! into the CPUID that a new guest gets.

pub mod config;
pub mod model;
pub mod names;
