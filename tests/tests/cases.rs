//! The cases that need no tools, on this machine's kernel.

use tests::cases::{self, CASES};

#[test]
fn every_case_holds() {
    assert_eq!(cases::run("").expect("run"), 0, "failed; the cases are told above");
}

#[test]
fn a_case_is_found_by_its_name() {
    for case in &CASES {
        assert_eq!(CASES.iter().filter(|other| other.name.contains(case.name)).count(), 1, "{}", case.name);
    }
}
