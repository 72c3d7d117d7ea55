//! Starts logging as the flags say.

use std::io::IsTerminal as _;

use super::{LogFormat, Logging};

/// Starts logging to standard error.
pub(crate) fn start_logging(logging: &Logging) {
    use tracing_subscriber::EnvFilter;
    // The daemon logs the same errors in fewer words. These targets can be enabled by name.
    let directives = format!("kube_client=off,kube_runtime=off,{}", logging.log);
    let (filter, wrong) = match EnvFilter::try_new(directives) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal());
    match logging.log_format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
    if let Some(error) = wrong {
        tracing::warn!(%error, log = logging.log, "the filter of --log is invalid: logging at level info");
    }
}
