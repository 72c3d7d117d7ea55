//! The architectures that the agent is built for.

use clap::ValueEnum;

/// An architecture, with its name in Debian and in container images.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub(crate) enum Architecture {
    /// x86-64
    #[value(alias = "x86_64")]
    Amd64,
    /// 64-bit ARM
    #[value(alias = "aarch64")]
    Arm64,
}

impl Architecture {
    /// The architecture of this machine.
    pub(crate) const HOST: Self = if cfg!(target_arch = "aarch64") { Self::Arm64 } else { Self::Amd64 };

    /// The name in Debian and in container images.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// The Rust target, for which glibc can be linked statically.
    pub(crate) fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// The C compiler that builds for it.
    pub(crate) fn c_compiler(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu-gcc",
            Self::Arm64 => "aarch64-linux-gnu-gcc",
        }
    }

    /// Whether this machine's compilers build for it.
    pub(crate) fn is_host(self) -> bool {
        self == Self::HOST
    }
}
