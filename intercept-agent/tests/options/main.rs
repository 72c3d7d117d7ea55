//! The command line of istio-iptables.

mod pod;
mod refusals;
mod round_trip;
mod settings;
