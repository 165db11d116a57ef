//! Executes the control socket's commands.

use super::ending::shutting_down;
use super::{Event, Mode, RunState, Supervisor, jobs};
use crate::control::command::{COMMANDS, Command};
use crate::control::message::{MIGRATION_IN_PROGRESS, QmpError, version};
use crate::control::options::{Capability, OwnOptions, parameters, set_capabilities};
use crate::control::schema::schema;
use crate::control::{ClientId, Incoming, QmpResult};
use crate::control::{block, job};
use crate::disk_selection::{DiskMode, DiskSelection};
use crate::error::chain;
use crate::machine::Machine;
use crate::machine::cpu::model::with_shown;
use crate::machine::description::{
    BackingDescription, Description, MAX_MIGRATED_DISK_BYTES, Travels,
};
use crate::machine::dirty::VmDirtyLog;
use devices::block::BlockNode;
use migration::bitmap::outgoing::SourceBitmap;
use migration::block::{SourceDisk, SourceDisks, Tuning};
use migration::params::Params;
use migration::source::SourceRam;
use migration::transport::Address;
use serde_json::{Value, json};
use std::sync::Arc;

fn empty() -> Value {
    json!({})
}

fn failed(error: &dyn std::error::Error) -> QmpError {
    QmpError::generic(chain(error))
}

/// The description of a machine with its disks marked for migration by `selection`, and these disks.
fn migrated(
    machine: &Machine,
    selection: &DiskSelection,
) -> Result<(Description, Vec<SourceDisk>), QmpError> {
    let ids: Vec<_> = machine.disks().iter().map(|disk| disk.node.id()).collect();
    if let Some(unknown) = selection.unknown(&ids) {
        let has = match ids.join(", ") {
            none if none.is_empty() => "it has no disks".to_owned(),
            ids => format!("it has: {ids}"),
        };
        return Err(QmpError::generic(format!("The guest has no disk {unknown:?}, {has}")));
    }
    let mut description = machine.description().clone();
    let mut migrated = Vec::new();
    for (disk, described) in machine.disks().iter().zip(&mut description.disks) {
        let node = disk.node.clone();
        let mode = selection.mode_of(node.id());
        if mode == DiskMode::None {
            if node.overrules_backing() {
                let desc = "has another backing file than its image records, which the destination \
                            would not use: move it with full, or have `qemu-img rebase -u` record it";
                return Err(QmpError::generic(format!("disk {} {desc}", node.id())));
            }
            continue;
        }
        if node.len_bytes() > MAX_MIGRATED_DISK_BYTES {
            let desc = format!("disk {} is too large to travel", node.id());
            return Err(QmpError::generic(desc));
        }
        // Without a backing file, `top` is everything.
        let backing = match (node.backing(), mode) {
            (Some(below), DiskMode::Top) => {
                let Some(name) = below.files().into_iter().next() else {
                    let desc = format!("disk {}: its backing chain is empty", node.id());
                    return Err(QmpError::generic(desc));
                };
                // The migration thread computes the digest: it has to read the whole file.
                let sha256 = String::new();
                Some(BackingDescription { name, len_bytes: below.len_bytes(), sha256 })
            }
            _ => None,
        };
        let only_top = backing.is_some();
        // The migration thread fills this in, too: the storage may hang.
        described.travels = Some(Travels { backing, data_bytes: 0 });
        migrated.push(SourceDisk { node: node.clone(), only_top });
    }
    Ok((description, migrated))
}

/// The dirty bitmaps that move, with their names on the wire: all, or those that the mapping names, which must be
/// here. The persistent ones of a read-only disk that does not travel are in its file, which the destination reads.
fn bitmaps_of(
    nodes: &[Arc<BlockNode>],
    disks: &[SourceDisk],
    params: &Params,
) -> Result<Vec<SourceBitmap>, QmpError> {
    let mapping = params.block_bitmap_mapping.as_deref();
    let names = |id: &str| {
        let node = nodes.iter().find(|node| node.id() == id)?;
        Some(node.bitmaps().info().iter().map(|bitmap| bitmap.name.as_str().to_owned()).collect())
    };
    if let Some(unknown) = mapping.and_then(|mapping| mapping.unknown(names)) {
        let desc = format!(
            "block-bitmap-mapping names '{unknown}', which is not here: unmap or add it first"
        );
        return Err(QmpError::generic(desc));
    }
    let travels = |node: &BlockNode| disks.iter().any(|disk| disk.node.id() == node.id());
    let here = nodes.iter().flat_map(|node| {
        let stay = node.read_only() && !travels(node);
        let all = node.bitmaps().info().into_iter();
        all.filter(move |it| !(it.persistent && stay)).map(move |it| (node.clone(), it.name))
    });
    let all = here.filter_map(|(node, name)| {
        let own = || (node.id().to_owned(), name.as_str().to_owned(), None);
        let (disk_alias, alias, persistent) = match mapping {
            Some(mapping) => mapping.there(node.id(), name.as_str())?,
            None => own(),
        };
        Some(SourceBitmap { node, name, disk_alias, alias, persistent })
    });
    Ok(all.collect())
}

impl Supervisor {
    /// Executes a command; returns the reply, or `None` if it comes later.
    pub(super) fn execute(&mut self, request: &Incoming) -> Option<QmpResult> {
        match &request.command {
            Command::Quit => {
                let event = Event::ending("SHUTDOWN", false, "host-qmp-quit");
                self.end(self.told_to("`quit`"), &event);
                Some(Ok(empty()))
            }
            Command::QueryBlock | Command::QueryNamedBlockNodes => self.ask_sizes(request),
            // The machine cannot be changed any more.
            Command::Stop
            | Command::Cont { .. }
            | Command::Reset
            | Command::Migrate { .. }
            | Command::CalcDirtyRate(_)
            | Command::ChangeBitmaps(_)
            | Command::Backup(_)
            | Command::Mirror(_)
            | Command::AddNode(_)
            | Command::Export(_)
            | Command::Powerdown
                if self.ending.is_some() =>
            {
                Some(Err(shutting_down()))
            }
            Command::ChangeBitmaps(_)
            | Command::StoreBitmaps { .. }
            | Command::BitmapSha256 { .. } => self.use_bitmaps(request),
            Command::Backup(steps) => self.backup(steps, request),
            Command::Mirror(spec) => self.mirror(spec, request),
            Command::AddNode(spec) => self.add_node(spec, request),
            Command::Export(_) => self.use_exports(request),
            Command::Stop => self.stop(request),
            Command::Cont { force } => self.cont(*force, request),
            Command::Reset => self.system_reset(request),
            Command::Migrate { uri, disks, tuning, own } => {
                Some(self.migrate(uri, disks.as_ref(), *tuning, own, request.client))
            }
            _ => Some(self.execute_at_once(request.command.clone())),
        }
    }

    fn execute_at_once(&mut self, command: Command) -> QmpResult {
        match command {
            Command::QueryVersion => Ok(version()),
            Command::QueryCommands => {
                Ok(COMMANDS.iter().map(|entry| json!({"name": entry.name})).collect())
            }
            Command::QuerySchema => Ok(schema()),
            Command::QueryStatus => Ok(json!({
                "status": self.state.name(),
                "running": self.state == RunState::Running,
                "singlestep": false,
            })),
            Command::QueryName => {
                let name = self.machine.as_ref().and_then(|m| m.description().name.clone());
                Ok(name.map_or_else(empty, |name| json!({"name": name})))
            }
            // Guests have no UUID: all zeroes, as in QEMU.
            Command::QueryUuid => Ok(json!({"UUID": "00000000-0000-0000-0000-000000000000"})),
            Command::QueryKvm => Ok(json!({"enabled": true, "present": true})),
            Command::ExpandCpuModel(expansion) => {
                let supported = self.host.supported_cpuid().map_err(|error| failed(&error))?;
                // What this host shows to every guest it shows to ours, too.
                let cpuid = self.machine.as_ref().map(|machine| &machine.description().cpuid);
                let shown: Vec<_> = cpuid.into_iter().flatten().map(|entry| entry.0).collect();
                expansion.reply(&with_shown(supported.as_slice(), &shown))
            }
            Command::QueryMemorySize => {
                // Unknown until a guest arrives.
                let memory = self.memory_bytes().unwrap_or(0);
                Ok(json!({"base-memory": memory, "plugged-memory": 0}))
            }
            Command::QueryCpus => Ok(self.query_cpus()),
            Command::QueryBlockStats => Ok(block::stats(self.nodes())),
            Command::QueryExports => Ok(self.exports.query()),
            Command::Quit
            | Command::QueryBlock
            | Command::QueryNamedBlockNodes
            | Command::ChangeBitmaps(_)
            | Command::StoreBitmaps { .. }
            | Command::BitmapSha256 { .. }
            | Command::Backup(_)
            | Command::Mirror(_)
            | Command::AddNode(_)
            | Command::Export(_)
            | Command::Stop
            | Command::Cont { .. }
            | Command::Reset => Err(QmpError::generic("this command is answered later")),
            Command::Negotiate => Err(QmpError::generic("the control server answers this command")),
            Command::DeleteNode { name } => self.delete_node(&name),
            Command::QueryBlockJobs => Ok(self.block_jobs.query(job::block_job)),
            Command::QueryJobs => Ok(self.block_jobs.query(job::job)),
            Command::Job(command) => self.job_command(&command),
            Command::Powerdown => {
                if let Some(machine) = &self.machine {
                    machine.press_power_button().map_err(|error| failed(&error))?;
                    self.tell(&Event::plain("POWERDOWN"));
                }
                Ok(empty())
            }
            Command::ConsoleInput(bytes) => {
                // Only while the guest is here: its FIFO moves with it, later input would be lost.
                let here = matches!(self.state, RunState::Running | RunState::Paused);
                let machine = self.machine.as_ref().filter(|_| here);
                Ok(json!({"taken": machine.map_or(0, |machine| machine.type_in(&bytes))}))
            }
            Command::Migrate { .. } => Err(QmpError::generic("this command has a client")),
            Command::MigrateCancel if self.jobs.is_past_handover() => Err(QmpError::generic(
                "The guest has moved, which cannot be cancelled any more; x-migrate-give-up gives up \
                 what has not arrived",
            )),
            Command::MigrateGiveUp => {
                self.jobs.give_up();
                Ok(empty())
            }
            Command::MigrateCancel => {
                if self.state != RunState::Inmigrate {
                    self.jobs.cancel();
                }
                Ok(empty())
            }
            Command::QueryMigrate { id } => self.jobs.info(id.as_deref()).ok_or_else(|| {
                // Only a query with an id can fail.
                let id = id.unwrap_or_default();
                QmpError::generic(format!("There is no migration {id:?}, or it was long ago"))
            }),
            Command::SetParameters(change) => {
                if change.multifd_channels.is_some() {
                    self.no_migration("change the number of data channels")?;
                }
                change.xbzrle_cache_size.map_or(Ok(()), |bytes| self.check_cache_size(bytes))?;
                self.jobs.change_params(|params| change.apply(params))?;
                Ok(empty())
            }
            Command::QueryParameters => Ok(parameters(&self.jobs.params_now())),
            Command::QueryCacheSize => Ok(self.jobs.params_now().xbzrle_cache_size.into()),
            Command::SetCapabilities(list) => {
                self.no_migration("change migration capabilities")?;
                if let Some((_, state)) = list.iter().rfind(|(name, _)| *name == Capability::Events)
                {
                    self.jobs.events_wanted = *state;
                }
                set_capabilities(&mut self.jobs.params, &list);
                Ok(empty())
            }
            Command::CalcDirtyRate(calc_time) => self.calc_dirty_rate(calc_time),
            Command::QueryDirtyRate { in_millis } => Ok(self.dirty_rate.query(in_millis)),
            Command::QueryCapabilities => {
                let params = self.jobs.params_now();
                let events = self.jobs.events_wanted;
                let one = |capability: &Capability| {
                    let state = capability.is_on(&params, events);
                    json!({"capability": capability.name(), "state": state})
                };
                Ok(Capability::ALL.iter().map(one).collect())
            }
        }
    }

    /// The size of guest RAM, unless a guest is yet to arrive.
    fn memory_bytes(&self) -> Option<u64> {
        match (&self.machine, &self.mode) {
            (Some(machine), _) => Some(machine.vm().layout().size_bytes()),
            // Its machine is being built.
            (None, Mode::Run(config)) => Some(config.memory_bytes),
            (None, Mode::Receive(_)) => None,
        }
    }

    /// A cache larger than guest RAM would be useless.
    fn check_cache_size(&self, bytes: u64) -> Result<(), QmpError> {
        match self.memory_bytes().filter(|memory| bytes > *memory) {
            None => Ok(()),
            Some(memory) => Err(QmpError::generic(format!(
                "Parameter 'xbzrle-cache-size' expects at most the guest's memory, {memory} bytes"
            ))),
        }
    }

    fn calc_dirty_rate(&mut self, calc_time: std::time::Duration) -> Result<Value, QmpError> {
        self.no_migration("measure the dirty rate")?;
        if self.dirty_rate.is_measuring() {
            return Err(QmpError::generic("The dirty rate is being measured already"));
        }
        let Some(machine) = &self.machine else {
            return Err(QmpError::generic("There is no machine"));
        };
        let started = self.dirty_rate.start(machine.vm().clone(), calc_time);
        started.map(|()| empty()).map_err(|error| failed(&error))
    }

    pub(super) fn no_migration(&self, what: &str) -> Result<(), QmpError> {
        if self.jobs.busy() {
            let desc = format!("{MIGRATION_IN_PROGRESS}: cannot {what} now");
            return Err(QmpError::generic(desc));
        }
        Ok(())
    }

    /// That the guest's disks are this process's: they are not before it has arrived, nor while it is handed over or
    /// has moved.
    pub(super) fn disks_are_here(&self) -> Result<(), QmpError> {
        if let RunState::FinishMigrate | RunState::Postmigrate | RunState::Inmigrate = self.state {
            let desc = format!("The guest is {}: its disks are another's", self.state.name());
            return Err(QmpError::generic(desc));
        }
        Ok(())
    }

    fn query_cpus(&self) -> Value {
        // Without a machine there are no vCPUs.
        let ids = self.machine.as_ref().map(|machine| machine.thread_ids()).unwrap_or_default();
        ids.iter()
            .enumerate()
            .map(|(index, thread_id)| {
                json!({
                    "cpu-index": index,
                    "qom-path": format!("/machine/unattached/device[{index}]"),
                    "thread-id": thread_id,
                    "props": {"socket-id": 0, "core-id": index, "thread-id": 0},
                    "target": "x86_64",
                })
            })
            .collect()
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = &BlockNode> {
        // Without a machine there are no disks.
        let disks = self.machine.as_ref().map(|machine| machine.disks()).unwrap_or_default();
        disks.iter().map(|disk| disk.node.as_ref())
    }

    fn cont(&mut self, force: bool, request: &Incoming) -> Option<QmpResult> {
        let refused = |desc: &str| Some(Err(QmpError::generic(desc)));
        match self.state {
            RunState::Running => Some(Ok(empty())),
            RunState::Paused | RunState::Prelaunch => Some(self.resume().map(|()| empty())),
            RunState::IoError => self.lock_and_resume(request),
            RunState::Postmigrate if !force => refused(
                "The guest has been handed over and may run at the destination; if you are sure \
                 that it does not, use cont with x-force=true",
            ),
            RunState::Postmigrate => {
                if let Err(error) = self.no_migration("take the guest back") {
                    return Some(Err(error));
                }
                if let Some(machine) = &mut self.machine {
                    machine.grant(jobs::operators_permit());
                }
                self.lock_and_resume(request)
            }
            RunState::Inmigrate => {
                // It runs when it has arrived, as in QEMU.
                if let Mode::Receive(config) = &mut self.mode {
                    config.paused = false;
                }
                Some(Ok(empty()))
            }
            state => refused(&format!("The guest is {} and cannot be resumed", state.name())),
        }
    }

    fn system_reset(&mut self, request: &Incoming) -> Option<QmpResult> {
        if let Err(error) = self.no_migration("reset the guest") {
            return Some(Err(error));
        }
        if !matches!(self.state, RunState::Running | RunState::Paused) {
            let desc = format!("The guest is {} and cannot be reset", self.state.name());
            return Some(Err(QmpError::generic(desc)));
        }
        self.reset(false, Some(request.clone()));
        None
    }

    fn migrate(
        &mut self,
        uri: &str,
        selection: Option<&DiskSelection>,
        tuning: Tuning,
        own: &OwnOptions,
        client: ClientId,
    ) -> Result<Value, QmpError> {
        self.no_migration("start another")?;
        self.exports.allow_migration()?;
        self.no_backup()?;
        let cache_size = own.parameters.xbzrle_cache_size;
        cache_size.map_or(Ok(()), |bytes| self.check_cache_size(bytes))?;
        let params = own.apply(self.jobs.params.clone())?;
        let owner =
            jobs::Owner { name: own.id.clone(), ends_with: own.end_source.then_some(client) };
        if !matches!(self.state, RunState::Running | RunState::Paused) {
            let desc = format!("The guest is {} and cannot be migrated", self.state.name());
            return Err(QmpError::generic(desc));
        }
        let address: Address = uri.parse().map_err(|error| {
            QmpError::generic(format!(
                "Parameter 'uri' expects a valid migration protocol: {error}"
            ))
        })?;
        let Some(machine) = &self.machine else {
            return Err(QmpError::generic("There is no machine"));
        };
        let vm = machine.vm().clone();
        let ram = SourceRam {
            ram: vm.ram().clone(),
            layout: vm.layout().clone(),
            dirty: Box::new(VmDirtyLog::new(vm.clone())),
        };
        let nodes = machine.nodes();
        let by_capability = DiskSelection::by_capability(&params);
        let (mut description, disks) = migrated(machine, selection.unwrap_or(&by_capability))?;
        let bitmaps = match params.dirty_bitmaps {
            true => bitmaps_of(&nodes, &disks, &params)?,
            false => Vec::new(),
        };
        description.bitmaps = !bitmaps.is_empty();
        let mirrors = self.block_jobs.for_a_move().map_err(QmpError::generic)?;
        // The migration needs the dirty log.
        let measurement = self.dirty_rate.abort();
        let disks = SourceDisks { disks, tuning };
        let mailbox = self.event_loop.mailbox().clone();
        let payload = self.payload.clone();
        let leaving = jobs::Leaving {
            vm,
            description,
            bitmaps,
            payload,
            nodes,
            mirrors,
            measurement,
            params,
            owner,
        };
        let started = self.jobs.send(address, leaving, ram, disks, mailbox);
        started.map(|()| empty()).map_err(|error| failed(&error))
    }
}
