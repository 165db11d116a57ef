//! Errors in words: one line with every cause, as users read them on the terminal and in replies.

use migration::guest::GuestError;
use std::error::Error;
use std::fmt::Write;

/// The error and its sources, joined with `: `.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

/// A machine-side failure as the migration engine reports it.
pub fn guest_error(error: &dyn Error) -> GuestError {
    GuestError::new(chain(error))
}
