//! What this process does about signals, and what the programs it becomes or starts inherit of that.
//!
//! A signal that is ignored stays ignored across exec, and a blocked one stays blocked: a daemon started
//! by `nohup`, from a script in the background or by a careless service manager would pass that on to
//! opencode and all its tools.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::FORBIDDEN;

/// One more than the highest signal of Linux.
const SIGNALS_END: i32 = 65;

/// Unblocks every signal for this thread, and for the threads and processes that it starts: to be
/// called before there are others.
///
/// No safe call does this: std hands the mask on as it is, and neither signal-hook nor the safe part of
/// rustix touches it.
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

/// Has every signal at its default in the program that this process becomes: handlers do not outlive
/// exec, ignored signals do.
pub fn reset_at_exec() {
    let nobody = Arc::new(AtomicBool::new(false));
    for signal in (1..SIGNALS_END).filter(|signal| !FORBIDDEN.contains(signal)) {
        // Fails for the two that the C library keeps for itself.
        let _ = signal_hook::flag::register(signal, nobody.clone());
    }
}
