//! The tables of capture options, from the table that the agent reads them by.

use std::collections::HashMap;

use anyhow::{Context as _, Result};
use syn::{Expr, Lit, Token, punctuated::Punctuated};

use super::{MarkdownTable, code, literal_text, macro_of};
use crate::tidy::Tree;

const TABLE: &str = "intercept-agent/src/options/table.rs";

/// The flags.
pub(super) fn flags(tree: &Tree) -> Result<String> {
    let mut table =
        MarkdownTable::new(["flag", "letter", "variable", "default", "does", "note when it is given"]);
    for setting in settings(tree)? {
        let Some(flag) = &setting.flag else { continue };
        let letter = setting.letter.map(|letter| code(format!("-{letter}"))).unwrap_or_default();
        let variables = setting.variables.iter().map(code).collect::<Vec<_>>().join(", ");
        let flag = code(format!("--{flag}"));
        table.row([flag, letter, variables, setting.default, setting.help, setting.note]);
    }
    Ok(table.0)
}

/// The variables that have no flag.
pub(super) fn variables(tree: &Tree) -> Result<String> {
    let mut table = MarkdownTable::new(["variable", "default", "does"]);
    for setting in settings(tree)?.into_iter().filter(|setting| setting.flag.is_none()) {
        let variables = setting.variables.iter().map(code).collect::<Vec<_>>().join(", ");
        table.row([variables, setting.default, setting.help]);
    }
    Ok(table.0)
}

/// A row of the macro `settings!`.
#[derive(Debug, PartialEq)]
struct SettingRow {
    flag: Option<String>,
    letter: Option<char>,
    variables: Vec<String>,
    default: String,
    help: String,
    note: String,
}

fn settings(tree: &Tree) -> Result<Vec<SettingRow>> {
    let table = macro_of(tree, TABLE, "settings")?;
    let rows = table.parse_body_with(Punctuated::<Expr, Token![;]>::parse_terminated)?;
    rows.iter().map(row).collect()
}

/// `NAME = flag("name").letter('n')...`.
fn row(row: &Expr) -> Result<SettingRow> {
    let Expr::Assign(row) = row else { anyhow::bail!("a row of settings! is not NAME = SETTING") };
    let calls = calls(&row.right);
    let text = |name: &str| calls.get(name).copied().and_then(literal_text);
    let named = text("flag");
    let switch = text("switch_flag");
    let unless_given = if switch.is_some() { "false" } else { "none" };
    let variables = calls.get("variables").or_else(|| calls.get("variable"));
    Ok(SettingRow {
        letter: calls.get("letter").copied().and_then(letter),
        variables: variables.copied().map(texts).unwrap_or_default(),
        default: text("default").unwrap_or_else(|| unless_given.to_owned()),
        help: text("help").context("a row of settings! has no help")?,
        note: text("note").unwrap_or_default(),
        flag: named.or(switch),
    })
}

/// The first argument of each call in a chain of calls.
fn calls(mut chain: &Expr) -> HashMap<String, &Expr> {
    let mut calls = HashMap::new();
    while let Expr::MethodCall(call) = chain {
        calls.extend(call.args.first().map(|argument| (call.method.to_string(), argument)));
        chain = &call.receiver;
    }
    if let Expr::Call(call) = chain
        && let Expr::Path(function) = &*call.func
        && let (Some(name), Some(argument)) = (function.path.get_ident(), call.args.first())
    {
        calls.insert(name.to_string(), argument);
    }
    calls
}

fn letter(expression: &Expr) -> Option<char> {
    match expression {
        Expr::Lit(literal) => match &literal.lit {
            Lit::Char(letter) => Some(letter.value()),
            _ => None,
        },
        _ => None,
    }
}

fn texts(list: &Expr) -> Vec<String> {
    match list {
        Expr::Reference(list) => texts(&list.expr),
        Expr::Array(list) => list.elems.iter().filter_map(literal_text).collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_with_all_their_columns() {
        let source = r#"settings! {
            A = flag("envoy-port").letter('p').variables(&["X", "ENVOY_PORT"]).takes("PORT").default("15001")
                .help("Where").note("not \
                    so").bound(value!(config.proxy_port, parse_port));
            B = switch_flag("dry-run").help("What").bound(Binding { read: |a, _| a.b(), ..Binding::C });
            C = variable(&["ONLY"]).help("Which").bound(D);
        }"#;
        let tree = Tree::of(&[(TABLE, source)]);
        let expected = "\
            | flag | letter | variable | default | does | note when it is given |\n\
            |---|---|---|---|---|---|\n\
            | `--envoy-port` | `-p` | `X`, `ENVOY_PORT` | 15001 | Where | not so |\n\
            | `--dry-run` |  |  | false | What |  |\n";
        assert_eq!(flags(&tree).expect("read"), expected);
        let expected = "| variable | default | does |\n|---|---|---|\n| `ONLY` | none | Which |\n";
        assert_eq!(variables(&tree).expect("read"), expected);
    }

    #[test]
    fn a_row_without_help_is_refused() {
        let tree = Tree::of(&[(TABLE, r#"settings! { A = flag("a").bound(B); }"#)]);
        flags(&tree).expect_err("no help");
    }
}
