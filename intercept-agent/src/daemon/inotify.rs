//! Watches a folder for changes.

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
    /// Files with these names were written, renamed or removed, or have another owner or mode.
    Names(HashSet<String>),
    /// The folder has another owner or mode, or the kernel dropped events. One of them may have been the end of the watch.
    Everything,
    /// The folder itself was removed or renamed, which ends the watch.
    Gone,
}

impl FolderWatch {
    /// Watches a folder. Must be called in a tokio runtime with io enabled.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let what = WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVED_FROM
            | WatchFlags::DELETE
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        inotify::add_watch(&events, path, what)?;
        // SAFETY: an OwnedFd owns its descriptor, which does not change, until it is dropped.
        let events = unsafe { AsyncFd::register(events) };
        Ok(Self { events: events.map_err(io::Error::from)? })
    }

    /// Waits for changes.
    pub(super) async fn changed(&self) -> io::Result<Changed> {
        let (mut names, mut everything) = (HashSet::new(), false);
        loop {
            let mut ready = self.events.readable().await?;
            let mut space = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(ready.get_inner(), &mut space);
            loop {
                match reader.next() {
                    Ok(event) => {
                        let flags = event.events();
                        if flags
                            .intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::IGNORED)
                        {
                            return Ok(Changed::Gone);
                        }
                        match event.file_name() {
                            Some(name) => names.extend(name.to_str().ok().map(str::to_owned)),
                            None => everything = true,
                        }
                    }
                    Err(Errno::AGAIN) => break,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
            if everything {
                return Ok(Changed::Everything);
            }
            if !names.is_empty() {
                return Ok(Changed::Names(names));
            }
        }
    }
}
