//! The folders that the commands use.

use std::{
    fs,
    path::{Path, PathBuf},
};

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

/// The names of the programs or tests in a folder of the workspace, sorted.
pub(crate) fn sources(folder: &Path) -> Result<Vec<String>> {
    let folder = root().join(folder);
    let reading = || format!("reading {}", folder.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(reading)? {
        let path = entry.with_context(reading)?.path();
        let is_source =
            path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file();
        names.extend(path.file_stem().filter(|_| is_source).map(|name| name.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_files_or_folders() {
        let names = sources(Path::new("tests/src/bin")).expect("readable");
        assert!(["actor", "bench"].iter().all(|name| names.iter().any(|found| found == name)), "{names:?}");
        assert!(sources(Path::new("tests/src")).expect("readable").iter().all(|name| name != "bin"));
    }
}
