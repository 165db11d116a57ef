//! An incoming guest, served on the thread `mig-in`: prepares, compares, locks and renames its images, and
//! cleans up after a failure.

use super::super::backends::BackendParts;
use super::super::messages::{Mailbox, Message};
use super::super::tasks;
use super::request::GuestRequest;
use super::served::ServedDisks;
use super::{ask, shutting_down};
use crate::boot::payload::BootPayload;
use crate::boot::transfer::ArrivingFiles;
use crate::config::ReceiveConfig;
use crate::error::guest_error;
use crate::images::Images;
use crate::kvm::Host;
use crate::machine::description::Description;
use crate::machine::{Machine, MachineError, give_back_disks, lock_disks_in_pause};
use devices::block::BlockNode;
use devices::state::DeviceRecord;
use migration::bitmap::incoming::BitmapsIncoming;
use migration::block::incoming::DisksIncoming;
use migration::boot::incoming::BootIncoming;
use migration::cancel::CancelToken;
use migration::destination::{DestinationHost, GoOn};
use migration::guest::{GuestError, IncomingRam, MachineDescription, RunPermit};
use migration::params::SharedParams;
use migration::participant::Incoming;
use migration::ram::incoming::RamIncoming;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How often a wait for the machine checks for cancellation.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long to wait for a cancelled build, or for the removal of images. One that hangs in the kernel is then left to its thread, which
/// releases its resources when it ends.
const GIVE_UP_PATIENCE: Duration = Duration::from_secs(1);

/// What it takes to build an incoming machine on this host.
pub struct BuildContext {
    /// KVM.
    pub host: Arc<Host>,
    /// The options, with the images for its disks.
    pub config: ReceiveConfig,
    /// The console and the handlers of the guest's end.
    pub parts: BackendParts,
    /// Boot files that this host already has, from `--kernel`.
    pub payload: Option<Arc<BootPayload>>,
}

/// A machine and its images.
struct Built {
    machine: Box<Machine>,
    images: Images,
    /// Dirty bitmaps come, too.
    bitmaps: bool,
}

impl BuildContext {
    /// Prepares the images, builds the machine and compares the backing files. May block on storage.
    fn build(
        self,
        description: &MachineDescription,
        go_on: GoOn<'_>,
    ) -> Result<Built, MachineError> {
        let mut description = Description::from_stream(description)?;
        self.config.limits.check(&description)?;
        let mut images = Images::prepare(&description.disks, &self.config, go_on)?;
        // Applies to this migration only: the next one chooses its disks anew.
        description.disks.iter_mut().for_each(|disk| disk.travels = None);
        let bitmaps = std::mem::take(&mut description.bitmaps);
        let backends = self.parts.with(images.nodes.clone());
        let machine = Box::new(Machine::arrive(&self.host, description, backends)?);
        std::mem::take(&mut images.backings).iter().try_for_each(|backing| backing.check(go_on))?;
        Ok(Built { machine, images, bitmaps })
    }
}

/// Serves a migration's destination.
pub struct ArrivingGuest {
    mailbox: Mailbox,
    cancel: CancelToken,
    /// The user may set them until the guest's machine is built.
    params: SharedParams,
    /// `None` once the machine is being built.
    context: Option<BuildContext>,
    images: Images,
    /// Offered until the guest takes them.
    served: ServedDisks,
    /// The received boot payload.
    arrived: Arc<Mutex<Option<BootPayload>>>,
    /// The guest has been started here.
    runs: bool,
}

impl ArrivingGuest {
    /// A guest to be built from `context`, in a migration that `cancel` cancels.
    pub fn new(
        mailbox: Mailbox,
        cancel: CancelToken,
        params: SharedParams,
        context: BuildContext,
        served: ServedDisks,
    ) -> Self {
        let (images, arrived, context) = (Images::default(), Arc::default(), Some(context));
        Self { mailbox, cancel, params, context, images, served, arrived, runs: false }
    }

    fn nodes(&self) -> &[Arc<BlockNode>] {
        &self.images.nodes
    }

    /// After the migration: removes the replaced images, if the guest runs here. May block on the file
    /// system.
    pub fn clean_up(mut self) {
        // Those that have arrived as well, now.
        if self.runs {
            self.mark_bitmaps();
        }
        self.images.clean_up();
    }

    /// Has the files of bitmaps say that they are in use. The guest does not wait for that.
    fn mark_bitmaps(&self) {
        let nodes = self.nodes().to_vec();
        let mark = move || nodes.iter().for_each(|node| node.mark_or_remove_bitmaps());
        if let Err(error) = tasks::spawn("mark-bitmaps", mark) {
            log::error!("cannot start a thread: {error}");
        }
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
            // Dropped here if the receiver is gone.
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
                    let desc = "the machine was not built in time: a disk image does not respond";
                    return Err(GuestError::new(desc));
                }
            }
        };
        let vm = built.machine.vm();
        let ram = IncomingRam { ram: vm.ram().clone(), layout: vm.layout().clone() };
        self.images = built.images;
        ask(&self.mailbox, |reply| GuestRequest::Install(built.machine, reply))?;
        // The migrated disks, in the source's order.
        let boot = ArrivingFiles::new(known, self.arrived.clone());
        let mut participants: Vec<Box<dyn Incoming>> =
            vec![Box::new(BootIncoming::new(Box::new(boot)))];
        let disks = self.images.arriving();
        if !disks.is_empty() {
            participants.push(Box::new(DisksIncoming::new(disks)));
        }
        if built.bitmaps {
            let mapping = self.params.get().block_bitmap_mapping.clone();
            let nodes = self.nodes().to_vec();
            participants.push(Box::new(BitmapsIncoming::new(nodes, mapping)));
        }
        participants.push(Box::new(RamIncoming::new(ram)));
        Ok(participants)
    }

    fn load_records(&mut self, records: Vec<DeviceRecord>) -> Result<(), GuestError> {
        ask(&self.mailbox, |reply| GuestRequest::LoadRecords(records, reply))
    }

    fn lock_disks(&mut self) -> Result<(), GuestError> {
        self.served.close().map_err(|error| guest_error(&error))?;
        lock_disks_in_pause(self.nodes()).map_err(|error| guest_error(&error))
    }

    fn called_off(&mut self) -> Result<(), GuestError> {
        // Migrated disks belong to this side only and have been locked from the start.
        let arriving = self.images.arriving();
        let travels = |node: &Arc<BlockNode>| arriving.iter().any(|it| Arc::ptr_eq(&it.node, node));
        let shared: Vec<_> = self.nodes().iter().filter(|node| !travels(node)).cloned().collect();
        give_back_disks(&shared);
        self.served.offer_again();
        Ok(())
    }

    fn run(&mut self, permit: RunPermit, running: bool) -> Result<(), GuestError> {
        self.images.rename_into_place().map_err(|error| guest_error(&error))?;
        let payload = devices::lock(&self.arrived).take().map(Arc::new);
        ask(&self.mailbox, |reply| GuestRequest::Run(permit, running, payload, reply))?;
        // The images must stay now, whatever happens to this thread.
        self.images.commit();
        self.runs = true;
        self.mark_bitmaps();
        Ok(())
    }

    fn abandon(&mut self) {
        // Closing the disks releases their locks: the source needs them again.
        match ask(&self.mailbox, GuestRequest::Uninstall) {
            Ok(machine) => drop(machine),
            Err(error) => log::debug!("{error}"),
        }
        // Removing images may hang with their disk, which the source must not wait for.
        let (images, (done, gone)) = (std::mem::take(&mut self.images), channel::<()>());
        let remove = move || {
            drop(images);
            drop(done);
        };
        match tasks::spawn("discard", remove) {
            Ok(()) => {
                if gone.recv_timeout(GIVE_UP_PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    log::warn!(
                        "an image of the guest cannot be removed: its storage does not respond"
                    );
                }
            }
            // They were dropped with the closure.
            Err(error) => log::error!("cannot start a thread: {error}"),
        }
    }
}
