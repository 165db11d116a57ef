//! The guest's CPU model: [`names`] knows the features of CPUID, [`config`] parses `--cpu`.

pub mod config;
pub mod names;
