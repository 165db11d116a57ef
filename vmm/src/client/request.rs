//! What `ferry ctl` sends: made of words by [`super::ctl`] and [`super::bitmap`].

use serde_json::Value;

/// A command, and how its result is shown.
#[derive(Debug)]
pub struct Request {
    /// The command.
    pub command: String,
    /// Its arguments.
    pub arguments: Value,
    /// Writes the result.
    pub show: fn(&Value) -> String,
}

impl Request {
    /// One whose result is shown as JSON.
    pub fn new(command: impl Into<String>, arguments: Value) -> Self {
        Self { command: command.into(), arguments, show: |value| format!("{value:#}") }
    }
}
