//! The verifier of this kernel takes every program.

use std::process::Command;

#[test]
fn check_finds_nothing_missing() {
    let output = Command::new(env!("CARGO_BIN_EXE_intercept-agent"))
        .args(["check", "--json"])
        .output()
        .expect("started");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let findings: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let findings = findings.as_array().expect("a list");
    assert!(findings.iter().any(|finding| finding["what"] == "programs"), "{text}");
    assert!(findings.iter().all(|finding| finding["ok"] == true), "{text}");
}
