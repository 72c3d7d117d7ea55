//! Rules about the documents.

use std::{
    collections::HashSet,
    path::{Component, Path, PathBuf},
};

use super::Tree;

const ARCHITECTURE: &str = "ARCHITECTURE.md";
const README: &str = "README.md";
const DRAWN: &str = "docs/architecture.dot";
const DRAWING: &str = "docs/architecture.svg";

/// The number of lines that a reader sees without scrolling.
const FIRST_SCREEN: usize = 40;

/// Text between backquotes with such an ending is a path.
const ENDINGS: [&str; 7] = [".rs", ".md", ".toml", ".sh", ".yaml", ".conf", "/"];

/// Every path in ARCHITECTURE.md exists, and every top-level module of a crate is mentioned.
///
/// A path is relative to the workspace or, below a heading with the name of a crate, to the crate's folder or its `src`.
pub(super) fn architecture_is_true(tree: &Tree) -> Vec<String> {
    let Some(text) = tree.text(ARCHITECTURE) else {
        return vec![format!("{ARCHITECTURE}: there is no such file")];
    };
    let mut complaints = Vec::new();
    let mut mentioned = HashSet::new();
    let mut folder = PathBuf::new();
    for (index, line) in text.lines().enumerate() {
        if line.starts_with('#') {
            let crates = line.split_whitespace().map(|word| word.trim_matches('`'));
            let named = crates.into_iter().find(|name| tree.has(&Path::new(name).join("Cargo.toml")));
            folder = named.map(PathBuf::from).unwrap_or_default();
        }
        for path in paths(line) {
            let places = [PathBuf::from(path), folder.join(path), folder.join("src").join(path)];
            match places.into_iter().find(|place| tree.has(place)) {
                Some(place) => {
                    mentioned.insert(place);
                }
                None => complaints.push(format!("{ARCHITECTURE}:{}: there is no {path}", index + 1)),
            }
        }
    }
    let modules = tree.with_extension("rs").map(|(path, _)| path).filter(|path| is_top_module(path));
    let silent = modules.filter(|path| !mentioned.contains(*path));
    complaints.extend(silent.map(|path| format!("{}: not in {ARCHITECTURE}", path.display())));
    complaints
}

/// Whether the path is `CRATE/src/MODULE.rs`, except the root of a crate.
fn is_top_module(path: &Path) -> bool {
    let parts: Vec<_> = path.iter().collect();
    matches!(parts[..], [_, src, file] if src == "src" && file != "main.rs" && file != "lib.rs")
}

fn paths(line: &str) -> impl Iterator<Item = &str> {
    let quoted = line.split('`').skip(1).step_by(2);
    quoted.filter(|text| {
        let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c));
        // Absolute paths are not in the workspace.
        plain && !text.starts_with('/') && ENDINGS.iter().any(|ending| text.ends_with(ending))
    })
}

/// Every label of the text is in the drawing.
pub(super) fn drawing_is_of_its_text(tree: &Tree) -> Vec<String> {
    let (Some(text), Some(drawing)) = (tree.text(DRAWN), tree.text(DRAWING)) else {
        return vec![format!("{DRAWN} or {DRAWING}: there is no such file")];
    };
    let drawing = drawing.replace("&#45;", "-");
    let labels = text.split("label=\"").skip(1).filter_map(|rest| rest.split('"').next());
    let lines = labels.flat_map(|label| label.split("\\n"));
    lines
        .filter(|line| !drawing.contains(&format!(">{}<", line.replace('&', "&amp;").replace('\'', "&#39;"))))
        .map(|line| format!("{DRAWING}: does not have {line:?} of {DRAWN}: `cargo xtask drawing`"))
        .collect()
}

/// Links between documents lead to existing files.
pub(super) fn links_lead_somewhere(tree: &Tree) -> Vec<String> {
    let mut complaints = Vec::new();
    for (path, text) in tree.with_extension("md") {
        let folder = path.parent().unwrap_or(Path::new(""));
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") || file.starts_with("mailto:") {
                continue;
            }
            if !tree.has(&resolved(&folder.join(file))) {
                complaints.push(format!("{}: there is no {target}", path.display()));
            }
        }
    }
    complaints
}

/// The path without `..`, as in the list of files.
fn resolved(path: &Path) -> PathBuf {
    let mut resolved = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(resolved.pop()),
            Component::CurDir => {}
            part => resolved.push(part),
        }
    }
    resolved
}

/// The README begins with two commands, and requires nothing else before them.
pub(super) fn readme_opens_with_two_commands(tree: &Tree) -> Vec<String> {
    let Some(text) = tree.text(README) else { return vec![format!("{README}: there is no such file")] };
    let mut commands = Vec::new();
    let mut fenced = false;
    for line in text.lines().take(FIRST_SCREEN).map(str::trim) {
        if line.starts_with("```") {
            fenced = !fenced;
        } else if fenced && !line.is_empty() && !line.starts_with('#') {
            commands.push(line);
        }
    }
    let ours = commands.iter().filter(|command| command.starts_with("cargo xtask ")).count();
    if commands.len() == 2 && ours == 2 {
        return Vec::new();
    }
    vec![format!(
        "{README}: the first {FIRST_SCREEN} lines should have two commands, both of cargo xtask, not {commands:?}"
    )]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_do_not_exist_and_modules_without_a_word_are_found() {
        let text =
            "# Map\n`Cargo.toml`, `/run/netns/`\n## The crate `one`\n`good.rs`, `src/also.rs`, `gone.rs`\n";
        let tree = Tree::of(&[
            (ARCHITECTURE, text),
            ("Cargo.toml", ""),
            ("one/Cargo.toml", ""),
            ("one/src/lib.rs", ""),
            ("one/src/good.rs", ""),
            ("one/src/good/inner.rs", ""),
            ("one/src/also.rs", ""),
            ("one/src/silent.rs", ""),
        ]);
        let expected =
            ["ARCHITECTURE.md:4: there is no gone.rs", "one/src/silent.rs: not in ARCHITECTURE.md"];
        assert_eq!(architecture_is_true(&tree), expected);
    }

    #[test]
    fn a_label_that_is_not_drawn_is_found() {
        let text = "a [label=\"o-ne\\nthe pod's\"] b [label=\"three\"]";
        let tree = Tree::of(&[(DRAWN, text), (DRAWING, "<text>o&#45;ne</text><text>the pod&#39;s</text>")]);
        let expected = [format!("{DRAWING}: does not have \"three\" of {DRAWN}: `cargo xtask drawing`")];
        assert_eq!(drawing_is_of_its_text(&tree), expected);
    }

    #[test]
    fn links_to_what_is_not_there_are_found() {
        let text = "[a](../README.md#b) [c](other.md) [d](https://e.f/g) [h](#i) [j](gone.md)";
        let tree = Tree::of(&[("docs/a.md", text), ("docs/other.md", ""), (README, "")]);
        assert_eq!(links_lead_somewhere(&tree), ["docs/a.md: there is no gone.md"]);
    }

    #[test]
    fn two_commands_and_no_more() {
        let readme = |commands: &str| Tree::of(&[(README, &format!("# Title\n```sh\n{commands}```\n"))]);
        let two = readme("cargo xtask demo   # shows it\ncargo xtask test\n");
        assert_eq!(readme_opens_with_two_commands(&two), Vec::<String>::new());
        assert_eq!(readme_opens_with_two_commands(&readme("cargo xtask demo\n")).len(), 1);
        assert_eq!(readme_opens_with_two_commands(&readme("make\ncargo xtask demo\n")).len(), 1);
    }
}
