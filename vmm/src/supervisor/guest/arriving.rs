//! A guest that arrives, on the thread `mig-in`: its images are made, compared, locked and named there,
//! and what is left of a failed arrival is dropped there.

use super::super::BackendParts;
use super::super::messages::{Mailbox, Message};
use super::{GuestRequest, ask, shutting_down};
use crate::boot::payload::BootPayload;
use crate::boot::transfer::ArrivingFiles;
use crate::config::ReceiveConfig;
use crate::error::guest_error;
use crate::images::Images;
use crate::kvm::Host;
use crate::machine::description::Description;
use crate::machine::{Machine, MachineError, lock_disks, unlock_disks};
use devices::block::BlockNode;
use devices::state::DeviceRecord;
use migration::block::incoming::DisksIncoming;
use migration::boot::incoming::BootIncoming;
use migration::cancel::CancelToken;
use migration::destination::{DestinationHost, GoOn};
use migration::guest::{GuestError, IncomingRam, MachineDescription, RunPermit};
use migration::participant::Incoming;
use migration::ram::incoming::RamIncoming;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How often a wait for the machine looks whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long a build that is not wanted any more may take to end. One that hangs in the kernel is then left
/// behind; what it holds goes when it ends.
const GIVE_UP_PATIENCE: Duration = Duration::from_secs(1);

/// What a machine for a guest that arrives is made of here.
pub struct BuildContext {
    /// KVM.
    pub host: Arc<Host>,
    /// Which disks may be used.
    pub config: ReceiveConfig,
    /// The console, and who hears of the guest's end.
    pub parts: BackendParts,
    /// Boot files that are here already, from `--kernel`.
    pub payload: Option<Arc<BootPayload>>,
}

/// What has been built.
struct Built {
    machine: Box<Machine>,
    images: Images,
}

impl BuildContext {
    /// Opens and makes the images, builds the machine, compares what its disks stand on. Takes as long
    /// as storage does.
    fn build(
        self,
        description: &MachineDescription,
        go_on: GoOn<'_>,
    ) -> Result<Built, MachineError> {
        let mut description = Description::from_stream(description)?;
        let mut images = Images::prepare(&description.disks, &self.config, go_on)?;
        // They have travelled then: when the guest leaves again, that is said anew.
        description.disks.iter_mut().for_each(|disk| disk.travels = None);
        let backends = self.parts.with(images.nodes.clone());
        let machine = Box::new(Machine::arrive(&self.host, description, backends)?);
        std::mem::take(&mut images.backings).iter().try_for_each(|backing| backing.check(go_on))?;
        Ok(Built { machine, images })
    }
}

/// Serves a migration's destination.
pub struct ArrivingGuest {
    mailbox: Mailbox,
    cancel: CancelToken,
    /// Until something has been built of it.
    context: Option<BuildContext>,
    images: Images,
    /// What has arrived to boot from.
    arrived: Arc<Mutex<Option<BootPayload>>>,
}

impl ArrivingGuest {
    /// A guest that is built on `context`, in a migration that `cancel` ends.
    pub fn new(mailbox: Mailbox, cancel: CancelToken, context: BuildContext) -> Self {
        let (images, arrived) = (Images::default(), Arc::default());
        Self { mailbox, cancel, context: Some(context), images, arrived }
    }

    fn nodes(&self) -> &[Arc<BlockNode>] {
        &self.images.nodes
    }

    /// After the migration: removes what the images have replaced, if the guest runs here. Takes as long
    /// as the file system does.
    pub fn clean_up(mut self) {
        self.images.clean_up();
    }
}

impl DestinationHost for ArrivingGuest {
    fn build(
        &mut self,
        description: &MachineDescription,
        go_on: GoOn<'_>,
    ) -> Result<Vec<Box<dyn Incoming>>, GuestError> {
        let again = || GuestError::new("a machine has been built for this guest already");
        let context = self.context.take().ok_or_else(again)?;
        let known = context.payload.clone();
        let wanted = Arc::new(AtomicBool::new(true));
        let (description, still_wanted) = (description.clone(), wanted.clone());
        let (done, built) = channel();
        let build = move || {
            let go_on = || still_wanted.load(Ordering::Acquire);
            let result = context.build(&description, &go_on);
            // If nobody wants it any more it is dropped here.
            let _ = done.send(result.map_err(|error| guest_error(&error)));
        };
        self.mailbox.post(Message::Guest(GuestRequest::Build(Box::new(build))));
        let mut given_up = None;
        let built = loop {
            match built.recv_timeout(LOOK_EVERY) {
                Ok(result) => break result?,
                Err(RecvTimeoutError::Disconnected) => return Err(shutting_down()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            match given_up {
                None if go_on() && !self.cancel.is_cancelled() => {}
                None => {
                    wanted.store(false, Ordering::Release);
                    given_up = Some(Instant::now());
                }
                Some(since) if since.elapsed() < GIVE_UP_PATIENCE => {}
                Some(_) => {
                    let desc = "the machine is not built in time: a disk image does not answer";
                    return Err(GuestError::new(desc));
                }
            }
        };
        let vm = built.machine.vm();
        let ram = IncomingRam { ram: vm.ram().clone(), layout: vm.layout().clone() };
        self.images = built.images;
        ask(&self.mailbox, |reply| GuestRequest::Install(built.machine, reply))?;
        // In the order of the source's, and each only if it travels.
        let boot = ArrivingFiles::new(known, self.arrived.clone());
        let mut participants: Vec<Box<dyn Incoming>> =
            vec![Box::new(BootIncoming::new(Box::new(boot)))];
        let disks = self.images.arriving();
        if !disks.is_empty() {
            participants.push(Box::new(DisksIncoming::new(disks)));
        }
        participants.push(Box::new(RamIncoming::new(ram)));
        Ok(participants)
    }

    fn load_records(&mut self, records: Vec<DeviceRecord>) -> Result<(), GuestError> {
        ask(&self.mailbox, |reply| GuestRequest::LoadRecords(records, reply))
    }

    fn lock_disks(&mut self) -> Result<(), GuestError> {
        lock_disks(self.nodes()).map_err(|error| guest_error(&error))
    }

    fn called_off(&mut self) -> Result<(), GuestError> {
        // Those that travel are this side's alone, and stay locked as they have been from the start.
        let arriving = self.images.arriving();
        let travels = |node: &Arc<BlockNode>| arriving.iter().any(|it| Arc::ptr_eq(&it.node, node));
        let shared: Vec<_> = self.nodes().iter().filter(|node| !travels(node)).cloned().collect();
        unlock_disks(&shared);
        Ok(())
    }

    fn run(&mut self, permit: RunPermit, running: bool) -> Result<(), GuestError> {
        self.images.rename_into_place().map_err(|error| guest_error(&error))?;
        let payload = devices::lock(&self.arrived).take().map(Arc::new);
        ask(&self.mailbox, |reply| GuestRequest::Run(permit, running, payload, reply))?;
        // From now on they are the guest's, whatever becomes of this thread.
        self.images.commit();
        Ok(())
    }

    fn abandon(&mut self) {
        // Closing the disks lets go of their locks: the source wants them back.
        match ask(&self.mailbox, GuestRequest::Uninstall) {
            Ok(machine) => drop(machine),
            Err(error) => log::debug!("{error}"),
        }
        self.images = Images::default();
    }
}
