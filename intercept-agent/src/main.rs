//! The binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    intercept_agent::main()
}
