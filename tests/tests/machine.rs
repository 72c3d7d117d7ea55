//! Units of a machine, which is a PID namespace here: its first process is in a network namespace of its own.

use std::process::Command;

use tests::actor::binary;

#[test]
fn units_of_a_machine_are_captured_and_released() {
    let demo = binary::locate("demo", "INTERCEPT_DEMO").expect("cargo build -p tests --bins");
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--net", "--mount", "--mount-proc", "--kill-child"]);
    let output = command.arg(demo).args(["--machine", "units"]).output().expect("unshare");
    let said = String::from_utf8_lossy(&output.stdout);
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{log}");
}
