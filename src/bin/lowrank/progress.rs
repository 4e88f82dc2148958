//! A progress bar, and the handling of Ctrl-C.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Runs a function with a progress bar of `bytes`, which is shown only on a terminal. Ctrl-C makes the function return an error.
pub(crate) fn watched<T>(bytes: u64, verb: impl FnOnce(&mut dyn FnMut(u64) -> ControlFlow<()>) -> T) -> T {
    // Fails if a handler is already set, which is the same one. Without a handler, Ctrl-C ends the process at once.
    let _ = ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed));
    let bar = ProgressBar::new(bytes);
    bar.set_draw_target(if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    });
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}  {bytes_per_sec}  {eta} left") {
        bar.set_style(style);
    }
    let done = verb(&mut |more| {
        bar.inc(more);
        if INTERRUPTED.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    done
}
