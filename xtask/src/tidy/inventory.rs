//! What the sources declare that users see: the words of causes and reasons, and the values of the chart.

use std::collections::BTreeSet;

use serde_json::Value;
use syn::{Expr, ExprCall, ExprMethodCall, ImplItemFn, ItemFn, Lit, LitStr, visit::Visit};

/// Names, in order.
pub(super) type Names = BTreeSet<String>;

/// The value of a literal text.
pub(super) fn text(expression: &Expr) -> Option<String> {
    match expression {
        Expr::Lit(literal) => match &literal.lit {
            Lit::Str(text) => Some(text.value()),
            _ => None,
        },
        _ => None,
    }
}

/// The text that calls of a function or method have first, as in `register("attaches", ...)`.
pub(super) fn first_arguments(source: &str, function: &str) -> syn::Result<Names> {
    let mut calls = Calls { function, found: Names::new() };
    calls.visit_file(&syn::parse_file(source)?);
    Ok(calls.found)
}

struct Calls<'a> {
    function: &'a str,
    found: Names,
}

impl Visit<'_> for Calls<'_> {
    fn visit_expr_method_call(&mut self, call: &ExprMethodCall) {
        if call.method == self.function {
            self.found.extend(call.args.first().and_then(text));
        }
        syn::visit::visit_expr_method_call(self, call);
    }

    fn visit_expr_call(&mut self, call: &ExprCall) {
        if matches!(&*call.func, Expr::Path(path) if path.path.is_ident(self.function)) {
            self.found.extend(call.args.first().and_then(text));
        }
        syn::visit::visit_expr_call(self, call);
    }
}

/// The texts in the body of a function.
pub(super) fn texts_of(source: &str, function: &str) -> syn::Result<Names> {
    let mut body = Body { function, inside: false, found: Names::new() };
    body.visit_file(&syn::parse_file(source)?);
    Ok(body.found)
}

struct Body<'a> {
    function: &'a str,
    inside: bool,
    found: Names,
}

impl Visit<'_> for Body<'_> {
    fn visit_item_fn(&mut self, item: &ItemFn) {
        let before = std::mem::replace(&mut self.inside, item.sig.ident == self.function);
        syn::visit::visit_item_fn(self, item);
        self.inside = before;
    }

    fn visit_impl_item_fn(&mut self, item: &ImplItemFn) {
        let before = std::mem::replace(&mut self.inside, item.sig.ident == self.function);
        // Not its documentation, which is text as well.
        syn::visit::visit_block(self, &item.block);
        self.inside = before;
    }

    fn visit_lit_str(&mut self, text: &LitStr) {
        if self.inside {
            self.found.insert(text.value());
        }
    }
}

/// The dotted paths of a JSON schema's properties; one whose own properties are open is not gone into.
pub(super) fn properties(schema: &Value) -> Names {
    let mut paths = Names::new();
    collect(schema, "", &mut paths);
    paths
}

fn collect(schema: &Value, prefix: &str, paths: &mut Names) {
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{prefix}{name}");
        // Whatever is below these is Kubernetes' own, or free.
        let closed = property["additionalProperties"] == Value::Bool(false);
        if closed && name != "affinity" && name != "updateStrategy" {
            collect(property, &format!("{path}."), paths);
        } else if name != "global" {
            paths.insert(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn names(list: &[&str]) -> Names {
        list.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn calls_and_bodies_are_read() {
        let source = r#"
            impl M { fn cause(&self) -> &str { match self { Self::A => "a", _ => "b" } } }
            fn other(m: M) { m.register("one", "help"); x.y.register("two", z); leave("three"); "c" }
        "#;
        assert_eq!(texts_of(source, "cause").expect("read"), names(&["a", "b"]));
        assert_eq!(first_arguments(source, "register").expect("read"), names(&["one", "two"]));
        assert_eq!(first_arguments(source, "leave").expect("read"), names(&["three"]));
    }

    #[test]
    fn closed_objects_of_a_schema_are_gone_into() {
        let schema = json!({"properties": {
            "a": {"type": "object", "additionalProperties": false, "properties": {"b": {}, "c": {}}},
            "d": {"type": "object"},
        }});
        assert_eq!(properties(&schema), names(&["a.b", "a.c", "d"]));
    }
}
