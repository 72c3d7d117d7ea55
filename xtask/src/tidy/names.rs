//! A rule about the names of types.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use syn::{
    Ident, ItemEnum, ItemStruct, ItemTrait, ItemType, ItemUnion,
    visit::{self, Visit},
};

use super::Tree;

/// Each name is declared by one type, so that a reader who searches for it finds that type.
///
/// Associated types are named by their trait and do not count.
pub(super) fn types_have_names_of_their_own(tree: &Tree) -> Vec<String> {
    check(tree)
}

fn check(tree: &Tree) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut types: BTreeMap<String, Vec<&Path>> = BTreeMap::new();
    for (path, text) in tree.with_extension("rs") {
        match syn::parse_file(text) {
            Ok(file) => {
                let mut declared = Declared::default();
                declared.visit_file(&file);
                for name in declared.0 {
                    types.entry(name).or_default().push(path);
                }
            }
            Err(error) => complaints.push(format!("{}: it does not parse: {error}", path.display())),
        }
    }
    types.retain(|_, paths| paths.len() > 1);
    for (name, paths) in &types {
        let paths: BTreeSet<String> = paths.iter().map(|path| path.display().to_string()).collect();
        let paths: Vec<String> = paths.into_iter().collect();
        complaints.push(format!("{}: several types are called {name}", paths.join(", ")));
    }
    complaints
}

/// The names of the types of a file, those inside modules and functions included.
#[derive(Default)]
struct Declared(Vec<String>);

impl Declared {
    fn add(&mut self, name: &Ident) {
        self.0.push(name.to_string());
    }
}

impl<'a> Visit<'a> for Declared {
    fn visit_item_struct(&mut self, item: &'a ItemStruct) {
        self.add(&item.ident);
        visit::visit_item_struct(self, item);
    }

    fn visit_item_enum(&mut self, item: &'a ItemEnum) {
        self.add(&item.ident);
        visit::visit_item_enum(self, item);
    }

    fn visit_item_union(&mut self, item: &'a ItemUnion) {
        self.add(&item.ident);
        visit::visit_item_union(self, item);
    }

    fn visit_item_trait(&mut self, item: &'a ItemTrait) {
        self.add(&item.ident);
        visit::visit_item_trait(self, item);
    }

    fn visit_item_type(&mut self, item: &'a ItemType) {
        self.add(&item.ident);
        visit::visit_item_type(self, item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_two_types_is_found() {
        let tree = Tree::of(&[
            ("a.rs", "struct Node;\nmod tests { fn a() { type Step = u8; } }"),
            ("b.rs", "pub(crate) enum Step {}\ntrait Once {}"),
            ("c.rs", "union Node { a: u8 }"),
        ]);
        let expected =
            ["a.rs, c.rs: several types are called Node", "a.rs, b.rs: several types are called Step"];
        assert_eq!(check(&tree), expected);
    }

    #[test]
    fn associated_types_do_not_count() {
        let text = "impl Deref for A { type Target = u8; }\nimpl Deref for B { type Target = u8; }";
        assert_eq!(check(&Tree::of(&[("a.rs", text)])), [""; 0]);
    }
}
