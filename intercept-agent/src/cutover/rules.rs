//! Rules of iptables as iptables-save prints them: which of them capture a pod, and the input of iptables-restore that takes
//! them out or puts them in again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use serde::{Deserialize, Serialize};

/// A table, without counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SavedTable {
    pub(super) name: String,
    chains: Vec<SavedChain>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct SavedChain {
    name: String,
    /// `ACCEPT` or `DROP` of a base chain, `-` of others.
    policy: String,
    /// What follows `-A NAME`.
    rules: Vec<String>,
}

/// A rule of a base chain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BaseRule {
    /// Its table.
    pub table: String,
    /// Its chain.
    pub chain: String,
    /// Its position in the chain, from 1.
    pub position: usize,
    /// The rule without `-A CHAIN`.
    pub rule: String,
}

/// Why the output of iptables-save is not understood.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// A line has another form.
    #[error("the line {0:?} is not understood")]
    Line(String),
    /// A table of nft that iptables cannot show.
    #[error(
        "{0}: the pod has rules that were made with nft; only rules that iptables can show can be taken out"
    )]
    Foreign(String),
}

impl SavedTable {
    /// Parses the output of iptables-save.
    pub(super) fn parse_all(text: &str) -> Result<Vec<Self>, RulesError> {
        let mut tables: Vec<Self> = Vec::new();
        for line in text.lines().map(str::trim_end).filter(|line| !line.is_empty() && *line != "COMMIT") {
            let unknown = || RulesError::Line(line.to_owned());
            if let Some(comment) = line.strip_prefix('#') {
                if comment.contains("incompatible") {
                    return Err(RulesError::Foreign(comment.trim().to_owned()));
                }
            } else if let Some(name) = line.strip_prefix('*') {
                tables.push(Self { name: name.to_owned(), chains: Vec::new() });
            } else {
                let table = tables.last_mut().ok_or_else(unknown)?;
                table.add(line).ok_or_else(unknown)?;
            }
        }
        Ok(tables)
    }

    fn add(&mut self, line: &str) -> Option<()> {
        if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split(' ');
            let (name, policy) = (words.next()?.to_owned(), words.next()?.to_owned());
            self.chains.push(SavedChain { name, policy, rules: Vec::new() });
            return Some(());
        }
        let (name, rule) =
            line.strip_prefix("-A ")?.split_once(' ').or(line.strip_prefix("-A ").map(|n| (n, "")))?;
        self.chains.iter_mut().find(|chain| chain.name == name)?.rules.push(rule.to_owned());
        Some(())
    }

    /// The table as iptables-save prints it, without counters and comments.
    pub(super) fn lines(&self) -> Vec<String> {
        let chains = self.chains.iter().map(|chain| format!(":{} {}", chain.name, chain.policy));
        let rules = self
            .chains
            .iter()
            .flat_map(|chain| chain.rules.iter().map(move |rule| format!("-A {} {rule}", chain.name)));
        std::iter::once(format!("*{}", self.name)).chain(chains).chain(rules).collect()
    }

    /// The table without these rules.
    pub(super) fn without(&self, rules: &[BaseRule]) -> Self {
        let mut table = self.clone();
        for chain in &mut table.chains {
            let is_one = |rule: &String| {
                rules.iter().any(|r| r.table == self.name && r.chain == chain.name && r.rule == *rule)
            };
            chain.rules.retain(|rule| !is_one(rule));
        }
        table
    }

    /// The rules of a chain; none if there is no such chain.
    fn rules(&self, chain: &str) -> &[String] {
        self.chains.iter().find(|found| found.name == chain).map_or(&[], |found| &found.rules)
    }

    /// All rules.
    pub(super) fn all_rules(&self) -> impl Iterator<Item = &String> {
        self.chains.iter().flat_map(|chain| &chain.rules)
    }

    /// The rules of base chains by which a packet can reach a rule that sends it to one of these ports of the proxy.
    pub(super) fn captures(&self, ports: &[u16]) -> Vec<BaseRule> {
        let mut capturing: BTreeSet<&str> = BTreeSet::new();
        let captures = |capturing: &BTreeSet<&str>, rule: &str| {
            let words = words(rule);
            sends_to(&words, ports) || target(&words).is_some_and(|to| capturing.contains(to))
        };
        loop {
            let more = self.chains.iter().filter(|chain| !capturing.contains(chain.name.as_str()));
            let more: Vec<&str> = more
                .filter(|chain| chain.rules.iter().any(|rule| captures(&capturing, rule)))
                .map(|chain| chain.name.as_str())
                .collect();
            if more.is_empty() {
                break;
            }
            capturing.extend(more);
        }
        let mut found = Vec::new();
        for chain in self.chains.iter().filter(|chain| chain.policy != "-") {
            for (rule, position) in chain.rules.iter().zip(1..).filter(|(rule, _)| captures(&capturing, rule))
            {
                let (table, chain) = (self.name.clone(), chain.name.clone());
                found.push(BaseRule { table, chain, position, rule: rule.clone() });
            }
        }
        found
    }

    /// Whether a packet can reach a rule of this target.
    pub(super) fn has_target(&self, name: &str) -> bool {
        self.all_rules().any(|rule| target(&words(rule)) == Some(name))
    }
}

/// The words of a rule. Quotes hold words together.
fn words(rule: &str) -> Vec<&str> {
    let (mut found, mut start, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, character) in rule.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => {
                found.push(&rule[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    found.push(&rule[start..]);
    found.retain(|word| !word.is_empty());
    found
}

/// The word after one of these.
pub(super) fn value<'a>(words: &[&'a str], names: &[&str]) -> Option<&'a str> {
    let at = words.iter().position(|word| names.contains(word))?;
    words.get(at + 1).copied()
}

fn target<'a>(words: &[&'a str]) -> Option<&'a str> {
    value(words, &["-j", "-g", "--jump", "--goto"])
}

/// Whether a rule itself sends packets to one of the ports.
fn sends_to(words: &[&str], ports: &[u16]) -> bool {
    let port = match target(words) {
        Some("REDIRECT") => value(words, &["--to-ports", "--to-port"]),
        Some("TPROXY") => value(words, &["--on-port"]),
        Some("DNAT") => {
            value(words, &["--to-destination"]).and_then(|to| to.rsplit_once(':')).map(|(_, port)| port)
        }
        _ => None,
    };
    port.and_then(|port| port.parse().ok()).is_some_and(|port| ports.contains(&port))
}

/// The zone in which conntrack tracks the answers of the proxy's DNS port, if a rule says so.
pub(super) fn zone_of_answers(table: &SavedTable, dns_port: u16) -> Option<u16> {
    table.all_rules().find_map(|rule| {
        let words = words(rule);
        let is_answer = target(&words) == Some("CT")
            && value(&words, &["--sport"]).and_then(|port| port.parse().ok()) == Some(dns_port);
        value(&words, &["--zone"]).filter(|_| is_answer)?.parse().ok()
    })
}

/// The input of one call of `iptables-restore --noflush`, which makes all changes of a table at once.
#[derive(Debug, Default)]
pub(super) struct Transaction(BTreeMap<String, Vec<String>>);

impl Transaction {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn line(&mut self, table: &str, line: String) {
        self.0.entry(table.to_owned()).or_default().push(line);
    }

    /// Deletes rules that are there.
    pub(super) fn delete<'a>(&mut self, rules: impl IntoIterator<Item = &'a BaseRule>) {
        for BaseRule { table, chain, rule, .. } in rules {
            self.line(table, format!("-D {chain} {rule}"));
        }
    }

    /// Inserts rules at the head of their chains, unless they are there.
    pub(super) fn insert_first(&mut self, tables: &[SavedTable], rules: &[BaseRule]) {
        for BaseRule { table, chain, rule, .. } in missing(tables, rules) {
            self.line(table, format!("-I {chain} 1 {rule}"));
        }
    }

    /// Inserts rules that are missing, where they were among the rules that are not in `ignored`. Those are at the head of
    /// their chains once this transaction is done.
    pub(super) fn insert(&mut self, tables: &[SavedTable], rules: &[BaseRule], ignored: &[BaseRule]) {
        let is_ignored = |chain: &BaseRule, rule: &str| {
            ignored.iter().any(|i| i.table == chain.table && i.chain == chain.chain && i.rule == rule)
        };
        let mut chains: BTreeMap<(&str, &str), Vec<String>> = BTreeMap::new();
        for added in missing(tables, rules) {
            let chain = chains.entry((&added.table, &added.chain)).or_insert_with(|| {
                let of = |i: &&BaseRule| i.table == added.table && i.chain == added.chain;
                let head = missing(tables, ignored).into_iter().filter(of).map(|i| i.rule.clone());
                let table = tables.iter().find(|table| table.name == added.table);
                head.chain(table.map_or(&[][..], |table| table.rules(&added.chain)).iter().cloned()).collect()
            });
            let others = chain.iter().enumerate().filter(|(_, rule)| !is_ignored(added, rule));
            let at = others.map(|(at, _)| at).nth(added.position - 1).unwrap_or(chain.len());
            chain.insert(at, added.rule.clone());
            let BaseRule { table, chain, rule, .. } = added;
            self.line(table, format!("-I {chain} {} {rule}", at + 1));
        }
    }

    /// The input of iptables-restore.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for (table, lines) in &self.0 {
            _ = writeln!(text, "*{table}\n{}\nCOMMIT", lines.join("\n"));
        }
        text
    }
}

/// Those of `rules` that are not in the tables, each as often as it is missing, in the order of their positions.
pub(super) fn missing<'a>(tables: &[SavedTable], rules: &'a [BaseRule]) -> Vec<&'a BaseRule> {
    let mut found: BTreeMap<(&str, &str, &str), usize> = BTreeMap::new();
    for table in tables {
        for chain in &table.chains {
            for rule in &chain.rules {
                *found.entry((&table.name, &chain.name, rule)).or_default() += 1;
            }
        }
    }
    let mut rules: Vec<&BaseRule> = rules.iter().collect();
    rules.sort();
    rules.retain(|rule| {
        match found.get_mut(&(rule.table.as_str(), rule.chain.as_str(), rule.rule.as_str())) {
            Some(count) if *count > 0 => {
                *count -= 1;
                false
            }
            _ => true,
        }
    });
    rules
}

#[cfg(test)]
mod tests;
