//! The entry program of `sk_lookup`, of which each pod has an instance. An instance reads the netns cookie from a cell of its
//! own, a map that nothing else uses. So it can be loaded before there is a pod.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
    path::Path,
};

use aya_obj::{Object, generated::bpf_insn};
use intercept_common::{layout::COOKIE_PLACEHOLDER, names};

use super::ProgramError;
use crate::{ids::NetnsCookie, loader::LoadError, objects::LOOKUP, sys};

/// Most instances that are kept ready. Each takes two descriptors and about 12 KiB of the kernel's memory, which is charged
/// to the daemon's cgroup.
const MOST_SPARES: usize = 4;

/// The `sk_lookup` program, relocated for a node's maps, and instances that no pod has yet. Nothing pins these, so the kernel
/// frees them with this process.
pub struct Lookup {
    instructions: Vec<bpf_insn>,
    // Holds the descriptors that the instructions contain as numbers.
    _maps: Vec<OwnedFd>,
    spares: RefCell<Vec<LookupInstance>>,
}

/// A loaded instance, which is not attached. Its cell has no cookie.
struct LookupInstance {
    program: OwnedFd,
    cell: OwnedFd,
}

impl Lookup {
    /// Relocates the program for the maps pinned in `maps`.
    pub fn prepare(maps: &Path) -> Result<Self, ProgramError> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| ProgramError::Instance(error);
        let mut object = Object::parse(LOOKUP).map_err(|e| failed(e.into()))?;
        let program = object.programs.get(names::SK_LOOKUP).ok_or(LoadError::Absent(names::SK_LOOKUP))?;
        let key = program.function_key();
        let definitions = std::mem::take(&mut object.maps);
        let mut opened = HashMap::new();
        for name in definitions.keys() {
            opened.insert(name, sys::open_pin(&maps.join(name)).map_err(|e| failed(e.into()))?);
        }
        let descriptors =
            definitions.iter().map(|(name, map)| (name.as_str(), opened[name].as_raw_fd(), map));
        object.relocate_maps(descriptors, &HashSet::new()).map_err(|e| failed(e.into()))?;
        let function = object.functions.remove(&key).ok_or(LoadError::Absent(names::SK_LOOKUP))?;
        let instructions = function.instructions;
        Ok(Self { instructions, _maps: opened.into_values().collect(), spares: RefCell::default() })
    }

    /// Returns an instance for the namespace with this cookie. It is loaded unless one is ready.
    pub fn load(&self, cookie: NetnsCookie) -> Result<OwnedFd, ProgramError> {
        let spare = self.spares.borrow_mut().pop();
        let LookupInstance { program, cell } = match spare {
            Some(spare) => spare,
            None => self.instance()?,
        };
        // The program holds its cell.
        sys::write_first(cell.as_fd(), &cookie.0.to_ne_bytes()).map_err(ProgramError::InstanceLoad)?;
        Ok(program)
    }

    /// Whether fewer instances are ready than are kept.
    pub fn wants_spares(&self) -> bool {
        self.spares.borrow().len() < MOST_SPARES
    }

    /// Loads an instance for a later pod.
    pub fn load_spare(&self) -> Result<(), ProgramError> {
        let spare = self.instance()?;
        self.spares.borrow_mut().push(spare);
        Ok(())
    }

    fn instance(&self) -> Result<LookupInstance, ProgramError> {
        let cell = sys::create_array("netns_cookie", 8).map_err(ProgramError::InstanceLoad)?;
        let mut instructions = self.instructions.clone();
        if !write_cell(&mut instructions, cell.as_raw_fd()) {
            let why = "the placeholder of the netns cookie is not in the program";
            return Err(ProgramError::Instance(why.into()));
        }
        let program =
            sys::load_sk_lookup(names::SK_LOOKUP, &instructions).map_err(ProgramError::InstanceLoad)?;
        Ok(LookupInstance { program, cell })
    }
}

/// Replaces the placeholder by the address of the cell's value. A 64-bit constant is two instructions, each with one half;
/// of an address in a map, the halves are the map and the offset in its value. False if it is not found.
fn write_cell(instructions: &mut [bpf_insn], cell: RawFd) -> bool {
    const LD_IMM64: u8 = 0x18;
    const PSEUDO_MAP_VALUE: u8 = 2;
    let halves = |value: u64| ((value & 0xffff_ffff) as u32, (value >> 32) as u32);
    let (low, high) = halves(COOKIE_PLACEHOLDER);
    let mut written = false;
    for at in 1..instructions.len() {
        let [first, second] = &mut instructions[at - 1..=at] else { continue };
        if first.code == LD_IMM64
            && first.src_reg() == 0
            && first.imm.cast_unsigned() == low
            && second.imm.cast_unsigned() == high
        {
            first.set_src_reg(PSEUDO_MAP_VALUE);
            first.imm = cell;
            second.imm = 0;
            written = true;
        }
    }
    written
}
