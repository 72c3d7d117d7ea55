//! Tests with a real API server, and the programs of Kubernetes for those with a cluster: built from Debian's source, beside
//! Debian's etcd. The cache only keeps the programs.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

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
/// The programs of the API.
const API: [&str; 2] = ["etcd", "kube-apiserver"];
/// The programs that are built. A cluster consists of these and etcd.
const BUILT: [&str; 6] =
    ["kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet"];
/// Example packages, which the server does not contain.
const EXAMPLES: [&str; 3] = ["/code-generator/", "/sample-apiserver/", "/example"];

/// Changes of the source: a file, a text that is in it once, and its replacement.
const PATCHES: [(&str, &str, &str); 5] = [
    // The limits of pods' cgroups need controllers. In a tree without controllers, kubelet writes no limits.
    (
        "pkg/kubelet/cm/cgroup_manager_linux.go",
        "\tmanager, err := cgroupfs2.NewManager(cgroupConfig,",
        "\tif supportedControllers.Len() == 0 {\n\t\treturn nil\n\t}\n\
         \tmanager, err := cgroupfs2.NewManager(cgroupConfig,",
    ),
    // Kubelet looks for the cgroups of ended pods in the mounts of controllers. Without controllers it would find and
    // remove none.
    (
        "pkg/kubelet/cm/helpers_linux.go",
        "\tmountPoints := make(map[string]string, len(controllers))\n",
        "\tmountPoints := map[string]string{\"unified\": util.CgroupRoot}\n",
    ),
    // Since Go 1.18 the caller allocates the iterator of a map. This library does not, so that the server crashes when
    // it indents JSON.
    (
        "vendor/github.com/modern-go/reflect2/unsafe_link.go",
        "func mapiterinit(rtype unsafe.Pointer, m unsafe.Pointer) *hiter",
        "func mapiterinit(rtype unsafe.Pointer, m unsafe.Pointer, it *hiter)",
    ),
    (
        "vendor/github.com/modern-go/reflect2/unsafe_link.go",
        "\t// rest fields are ignored\n",
        "\trest  [10]unsafe.Pointer\n",
    ),
    (
        "vendor/github.com/modern-go/reflect2/unsafe_map.go",
        "\treturn &UnsafeMapIterator{\n\t\thiter:      mapiterinit(type2.rtype, *(*unsafe.Pointer)(obj)),\n",
        "\tit := new(hiter)\n\tmapiterinit(type2.rtype, *(*unsafe.Pointer)(obj), it)\n\
         \treturn &UnsafeMapIterator{\n\t\thiter:      it,\n",
    ),
];

/// Runs the tests that need an API server, in their own namespaces and cgroups.
pub(crate) fn kube(arguments: &parts::PartsArgs) -> Result<()> {
    let folder = folder()?;
    if arguments.leave_out(
        &missing(&API)?,
        "the watch of a real kube-apiserver",
        "`cargo xtask kube` builds it",
    ) {
        return Ok(());
    }
    setup::setup(&[Group::Base, Group::Kube])?;
    get(&API)?;
    test::needing("kube", &[("INTERCEPT_KUBE", &folder)])
}

/// Where its programs are kept.
pub(crate) fn folder() -> Result<PathBuf> {
    Ok(workspace::cache()?.join("kube"))
}

/// All programs of a cluster.
pub(crate) fn cluster() -> Vec<&'static str> {
    [&API[..1], &BUILT].concat()
}

/// Those of the programs that are not kept.
pub(crate) fn missing(programs: &[&str]) -> Result<Vec<PathBuf>> {
    let folder = folder()?;
    let files = programs.iter().map(|program| folder.join(program));
    Ok(files.filter(|file| !file.is_file()).collect())
}

/// Builds everything if one of the programs is not kept; it takes its time once.
pub(crate) fn get(programs: &[&str]) -> Result<()> {
    let folder = folder()?;
    if !missing(programs)?.is_empty() {
        let scratch = folder.with_extension("part");
        drop(fs::remove_dir_all(&scratch));
        let built = build(&scratch, &folder);
        // Two gigabytes that are no longer needed.
        let removed = fs::remove_dir_all(&scratch);
        built.with_context(|| format!("building Kubernetes in {}", scratch.display()))?;
        removed.with_context(|| format!("removing {}", scratch.display()))?;
    }
    let tried: Vec<_> = programs.iter().copied().filter(|program| *program != "kubectl").collect();
    parts::try_programs(&folder, &tried)
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
    patch(&go.source())?;

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
    let mut programs = go.build(&kept.join(""));
    programs.args(["-ldflags", &linked]);
    programs.args(BUILT.map(|program| format!("{PACKAGE}/cmd/{program}")));
    run::quietly("building Kubernetes (ten minutes on two cores)", &mut programs)?;
    fs::rename(root.join("usr/bin/etcd"), kept.join("etcd")).context("keeping etcd")?;
    // What an earlier version of this command has kept.
    drop(fs::remove_dir_all(folder));
    fs::rename(&kept, folder).with_context(|| format!("keeping {}", folder.display()))
}

fn patch(source: &Path) -> Result<()> {
    for (file, before, after) in PATCHES {
        let path = source.join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        ensure!(text.matches(before).count() == 1, "{} is not as it was: change PATCHES", path.display());
        fs::write(&path, text.replace(before, after))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
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
