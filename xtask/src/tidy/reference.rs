//! Rules about the documents for users: their tables list every flag, metric, word and value that there is, and nothing
//! else.

use std::collections::BTreeMap;

use intercept_common::failure::Failure;
use serde_json::Value;

use super::{
    Tree,
    inventory::{self, Names},
};
use crate::docs;

const REFERENCE: &str = "docs/reference.md";
const OPERATIONS: &str = "docs/operations.md";

const CAUSES: &str = "intercept-agent/src/daemon/cause.rs";
const SIDECAR: &str = "intercept-agent/src/daemon/sidecar.rs";
const FAILURES: &str = "intercept-common/src/failure.rs";
const VALUES: &str = "deploy/chart/values.yaml";
const SCHEMA: &str = "deploy/chart/values.schema.json";
const ALERTS: &str = "deploy/chart/files/alerts.yaml";
const DASHBOARD: &str = "deploy/chart/files/dashboard.json";

/// Suffixes of the samples of a metric.
const SAMPLES: [&str; 4] = ["_total", "_bucket", "_sum", "_count"];

/// The first column of the table below this heading names exactly these.
struct DocumentTable {
    document: &'static str,
    heading: &'static str,
    /// Where they come from.
    source: &'static str,
    /// Each with what its row has to say besides, between backquotes.
    names: BTreeMap<String, Vec<String>>,
}

/// Every table is complete, and has nothing else.
pub(super) fn tables_list_what_there_is(tree: &Tree) -> Vec<String> {
    let tables = match tables(tree) {
        Ok(tables) => tables,
        Err(error) => return vec![error],
    };
    tables.iter().flat_map(|table| compare(tree, table)).collect()
}

fn tables(tree: &Tree) -> Result<Vec<DocumentTable>, String> {
    let table = |document, heading, source, names: Names| DocumentTable {
        document,
        heading,
        source,
        names: names.into_iter().map(|name| (name, Vec::new())).collect(),
    };
    let causes = read(tree, CAUSES, |text| inventory::texts_of(text, "as_str"))?;
    let failures = Failure::ALL.iter().map(|failure| failure.as_str().to_owned()).collect();
    let ignored = read(tree, SIDECAR, |text| inventory::texts_of(text, "as_str"))?;
    let values = inventory::properties(&json(tree, SCHEMA)?);
    let alerts = text(tree, ALERTS)?.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    Ok(vec![
        table(REFERENCE, "Chart values", SCHEMA, values),
        table(OPERATIONS, "Causes of errors", CAUSES, causes),
        table(OPERATIONS, "Failures inside the programs", FAILURES, failures),
        table(OPERATIONS, "Why a pod is ignored", SIDECAR, ignored),
        table(OPERATIONS, "Alerts", ALERTS, alerts.map(str::to_owned).collect()),
    ])
}

fn compare(tree: &Tree, table: &DocumentTable) -> Vec<String> {
    let DocumentTable { document, heading, source, names } = table;
    let Some(text) = tree.text(document) else { return vec![format!("{document}: there is no such file")] };
    let rows = rows(text, heading);
    let mut complaints = Vec::new();
    if names.is_empty() {
        complaints.push(format!("{source}: found none for {heading:?} of {document}: see xtask/src/tidy"));
    }
    for (name, more) in names {
        match rows.get(name) {
            None => complaints.push(format!("{document}: {heading:?} has no row for {name} of {source}")),
            Some(row) => complaints.extend(
                more.iter()
                    .filter(|more| !row.contains(&format!("`{more}`")))
                    .map(|more| format!("{document}: the row for {name} does not name `{more}` of {source}")),
            ),
        }
    }
    let others = rows.keys().filter(|name| !names.contains_key(*name));
    complaints
        .extend(others.map(|name| format!("{document}: {heading:?} has {name}, which {source} has not")));
    complaints
}

/// Rows of the tables below a heading, by the name in the first column.
fn rows(text: &str, heading: &str) -> BTreeMap<String, String> {
    let is_heading = |line: &&str| line.starts_with("## ");
    let section = text.lines().skip_while(|line| line.strip_prefix("## ") != Some(heading)).skip(1);
    let rows = section.take_while(|line| !is_heading(line)).filter_map(|line| {
        let (name, rest) = line.strip_prefix("| `")?.split_once('`')?;
        let name = name.strip_suffix("_total").unwrap_or(name);
        Some((name.to_owned(), rest.to_owned()))
    });
    rows.collect()
}

/// Every value of the chart is in its schema, and every property of the schema has a value.
pub(super) fn values_have_a_schema(tree: &Tree) -> Vec<String> {
    let compared = || {
        let schema = json(tree, SCHEMA)?;
        let values: Value = serde_saphyr::from_str(text(tree, VALUES)?)
            .map_err(|error| format!("{VALUES}: it does not read: {error}"))?;
        let properties = inventory::properties(&schema);
        let has = |path: &String| path.split('.').try_fold(&values, |value, part| value.get(part)).is_some();
        let absent = properties.iter().filter(|path| !has(path));
        // helm compares the other way round.
        Ok(absent.map(|path| format!("{VALUES}: has no {path}, which {SCHEMA} has")).collect())
    };
    compared().unwrap_or_else(|error: String| vec![error])
}

/// Every name `intercept_...` in a dashboard or an alert is a metric.
pub(super) fn dashboards_and_alerts_use_metrics(tree: &Tree) -> Vec<String> {
    let compared = || {
        let metrics = docs::metric_names(tree).map_err(|error| format!("{error:#}"))?;
        let mut complaints = Vec::new();
        for file in [ALERTS, DASHBOARD] {
            let words = text(tree, file)?.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let named = words.filter(|word| word.starts_with("intercept_"));
            let unknown = named.filter(|&word| {
                let base = SAMPLES.iter().find_map(|sample| word.strip_suffix(sample)).unwrap_or(word);
                !metrics.contains(base)
            });
            complaints.extend(unknown.map(|word| format!("{file}: there is no metric {word}")));
        }
        Ok(complaints)
    };
    compared().unwrap_or_else(|error: String| vec![error])
}

fn text<'a>(tree: &'a Tree, path: &str) -> Result<&'a str, String> {
    tree.text(path).ok_or_else(|| format!("{path}: there is no such file"))
}

fn json(tree: &Tree, path: &str) -> Result<Value, String> {
    serde_json::from_str(text(tree, path)?).map_err(|error| format!("{path}: it does not read: {error}"))
}

fn read<T>(tree: &Tree, path: &str, reader: impl Fn(&str) -> syn::Result<T>) -> Result<T, String> {
    reader(text(tree, path)?).map_err(|error| format!("{path}: it does not read: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_and_what_is_too_much_is_found() {
        let document = "## Metrics\n| `a_total` | x |\n| `b` | `B_VAR` |\n| `c` | |\n\n## Other\n| `d` | |\n";
        let tree = Tree::of(&[(OPERATIONS, document)]);
        let names = [("a", vec![]), ("b", vec!["B_VAR".to_owned(), "B_TWO".to_owned()]), ("e", vec![])];
        let names = names.map(|(name, more)| (name.to_owned(), more)).into();
        let table = DocumentTable { document: OPERATIONS, heading: "Metrics", source: "x.rs", names };
        let expected = [
            "docs/operations.md: the row for b does not name `B_TWO` of x.rs",
            "docs/operations.md: \"Metrics\" has no row for e of x.rs",
            "docs/operations.md: \"Metrics\" has c, which x.rs has not",
        ];
        assert_eq!(compare(&tree, &table), expected);
    }

    #[test]
    fn a_source_that_gives_no_names_is_found() {
        let tree = Tree::of(&[(OPERATIONS, "## Metrics\n")]);
        let table = DocumentTable {
            document: OPERATIONS,
            heading: "Metrics",
            source: "x.rs",
            names: BTreeMap::new(),
        };
        assert_eq!(compare(&tree, &table).len(), 1);
    }

    #[test]
    fn a_metric_that_is_not_there_is_found() {
        let tree = Tree::of(&[
            (
                "intercept-agent/src/daemon/metrics/table.rs",
                r#"labels! { } metrics! { A: Gauge = "pods", ""; B: Histogram = "attach_seconds", ""; }"#,
            ),
            (ALERTS, "intercept_pods > 0 and intercept_attach_seconds_bucket > intercept_pod"),
            (DASHBOARD, "{}"),
        ]);
        let expected = [format!("{ALERTS}: there is no metric intercept_pod")];
        assert_eq!(dashboards_and_alerts_use_metrics(&tree), expected);
    }
}
