//! Many connections, one way or the other; see `tests::swarm`.

mod accept;
mod dial;

use anyhow::{Context, Result};
use tests::swarm::Role;

fn main() -> Result<()> {
    let role = std::env::args().nth(1).context("a swarm needs a role")?;
    match serde_json::from_str(&role).context("understanding the role")? {
        Role::Accept(accept) => accept::accept(&accept),
        Role::Dial(dial) => dial::dial(dial),
    }
}
