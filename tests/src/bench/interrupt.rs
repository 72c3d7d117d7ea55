//! An orderly early end: a signal sets a flag that waiting code checks, and guards then clean up.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use tokio::signal::unix::{SignalKind, signal};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Makes SIGINT and SIGTERM set the flag. A second signal ends the process.
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

/// Whether the benchmark must end.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Returns an error if the benchmark must end.
pub fn check() -> Result<()> {
    ensure!(!asked(), "interrupted");
    Ok(())
}
