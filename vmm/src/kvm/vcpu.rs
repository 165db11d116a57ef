//! Runs one vCPU and makes it stop: the exit loop's view of `KVM_RUN`, and the kick.
//!
//! A kick is a signal whose handler sets `immediate_exit` in the thread's own `kvm_run` page. A kick
//! that arrives before `KVM_RUN` makes it return at once; one that arrives during it interrupts it.
//! [`Vcpu::acknowledge_kick`] clears the flag and must come before the mailbox is looked at, so that
//! a message sent after the look brings its own kick.

use super::{KvmError, ioctl};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::cell::Cell;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs; null elsewhere.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    IMMEDIATE_EXIT.with(|flag| {
        // SAFETY: non-null only between `Vcpu::bind_to_thread` and `Vcpu::drop` on this very
        // thread, while the `kvm_run` page is mapped.
        if let Some(flag) = unsafe { flag.get().as_ref() } {
            flag.store(1, Ordering::SeqCst);
        }
    });
}

/// Installs the handler of the kick signal, once per process.
fn install_kick_handler() -> Result<(), KvmError> {
    static INSTALLED: Once = Once::new();
    let mut result = Ok(());
    INSTALLED.call_once(|| result = register_signal_handler(SIGRTMIN(), on_kick));
    result.map_err(|error| KvmError::Ioctl { what: "sigaction", source: error.into() })
}

/// Interrupts the vCPU that `thread` runs, or its next `KVM_RUN`.
pub fn kick(thread: &JoinHandle<()>) {
    // The thread may have ended already; that is as good as stopped.
    let _ = thread.kill(SIGRTMIN());
}

/// The kernel's id of the calling thread, as `query-cpus-fast` reports it.
pub fn thread_id() -> i32 {
    // SAFETY: no arguments, no memory, cannot fail.
    unsafe { libc::gettid() }
}

/// Why `KVM_RUN` came back with something for us to do.
#[derive(Debug)]
pub enum Exit<'a> {
    /// Port read: fill the buffer.
    PortRead(u16, &'a mut [u8]),
    /// Port write.
    PortWrite(u16, &'a [u8]),
    /// MMIO read: fill the buffer.
    MmioRead(u64, &'a mut [u8]),
    /// MMIO write.
    MmioWrite(u64, &'a [u8]),
    /// Kicked, or interrupted for another reason.
    Interrupted,
    /// The guest triple-faulted.
    TripleFault,
    /// KVM cannot go on; [`Vcpu::internal_error`] says why.
    InternalError,
    /// KVM cannot go on; the text says why.
    Failed(String),
}

/// One vCPU, owned by its thread.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
}

impl Vcpu {
    pub(super) fn new(fd: VcpuFd, index: u8) -> Self {
        Self { fd, index }
    }

    /// Which vCPU.
    pub fn index(&self) -> u8 {
        self.index
    }

    /// The vCPU's file, for state ioctls in this folder.
    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Makes kicks sent to the calling thread reach this vCPU. Call first on the vCPU's thread.
    pub fn bind_to_thread(&mut self) -> Result<(), KvmError> {
        install_kick_handler()?;
        let flag = ptr::from_mut(&mut self.fd.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.with(|cell| cell.set(flag.cast::<AtomicU8>().cast_const()));
        Ok(())
    }

    /// Clears the kick. Look at the mailbox only after it.
    pub fn acknowledge_kick(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Runs the guest until it needs us.
    pub fn run(&mut self) -> Exit<'_> {
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => Exit::PortRead(port, data),
            Ok(VcpuExit::IoOut(port, data)) => Exit::PortWrite(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => Exit::MmioRead(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => Exit::MmioWrite(address, data),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => Exit::Interrupted,
            Ok(VcpuExit::Shutdown) => Exit::TripleFault,
            Ok(VcpuExit::InternalError) => Exit::InternalError,
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Exit::Failed(format!("KVM refused to enter the guest (reason {reason:#x})"))
            }
            Ok(other) => Exit::Failed(format!("unexpected exit {other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
            Err(error) => Exit::Failed(format!("KVM_RUN: {error}")),
        }
    }

    /// Lets KVM finish the instruction whose port or MMIO access was just served, without running
    /// any further one: needed before the registers are saved.
    pub fn complete_access(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        // With immediate_exit set, KVM_RUN completes the access and returns EINTR.
        let result = self.fd.run();
        if let Ok(exit) = result {
            log::warn!("vCPU exited while completing an access: {exit:?}");
        }
        self.acknowledge_kick();
    }

    /// Describes the last [`Exit::InternalError`].
    pub fn internal_error(&mut self) -> String {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, which selects this union member.
        let error = unsafe { run.__bindgen_anon_1.internal };
        let what = match error.suberror {
            kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction",
            kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM cannot deliver an event",
            _ => "KVM internal error",
        };
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        format!("{what} (suberror {}) at rip {rip:#x}", error.suberror)
    }

    /// Tells the guest's kvmclock that it was paused, so that its watchdogs do not bark.
    pub fn notify_clock_paused(&self) {
        // EINVAL: the guest does not use kvmclock.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// The frequency of the guest's TSC in kHz.
    pub fn tsc_khz(&self) -> Result<u32, KvmError> {
        ioctl("KVM_GET_TSC_KHZ", self.fd.get_tsc_khz())
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // Called on the vCPU's thread; on any other the cell is null already.
        IMMEDIATE_EXIT.with(|cell| cell.set(ptr::null()));
    }
}
