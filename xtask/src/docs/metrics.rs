//! The table of metrics, from the table that the daemon registers them by.

use std::collections::{BTreeSet, HashMap};

use anyhow::{Context as _, Result, bail};
use syn::{
    Attribute, Expr, Field, FieldsNamed, GenericArgument, Ident, Lit, LitStr, Meta, PathArguments, Token,
    Type,
    parse::{Parse, ParseStream},
    punctuated::Punctuated,
};

use super::{MarkdownTable, code, macro_of};
use crate::tidy::Tree;

const TABLE: &str = "intercept-agent/src/daemon/metrics/table.rs";

/// All metrics.
pub(super) fn metrics(tree: &Tree) -> Result<String> {
    let labels = macro_of(tree, TABLE, "labels")?.parse_body_with(label_sets)?;
    let mut table = MarkdownTable::new(["metric", "type", "labels", "counts"]);
    for MetricRow { name, kind, help, document } in rows(tree)? {
        let (kind, set) = kind_and_labels(&kind).with_context(|| format!("{name}: no kind of metric"))?;
        let (kind, suffix) = match kind.as_str() {
            // As it is written for Prometheus.
            "Counter" => ("counter", "_total"),
            "Gauge" => ("gauge", ""),
            "Histogram" => ("histogram", ""),
            _ => bail!("{name}: {kind} is no kind of metric that is known here"),
        };
        let set = match set {
            Some(set) => {
                labels.get(&set).with_context(|| format!("{name}: {set} is not in labels!"))?.join(", ")
            }
            None => String::new(),
        };
        let counts = if document.is_empty() { help } else { document };
        table.row([code(format!("{}{suffix}", prefixed(&name))), kind.to_owned(), set, counts]);
    }
    Ok(table.0)
}

/// The names of all, without what is put behind them when they are shown.
pub(crate) fn names(tree: &Tree) -> Result<BTreeSet<String>> {
    Ok(rows(tree)?.iter().map(|row| prefixed(&row.name)).collect())
}

fn prefixed(name: &str) -> String {
    format!("intercept_{name}")
}

fn rows(tree: &Tree) -> Result<Punctuated<MetricRow, Token![;]>> {
    Ok(macro_of(tree, TABLE, "metrics")?.parse_body_with(Punctuated::parse_terminated)?)
}

/// A row of the macro `metrics!`.
struct MetricRow {
    name: String,
    kind: Type,
    help: String,
    /// Its comment.
    document: String,
}

impl Parse for MetricRow {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        let comments = input.call(Attribute::parse_outer)?;
        let document: Vec<String> = comments.iter().filter_map(comment).collect();
        input.parse::<Ident>()?;
        input.parse::<Token![:]>()?;
        let kind = input.parse()?;
        input.parse::<Token![=]>()?;
        let name = input.parse::<LitStr>()?.value();
        input.parse::<Token![,]>()?;
        let help = input.parse::<LitStr>()?.value();
        Ok(Self { name, kind, help, document: document.join(" ") })
    }
}

fn comment(attribute: &Attribute) -> Option<String> {
    let Meta::NameValue(doc) = &attribute.meta else { return None };
    let Expr::Lit(literal) = &doc.value else { return None };
    match &literal.lit {
        Lit::Str(text) => Some(text.value().trim().to_owned()),
        _ => None,
    }
}

/// `Gauge`, or `Family<Labels, Gauge>`.
fn kind_and_labels(kind: &Type) -> Option<(String, Option<String>)> {
    let Type::Path(path) = kind else { return None };
    let last = path.path.segments.last()?;
    let PathArguments::AngleBracketed(arguments) = &last.arguments else {
        return Some((last.ident.to_string(), None));
    };
    let mut types = arguments.args.iter().map(|argument| match argument {
        GenericArgument::Type(Type::Path(path)) => path.path.get_ident().map(Ident::to_string),
        _ => None,
    });
    let (labels, kind) = (types.next()??, types.next()??);
    (last.ident == "Family").then_some((kind, Some(labels)))
}

/// `Name { label: Type, ... }`, again and again.
fn label_sets(input: ParseStream<'_>) -> syn::Result<HashMap<String, Vec<String>>> {
    let mut sets = HashMap::new();
    while !input.is_empty() {
        let name = input.parse::<Ident>()?.to_string();
        let fields = input.parse::<FieldsNamed>()?.named;
        let label = |field: &Field| field.ident.as_ref().map(Ident::to_string);
        sets.insert(name, fields.iter().filter_map(label).collect());
    }
    Ok(sets)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = r#"
        labels! { State { state: String } PodMap { pod: String, map: String } }
        metrics! {
            /// more than
            /// the help
            A: Family<State, Gauge> = "pods", "Pods";
            B: Family<PodMap, Counter> = "writes", "Writes";
            C: Histogram = "seconds", "Time";
        }"#;

    #[test]
    fn kinds_and_labels_are_those_of_the_types() {
        let expected = "\
            | metric | type | labels | counts |\n\
            |---|---|---|---|\n\
            | `intercept_pods` | gauge | state | more than the help |\n\
            | `intercept_writes_total` | counter | pod, map | Writes |\n\
            | `intercept_seconds` | histogram |  | Time |\n";
        assert_eq!(metrics(&Tree::of(&[(TABLE, SOURCE)])).expect("read"), expected);
    }

    #[test]
    fn labels_that_are_not_there_are_refused() {
        let source = SOURCE.replace("State {", "Other {");
        metrics(&Tree::of(&[(TABLE, &source)])).expect_err("no State");
    }
}
