//! The table of command flags, from the declarations that clap parses them by.

use std::collections::HashMap;

use anyhow::{Context as _, Result, bail};
use syn::{Attribute, Expr, Field, Fields, Item, ItemEnum, ItemStruct, Lit, Meta, Type, Variant};

use super::{MarkdownTable, code, literal_text};
use crate::tidy::Tree;

const COMMAND_LINE: &str = "intercept-agent/src/cli.rs";
/// More of its arguments.
const POD_COMMANDS: &str = "intercept-agent/src/cli/pod.rs";

/// The flags of all commands, without capture options.
pub(super) fn flags(tree: &Tree) -> Result<String> {
    let text = tree.text(COMMAND_LINE).with_context(|| format!("{COMMAND_LINE}: there is no such file"))?;
    let mut file = syn::parse_file(text).with_context(|| format!("reading {COMMAND_LINE}"))?;
    if let Some(text) = tree.text(POD_COMMANDS) {
        let more = syn::parse_file(text).with_context(|| format!("reading {POD_COMMANDS}"))?;
        file.items.extend(more.items);
    }
    let mut declarations =
        CommandLine { tree, structs: HashMap::new(), enums: HashMap::new(), flags: Vec::new() };
    for item in &file.items {
        match item {
            Item::Struct(item) => drop(declarations.structs.insert(item.ident.to_string(), item)),
            Item::Enum(item) => drop(declarations.enums.insert(item.ident.to_string(), item)),
            _ => {}
        }
    }
    declarations.add_fields("Logging", "all")?;
    declarations.add_commands("Command", "")?;
    let mut table = MarkdownTable::new(["flag", "command", "variable", "default", "meaning"]);
    for flag in &declarations.flags {
        let commands: Vec<_> = flag.uses.iter().map(|used| used.command.as_str()).collect();
        let variable = flag.by_command(|used| used.variable.as_ref().map(code).unwrap_or_default());
        let default = flag.by_command(|used| used.default.clone());
        let meaning = flag.by_command(|used| used.help.clone());
        table.row([code(format!("--{}", flag.name)), commands.join(", "), variable, default, meaning]);
    }
    Ok(table.0)
}

struct CommandLine<'a> {
    tree: &'a Tree,
    structs: HashMap<String, &'a ItemStruct>,
    enums: HashMap<String, &'a ItemEnum>,
    flags: Vec<CommandFlag>,
}

/// A flag, with its declaration in each command that has it.
struct CommandFlag {
    name: String,
    uses: Vec<FlagUse>,
}

struct FlagUse {
    command: String,
    variable: Option<String>,
    default: String,
    help: String,
}

impl CommandFlag {
    /// A property of all commands, or, if it differs, of each.
    fn by_command(&self, property: impl Fn(&FlagUse) -> String) -> String {
        let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
        for used in &self.uses {
            let value = property(used);
            match groups.iter_mut().find(|(known, _)| *known == value) {
                Some((_, commands)) => commands.push(&used.command),
                None => groups.push((value, vec![&used.command])),
            }
        }
        match &groups[..] {
            [(value, _)] => value.clone(),
            _ => {
                let named = groups.iter().filter(|(value, _)| !value.is_empty());
                let named = named.map(|(value, commands)| format!("{}: {value}", commands.join(", ")));
                named.collect::<Vec<_>>().join("; ")
            }
        }
    }
}

impl CommandLine<'_> {
    /// The commands of an enum, below the command `parent`.
    fn add_commands(&mut self, name: &str, parent: &str) -> Result<()> {
        let commands = *self.enums.get(name).with_context(|| format!("there is no enum {name}"))?;
        let is_shown = |variant: &&Variant| attribute_value(&variant.attrs, "command", "hide").is_none();
        for variant in commands.variants.iter().filter(is_shown) {
            let named =
                attribute_value(&variant.attrs, "command", "name").and_then(|name| literal_text(&name));
            let command = named.unwrap_or_else(|| kebab(&variant.ident.to_string()));
            let command = format!("{parent} {command}").trim_start().to_owned();
            match &variant.fields {
                Fields::Unnamed(fields) => {
                    for field in &fields.unnamed {
                        self.add_fields(&type_name(&field.ty), &command)?;
                    }
                }
                fields => fields.iter().try_for_each(|field| self.add_field(field, &command))?,
            }
        }
        Ok(())
    }

    /// The flags of a struct. One of another file has the capture options, which are in a table of their own.
    fn add_fields(&mut self, name: &str, command: &str) -> Result<()> {
        match self.structs.get(name).copied() {
            Some(arguments) => arguments.fields.iter().try_for_each(|field| self.add_field(field, command)),
            None if name == "RawOptions" => Ok(()),
            None => bail!("{COMMAND_LINE} has no struct {name}"),
        }
    }

    fn add_field(&mut self, field: &Field, command: &str) -> Result<()> {
        if has(&field.attrs, "command", "flatten") {
            return self.add_fields(&type_name(&field.ty), command);
        }
        if has(&field.attrs, "command", "subcommand") {
            return self.add_commands(&type_name(&field.ty), command);
        }
        if !has(&field.attrs, "arg", "long") {
            return Ok(());
        }
        let own = field.ident.as_ref().map(|name| kebab(&name.to_string())).unwrap_or_default();
        let name =
            attribute_value(&field.attrs, "arg", "long").and_then(|long| literal_text(&long)).unwrap_or(own);
        let help = help(&field.attrs);
        let (help, noted) = match help.strip_suffix(']').and_then(|help| help.rsplit_once(" [default: ")) {
            Some((help, default)) => (help.to_owned(), Some(default.to_owned())),
            None => (help, None),
        };
        let value = ["default_value", "default_value_t"].into_iter();
        let declared = value.filter_map(|key| attribute_value(&field.attrs, "arg", key)).next();
        let default = match declared {
            Some(expression) => self.constant(&expression)?,
            None if type_name(&field.ty) == "bool" => "off".to_owned(),
            None => noted.unwrap_or_default(),
        };
        let help = match self.enums.get(&type_name(&field.ty)) {
            Some(values) if has(&field.attrs, "arg", "value_enum") => format!("{help}: {}", choices(values)),
            _ => help,
        };
        let variable = attribute_value(&field.attrs, "arg", "env").and_then(|name| literal_text(&name));
        let used = FlagUse { command: command.to_owned(), variable, default, help };
        match self.flags.iter_mut().find(|flag| flag.name == name) {
            Some(flag) => flag.uses.push(used),
            None => self.flags.push(CommandFlag { name, uses: vec![used] }),
        }
        Ok(())
    }

    /// The text of a literal, of a variant, or of a constant of the agent.
    fn constant(&self, expression: &Expr) -> Result<String> {
        match expression {
            Expr::Lit(literal) => match &literal.lit {
                Lit::Str(text) => Ok(text.value()),
                Lit::Int(number) => Ok(number.base10_digits().to_owned()),
                _ => bail!("a default is neither text nor a number"),
            },
            Expr::Binary(shift) if matches!(shift.op, syn::BinOp::Shl(_)) => {
                let number = |side| anyhow::Ok(self.constant(side)?.parse::<u64>()?);
                Ok((number(&shift.left)? << number(&shift.right)?).to_string())
            }
            Expr::Path(path) => {
                let name = path.path.segments.last().context("an empty path")?.ident.to_string();
                if path.path.segments.len() > 1 {
                    return Ok(kebab(&name));
                }
                let files = self
                    .tree
                    .with_extension("rs")
                    .filter(|(path, _)| path.starts_with("intercept-agent/src"));
                let holders = files.filter(|(_, text)| text.contains(&format!("pub const {name}:")));
                let parsed = holders.filter_map(|(_, text)| syn::parse_file(text).ok());
                let found = parsed.flat_map(|file| file.items).find_map(|item| match item {
                    Item::Const(item) if item.ident == name => Some(item.expr),
                    _ => None,
                });
                self.constant(&*found.with_context(|| format!("there is no constant {name}"))?)
            }
            _ => bail!("a default is no constant"),
        }
    }
}

/// `AsIstio` and `as_istio` as `as-istio`.
fn kebab(name: &str) -> String {
    let mut kebab = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !kebab.is_empty() {
            kebab.push('-');
        }
        kebab.push(if letter == '_' { '-' } else { letter.to_ascii_lowercase() });
    }
    kebab
}

/// The last segment of a type, or of the type in an `Option` or `Deferred`.
fn type_name(kind: &Type) -> String {
    let Type::Path(path) = kind else { return String::new() };
    let Some(last) = path.path.segments.last() else { return String::new() };
    match &last.arguments {
        syn::PathArguments::AngleBracketed(inner) if last.ident == "Option" || last.ident == "Deferred" => {
            match inner.args.first() {
                Some(syn::GenericArgument::Type(kind)) => type_name(kind),
                _ => String::new(),
            }
        }
        _ => last.ident.to_string(),
    }
}

/// The first paragraph of the documentation.
fn help(attributes: &[Attribute]) -> String {
    let lines = attributes.iter().filter_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("doc") => literal_text(&pair.value),
        _ => None,
    });
    let lines = lines.map(|line| line.trim().to_owned()).take_while(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// The values of an enum of clap, with their documentation.
fn choices(values: &ItemEnum) -> String {
    let choice = |value: &syn::Variant| {
        let (name, help) = (code(kebab(&value.ident.to_string())), help(&value.attrs));
        if help.is_empty() { name } else { format!("{name} ({help})") }
    };
    values.variants.iter().map(choice).collect::<Vec<_>>().join(", ")
}

fn has(attributes: &[Attribute], attribute: &str, key: &str) -> bool {
    entries(attributes, attribute).any(|(name, _)| name == key)
}

fn attribute_value(attributes: &[Attribute], attribute: &str, key: &str) -> Option<Expr> {
    entries(attributes, attribute).find_map(|(name, value)| if name == key { value } else { None })
}

/// `key` and `key = value` in `#[attribute(..)]`.
fn entries<'a>(
    attributes: &'a [Attribute],
    attribute: &'a str,
) -> impl Iterator<Item = (String, Option<Expr>)> + 'a {
    attributes.iter().filter(move |found| found.path().is_ident(attribute)).flat_map(|found| {
        let mut entries = Vec::new();
        // An entry of another form ends the parsing, and is none of those asked for.
        drop(found.parse_nested_meta(|meta| {
            let value = match meta.value() {
                Ok(value) => Some(value.parse::<Expr>()?),
                Err(_) => None,
            };
            entries.extend(meta.path.get_ident().map(|name| (name.to_string(), value)));
            Ok(())
        }));
        entries
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_listed_with_their_commands() {
        let source = r#"
            struct Logging {
                /// What to log
                #[arg(long, default_value = "info", env = "LOG")]
                log: String,
            }
            enum Command { Attach(Deferred<AttachArgs>), #[command(name = "other-name")] Renamed(AttachArgs), Cni(CniArgs) }
            struct AttachArgs {
                /// A path [default: its own]
                #[arg(long, value_name = "PATH")]
                netns: Option<PathBuf>,
                #[command(flatten)]
                load: Load,
                #[command(flatten)]
                options: RawOptions,
            }
            struct Load {
                /// Most of them
                #[arg(long, default_value_t = MOST)]
                max_connections: u32,
            }
            struct CniArgs { #[command(subcommand)] command: Option<CniCommand> }
            enum Pods {
                /// Some
                WithSidecar,
                All,
            }
            enum CniCommand { Install {
                /// Which pods
                #[arg(long = "select", value_enum, default_value_t = Pods::WithSidecar)]
                pods: Pods,
                /// More
                ///
                /// And more
                #[arg(long)]
                netns: bool,
            } }
        "#;
        let constants = "pub const MOST: u32 = 1 << 20;";
        let tree = Tree::of(&[(COMMAND_LINE, source), ("intercept-agent/src/programs.rs", constants)]);
        let expected = "\
            | flag | command | variable | default | meaning |\n\
            |---|---|---|---|---|\n\
            | `--log` | all | `LOG` | info | What to log |\n\
            | `--netns` | attach, other-name, cni install |  | attach, other-name: its own; cni install: off | attach, other-name: A path; cni install: More |\n\
            | `--max-connections` | attach, other-name |  | 1048576 | Most of them |\n\
            | `--select` | cni install |  | with-sidecar | Which pods: `with-sidecar` (Some), `all` |\n";
        assert_eq!(flags(&tree).expect("read"), expected);
    }
}
