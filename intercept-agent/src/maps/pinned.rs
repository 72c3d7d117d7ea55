//! A map that is opened when it is used first: a pin costs three system calls, and most commands use few of the maps.

use std::{
    cell::OnceCell,
    path::{Path, PathBuf},
};

use aya::maps::{Map, MapData, MapError};

use super::{MapsError, open};

/// A pinned map, which may not be open yet.
pub(super) struct Pinned<T> {
    dir: PathBuf,
    name: &'static str,
    wrap: fn(MapData) -> Map,
    opened: OnceCell<T>,
}

impl<T: TryFrom<Map, Error = MapError>> Pinned<T> {
    /// The map `name` in `dir`, of the kind that `wrap` makes.
    pub(super) fn new(dir: &Path, name: &'static str, wrap: fn(MapData) -> Map) -> Self {
        Self { dir: dir.to_owned(), name, wrap, opened: OnceCell::new() }
    }

    /// The map, opened now unless it is open. Fails if its pin is missing or of another kind.
    pub(super) fn get(&self) -> Result<&T, MapsError> {
        if let Some(opened) = self.opened.get() {
            return Ok(opened);
        }
        let opened = open(&self.dir, self.name, self.wrap)?;
        Ok(self.opened.get_or_init(|| opened))
    }

    /// As [`Self::get`], to change the map.
    pub(super) fn get_mut(&mut self) -> Result<&mut T, MapsError> {
        self.get()?;
        Ok(self.opened.get_mut().expect("was opened"))
    }
}
