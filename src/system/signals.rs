//! Signal masks and dispositions, of this process and of the programs that it starts or becomes.
//!
//! Ignored and blocked signals stay so across exec: a daemon started by `nohup`, by a background job of a
//! script or by a careless service manager would pass them on to opencode and all its tools.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::FORBIDDEN;

/// One above the highest signal of Linux.
const SIGNALS_END: i32 = 65;

/// Unblocks every signal for this thread, and for the threads and processes that it starts. Call it before
/// other threads exist.
///
/// No safe call does this: std passes the mask on unchanged, and neither signal-hook nor the safe part of
/// rustix can change it.
pub fn unblock_all() {
    let mut none = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigemptyset` initialises the set that it is given, which lives on this stack;
    // `pthread_sigmask` reads an initialised set, and takes a null pointer for the old mask. Neither
    // keeps a pointer.
    #[allow(unsafe_code)]
    unsafe {
        if libc::sigemptyset(none.as_mut_ptr()) == 0 {
            libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
        }
    }
}

/// Makes every signal default in the program that this process becomes: handlers do not survive exec, ignored
/// signals do.
pub fn reset_at_exec() {
    let nobody = Arc::new(AtomicBool::new(false));
    for signal in (1..SIGNALS_END).filter(|signal| !FORBIDDEN.contains(signal)) {
        // Fails for the two signals that the C library reserves.
        let _ = signal_hook::flag::register(signal, nobody.clone());
    }
}
