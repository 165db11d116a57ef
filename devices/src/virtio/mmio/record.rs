//! The transport's record: how its registers and queues are saved, and checked before they are restored.

use super::{
    END_PATIENCE, INTERRUPT_CONFIG, INTERRUPT_USED, MmioTransport, QueueSlot, STATUS_BY_DRIVER,
    STATUS_FEATURES_OK, STATUS_NEEDS_RESET, Shared, all_set, in_order, is_live,
};
use crate::state::{AtMost, DeviceRecord, Persist};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;
use std::time::Instant;
use virtio_queue::{Queue, QueueState};

/// More queues than any of our devices has.
const MAX_QUEUES: usize = crate::virtio::blk::MAX_QUEUES as usize;

/// All registers, the queues, and the device's own record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioState {
    pub(super) device_id: u32,
    pub(super) status: u32,
    pub(super) interrupt_status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    /// Since version 2; version 1 had one queue.
    #[serde(alias = "queue", deserialize_with = "one_or_more")]
    pub(super) queues: Vec<SavedQueue>,
    pub(super) device: DeviceRecord,
}

/// A virtqueue, as virtio-queue describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedQueue {
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) event_idx: bool,
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
    pub(super) desc_table: u64,
    pub(super) avail_ring: u64,
    pub(super) used_ring: u64,
}

impl SavedQueue {
    fn of(slot: &QueueSlot) -> Self {
        let (state, position) = (slot.config.state(), slot.position());
        Self {
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            next_avail: position.next_avail,
            next_used: position.next_used,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }

    fn check(self, max_size: u16) -> Result<Queue, String> {
        Queue::try_from(QueueState {
            max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
        .map_err(|error| format!("virtqueue: {error}"))
    }
}

/// Reads the queues, or the one queue of version 1.
struct OneOrMore;

impl<'de> Visitor<'de> for OneOrMore {
    type Value = Vec<SavedQueue>;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "a virtqueue, or at most {MAX_QUEUES}")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, queues: A) -> Result<Vec<SavedQueue>, A::Error> {
        AtMost::<_, MAX_QUEUES>(PhantomData).visit_seq(queues)
    }

    fn visit_map<A: MapAccess<'de>>(self, queue: A) -> Result<Vec<SavedQueue>, A::Error> {
        SavedQueue::deserialize(MapAccessDeserializer::new(queue)).map(|queue| vec![queue])
    }
}

fn one_or_more<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<SavedQueue>, D::Error> {
    deserializer.deserialize_any(OneOrMore)
}

impl Persist for MmioTransport {
    const KIND: &'static str = "virtio-mmio";
    const VERSION: u16 = 2;
    type State = MmioState;

    fn save(&self) -> MmioState {
        MmioState {
            device_id: self.device.device_id(),
            // A drain has waited for a background reset.
            status: self.shared.status.load(Ordering::SeqCst),
            interrupt_status: self.shared.interrupt_status.load(Ordering::SeqCst),
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(SavedQueue::of).collect(),
            device: self.device.save(),
        }
    }

    fn restore(&mut self, state: MmioState) -> Result<(), String> {
        if state.device_id != self.device.device_id() {
            return Err(format!(
                "virtio device id {} here and {} there",
                self.device.device_id(),
                state.device_id
            ));
        }
        if state.queues.len() != self.queues.len() {
            let (here, there) = (self.queues.len(), state.queues.len());
            return Err(format!("{here} virtqueues here and {there} there"));
        }
        let status = state.status;
        if status & !(STATUS_BY_DRIVER | STATUS_NEEDS_RESET) != 0 || !in_order(status) {
            return Err(format!("impossible virtio status {status:#x}"));
        }
        self.driver_features = state.driver_features;
        if status & STATUS_FEATURES_OK != 0 && !self.accepts_features() {
            let (used, offered) = (state.driver_features, self.features());
            return Err(format!(
                "the guest uses virtio features {used:#x} of {offered:#x} offered"
            ));
        }
        self.device.restore(state.device).map_err(|error| error_chain(&error))?;
        let max_size = self.device.queue_max_size();
        let queues = state.queues.into_iter().map(|saved| saved.check(max_size));
        let queues = queues.collect::<Result<Vec<_>, _>>()?;
        // Workers of an earlier restore are parked and end at once.
        if !all_set(&self.retire_workers(), Instant::now() + END_PATIENCE) {
            return Err("its earlier requests are still in flight".into());
        }
        for (slot, queue) in self.queues.iter_mut().zip(queues) {
            slot.config = queue;
        }
        self.shared = Shared::new(self.shared.irq.clone(), self.shared.limits.clone());
        self.shared.status.store(status, Ordering::SeqCst);
        let interrupts = state.interrupt_status & (INTERRUPT_USED | INTERRUPT_CONFIG);
        self.shared.interrupt_status.store(interrupts, Ordering::SeqCst);
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.drained = true;
        if is_live(status) {
            // A failure here is the host's or the stream's, not the guest's: refuse the record instead of
            // setting NEEDS_RESET.
            self.activate().map_err(|error| format!("virtqueue: {error}"))?;
        }
        Ok(())
    }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
