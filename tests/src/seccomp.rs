//! Processes on a host that lacks something: a seccomp filter stands for it. Needs no rights.
//!
//! - [`hang_unlinks`]: a file system that never removes a file, as on storage that does not respond. The filter
//!   passes unlinks on to a listener that nobody reads. The process holds it itself, so they wait until it is killed.
//! - [`refuse_ioctl`]: a kernel that does not know an ioctl.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// `BPF_LD | BPF_W | BPF_ABS`: loads a word of `struct seccomp_data`; its first is the system call.
const LOAD: u16 = 0x20;
/// `BPF_JMP | BPF_JEQ | BPF_K`.
const JUMP_IF_EQUAL: u16 = 0x15;
/// `BPF_RET | BPF_K`.
const RETURN: u16 = 0x06;

/// Where `struct seccomp_data` has the lower half of a system call's second argument.
const SECOND_ARGUMENT: u32 = 24;

/// Makes every unlink of the process, and of its threads, hang.
pub fn hang_unlinks(command: &mut Command) {
    // SAFETY: the closure allocates nothing and calls only what is safe between fork and exec.
    unsafe { command.pre_exec(install_hanging) };
}

/// Makes every ioctl `request` of the process, and of its threads, fail with `EINVAL`.
pub fn refuse_ioctl(command: &mut Command, request: u32) {
    // SAFETY: as above.
    unsafe { command.pre_exec(move || install_refusing(request)) };
}

fn number(call: libc::c_long) -> u32 {
    u32::try_from(call).unwrap_or(u32::MAX)
}

fn install_refusing(request: u32) -> io::Result<()> {
    let refused = libc::SECCOMP_RET_ERRNO | libc::EINVAL.unsigned_abs();
    let mut steps = [
        step(LOAD, (0, 0), 0),
        step(JUMP_IF_EQUAL, (0, 2), number(libc::SYS_ioctl)),
        step(LOAD, (0, 0), SECOND_ARGUMENT),
        step(JUMP_IF_EQUAL, (1, 0), request),
        step(RETURN, (0, 0), libc::SECCOMP_RET_ALLOW),
        step(RETURN, (0, 0), refused),
    ];
    let program = libc::sock_fprog { len: 6, filter: steps.as_mut_ptr() };
    // SAFETY: `program` and its steps outlive the calls; the others take plain numbers.
    let installed = unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    };
    if installed < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn step(code: u16, (then, otherwise): (u8, u8), value: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: then, jf: otherwise, k: value }
}

fn install_hanging() -> io::Result<()> {
    let mut steps = [
        step(LOAD, (0, 0), 0),
        step(JUMP_IF_EQUAL, (2, 0), number(libc::SYS_unlink)),
        step(JUMP_IF_EQUAL, (1, 0), number(libc::SYS_unlinkat)),
        step(RETURN, (0, 0), libc::SECCOMP_RET_ALLOW),
        step(RETURN, (0, 0), libc::SECCOMP_RET_USER_NOTIF),
    ];
    let program = libc::sock_fprog { len: 5, filter: steps.as_mut_ptr() };
    // SAFETY: `program` and its steps outlive the calls; the others take plain numbers.
    let held = unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
        let listener = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        );
        // A duplicate, which exec does not close: without a listener unlinks would fail at once.
        libc::dup(libc::c_int::try_from(listener).unwrap_or(-1))
    };
    if held < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
