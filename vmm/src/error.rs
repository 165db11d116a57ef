//! Error texts: one line with all causes, as printed on the terminal and sent in replies.

use migration::guest::GuestError;
use std::error::Error;

pub use migration::error::chain;

/// Wraps an error of the machine for the migration engine.
pub fn guest_error(error: &dyn Error) -> GuestError {
    GuestError::new(chain(error))
}
