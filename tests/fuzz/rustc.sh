#!/bin/sh
# Called by cargo instead of rustc for the crates of the workspace: `rustc.sh RUSTC ARGUMENTS...`. Adds libFuzzer's
# instrumentation of edges and comparisons. Dependencies are compiled as usual, so the builds of release mode share them.
case " $* " in
# Build scripts run without libFuzzer, and macros in the compiler.
*" --crate-name build_script_"* | *" --crate-type proc-macro "*) exec "$@" ;;
*" --crate-name ___ "*) exec "$@" ;; # Cargo asks for the compiler's settings.
esac
exec "$@" -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1 -Cdebug-assertions --cfg=fuzzing
