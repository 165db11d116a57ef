//! Errors in words: one line with every cause, as users read them on the terminal and in replies.

use migration::guest::GuestError;
use std::error::Error;

pub use migration::error::chain;

/// A machine-side failure as the migration engine reports it.
pub fn guest_error(error: &dyn Error) -> GuestError {
    GuestError::new(chain(error))
}
