//! The benchmark as a program: it measures, its regression check passes, and it removes what it made.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tests::testbed::{name, sweep::leftovers};

fn bench(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.args(arguments);
    command
}

fn left_behind(pid: u32) -> Vec<std::path::PathBuf> {
    let mut left = leftovers(pid).expect("namespaces and cgroups are listed");
    let mine = format!("{}{}.", name::PREFIX, name::Maker::of(pid));
    for entry in std::fs::read_dir("/run").expect("/run is listed").flatten() {
        if entry.file_name().to_string_lossy().starts_with(&mine) {
            left.push(entry.path());
        }
    }
    left
}

#[test]
fn quiet_figures_are_within_their_limits() {
    let child = bench(&["--check"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let pid = child.id();
    let output = child.wait_with_output().expect("it ends");
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("instructions of connect4"), "{out}");
    assert_eq!(left_behind(pid), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_short_run_reports_ratios_of_every_mode() {
    let folder = tempfile::tempdir().expect("a folder is made");
    let out = folder.path().to_str().expect("it is UTF-8");
    let modes = "none,explicit,iptables-nft,iptables-legacy,nft,agent";
    let arguments = ["--quick", "--rounds", "1", "--work", "connect", "--modes", modes, "--out", out];
    let output = bench(&arguments).output().expect("it ends");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let json = read(&folder.path().join("report.json"));
    let report: serde_json::Value = serde_json::from_str(&json).expect("it is JSON");
    let summaries = report["summaries"].as_array().expect("there are summaries");
    assert_eq!(summaries.len(), 2 * 6, "two works, six modes");
    for summary in summaries {
        let ratio = &summary["ratios"][0]["rate"]["median"];
        assert!(ratio.as_f64().is_some_and(|ratio| ratio > 0.0), "{summary}");
    }
    let page = read(&folder.path().join("report.html"));
    assert!(
        page.contains("<svg") && !page.contains("src=") && !page.contains("href="),
        "it needs no other file"
    );
}

#[test]
fn joined_connections_are_compared_with_the_agent_without_them() {
    let folder = tempfile::tempdir().expect("a folder is made");
    let out = folder.path().to_str().expect("it is UTF-8");
    let arguments =
        ["--quick", "--rounds", "1", "--work", "acceleration", "--modes", "agent,accelerated", "--out", out];
    let output = bench(&arguments).env_remove("INTERCEPT_ENVOY").output().expect("it ends");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document = read(&folder.path().join("report.md"));
    // Eight works of the relay in three topologies; those of Envoy are left out by name.
    for title in ["two pods of a node |", "to a pod that is not captured", "two pods on one veth |"] {
        assert!(document.contains(&format!("| {title}")), "{title}\n{document}");
    }
    let goals = document.lines().filter(|line| line.contains("reached") || line.contains("missed")).count();
    assert_eq!(goals, 8, "{document}");
    assert!(document.contains("envoy-tcp and envoy-http: left out"), "{document}");
}

#[test]
fn an_interrupted_run_cleans_up() {
    let mut child = bench(&["--quick", "--work", "connect", "--modes", "explicit,agent"])
        .args([
            "--out",
            std::env::temp_dir().join("intercept-bench-interrupted").to_str().expect("it is UTF-8"),
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let pid = child.id();
    let deadline = Instant::now() + Duration::from_secs(20);
    while left_behind(pid).len() < 5 {
        assert!(Instant::now() < deadline, "it has made no pods");
        std::thread::yield_now();
    }
    let raw = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("it is a pid");
    rustix::process::kill_process(raw, rustix::process::Signal::INT).expect("it is still there");
    let status = child.wait().expect("it ends");
    drop(std::fs::remove_dir_all(std::env::temp_dir().join("intercept-bench-interrupted")));
    assert_eq!(status.code(), Some(1), "an interrupted run is no success");
    assert_eq!(left_behind(pid), Vec::<std::path::PathBuf>::new());
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
