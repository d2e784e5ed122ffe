//! Preloaded into a daemon (`LD_PRELOAD`), this kills it at the worst moment: a change is on disk,
//! and nobody has been told yet. That moment is the sync of the data directory, which follows the
//! rename of the state file. It does so once, when the file that `DIE_AFTER_WRITE` names exists.

use std::ffi::{c_int, c_long};
use std::path::Path;

extern "C" {
    fn getpid() -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
}

const SIGKILL: c_int = 9;
#[cfg(target_arch = "x86_64")]
const SYS_FSYNC: c_long = 74;
#[cfg(target_arch = "aarch64")]
const SYS_FSYNC: c_long = 82;

/// # Safety
/// As the one of libc, which it stands for.
#[no_mangle]
pub unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    let is_directory = Path::new(&format!("/proc/self/fd/{fd}")).is_dir();
    let order = std::env::var_os("DIE_AFTER_WRITE").filter(|_| is_directory);
    // By the one who can remove the file, so that its successor lives.
    if order.is_some_and(|order| std::fs::remove_file(order).is_ok()) {
        kill(getpid(), SIGKILL);
    }
    syscall(SYS_FSYNC, fd) as c_int
}
