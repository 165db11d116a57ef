//! What the machine does for a migration, on the main thread: it is stopped and goes on, its devices and
//! disks are given away or taken, it is built for a guest that arrives, and run. Asked by the migration
//! threads through [`super::guest`]; when and why is `migration`'s business.

use super::guest::{Arrival, GuestRequest};
use super::{Mission, Supervisor};
use crate::control::Event;
use crate::error::{chain, guest_error};
use crate::images::Images;
use crate::machine::description::Description;
use crate::machine::run_state::RunState;
use crate::machine::{Machine, MachineError};
use migration::guest::{GuestError, IncomingRam, RunPermit, Stopped};

impl Supervisor {
    pub(super) fn on_guest_request(&mut self, request: GuestRequest) {
        let no_machine = || GuestError::new("there is no machine");
        // A migration thread that does not wait for its answer has been cancelled.
        match request {
            GuestRequest::Pause(reply) => drop(reply.send(self.pause_for_migration())),
            GuestRequest::SaveRecords(reply) => {
                let machine = self.machine.as_ref().ok_or_else(no_machine);
                let records = machine.and_then(|machine| {
                    machine.save_records().map_err(|error| guest_error(&error))
                });
                drop(reply.send(records));
            }
            GuestRequest::ReleaseDisks(reply) => {
                let machine = self.machine.as_ref().ok_or_else(no_machine);
                let released = machine.and_then(|machine| {
                    // What the destination has received is on its own storage.
                    let stays = |id: &str| !self.jobs.travelling.iter().any(|other| other == id);
                    machine
                        .flush_disks(stays)
                        // Nothing is written any more once the lock is gone, not even by a later flush.
                        .and_then(|()| machine.write_back_disks())
                        .map_err(|error| guest_error(&error))?;
                    machine.unlock_disks();
                    Ok(())
                });
                drop(reply.send(released));
            }
            GuestRequest::Resume(stopped, reply) => {
                drop(reply.send(self.resume_after_migration(stopped)));
            }
            GuestRequest::Throttle(percent, reply) => {
                if let Some(machine) = &self.machine {
                    machine.throttle(percent);
                }
                drop(reply.send(Ok(())));
            }
            GuestRequest::Surrendered(reply) => {
                self.become_state(RunState::Postmigrate);
                drop(reply.send(Ok(())));
            }
            GuestRequest::Build(description, reply) => {
                let built = Description::from_stream(&description)
                    .map_err(MachineError::from)
                    .map_err(|error| guest_error(&error))
                    .and_then(|description| self.arrive(description));
                drop(reply.send(built));
            }
            GuestRequest::Disks(reply) => drop(reply.send(Ok(self.images.arriving()))),
            GuestRequest::LoadRecords(records, reply) => {
                let machine = self.machine.as_mut().ok_or_else(no_machine);
                drop(reply.send(machine.and_then(|machine| {
                    machine.load_records(records).map_err(|error| guest_error(&error))
                })));
            }
            GuestRequest::LockDisks(reply) => {
                let machine = self.machine.as_ref().ok_or_else(no_machine);
                drop(reply.send(machine.and_then(|machine| {
                    machine.lock_disks().map_err(|error| guest_error(&error))
                })));
            }
            GuestRequest::UnlockDisks(reply) => {
                if let Some(machine) = &self.machine {
                    machine.unlock_disks();
                }
                drop(reply.send(Ok(())));
            }
            GuestRequest::Run(permit, running, reply) => {
                drop(reply.send(self.run_arrived(permit, running)));
            }
            GuestRequest::Abandon(reply) => {
                // Closing the disks lets go of their locks: the source wants them back.
                self.machine = None;
                self.disks.clear();
                self.images = Images::default();
                drop(reply.send(Ok(())));
            }
        }
    }

    fn pause_for_migration(&mut self) -> Result<Stopped, GuestError> {
        let refused = |text: &str| Err(GuestError::new(text));
        let was_running = match self.state {
            RunState::Running => true,
            RunState::Paused => false,
            state => return refused(&format!("the guest is {} and cannot move", state.name())),
        };
        let Some(machine) = &mut self.machine else { return refused("there is no machine") };
        if !self.jobs.moves(machine.vm()) {
            return refused("the guest was reset while it moved, and has other RAM now");
        }
        machine.pause().map_err(|error| guest_error(&error))?;
        if machine.has_ended() {
            // Its message is on the way here: the guest ends, or is reset, where it is.
            return refused("the guest has just ended or asked for a reset");
        }
        if machine.keeps_disk_requests() {
            // Its request is kept by this process, which cannot give it away.
            if was_running {
                self.become_state(RunState::IoError);
                self.tell(&Event::plain("STOP"));
            }
            return refused("a request to its disk has failed: `cont` tries it again");
        }
        let Some(permit) = machine.take_permit() else {
            return refused("the right to run this guest is elsewhere");
        };
        self.become_state(RunState::FinishMigrate);
        if was_running {
            self.tell(&Event::plain("STOP"));
        }
        Ok(Stopped { permit, was_running, drains: Vec::new() })
    }

    fn resume_after_migration(&mut self, stopped: Stopped) -> Result<(), GuestError> {
        let Some(machine) = &mut self.machine else { return Ok(()) };
        machine.grant(stopped.permit);
        if let Err(error) = relock(machine) {
            self.become_state(RunState::IoError);
            return Err(GuestError::new(format!(
                "{}; the guest stays paused, `cont` tries again",
                chain(&error)
            )));
        }
        if stopped.was_running {
            self.resume().map_err(|error| guest_error(&error))
        } else {
            self.become_state(RunState::Paused);
            Ok(())
        }
    }

    fn arrive(&mut self, mut description: Description) -> Result<Arrival, GuestError> {
        let Mission::Receive(config) = &self.mission else {
            return Err(GuestError::new("this process waits for no guest"));
        };
        let failed = |error: &dyn std::error::Error| guest_error(error);
        self.images =
            Images::prepare(&description.disks, config).map_err(|error| failed(&error))?;
        self.disks = std::mem::take(&mut self.images.nodes);
        // They have travelled then: when the guest leaves again, that is said anew.
        description.disks.iter_mut().for_each(|disk| disk.travels = None);
        let machine = Machine::arrive(&self.host, description, self.backends())
            .map_err(|error| failed(&error))?;
        let ram =
            IncomingRam { ram: machine.vm().ram().clone(), layout: machine.vm().layout().clone() };
        self.machine = Some(machine);
        Ok(Arrival { ram, backings: std::mem::take(&mut self.images.backings) })
    }

    fn run_arrived(&mut self, permit: RunPermit, running: bool) -> Result<(), GuestError> {
        let paused = matches!(&self.mission, Mission::Receive(config) if config.paused);
        let Some(machine) = &mut self.machine else {
            return Err(GuestError::new("there is no machine"));
        };
        self.images.keep().map_err(|error| guest_error(&error))?;
        machine.grant(permit);
        let serial = machine.serial().clone();
        if running && !paused {
            machine.run().map_err(|error| guest_error(&error))?;
            self.become_state(RunState::Running);
            self.tell(&Event::plain("RESUME"));
        } else {
            self.become_state(RunState::Paused);
        }
        self.images.settle();
        self.console.attach(serial);
        Ok(())
    }
}

/// Takes the disks' locks back. A destination that refused lets go of them when its connection closes,
/// which may take a moment.
fn relock(machine: &Machine) -> Result<(), MachineError> {
    const TRIES: u32 = 20;
    let mut result = machine.lock_disks();
    for _ in 0..TRIES {
        if result.is_ok() {
            break;
        }
        // The lock's holder gives no event when it lets go, so there is nothing else to wait for.
        std::thread::sleep(std::time::Duration::from_millis(50));
        result = machine.lock_disks();
    }
    result
}
