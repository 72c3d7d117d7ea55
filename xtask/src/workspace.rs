//! The folders that the commands use.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::toolchain;

/// The folder of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is in a folder of the workspace")
}

/// Cargo's target folder.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The folder of what set-up builds and downloads.
pub(crate) fn cache() -> Result<PathBuf> {
    toolchain::cache().context("finding the cache: set INTERCEPT_CACHE, XDG_CACHE_HOME or HOME")
}

/// The Envoy that set-up installs.
pub(crate) fn envoy() -> Result<PathBuf> {
    Ok(cache()?.join("envoy/envoy"))
}
