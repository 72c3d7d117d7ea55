//! Loads a compiled object: its types, maps and constants, and each program when it is asked for.
//!
//! aya's loader first reads all types of the running kernel, for relocations that these objects do not have. That is most
//! of its time without the verifier, and 20 MB. This one takes from aya what the objects need: the reader of objects, the
//! relocations between programs and maps, and the creation of maps.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::maps::{MapData, MapError};
use aya_obj::{
    EbpfSectionKind, Object,
    btf::BtfFeatures,
    generated::{BPF_ALU64, BPF_CALL, BPF_JMP, BPF_K, BPF_MOV, BPF_PSEUDO_KFUNC_CALL},
};

use crate::sys::{self, ProgramKind, ProgramLoad, Rejection};

/// Why an object cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The object cannot be read, or lacks a constant, or a program uses a map that it does not have.
    #[error("reading the built-in object: the build is inconsistent")]
    Object(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernel refused the types of the programs.
    #[error("loading the types (BTF) of the programs")]
    Types(#[source] Rejection),
    /// A map cannot be created.
    #[error("creating map {name}")]
    Map {
        /// Name of the map.
        name: String,
        /// The error from aya.
        #[source]
        source: Box<MapError>,
    },
    /// A map cannot be pinned or filled.
    #[error("{action} map {name}")]
    Call {
        /// The operation.
        action: &'static str,
        /// Name of the map.
        name: String,
        /// The error from the kernel.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a program.
    #[error("loading program {name}")]
    Program {
        /// Name of the program.
        name: &'static str,
        /// The error from the kernel, with the end of the verifier's log.
        #[source]
        source: Rejection,
    },
    /// The object has no program or map with this name.
    #[error("the built-in object has no {0}: the build is inconsistent")]
    Absent(&'static str),
}

fn inconsistent(error: impl std::error::Error + Send + Sync + 'static) -> LoadError {
    LoadError::Object(error.into())
}

/// How an object is loaded.
#[derive(Clone, Copy)]
pub struct LoadOptions<'a> {
    /// Directory in bpffs in which maps are pinned.
    pub pins: &'a Path,
    /// Maps that are opened from their pins; those without are created and pinned. Other maps live with the programs.
    pub pinned: &'a [&'static str],
    /// Values of constants, by name, in native byte order.
    pub constants: &'a [(&'static str, &'a [u8])],
    /// Numbers of entries that differ from those of the object, by map.
    pub sizes: &'a [(&'static str, u32)],
}

/// An object with its maps. Its programs can be loaded, from several threads at once.
pub struct Loaded {
    object: Object,
    btf: OwnedFd,
    maps: HashMap<String, OwnedFd>,
}

/// The features of the kernel's BTF on which the types of the object may depend. All kernels that have the programs' hooks
/// have these; what is newer is replaced by aya with something older.
const BTF_FEATURES: BtfFeatures = {
    let (func, func_global, datasec, float) = (true, true, true, true);
    let (datasec_zero, decl_tag, type_tag, enum64) = (false, false, false, false);
    BtfFeatures::new(func, func_global, datasec, datasec_zero, float, decl_tag, type_tag, enum64)
};

impl Loaded {
    /// Reads an object, creates the maps that are missing, and relocates the programs.
    pub fn new(object: &[u8], options: LoadOptions<'_>) -> Result<Self, LoadError> {
        let mut object = Object::parse(object).map_err(inconsistent)?;
        let constants = options.constants.iter().map(|(name, value)| (*name, (*value, true)));
        object.patch_map_data(constants.collect()).map_err(inconsistent)?;
        let types = object.fixup_and_sanitize_btf(&BTF_FEATURES).map_err(inconsistent)?;
        let types = types.ok_or(LoadError::Absent("types"))?.to_bytes();
        let btf = sys::load_btf(&types).map_err(LoadError::Types)?;
        let definitions = std::mem::take(&mut object.maps);
        let mut maps = HashMap::new();
        for (name, definition) in &definitions {
            maps.insert(name.clone(), map(name, definition, btf.as_fd(), options)?);
        }
        let text: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
        let descriptors = definitions
            .iter()
            .filter_map(|(name, definition)| Some((name.as_str(), maps.get(name)?.as_raw_fd(), definition)));
        object.relocate_maps(descriptors, &text).map_err(inconsistent)?;
        object.relocate_calls(&text).map_err(inconsistent)?;
        Ok(Self { object, btf, maps })
    }

    /// A map of the object.
    pub fn map(&self, name: &'static str) -> Result<BorrowedFd<'_>, LoadError> {
        self.maps.get(name).map(OwnedFd::as_fd).ok_or(LoadError::Absent(name))
    }

    /// Replaces calls of a helper, which no kernel has, with calls of a function of the kernel. Without a function, calls
    /// give 0; the programs do not reach them.
    #[expect(clippy::cast_possible_truncation, reason = "the codes of instructions have eight bits")]
    pub fn replace_helper(&mut self, helper: u32, function: Option<u32>) {
        const CALL: u8 = (BPF_JMP | BPF_CALL) as u8;
        const SET_R0: u8 = (BPF_ALU64 | BPF_MOV | BPF_K) as u8;
        let instructions = self.object.functions.values_mut().flat_map(|function| &mut function.instructions);
        for instruction in instructions {
            if instruction.code != CALL
                || instruction.src_reg() != 0
                || instruction.imm != helper.cast_signed()
            {
                continue;
            }
            match function {
                Some(id) => {
                    instruction.set_src_reg(BPF_PSEUDO_KFUNC_CALL as u8);
                    instruction.imm = id.cast_signed();
                }
                None => {
                    instruction.code = SET_R0;
                    instruction.imm = 0;
                }
            }
        }
    }

    /// Has the kernel verify a program.
    pub fn load(&self, name: &'static str, kind: ProgramKind) -> Result<OwnedFd, LoadError> {
        let program = self.object.programs.get(name).ok_or(LoadError::Absent(name))?;
        let function = self.object.functions.get(&program.function_key()).ok_or(LoadError::Absent(name))?;
        let load = ProgramLoad {
            kind,
            name,
            instructions: &function.instructions,
            btf: self.btf.as_fd(),
            functions: &function.func_info.func_info,
            lines: &function.line_info.line_info,
        };
        load.load().map_err(|source| LoadError::Program { name, source })
    }
}

/// Opens a map from its pin, or creates it.
fn map(
    name: &str,
    definition: &aya_obj::Map,
    btf: BorrowedFd<'_>,
    options: LoadOptions<'_>,
) -> Result<OwnedFd, LoadError> {
    let failed = |action| move |source| LoadError::Call { action, name: name.to_owned(), source };
    let pin = options.pinned.contains(&name).then(|| options.pins.join(name));
    if let Some(Ok(pinned)) = pin.as_deref().map(sys::open_pin) {
        return Ok(pinned);
    }
    let mut definition = definition.clone();
    if let Some((_, size)) = options.sizes.iter().find(|(map, _)| *map == name) {
        definition.set_max_entries(*size);
    }
    let (kind, data) = (definition.section_kind(), definition.data().to_vec());
    let created = MapData::create(definition, name, Some(btf))
        .map_err(|source| LoadError::Map { name: name.to_owned(), source: Box::new(source) })?;
    let map = created.fd().as_fd().try_clone_to_owned().map_err(failed("keeping"))?;
    if !data.is_empty() {
        sys::write_first(map.as_fd(), &data).map_err(failed("filling"))?;
    }
    if kind == EbpfSectionKind::Rodata {
        sys::freeze(map.as_fd()).map_err(failed("freezing"))?;
    }
    if let Some(pin) = &pin {
        sys::pin(map.as_fd(), pin).map_err(failed("pinning"))?;
    }
    Ok(map)
}
