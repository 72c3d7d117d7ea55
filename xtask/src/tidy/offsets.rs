//! A rule about the offsets of the kernel's structs: the programs' globals and the agent's list name the same.

use std::path::Path;

use syn::{
    Attribute, Expr, File, Ident, Item, ItemStatic, Token, Type, punctuated::Punctuated, visit::Visit,
};

use super::{
    Tree,
    inventory::{self, Names},
};

const LIST: &str = "intercept-agent/src/btf_offsets.rs";
const PROGRAMS: &str = "intercept-ebpf/src";

/// A global without an entry would stay 0, and what is read with it would be wrong.
pub(super) fn every_global_is_filled_in(tree: &Tree) -> Vec<String> {
    match compare(tree) {
        Ok(complaints) => complaints,
        Err(error) => vec![format!("{LIST}: {error}")],
    }
}

fn compare(tree: &Tree) -> syn::Result<Vec<String>> {
    let list = tree.text(LIST).unwrap_or_default();
    let mut listed = helpers(list)?;
    for function in ["step", "optional"] {
        listed.extend(inventory::first_arguments(list, function)?);
    }
    let mut complaints = Vec::new();
    let mut declared = Names::new();
    for (path, text) in tree.with_extension("rs").filter(|(path, _)| path.starts_with(PROGRAMS)) {
        let globals = globals(path, text)?;
        let missing = globals.iter().filter(|global| !listed.contains(*global));
        complaints.extend(missing.map(|global| format!("{}: {global} is not in {LIST}", path.display())));
        declared.extend(globals);
    }
    let unknown = listed.iter().filter(|global| !declared.contains(*global));
    complaints.extend(unknown.map(|global| format!("{LIST}: no program has a global {global}")));
    Ok(complaints)
}

/// The globals of the list's constants that are pairs of a global and a helper of the kernel.
fn helpers(list: &str) -> syn::Result<Names> {
    let constants = syn::parse_file(list)?.items.into_iter().filter_map(|item| match item {
        Item::Const(constant) => Some(constant.expr),
        _ => None,
    });
    let pairs = constants.filter_map(|value| match *value {
        Expr::Tuple(pair) => pair.elems.first().and_then(inventory::text),
        _ => None,
    });
    Ok(pairs.collect())
}

/// The statics of type `u32` that keep their names, also those that the macro `offsets!` makes.
fn globals(path: &Path, text: &str) -> syn::Result<Names> {
    let file: File = syn::parse_file(text).map_err(|error| {
        syn::Error::new(error.span(), format!("{} does not read: {error}", path.display()))
    })?;
    let mut globals = Globals(Names::new());
    globals.visit_file(&file);
    for item in &file.items {
        if let Item::Macro(call) = item
            && call.mac.path.is_ident("offsets")
        {
            let names = call.mac.parse_body_with(Punctuated::<Ident, Token![,]>::parse_terminated)?;
            globals.0.extend(names.iter().map(Ident::to_string));
        }
    }
    Ok(globals.0)
}

struct Globals(Names);

impl Visit<'_> for Globals {
    fn visit_item_static(&mut self, item: &ItemStatic) {
        let is_u32 = matches!(&*item.ty, Type::Path(path) if path.path.is_ident("u32"));
        if is_u32 && item.attrs.iter().any(keeps_its_name) {
            self.0.insert(item.ident.to_string());
        }
    }
}

/// `#[unsafe(no_mangle)]`.
fn keeps_its_name(attribute: &Attribute) -> bool {
    attribute.path().is_ident("unsafe")
        && attribute.parse_args::<Ident>().is_ok_and(|inner| inner == "no_mangle")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAM: &str = "intercept-ebpf/src/owner.rs";
    const JOIN: &str = "intercept-ebpf/src/join/kernel.rs";

    #[test]
    fn a_global_or_an_entry_alone_is_found() {
        let list = r#"const A: [B; 2] = [step("ONE", "sock", "a"), optional("TWO", "sock", "b")];
            const C: (&str, &str) = ("THREE", "f");"#;
        let program = "#[unsafe(no_mangle)] static ONE: u32 = 0; static PLAIN: u32 = 0;
            #[unsafe(no_mangle)] static FOUR: u32 = 0;";
        let join = "offsets! { TWO, FIVE, }";
        let tree = Tree::of(&[(LIST, list), (PROGRAM, program), (JOIN, join)]);
        let expected = [
            format!("{PROGRAM}: FOUR is not in {LIST}"),
            format!("{JOIN}: FIVE is not in {LIST}"),
            format!("{LIST}: no program has a global THREE"),
        ];
        assert_eq!(every_global_is_filled_in(&tree), expected);
    }
}
