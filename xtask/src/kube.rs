//! Tests with a real API server: kube-apiserver, built from Debian's source, and Debian's etcd. The cache only keeps the two
//! programs.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{
    architecture::Architecture, debian::PackageLists, parts, run, setup, setup::Group, test, workspace,
};

/// The Debian release with the vendored source and a matching compiler.
const SOURCES: [&str; 2] = ["deb bookworm main", "deb-src bookworm main"];
const SOURCE: &str = "kubernetes";
/// The version that the server reports; Debian adds patches.
const VERSION: &str = "v1.20.2";
const PACKAGES: [&str; 3] = ["etcd-server", "golang-1.19-go", "golang-1.19-src"];
const GO_ROOT: &str = "usr/lib/go-1.19";
/// The path for Go without modules, because go.mod is older than the vendored packages.
const PACKAGE: &str = "k8s.io/kubernetes";
/// The programs that are kept.
const PROGRAMS: [&str; 2] = ["etcd", "kube-apiserver"];
/// Example packages, which the server does not contain.
const EXAMPLES: [&str; 3] = ["/code-generator/", "/sample-apiserver/", "/example"];

/// Runs the tests that need an API server, in their own namespaces and cgroups.
pub(crate) fn kube(arguments: &parts::PartsArgs) -> Result<()> {
    let folder = workspace::cache()?.join("kube");
    if arguments.leave_out(&folder, "the watch of a real kube-apiserver", "`cargo xtask kube` builds it") {
        return Ok(());
    }
    setup::setup(&[Group::Base, Group::Kube])?;
    if !folder.is_dir() {
        let scratch = folder.with_extension("part");
        drop(fs::remove_dir_all(&scratch));
        let built = build(&scratch, &folder);
        // Two gigabytes that are no longer needed.
        let removed = fs::remove_dir_all(&scratch);
        built.with_context(|| format!("building kube-apiserver in {}", scratch.display()))?;
        removed.with_context(|| format!("removing {}", scratch.display()))?;
    }
    parts::try_programs(&folder, &PROGRAMS)?;
    test::needing("kube", &[("INTERCEPT_KUBE", &folder)])
}

/// Makes the folder atomically.
fn build(scratch: &Path, folder: &Path) -> Result<()> {
    let (root, kept) = (scratch.join("root"), scratch.join("kept"));
    for made in [&root, &kept] {
        fs::create_dir_all(made).with_context(|| format!("making {}", made.display()))?;
    }
    let lists = PackageLists::own(
        &scratch.join("apt"),
        &SOURCES,
        Architecture::HOST,
        "reading which packages Debian has",
    )?;
    lists.unpack(&PACKAGES, &root)?;
    let go = Go { root: root.join(GO_ROOT), scratch: scratch.to_owned() };
    lists.unpack_source(SOURCE, &go.source())?;

    let generator = scratch.join("openapi-gen");
    let package = format!("{PACKAGE}/vendor/k8s.io/kube-openapi/cmd/openapi-gen");
    run::quietly("building openapi-gen", go.build(&generator).arg(package))?;
    let mut describe = go.command(&generator);
    // As the Makefile does, which needs a git repository.
    describe.arg("--logtostderr").arg("--input-dirs").arg(described(&go.source())?);
    describe.args(["--output-package", &format!("{PACKAGE}/pkg/generated/openapi")]);
    describe.args(["--output-file-base", "zz_generated.openapi", "--report-filename", "/dev/null"]);
    describe.args(["--go-header-file", "hack/boilerplate/boilerplate.generatego.txt"]);
    run::quietly("describing the API", &mut describe)?;

    let linked = format!("-s -w -X {PACKAGE}/vendor/k8s.io/component-base/version.gitVersion={VERSION}");
    let mut server = go.build(&kept.join("kube-apiserver"));
    server.args(["-ldflags", &linked, &format!("{PACKAGE}/cmd/kube-apiserver")]);
    run::quietly("building kube-apiserver (five minutes on two cores)", &mut server)?;
    fs::rename(root.join("usr/bin/etcd"), kept.join("etcd")).context("keeping etcd")?;
    fs::rename(&kept, folder).with_context(|| format!("keeping {}", folder.display()))
}

/// The packages with types of the API, by their names within the server.
fn described(source: &Path) -> Result<String> {
    let mut grep = Command::new("grep");
    grep.args(["-rlF", "--include=*.go", "+k8s:openapi-gen=", "pkg", "staging/src"]).current_dir(source);
    let files = run::output(&mut grep).context("looking for the types of the API")?;
    Ok(packages(&files).into_iter().collect::<Vec<_>>().join(","))
}

fn packages(files: &str) -> BTreeSet<String> {
    let files = files.lines().filter(|file| !EXAMPLES.iter().any(|example| file.contains(example)));
    let folders = files.filter_map(|file| Some(file.rsplit_once('/')?.0));
    folders
        .map(|folder| match folder.strip_prefix("staging/src/") {
            Some(staged) => format!("{PACKAGE}/vendor/{staged}"),
            None => format!("{PACKAGE}/{folder}"),
        })
        .collect()
}

/// The Go compiler, configured to write only inside its folder and to download nothing.
struct Go {
    root: PathBuf,
    scratch: PathBuf,
}

impl Go {
    fn source(&self) -> PathBuf {
        self.scratch.join("go/src").join(PACKAGE)
    }

    fn command(&self, program: &Path) -> Command {
        let source = self.source();
        let mut command = Command::new(program);
        command.env_clear().env("PATH", self.root.join("bin")).env("GOROOT", &self.root);
        command.env("HOME", &self.scratch).env("GOCACHE", self.scratch.join("cache"));
        command.env("GOPATH", self.scratch.join("go")).env("TMPDIR", &self.scratch);
        command.envs([("GO111MODULE", "off"), ("GOPROXY", "off"), ("CGO_ENABLED", "0")]);
        command.env("PWD", &source).current_dir(&source);
        command
    }

    fn build(&self, output: &Path) -> Command {
        let mut command = self.command(&self.root.join("bin/go"));
        command.args(["build", "-p", "2", "-o"]).arg(output);
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_of_the_api_are_known_by_package() {
        let files = "pkg/apis/abac/v0/doc.go\n\
                     staging/src/k8s.io/api/core/v1/doc.go\n\
                     staging/src/k8s.io/api/core/v1/types.go\n\
                     staging/src/k8s.io/apiserver/pkg/apis/example/v1/doc.go\n\
                     staging/src/k8s.io/sample-apiserver/pkg/apis/wardle/v1/types.go\n";
        let expected = ["k8s.io/kubernetes/pkg/apis/abac/v0", "k8s.io/kubernetes/vendor/k8s.io/api/core/v1"];
        assert!(packages(files).iter().eq(expected), "{:?}", packages(files));
    }
}
