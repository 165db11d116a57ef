//! virtio-rng (virtio 1.2, 5.4): random bytes from the host. It has no state: bytes from the destination
//! are as random as bytes from the source.

use super::chains::{give_back, take_all};
use super::{BrokenQueue, QueueHost, QueueProcessor, VirtioDevice};
use crate::log_limit::LogLimit;
use crate::ram::GuestRam;
use crate::segments::Segments;
use crate::state::{DeviceRecord, Persist, RestoreError};
use serde::{Deserialize, Serialize};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use virtio_queue::{DescriptorChain, Queue};

const DEVICE_ID: u32 = 4;
const QUEUE_SIZE: u16 = 64;
/// Maximum bytes per request. A device may return fewer than requested, and drivers ask again.
const MOST_BYTES: usize = 4096;

/// A virtio-rng device.
#[derive(Debug, Default)]
pub struct Rng;

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_count(&self) -> u16 {
        1
    }

    fn queue_max_size(&self) -> u16 {
        QUEUE_SIZE
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn processor(
        &self,
        _queue: u16,
        _driver_features: u64,
        _ram: &GuestRam,
    ) -> io::Result<Box<dyn QueueProcessor>> {
        Ok(Box::new(Processor { bytes: vec![0; MOST_BYTES], no_bytes: LogLimit::new() }))
    }

    fn thread_name(&self, _queue: u16) -> String {
        "rng".into()
    }

    fn save(&self) -> DeviceRecord {
        self.save_record("")
    }

    fn restore(&mut self, record: DeviceRecord) -> Result<(), RestoreError> {
        self.restore_record(record)
    }
}

/// No state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {}

impl Persist for Rng {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u16 = 1;
    type State = RngState;

    fn save(&self) -> RngState {
        RngState {}
    }

    fn restore(&mut self, RngState {}: RngState) -> Result<(), String> {
        Ok(())
    }
}

struct Processor {
    bytes: Vec<u8>,
    no_bytes: LogLimit,
}

impl QueueProcessor for Processor {
    fn process(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
    ) -> Result<(), BrokenQueue> {
        take_all(ram, queue, host, |queue, host, chain| {
            let head = chain.head_index();
            let written = self.fill(ram, chain)?;
            give_back(ram, queue, host, head, written)?;
            Ok(ControlFlow::Continue(()))
        })
    }

    fn drain(
        &mut self,
        _ram: &GuestRam,
        _queue: &mut Queue,
        _host: &mut dyn QueueHost,
    ) -> Result<(), BrokenQueue> {
        // Requests are served synchronously, one by one.
        Ok(())
    }

    fn wakers(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn in_flight(&self) -> bool {
        false
    }
}

impl Processor {
    /// Fills a chain's buffers; returns the byte count.
    fn fill(
        &mut self,
        ram: &GuestRam,
        chain: DescriptorChain<&GuestRam>,
    ) -> Result<usize, BrokenQueue> {
        let mut room = Segments::default();
        for descriptor in chain.writable() {
            let len = descriptor.len() as usize;
            if !room.push(ram, descriptor.addr(), len) {
                return Err(BrokenQueue("request with a buffer outside RAM".into()));
            }
        }
        let len = room.len().min(MOST_BYTES);
        let (bytes, _) = self.bytes.split_at_mut(len);
        if let Err(error) = getrandom::fill(bytes) {
            if let Some(suppressed) = self.no_bytes.allow() {
                log::error!("the host has no random bytes: {error}{suppressed}");
            }
            return Ok(0);
        }
        room.write(ram, bytes).ok_or_else(|| BrokenQueue("request without room".into()))?;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::BusDevice;
    use crate::ram::GuestAddress;
    use crate::virtio::driver::*;
    use crate::virtio::{F_EVENT_IDX, F_VERSION_1};
    use vm_memory::Bytes;

    fn driver(ram: Option<GuestRam>) -> Driver<()> {
        let new = || GuestRam::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        Driver::of_device(ram.unwrap_or_else(new), Box::new(Rng), ())
    }

    impl Driver<()> {
        /// Asks for bytes at [`DATA`] and returns how many came.
        fn ask(&mut self, len: u32, flags: u16) -> u32 {
            let used_len = USED + 8 + u64::from(self.avail % 16) * 8;
            self.descriptor(0, DATA, len, flags, 0);
            self.publish(0, true);
            self.wait();
            self.ram.read_obj(GuestAddress(used_len)).unwrap()
        }

        fn bytes(&self) -> [u8; 32] {
            self.ram.read_obj(GuestAddress(DATA)).unwrap()
        }
    }

    #[test]
    fn bytes_are_random_every_time_and_marked_for_migration() {
        let mut driver = driver(None);
        assert_eq!(driver.get(8), 4, "device id");
        driver.start(F_VERSION_1 | F_EVENT_IDX);
        assert_eq!(driver.ask(64, 2), 64);
        let first = driver.bytes();
        assert_ne!(first, [0; 32]);
        assert!(driver.marked(DATA));
        assert_eq!(driver.ask(64, 2), 64);
        assert_ne!(driver.bytes(), first);
        assert_eq!(driver.irq.count(), 1, "the event index asked for the first only");
    }

    #[test]
    fn hostile_requests_get_nothing_or_less() {
        let mut driver = driver(None);
        driver.start(F_VERSION_1);
        assert_eq!(driver.ask(64, 0), 0, "nothing to write to");
        assert_eq!(driver.ask(0, 2), 0);
        assert_eq!(driver.bytes(), [0; 32]);
        assert_eq!(driver.ask(1 << 20, 2), 4096);
        driver.descriptor(0, (2 << 20) - 8, 16, 2, 0);
        driver.publish(0, true);
        driver.wait_for_needs_reset();
        driver.reset();
    }

    #[test]
    fn a_head_past_the_table_breaks_the_queue() {
        let mut driver = driver(None);
        driver.start(F_VERSION_1);
        driver.publish(16, true);
        driver.wait_for_needs_reset();
        assert_eq!(driver.used(), 0);
    }

    #[test]
    fn a_chain_that_loops_ends() {
        let mut driver = driver(None);
        driver.start(F_VERSION_1);
        assert_eq!(driver.ask(64, 3), 16 * 64, "as often as the queue has entries");
    }

    #[test]
    fn it_moves_without_state_of_its_own() {
        let mut source = driver(None);
        source.start(F_VERSION_1);
        source.ask(64, 2);
        source.drain();
        let record = source.transport.save_record("rng");
        let mut destination = driver(Some(source.ram.clone()));
        destination.avail = source.avail;
        destination.transport.restore_record(record).unwrap();
        destination.transport.resume();
        assert_eq!(destination.ask(32, 2), 32);
        let mut other = source.transport.save_record("rng");
        let mut state: serde_json::Value = other.state.decode().unwrap();
        state["device"]["state"] = serde_json::json!({ "seed": 4 });
        other.state = state.into();
        assert!(destination.transport.restore_record(other).is_err());
    }

    #[test]
    fn its_configuration_space_is_empty() {
        let mut driver = driver(None);
        let mut data = [0xff; 4];
        driver.transport.read(0x100, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
