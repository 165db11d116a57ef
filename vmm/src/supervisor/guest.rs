//! The migration threads' interface to the machine. They do slow work themselves, on the disks and images
//! that they hold; every other call is a message to the supervisor, the only owner of the machine, and
//! waits for its reply.
//!
//! [`leaving`] serves an outgoing migration, [`arriving`] an incoming one, and [`served`] offers the images of its disks
//! until it is here.

pub mod arriving;
pub mod leaving;
pub mod request;
pub mod served;

use super::messages::{Mailbox, Message};
use migration::guest::GuestError;
use request::{GuestRequest, Reply};
use std::sync::mpsc::channel;

/// Sends a request to the supervisor and waits for the reply.
fn ask<T>(
    mailbox: &Mailbox,
    request: impl FnOnce(Reply<T>) -> GuestRequest,
) -> Result<T, GuestError> {
    let (reply, answer) = channel();
    mailbox.post(Message::Guest(request(reply)));
    answer.recv().map_err(|_| shutting_down())?
}

fn shutting_down() -> GuestError {
    GuestError::new("the virtual machine is shutting down")
}
