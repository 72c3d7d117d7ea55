//! Deadlines that scale with the machine.

use std::{env, sync::LazyLock, time::Duration};

/// How many times as long as on hardware anything may take; virtual machines set it.
const VARIABLE: &str = "INTERCEPT_SLOWDOWN";

static SLOWDOWN: LazyLock<u32> = LazyLock::new(|| {
    env::var(VARIABLE).map_or(1, |text| {
        text.parse().unwrap_or_else(|error| panic!("{VARIABLE} is {text:?}, which is no number: {error}"))
    })
});

/// A deadline of hardware, for this machine.
#[must_use]
pub fn scaled(deadline: Duration) -> Duration {
    deadline * *SLOWDOWN
}
