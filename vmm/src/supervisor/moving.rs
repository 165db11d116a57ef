//! Executes the requests of migration threads on the main thread: stops and resumes the machine, saves and
//! restores its records, takes over and runs an incoming machine. Requests come through [`super::guest`];
//! the migration engine decides when, and does slow work itself.

use super::guest::request::GuestRequest;
use super::{Mode, Supervisor, tasks};
use crate::control::Event;
use crate::error::{chain, guest_error};
use crate::machine::Machine;
use crate::machine::drain::Drains;
use crate::machine::run_state::RunState;
use migration::guest::{GuestError, RunPermit, Stopped};

/// A guest whose vCPUs are stopped for a migration, which waits for requests in flight. Clients get `STOP`
/// only after that has succeeded.
pub(super) struct Pausing {
    /// Whether the user wants it to run.
    pub was_running: bool,
}

impl Supervisor {
    pub(super) fn on_guest_request(&mut self, request: GuestRequest) {
        let no_machine = || GuestError::new("there is no machine");
        // A send fails if the migration thread was cancelled. A dropped reply tells it that the process is
        // about to end.
        match request {
            GuestRequest::Uninstall(reply) => drop(reply.send(Ok(self.uninstall()))),
            GuestRequest::Surrendered(reply) => {
                self.become_state(RunState::Postmigrate);
                self.block_jobs.guest_has_moved();
                self.end_exports();
                drop(reply.send(Ok(())));
            }
            GuestRequest::Install(machine, _) if self.ending.is_some() => tasks::discard(machine),
            _ if self.ending.is_some() => {}
            GuestRequest::BeginPause(reply) => drop(reply.send(self.begin_pause())),
            GuestRequest::FinishPause(reply) => drop(reply.send(self.finish_pause())),
            GuestRequest::CallOffPause(reply) => drop(reply.send(self.call_off_pause())),
            GuestRequest::SaveRecords(reply) => {
                let machine = self.machine.as_ref().ok_or_else(no_machine);
                let records = machine.and_then(|machine| {
                    machine.save_records().map_err(|error| guest_error(&error))
                });
                drop(reply.send(records));
            }
            GuestRequest::Resume(stopped, locked, reply) => {
                drop(reply.send(self.resume_after_migration(stopped, locked)));
            }
            GuestRequest::Throttle(percent, reply) => {
                if let Some(machine) = &self.machine {
                    machine.throttle(percent);
                }
                drop(reply.send(Ok(())));
            }
            GuestRequest::Build(build) => {
                // On a new thread with normal priority: the vCPU threads inherit it.
                if let Err(error) = tasks::spawn("build", build) {
                    log::error!("cannot start a thread: {error}");
                }
            }
            GuestRequest::Install(machine, reply) => {
                self.machine = Some(machine);
                drop(reply.send(Ok(())));
            }
            GuestRequest::LoadRecords(records, reply) => {
                let machine = self.machine.as_mut().ok_or_else(no_machine);
                drop(reply.send(machine.and_then(|machine| {
                    machine.load_records(records).map_err(|error| guest_error(&error))
                })));
            }
            GuestRequest::Run(permit, running, payload, reply) => {
                let here = payload.as_ref().or(self.payload.as_ref());
                if let (Some(machine), Some(payload)) = (&self.machine, here) {
                    machine.set_boot_files(payload);
                }
                let result = self.run_arrived(permit, running);
                if result.is_ok() && payload.is_some() {
                    self.payload = payload;
                }
                drop(reply.send(result));
            }
        }
    }

    fn begin_pause(&mut self) -> Result<Drains, GuestError> {
        let refused = |text: &str| Err(GuestError::new(text));
        let was_running = match self.state {
            RunState::Running => true,
            RunState::Paused => false,
            state => return refused(&format!("the guest is {} and cannot move", state.name())),
        };
        if self.transition.is_some() {
            return refused("the guest is being reset");
        }
        let Some(machine) = &mut self.machine else { return refused("there is no machine") };
        if !self.jobs.moves(machine.vm()) {
            return refused("the guest was reset while it moved, and has other RAM now");
        }
        let drains = machine.begin_pause().map_err(|error| guest_error(&error))?;
        if machine.has_ended() {
            // Its message follows: the guest ends or is reset here.
            return refused("the guest has just ended or asked for a reset");
        }
        self.pausing = Some(Pausing { was_running });
        Ok(drains)
    }

    fn finish_pause(&mut self) -> Result<Stopped, GuestError> {
        let refused = |text: &str| Err(GuestError::new(text));
        let pausing = self.pausing.take();
        let Some(machine) = &mut self.machine else { return refused("there is no machine") };
        let kept = "a request to its disk has failed: `cont` tries it again";
        let Some(Pausing { was_running }) = pausing else { return refused(kept) };
        if machine.keeps_disk_requests() {
            // A kept request cannot be migrated.
            if was_running {
                self.become_state(RunState::IoError);
                self.tell(&Event::plain("STOP"));
            }
            return refused(kept);
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

    fn call_off_pause(&mut self) -> Result<(), GuestError> {
        let runs = self.pausing.take().is_some_and(|pausing| pausing.was_running);
        let Some(machine) = self.machine.as_mut().filter(|_| runs) else { return Ok(()) };
        if let Err(error) = machine.run() {
            let why = chain(&error);
            self.fail(&why);
            return Err(GuestError::new(why));
        }
        Ok(())
    }

    fn resume_after_migration(
        &mut self,
        stopped: Stopped,
        locked: Result<(), String>,
    ) -> Result<(), GuestError> {
        let Some(machine) = &mut self.machine else { return Ok(()) };
        machine.grant(stopped.permit);
        if let Err(why) = locked {
            self.become_state(RunState::IoError);
            let text = format!("{why}; the guest stays paused, `cont` tries again");
            return Err(GuestError::new(text));
        }
        if stopped.was_running {
            self.resume().map_err(|error| {
                self.fail(&error.desc);
                GuestError::new(error.desc)
            })
        } else {
            self.become_state(RunState::Paused);
            Ok(())
        }
    }

    /// Returns the machine of a guest whose migration failed.
    fn uninstall(&mut self) -> Option<Box<Machine>> {
        let arriving = self.state == RunState::Inmigrate;
        self.machine.take_if(|machine| arriving && !machine.is_running())
    }

    fn run_arrived(&mut self, permit: RunPermit, running: bool) -> Result<(), GuestError> {
        let paused = matches!(&self.mode, Mode::Receive(config) if config.paused);
        let Some(machine) = &mut self.machine else {
            return Err(GuestError::new("there is no machine"));
        };
        machine.grant(permit);
        let serial = machine.serial().clone();
        if running && !paused {
            machine.run().map_err(|error| guest_error(&error))?;
            self.become_state(RunState::Running);
            self.tell(&Event::plain("RESUME"));
        } else {
            self.become_state(RunState::Paused);
        }
        self.console.attach(serial);
        Ok(())
    }
}
