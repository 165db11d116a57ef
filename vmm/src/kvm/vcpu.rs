//! Runs and kicks one vCPU: `KVM_RUN` and its exits. Used by `machine::vcpus`.
//!
//! A kick is a signal whose handler sets `immediate_exit` in the thread's own `kvm_run` page. A kick that
//! arrives before `KVM_RUN` makes it return at once; one during `KVM_RUN` interrupts it.
//! [`Vcpu::acknowledge_kick`] clears the flag and must precede the check of the mailbox: a message sent
//! after that check brings its own kick.

use super::{KvmError, ioctl};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::cell::Cell;
use std::fmt;
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
pub(crate) fn install_kick_handler() -> Result<(), KvmError> {
    static INSTALLED: Once = Once::new();
    let mut result = Ok(());
    INSTALLED.call_once(|| result = register_signal_handler(SIGRTMIN(), on_kick));
    result.map_err(|error| KvmError::Ioctl { what: "sigaction", source: error.into() })
}

/// Interrupts the vCPU that `thread` runs, or its next `KVM_RUN`.
pub fn kick(thread: &JoinHandle<()>) {
    // Fails if the thread has ended already.
    let _ = thread.kill(SIGRTMIN());
}

/// The kernel's id of the calling thread, as `query-cpus-fast` reports it.
pub fn thread_id() -> i32 {
    // SAFETY: no arguments, no memory, cannot fail.
    unsafe { libc::gettid() }
}

/// Why `KVM_RUN` returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// Port access of whole elements; [`Vcpu::port_data`] holds them.
    Port {
        /// Port number.
        port: u16,
        /// Whether the guest writes.
        write: bool,
    },
    /// MMIO access; [`Vcpu::mmio_data`] holds the bytes.
    Mmio {
        /// Guest address.
        address: u64,
        /// Whether the guest writes.
        write: bool,
    },
    /// Kicked, or interrupted for another reason.
    Interrupted,
    /// The guest did something that no CPU can go on from.
    Crashed(String),
    /// KVM cannot continue, for the given reason.
    Failed(String),
}

/// The registers that tell where a guest is.
#[derive(Debug, Clone)]
pub struct Registers {
    index: u8,
    regs: kvm_regs,
    sregs: kvm_sregs,
}

impl Registers {
    /// The vCPU and its RIP.
    pub fn place(&self) -> String {
        let (cs, rip) = (self.sregs.cs, self.regs.rip);
        // KVM on AMD resets a vCPU at a triple fault: what it shows then is where CPUs start.
        let is_reset = cs.base == 0xffff_0000 && rip == 0xfff0;
        let note = if is_reset { ", where KVM has reset it" } else { "" };
        format!("vCPU {} at rip {rip:#x}{note}", self.index)
    }
}

impl fmt::Display for Registers {
    /// All of them, several to a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (r, s) = (&self.regs, &self.sregs);
        let general = [
            ("rax", r.rax),
            ("rbx", r.rbx),
            ("rcx", r.rcx),
            ("rdx", r.rdx),
            ("rsi", r.rsi),
            ("rdi", r.rdi),
            ("rbp", r.rbp),
            ("rsp", r.rsp),
            ("r8", r.r8),
            ("r9", r.r9),
            ("r10", r.r10),
            ("r11", r.r11),
            ("r12", r.r12),
            ("r13", r.r13),
            ("r14", r.r14),
            ("r15", r.r15),
            ("rip", r.rip),
            ("rflags", r.rflags),
            ("cr0", s.cr0),
            ("cr2", s.cr2),
            ("cr3", s.cr3),
            ("cr4", s.cr4),
            ("efer", s.efer),
        ];
        write!(f, "vCPU {}:", self.index)?;
        for (number, (name, value)) in general.iter().enumerate() {
            let separator = if number % 4 == 0 { "\n  " } else { " " };
            write!(f, "{separator}{name:>6}={value:016x}")?;
        }
        for (name, segment) in [("cs", s.cs), ("ss", s.ss), ("ds", s.ds), ("tr", s.tr)] {
            let kvm_segment { selector, base, limit, .. } = segment;
            write!(f, "\n  {name:>6}={selector:04x} base={base:016x} limit={limit:08x}")?;
        }
        for (name, table) in [("gdt", s.gdt), ("idt", s.idt)] {
            write!(f, "\n  {name:>6}={:016x} limit={:04x}", table.base, table.limit)?;
        }
        Ok(())
    }
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

    /// The vCPU's number.
    pub fn index(&self) -> u8 {
        self.index
    }

    /// The vCPU's file, for state ioctls in this folder.
    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Directs kicks of the calling thread to this vCPU. Call first on the vCPU's thread.
    pub fn bind_to_thread(&mut self) {
        let flag = ptr::from_mut(&mut self.fd.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.with(|cell| cell.set(flag.cast::<AtomicU8>().cast_const()));
    }

    /// Clears the kick. Check the mailbox only afterwards.
    pub fn acknowledge_kick(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Runs the guest until the next exit.
    pub fn run(&mut self) -> Exit {
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, _)) => Exit::Port { port, write: false },
            Ok(VcpuExit::IoOut(port, _)) => Exit::Port { port, write: true },
            Ok(VcpuExit::MmioRead(address, _)) => Exit::Mmio { address, write: false },
            Ok(VcpuExit::MmioWrite(address, _)) => Exit::Mmio { address, write: true },
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => Exit::Interrupted,
            Ok(VcpuExit::Shutdown) => Exit::Crashed("triple fault".to_owned()),
            Ok(VcpuExit::InternalError) => Exit::Crashed(self.internal_error()),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Exit::Crashed(format!("KVM refused to enter the guest (reason {reason:#x})"))
            }
            Ok(other) => Exit::Failed(format!("unexpected exit {other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
            Err(error) => Exit::Failed(format!("KVM_RUN: {error}")),
        }
    }

    /// After [`Exit::Port`]: the elements of the access, one after another, and their size in bytes. A
    /// string instruction (`rep outsb`) has several, all for the same port.
    pub fn port_data(&mut self) -> std::slice::ChunksExactMut<'_, u8> {
        let run = ptr::from_mut(self.fd.get_kvm_run());
        // SAFETY: the exit reason was KVM_EXIT_IO, which selects this union member.
        let io = unsafe { (*run).__bindgen_anon_1.io };
        let (size, count) = (usize::from(io.size).max(1), io.count as usize);
        let offset = usize::try_from(io.data_offset).expect("64-bit host");
        // SAFETY: KVM keeps `count * size` bytes at this offset within the mapping that starts at
        // `run`, and they stay there while the vCPU, borrowed by the result, does not run.
        let data =
            unsafe { std::slice::from_raw_parts_mut(run.cast::<u8>().add(offset), size * count) };
        data.chunks_exact_mut(size)
    }

    /// After [`Exit::Mmio`]: the bytes of the access.
    pub fn mmio_data(&mut self) -> &mut [u8] {
        // SAFETY: the exit reason was KVM_EXIT_MMIO, which selects this union member.
        let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
        let len = (mmio.len as usize).min(mmio.data.len());
        &mut mmio.data[..len]
    }

    /// Completes the instruction of the last port or MMIO access without running another one: required
    /// before the registers are saved.
    pub fn complete_access(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        // With immediate_exit set, KVM_RUN completes the access and returns EINTR.
        let result = self.fd.run();
        if let Ok(exit) = result {
            log::warn!("vCPU exited while completing an access: {exit:?}");
        }
        self.acknowledge_kick();
    }

    /// Describes the last KVM_EXIT_INTERNAL_ERROR.
    fn internal_error(&mut self) -> String {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, which selects this union member.
        let error = unsafe { run.__bindgen_anon_1.internal };
        let what = match error.suberror {
            kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction",
            kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM cannot deliver an event",
            _ => "KVM internal error",
        };
        format!("{what} (suberror {})", error.suberror)
    }

    /// Where the guest is.
    pub fn registers(&self) -> Result<Registers, KvmError> {
        let regs = ioctl("KVM_GET_REGS", self.fd.get_regs())?;
        let sregs = ioctl("KVM_GET_SREGS", self.fd.get_sregs())?;
        Ok(Registers { index: self.index, regs, sregs })
    }

    /// Tells the guest's kvmclock that it was paused, so that watchdogs do not fire.
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
