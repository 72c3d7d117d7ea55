//! Command lines and environments: whatever they are, the parser refuses them or makes a configuration of them that,
//! written as options again, is the same.
//!
//! A line of the input is an argument, or a variable if it looks like one.

#![no_main]

use std::{collections::HashMap, io};

use clap::Parser;
use intercept_agent::facade::options::{Config, NameSource, RawOptions};
use libfuzzer_sys::fuzz_target;

#[derive(Parser)]
struct FuzzCommandLine {
    #[command(flatten)]
    raw: RawOptions,
}

/// A pod with one user and one DNS server.
struct FuzzNames;

impl NameSource for FuzzNames {
    fn user(&self, name: &str) -> io::Result<Option<u32>> {
        Ok((name == "app").then_some(1000))
    }

    fn group(&self, name: &str) -> io::Result<Option<u32>> {
        Ok((name == "app").then_some(1001))
    }

    fn resolv_conf(&self) -> io::Result<String> {
        Ok("nameserver 10.96.0.10\n".into())
    }
}

fn parse(arguments: &[String], variables: &HashMap<String, String>) -> Option<Config> {
    let line = std::iter::once("x").chain(arguments.iter().map(String::as_str));
    let raw = FuzzCommandLine::try_parse_from(line).ok()?.raw.read_env(|name| variables.get(name).cloned());
    match raw.validate(&FuzzNames) {
        Ok((config, ..)) => Some(config),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

fuzz_target!(|input: &str| {
    let (mut arguments, mut variables) = (Vec::new(), HashMap::new());
    for line in input.lines() {
        match line.split_once('=') {
            Some((name, value)) if name.starts_with(|c: char| c.is_ascii_uppercase()) => {
                variables.insert(name.to_owned(), value.to_owned());
            }
            _ => arguments.push(line.to_owned()),
        }
    }
    let Some(config) = parse(&arguments, &variables) else { return };
    let written = config.to_env().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let again = parse(&config.to_args(), &written);
    assert_eq!(again.as_ref(), Some(&config), "{:?} {written:?}", config.to_args());
});
