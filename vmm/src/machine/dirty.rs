//! KVM's dirty log and the marks of device writes, as one [`DirtySource`].

use crate::error::guest_error;
use crate::kvm::vm::{Vm, word_range};
use devices::ram::PageIndex;
use migration::guest::{DirtySource, GuestError};
use std::sync::Arc;
use vm_memory::GuestMemoryBackend;

/// Which pages of one VM were written, by anyone.
pub struct VmDirtyLog {
    vm: Arc<Vm>,
    scratch: Vec<u64>,
    started: bool,
}

impl VmDirtyLog {
    /// Tracking is off until `start`.
    pub fn new(vm: Arc<Vm>) -> Self {
        Self { vm, scratch: Vec::new(), started: false }
    }
}

impl DirtySource for VmDirtyLog {
    fn start(&mut self) -> Result<(), GuestError> {
        for region in self.vm.ram().iter() {
            region.get_mmap().bitmap().reset();
        }
        self.started = true;
        self.vm.start_dirty_log().map_err(|error| guest_error(&error))
    }

    fn drain_into(&mut self, bitmap: &mut [u64]) -> Result<(), GuestError> {
        let log = self.vm.read_dirty_log(bitmap, &mut self.scratch);
        log.map_err(|error| guest_error(&error))?;
        for (region, block) in self.vm.ram().iter().zip(self.vm.layout().blocks()) {
            let Some(words) = bitmap.get_mut(word_range(block)) else {
                return Err(GuestError::new("the dirty bitmap is smaller than guest RAM"));
            };
            // Cleared before the page is copied, as the log is: a later write marks it again.
            let marks = region.get_mmap().bitmap().get_and_reset();
            words.iter_mut().zip(marks).for_each(|(word, marks)| *word |= marks);
        }
        Ok(())
    }

    fn clear(&mut self, first: PageIndex, mask: &[u64]) -> Result<(), GuestError> {
        self.vm.clear_dirty_log(first, mask).map_err(|error| guest_error(&error))
    }

    fn stop(&mut self) {
        if std::mem::take(&mut self.started)
            && let Err(error) = self.vm.stop_dirty_log()
        {
            log::warn!("the dirty log stays on: {}", crate::error::chain(&error));
        }
    }
}

impl Drop for VmDirtyLog {
    fn drop(&mut self) {
        self.stop();
    }
}
