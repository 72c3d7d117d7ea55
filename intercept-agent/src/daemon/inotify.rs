//! Tells of changes in one folder.

use std::{collections::HashSet, io, mem::MaybeUninit, os::fd::OwnedFd, path::Path};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};
use tokio::io::unix::AsyncFd;

/// A watched folder.
pub(super) struct FolderWatch {
    events: AsyncFd<OwnedFd>,
}

/// What changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Changed {
    /// Files of these names were written, renamed or removed.
    Names(HashSet<String>),
    /// More than the kernel could list.
    Everything,
    /// The folder itself was removed or renamed: the watch has ended.
    Gone,
}

impl FolderWatch {
    /// Watch a folder. To be called within a tokio runtime with io enabled.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let what = WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVED_FROM
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        inotify::add_watch(&events, path, what)?;
        // SAFETY: an OwnedFd keeps its descriptor open, and always the same one, until it is dropped.
        let events = unsafe { AsyncFd::register(events) };
        Ok(Self { events: events.map_err(io::Error::from)? })
    }

    /// Wait for changes.
    pub(super) async fn changed(&self) -> io::Result<Changed> {
        let mut names = HashSet::new();
        loop {
            let mut ready = self.events.readable().await?;
            let mut space = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(ready.get_inner(), &mut space);
            loop {
                match reader.next() {
                    Ok(event) => {
                        let flags = event.events();
                        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                            return Ok(Changed::Everything);
                        }
                        if flags
                            .intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::IGNORED)
                        {
                            return Ok(Changed::Gone);
                        }
                        names
                            .extend(event.file_name().and_then(|name| name.to_str().ok()).map(str::to_owned));
                    }
                    Err(Errno::AGAIN) => break,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
            if !names.is_empty() {
                return Ok(Changed::Names(names));
            }
        }
    }
}
