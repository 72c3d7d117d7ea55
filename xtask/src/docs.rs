//! The parts of the documents that are made from the sources.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};
use syn::{Expr, ExprLit, Lit};

use crate::{tidy::Tree, workspace};

mod commands;
mod decision;
mod flags;
mod metrics;

pub(crate) use metrics::names as metric_names;

/// A table in a document, between two comments that name it.
struct Part {
    document: &'static str,
    name: &'static str,
    make: fn(&Tree) -> Result<String>,
}

const PARTS: [Part; 7] = [
    Part { document: "docs/reference.md", name: "command flags", make: commands::flags },
    Part { document: "docs/reference.md", name: "capture options", make: flags::flags },
    Part { document: "docs/reference.md", name: "variables without a flag", make: flags::variables },
    Part { document: "docs/decision.md", name: "outbound rows", make: decision::outbound },
    Part { document: "docs/decision.md", name: "inbound rows", make: decision::inbound },
    Part { document: "docs/decision.md", name: "failures", make: decision::failures },
    Part { document: "docs/operations.md", name: "metrics", make: metrics::metrics },
];

/// Makes every part anew; `cargo xtask tidy` compares.
pub(crate) fn docs() -> Result<()> {
    for part in &PARTS {
        // Anew for each part, because a document may have several.
        let tree = Tree::read(workspace::root())?;
        let made = part.renewed(&tree)?;
        let path = workspace::root().join(part.document);
        fs::write(&path, made).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// What is wrong with each part that is not as the sources have it.
pub(crate) fn stale(tree: &Tree) -> Vec<String> {
    let complaints = PARTS.iter().filter_map(|part| {
        let Part { document, name, .. } = part;
        match part.renewed(tree) {
            Ok(renewed) if tree.text(document) == Some(&renewed) => None,
            Ok(_) => Some(format!("{document}: {name:?} is not as the sources have it: `cargo xtask docs`")),
            Err(error) => Some(format!("{document}: {error:#}")),
        }
    });
    complaints.collect()
}

impl Part {
    /// The document with this part as the sources have it.
    fn renewed(&self, tree: &Tree) -> Result<String> {
        let made = (self.make)(tree).with_context(|| format!("making {:?}", self.name))?;
        let text = tree.text(self.document).context("there is no such file")?;
        self.put(text, &made)
    }

    fn put(&self, text: &str, made: &str) -> Result<String> {
        let begin = format!("<!-- made by `cargo xtask docs`: {} -->\n", self.name);
        let end = "<!-- end -->";
        let Some((before, (_, after))) =
            text.split_once(&begin).and_then(|(before, rest)| Some((before, rest.split_once(end)?)))
        else {
            bail!("there is no {:?} with {end:?} behind it", begin.trim_end());
        };
        Ok(format!("{before}{begin}\n{made}\n{end}{after}"))
    }
}

/// A table in Markdown.
struct MarkdownTable(String);

impl MarkdownTable {
    fn new<const N: usize>(columns: [&str; N]) -> Self {
        let mut table = Self(String::new());
        table.row(columns);
        table.0.push_str(&format!("|{}\n", "---|".repeat(N)));
        table
    }

    fn row<const N: usize>(&mut self, cells: [impl AsRef<str>; N]) {
        for cell in cells {
            self.0.push_str(&format!("| {} ", cell.as_ref()));
        }
        self.0.push_str("|\n");
    }
}

/// Between backquotes.
fn code(text: impl AsRef<str>) -> String {
    format!("`{}`", text.as_ref())
}

/// The value of a string literal.
fn literal_text(expression: &Expr) -> Option<String> {
    match expression {
        Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) => Some(text.value()),
        _ => None,
    }
}

/// The body of the only call of a macro in a file.
fn macro_of(tree: &Tree, path: &str, name: &str) -> Result<syn::Macro> {
    let text = tree.text(path).with_context(|| format!("{path}: there is no such file"))?;
    let file = syn::parse_file(text).with_context(|| format!("reading {}", Path::new(path).display()))?;
    let mut calls = file.items.into_iter().filter_map(|item| match item {
        syn::Item::Macro(item) if item.mac.path.is_ident(name) => Some(item.mac),
        _ => None,
    });
    match (calls.next(), calls.next()) {
        (Some(call), None) => Ok(call),
        _ => bail!("{path}: {name}! is not called once"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: Part = Part { document: "a.md", name: "one", make: |_| Ok("| new |\n".to_owned()) };

    #[test]
    fn a_part_is_replaced_and_nothing_else() {
        let text = "before\n<!-- made by `cargo xtask docs`: one -->\n\n| old |\n\n<!-- end -->\nafter\n";
        let tree = Tree::of(&[("a.md", text)]);
        let renewed = PART.renewed(&tree).expect("the part is there");
        assert_eq!(renewed, text.replace("old", "new"));
        assert_eq!(PART.renewed(&Tree::of(&[("a.md", &renewed)])).expect("again"), renewed);
        PART.renewed(&Tree::of(&[("a.md", "nothing")])).expect_err("there is no such part");
    }

    #[test]
    fn tables_have_a_head_and_rows() {
        let mut table = MarkdownTable::new(["a", "b"]);
        table.row(["1", ""]);
        assert_eq!(table.0, "| a | b |\n|---|---|\n| 1 |  |\n");
    }
}
