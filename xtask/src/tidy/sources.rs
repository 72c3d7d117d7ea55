//! Rules about manifests and Rust files.

use std::path::Path;

use super::Tree;

/// The maximum length of a file.
const LINES: usize = 500;

/// Longer files, with the reason.
const LONG: [(&str, &str); 0] = [];

/// Files that may use `unsafe`: context reads, map access, raw system calls.
const UNSAFE: [&str; 51] = [
    "intercept-agent/src/acceleration/self_test/queue.rs",
    "intercept-agent/src/commands/run.rs",
    "intercept-agent/src/cutover/iptables.rs",
    "intercept-agent/src/daemon/inotify.rs",
    "intercept-agent/src/sys.rs",
    "intercept-agent/src/sys/load.rs",
    "intercept-agent/src/routes/follow.rs",
    "intercept-agent/src/netns.rs",
    "intercept-agent/src/trace.rs",
    "intercept-agent/src/userns.rs",
    "intercept-agent/src/validation/probe.rs",
    "intercept-agent/src/proof/dialer.rs",
    "intercept-agent/src/pod_process.rs",
    "intercept-ebpf/src/atomic.rs",
    "intercept-ebpf/src/context.rs",
    "intercept-ebpf/src/lookup.rs",
    "intercept-ebpf/src/handshake.rs",
    "intercept-ebpf/src/inbound.rs",
    "intercept-ebpf/src/join/kernel.rs",
    "intercept-ebpf/src/join/maps.rs",
    "intercept-ebpf/src/join/pair.rs",
    "intercept-ebpf/src/join/short.rs",
    "intercept-ebpf/src/lifecycle.rs",
    "intercept-ebpf/src/maps.rs",
    "intercept-ebpf/src/observe.rs",
    "intercept-ebpf/src/open.rs",
    "intercept-ebpf/src/original.rs",
    "intercept-ebpf/src/container.rs",
    "intercept-ebpf/src/owner.rs",
    "intercept-ebpf/src/listeners.rs",
    "intercept-ebpf/src/verdict.rs",
    "intercept-ebpf/src/verifier.rs",
    "intercept-ebpf/src/proxy.rs",
    "intercept-ebpf/src/refusal.rs",
    "intercept-ebpf/src/shadow/compare.rs",
    "intercept-ebpf/src/shadow/connections.rs",
    "intercept-ebpf/src/shadow/flows.rs",
    "intercept-ebpf/src/shadow/request.rs",
    "intercept-ebpf/src/storage.rs",
    "intercept-ebpf/src/trial.rs",
    "intercept-ebpf/src/workload.rs",
    "tests/src/bin/unusual/ring.rs",
    "tests/src/bin/unusual/user_namespace.rs",
    "tests/src/bin/steps/main.rs",
    "tests/src/bpf.rs",
    "tests/src/datagram.rs",
    "tests/src/joined.rs",
    "tests/src/kernel.rs",
    "tests/src/missing_hook.rs",
    "tests/src/testbed/namespace.rs",
    "tests/src/testbed/sandbox.rs",
];

/// The file with the names of maps and programs.
const NAMES: &str = "intercept-common/src/names.rs";

/// The length of a name in the kernel (`BPF_OBJ_NAME_LEN` without the terminating zero).
const NAME_BYTES: usize = 15;

pub(super) fn manifests_inherit_lints(tree: &Tree) -> Vec<String> {
    let crates = tree.files.iter().filter(|(path, text)| {
        path.ends_with("Cargo.toml") && text.lines().any(|line| line.trim() == "[package]")
    });
    crates
        .filter(|(_, text)| {
            let mut after = text.lines().map(str::trim).skip_while(|line| *line != "[lints]").skip(1);
            after.find(|line| !line.is_empty()) != Some("workspace = true")
        })
        .map(|(path, _)| format!("{}: does not inherit the workspace's lints", path.display()))
        .collect()
}

pub(super) fn files_are_short(tree: &Tree) -> Vec<String> {
    let excepted = |path: &Path| LONG.iter().any(|(long, _)| path == Path::new(long));
    tree.with_extension("rs")
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(path, lines)| (*lines > LINES) != excepted(path))
        .map(|(path, lines)| match lines > LINES {
            true => format!("{}: {lines} lines, more than {LINES}", path.display()),
            false => format!("{}: {lines} lines; it needs no exception any more", path.display()),
        })
        .collect()
}

pub(super) fn nothing_is_allowed(tree: &Tree) -> Vec<String> {
    let attributes = ["#[", "#!["].map(|open| format!("{open}allow("));
    let places = tree.with_extension("rs").flat_map(|(path, text)| {
        let lines = text.lines().enumerate();
        let hits = lines.filter(|(_, line)| attributes.iter().any(|attribute| line.contains(attribute)));
        hits.map(move |(number, _)| {
            format!("{}:{}: allow; use expect with a reason", path.display(), number + 1)
        })
    });
    places.collect()
}

pub(super) fn unsafe_is_where_it_may_be(tree: &Tree) -> Vec<String> {
    let mut complaints = Vec::new();
    for (path, text) in tree.with_extension("rs") {
        let expected = UNSAFE.iter().any(|named| path == Path::new(named));
        match says_unsafe(text) {
            Some(line) if !expected => {
                complaints
                    .push(format!("{}:{line}: unsafe, in a file that is not in the list", path.display()));
            }
            None if expected => {
                complaints.push(format!("{}: has no unsafe; take it off the list", path.display()));
            }
            _ => {}
        }
    }
    let gone = UNSAFE.iter().filter(|named| !tree.has(Path::new(named)));
    complaints.extend(gone.map(|named| format!("{named}: in the list of unsafe, but there is no such file")));
    complaints
}

/// The first line with unsafe code. Attributes do not count, because they only concern the linker.
fn says_unsafe(text: &str) -> Option<usize> {
    let what = ["{", "fn ", "impl ", "extern ", "trait "].map(|what| format!("{} {what}", "unsafe"));
    let found = text.lines().position(|line| {
        let code = line.split("//").next().unwrap_or_default();
        what.iter().any(|what| code.contains(what))
    });
    found.map(|index| index + 1)
}

pub(super) fn kernel_names_are_short(tree: &Tree) -> Vec<String> {
    let Some(text) = tree.text(NAMES) else { return vec![format!("{NAMES}: there is no such file")] };
    let names: Vec<&str> = text
        .lines()
        .filter_map(|line| {
            line.trim().strip_prefix("pub const ")?.split_once(": &str = \"")?.1.strip_suffix("\";")
        })
        .collect();
    let mut complaints: Vec<String> = names
        .iter()
        .filter(|name| name.len() > NAME_BYTES)
        .map(|name| format!("{NAMES}: {name:?} is longer than {NAME_BYTES} bytes"))
        .collect();
    if names.is_empty() {
        complaints.push(format!("{NAMES}: has no names"));
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_without_lints_is_found() {
        let good = "[package]\nname = \"a\"\n\n[lints]\nworkspace = true\n";
        let tree = Tree::of(&[
            ("a/Cargo.toml", good),
            ("b/Cargo.toml", "[package]\nname = \"b\"\n"),
            ("Cargo.toml", "[workspace]\n"),
        ]);
        assert_eq!(manifests_inherit_lints(&tree), ["b/Cargo.toml: does not inherit the workspace's lints"]);
    }

    #[test]
    fn a_long_file_is_found() {
        let tree = Tree::of(&[("a.rs", &"\n".repeat(LINES)), ("b.rs", &"\n".repeat(LINES + 1))]);
        assert_eq!(files_are_short(&tree), ["b.rs: 501 lines, more than 500"]);
    }

    #[test]
    fn an_allowed_lint_is_found() {
        let text = format!("fn a() {{}}\n{}allow(dead_code)]\nfn b() {{}}\n", "#[");
        let tree = Tree::of(&[("a.rs", &text), ("b.rs", "#[expect(dead_code, reason = \"\")]")]);
        assert_eq!(nothing_is_allowed(&tree), ["a.rs:2: allow; use expect with a reason"]);
    }

    #[test]
    fn unsafe_is_found_in_code_only() {
        let word = "unsafe";
        assert_eq!(says_unsafe(&format!("// no {word} {{}} here\nlet x = {word} {{ f() }};")), Some(2));
        assert_eq!(says_unsafe(&format!("{word} impl Pod for X {{}}")), Some(1));
        assert_eq!(says_unsafe(&format!("#![deny({word}_op_in_{word}_fn)]\nlet {word}ty = 1;")), None);
    }

    #[test]
    fn a_name_that_the_kernel_would_cut_is_found() {
        let text =
            "pub const GOOD: &str = \"exactly15bytes_\";\npub const BAD: &str = \"sixteen__bytes__\";\n";
        let complaints = kernel_names_are_short(&Tree::of(&[(NAMES, text)]));
        assert_eq!(complaints, [format!("{NAMES}: \"sixteen__bytes__\" is longer than 15 bytes")]);
    }
}
