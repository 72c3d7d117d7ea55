//! The commands of a page of docs/, run as its reader types them.

use std::{cell::Cell, fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};

use super::Cluster;

/// The kubectl and helm commands in a page's blocks of code.
#[derive(Debug)]
pub struct DocumentedCommands {
    commands: Vec<DocumentedCommand>,
}

#[derive(Debug)]
struct DocumentedCommand {
    text: String,
    has_run: Cell<bool>,
}

impl DocumentedCommands {
    /// Reads a page.
    pub fn read(page: &str) -> Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(page);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let commands = parse(&text).into_iter();
        Ok(Self {
            commands: commands.map(|text| DocumentedCommand { text, has_run: Cell::new(false) }).collect(),
        })
    }

    /// Runs the one command that contains this text, with words of the page replaced by the cluster's. Returns its output.
    pub fn run(&self, cluster: &Cluster, part: &str, replaced: &[(&str, &str)]) -> Result<String> {
        let found: Vec<_> = self.commands.iter().filter(|command| command.text.contains(part)).collect();
        let [command] = found[..] else { bail!("{part:?} is in {} commands of the page", found.len()) };
        let mut text = command.text.clone();
        for (word, by) in replaced {
            ensure!(text.contains(word), "{text:?} has no {word}");
            text = text.replace(word, by);
        }
        command.has_run.set(true);
        cluster.shell(&text)
    }

    /// Those that have not run.
    pub fn left(&self) -> Vec<&str> {
        let left = self.commands.iter().filter(|command| !command.has_run.get());
        left.map(|command| command.text.as_str()).collect()
    }
}

/// Each command once. It goes on in the next line after a backslash and inside quotes.
fn parse(page: &str) -> Vec<String> {
    let mut commands = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        let mut command = line.trim_start().to_owned();
        let is_code = line.starts_with("    ");
        if !is_code || !["kubectl ", "helm "].iter().any(|program| command.starts_with(program)) {
            continue;
        }
        while command.ends_with('\\') || command.matches('\'').count() % 2 == 1 {
            let Some(more) = lines.next() else { break };
            command = format!("{command}\n{}", more.trim_start());
        }
        if !commands.contains(&command) {
            commands.push(command);
        }
    }
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_in_blocks_of_code() {
        let page = "1. First `kubectl get pods`:\n\n       kubectl get \\\n           pods\n\n   helm is not code here.\n\n\
                    \x20      helm list -f 'a\n           b'\n       kubectl get \\\n           pods\n";
        assert_eq!(parse(page), ["kubectl get \\\npods", "helm list -f 'a\nb'"]);
    }
}
