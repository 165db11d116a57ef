//! What `ferry ctl` sends: made of words by [`super::ctl`], [`super::bitmap`] and [`super::job`].

use serde_json::Value;

/// A job to follow when the request has been answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Follow {
    /// The job.
    pub id: String,
    /// Whether it is told to complete when it is ready.
    pub complete: bool,
}

/// A command, and how its result is shown.
#[derive(Debug)]
pub struct Request {
    /// The command.
    pub command: String,
    /// Its arguments.
    pub arguments: Value,
    /// Writes the result.
    pub show: fn(&Value) -> String,
    /// The job to follow instead.
    pub follow: Option<Follow>,
}

impl Request {
    /// One whose result is shown as JSON.
    pub fn new(command: impl Into<String>, arguments: Value) -> Self {
        let show = |value: &Value| format!("{value:#}");
        Self { command: command.into(), arguments, show, follow: None }
    }
}
