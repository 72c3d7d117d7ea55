//! `run`: one pod in the foreground.

use anyhow::{Context as _, Result};
use intercept_agent::node::Node;

use super::attach::Request;
use crate::cli::AttachArgs;

pub(super) fn run(args: AttachArgs) -> Result<()> {
    super::check::require_privileges()?;
    let request = Request::of(args)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(follow(request))
}

async fn follow(request: Request) -> Result<()> {
    let _ = (request, Node::open);
    Ok(())
}
