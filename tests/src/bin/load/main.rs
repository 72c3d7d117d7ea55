//! Many connections, one way or the other; see `tests::load`.

mod accept;
mod dial;

use anyhow::{Context, Result};
use tests::load::LoadRole;

fn main() -> Result<()> {
    let role = std::env::args().nth(1).context("a load process needs a role")?;
    match serde_json::from_str(&role).context("understanding the role")? {
        LoadRole::Accept(accept) => accept::accept(&accept),
        LoadRole::Dial(dial) => dial::dial(dial),
    }
}
