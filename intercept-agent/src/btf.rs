//! Reads the types of the running kernel from their BTF: offsets of struct members and values of enums.
//!
//! The format is that of <https://docs.kernel.org/bpf/btf.html>: a header, the types, each a record of fixed size with a
//! number of elements that depends on its kind, and their names. Some megabytes are read for a dozen answers, so the types
//! are neither copied nor indexed by name. A loader's reader takes 20 MB and ten times as long.

use std::{io, ops::Range, path::Path};

use aya_obj::generated::{
    BTF_KIND_ARRAY, BTF_KIND_CONST, BTF_KIND_DATASEC, BTF_KIND_DECL_TAG, BTF_KIND_ENUM, BTF_KIND_ENUM64,
    BTF_KIND_FUNC, BTF_KIND_FUNC_PROTO, BTF_KIND_INT, BTF_KIND_STRUCT, BTF_KIND_TYPEDEF, BTF_KIND_UNION,
    BTF_KIND_VAR, BTF_KIND_VOLATILE,
};

const MAGIC: u16 = 0xeb9f;
/// Size in bytes of a type without its elements: name, info, and size or type.
const TYPE: usize = 12;
/// Size in bytes of a member of a struct: name, type, offset in bits.
const MEMBER: usize = 12;
/// Nested types that are followed, at most. The kernel's are a dozen deep.
const DEPTH: u32 = 32;

/// The types of a kernel.
pub(crate) struct Btf {
    data: Vec<u8>,
    strings: Range<usize>,
    /// Where each type begins, by its id. The first has the id 1.
    types: Vec<u32>,
}

/// A type of [`Btf`].
#[derive(Clone, Copy)]
struct BtfType {
    at: usize,
    name: u32,
    kind: u32,
    /// Whether members of a struct may be bit fields.
    has_bit_fields: bool,
    /// Number of elements.
    len: usize,
    /// The id of another type, for the kinds that refer to one.
    refers_to: u32,
}

impl Btf {
    /// Reads a file like `/sys/kernel/btf/vmlinux`.
    ///
    /// # Errors
    /// If it cannot be read, or is not BTF of this machine's byte order.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let data = std::fs::read(path)?;
        Self::parse(data).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "this is not BTF"))
    }

    fn parse(data: Vec<u8>) -> Option<Self> {
        let magic = u16::from_ne_bytes(data.get(..2)?.try_into().ok()?);
        if magic != MAGIC {
            return None;
        }
        // The header: magic, version, flags, its length, and offset and length of types and strings.
        let [header, type_at, type_len, string_at, string_len] = [4, 8, 12, 16, 20].map(|at| word(&data, at));
        let section = |at: Option<u32>, len: Option<u32>| {
            let start = header?.checked_add(at?)? as usize;
            let section = start..start.checked_add(len? as usize)?;
            data.get(section.clone()).map(|_| section)
        };
        let (of_types, strings) = (section(type_at, type_len)?, section(string_at, string_len)?);
        let mut btf = Self { data, strings, types: Vec::new() };
        let mut at = of_types.start;
        while at < of_types.end {
            btf.types.push(u32::try_from(at).ok()?);
            at += TYPE + btf.at(at)?.elements()?;
        }
        Some(btf)
    }

    /// Returns the offset in bytes of a member of the struct with this name. The path of a member of a member has dots.
    /// Members of anonymous structs and unions are found too.
    pub(crate) fn offset_of(&self, name: &str, path: &str) -> Option<u32> {
        let mut named = self.named(name).filter(|ty| matches!(ty.kind, BTF_KIND_STRUCT | BTF_KIND_UNION));
        named.find_map(|ty| self.offset_in(ty, path, DEPTH))
    }

    /// Whether an enum with this name has this value.
    pub(crate) fn has_enumerator(&self, name: &str, value: &str) -> bool {
        let size = |ty: &BtfType| if ty.kind == BTF_KIND_ENUM64 { 12 } else { 8 };
        let mut named = self.named(name).filter(|ty| matches!(ty.kind, BTF_KIND_ENUM | BTF_KIND_ENUM64));
        named.any(|ty| {
            (0..ty.len).any(|index| {
                word(&self.data, ty.at + TYPE + index * size(&ty))
                    .is_some_and(|name| self.is_named(name, value))
            })
        })
    }

    /// The id of the struct with this name.
    pub(crate) fn struct_id(&self, name: &str) -> Option<u32> {
        self.id(name, BTF_KIND_STRUCT)
    }

    /// The id of the function with this name. Besides those that programs may call, BTF has many others.
    pub(crate) fn function_id(&self, name: &str) -> Option<u32> {
        self.id(name, BTF_KIND_FUNC)
    }

    fn id(&self, name: &str, kind: u32) -> Option<u32> {
        let is_it = |ty: BtfType| ty.kind == kind && self.is_named(ty.name, name);
        let index = self.types.iter().position(|&at| self.at(at as usize).is_some_and(is_it))?;
        u32::try_from(index + 1).ok()
    }

    fn named(&self, name: &str) -> impl Iterator<Item = BtfType> {
        self.types
            .iter()
            .filter_map(|&at| self.at(at as usize))
            .filter(move |ty| self.is_named(ty.name, name))
    }

    fn at(&self, at: usize) -> Option<BtfType> {
        let [name, info, refers_to] = [0, 4, 8].map(|offset| word(&self.data, at + offset));
        let info = info?;
        Some(BtfType {
            at,
            name: name?,
            kind: info >> 24 & 0x1f,
            has_bit_fields: info >> 31 != 0,
            len: (info & 0xffff) as usize,
            refers_to: refers_to?,
        })
    }

    fn is_named(&self, offset: u32, name: &str) -> bool {
        let Some(rest) = self.data[self.strings.clone()].get(offset as usize..) else { return false };
        rest.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    fn offset_in(&self, ty: BtfType, path: &str, depth: u32) -> Option<u32> {
        let depth = depth.checked_sub(1)?;
        let (member, rest) = path.split_once('.').map_or((path, None), |(member, rest)| (member, Some(rest)));
        (0..ty.len).find_map(|index| {
            let at = ty.at + TYPE + index * MEMBER;
            let [name, id, bits] = [0, 4, 8].map(|offset| word(&self.data, at + offset));
            let (name, bits) = (name?, bits?);
            let found = self.is_named(name, member);
            let inside = match rest {
                None if found => Some(0),
                Some(rest) if found => self.offset_in(self.aggregate(id?)?, rest, depth),
                _ if self.is_named(name, "") => self.offset_in(self.aggregate(id?)?, path, depth),
                _ => None,
            };
            let bits = if ty.has_bit_fields { bits & 0xff_ffff } else { bits };
            inside.map(|inside| inside + bits / 8)
        })
    }

    /// Returns the struct or union that an id stands for, without typedefs and qualifiers.
    fn aggregate(&self, mut id: u32) -> Option<BtfType> {
        for _ in 0..DEPTH {
            let ty = self.at(*self.types.get(id.checked_sub(1)? as usize)? as usize)?;
            match ty.kind {
                BTF_KIND_STRUCT | BTF_KIND_UNION => return Some(ty),
                BTF_KIND_TYPEDEF | BTF_KIND_CONST | BTF_KIND_VOLATILE => id = ty.refers_to,
                _ => return None,
            }
        }
        None
    }
}

impl BtfType {
    /// Size in bytes of what follows the type. `None` for a kind that this file does not know.
    fn elements(&self) -> Option<usize> {
        Some(match self.kind {
            BTF_KIND_INT | BTF_KIND_VAR | BTF_KIND_DECL_TAG => 4,
            BTF_KIND_ARRAY => 12,
            BTF_KIND_STRUCT | BTF_KIND_UNION | BTF_KIND_DATASEC | BTF_KIND_ENUM64 => 12 * self.len,
            BTF_KIND_ENUM | BTF_KIND_FUNC_PROTO => 8 * self.len,
            1..=19 => 0,
            _ => return None,
        })
    }
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests;
