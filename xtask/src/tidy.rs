//! Rules of the project that the compiler does not check.
//!
//! A rule is a function from the sources to complaints. Each complaint begins with its file.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::{docs, run, workspace};

mod documents;
mod inventory;
mod names;
mod offsets;
mod reference;
mod sources;

/// Checks every rule.
pub(crate) fn tidy() -> Result<()> {
    let tree = Tree::read(workspace::root())?;
    let complaints: Vec<String> = [
        sources::manifests_inherit_lints(&tree),
        sources::files_are_short(&tree),
        sources::nothing_is_allowed(&tree),
        sources::unsafe_is_where_it_may_be(&tree),
        sources::kernel_names_are_short(&tree),
        names::types_have_names_of_their_own(&tree),
        documents::architecture_is_true(&tree),
        documents::readme_opens_with_two_commands(&tree),
        documents::links_lead_somewhere(&tree),
        documents::drawing_is_of_its_text(&tree),
        offsets::every_global_is_filled_in(&tree),
        docs::stale(&tree),
        reference::tables_list_what_there_is(&tree),
        reference::values_have_a_schema(&tree),
        reference::dashboards_and_alerts_use_metrics(&tree),
    ]
    .concat();
    for complaint in &complaints {
        println!("{complaint}");
    }
    if !complaints.is_empty() {
        bail!("tidy: {} complaints", complaints.len());
    }
    Ok(())
}

/// The text files under version control, and new ones that git does not ignore.
pub(crate) struct Tree {
    files: Vec<(PathBuf, String)>,
}

impl Tree {
    pub(crate) fn read(root: &Path) -> Result<Self> {
        let mut git = std::process::Command::new("git");
        git.args(["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(root);
        let mut files = Vec::new();
        for path in run::output(&mut git).context("listing the files")?.lines() {
            // Deleted files are still listed, and images are not text.
            if let Ok(text) = fs::read_to_string(root.join(path)) {
                files.push((PathBuf::from(path), text));
            }
        }
        Ok(Self { files })
    }

    pub(crate) fn with_extension<'a>(&'a self, extension: &str) -> impl Iterator<Item = (&'a Path, &'a str)> {
        self.files
            .iter()
            .filter(move |(path, _)| path.extension().is_some_and(|found| found == extension))
            .map(|(path, text)| (path.as_path(), text.as_str()))
    }

    pub(crate) fn text(&self, path: &str) -> Option<&str> {
        self.files.iter().find(|(found, _)| found == Path::new(path)).map(|(_, text)| text.as_str())
    }

    fn has(&self, path: &Path) -> bool {
        self.files.iter().any(|(found, _)| found.starts_with(path))
    }

    #[cfg(test)]
    pub(crate) fn of(files: &[(&str, &str)]) -> Self {
        Self { files: files.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned())).collect() }
    }
}
