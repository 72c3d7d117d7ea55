//! Ending early but orderly: a signal sets a flag, which whoever waits looks at, and the guards then do their work.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use tokio::signal::unix::{SignalKind, signal};

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT and SIGTERM set the flag instead of ending the process; the second one ends it.
pub fn watch() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let inside = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt()).context("watching for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("watching for SIGTERM")?;
    drop(inside);
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if ASKED.swap(true, Ordering::Relaxed) {
                    eprintln!("\nended at once; `cargo xtask clean` removes what is left");
                    std::process::exit(130);
                }
                eprintln!("\nending; again to end without cleaning up");
            }
        });
    });
    Ok(())
}

/// Whether the benchmark is to end.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// An error if the benchmark is to end.
pub fn check() -> Result<()> {
    ensure!(!asked(), "interrupted");
    Ok(())
}
