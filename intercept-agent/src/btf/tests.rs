use super::*;
use crate::btf_offsets::VMLINUX_BTF;

/// BTF of these types and names.
fn btf(types: &[u32], strings: &str) -> Vec<u8> {
    let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let [type_len, string_len] = [types.len(), strings.len()].map(small);
    let mut data = MAGIC.to_ne_bytes().to_vec();
    data.extend([1, 0]);
    for word in [24, 0, type_len, type_len, string_len] {
        data.extend(word.to_ne_bytes());
    }
    data.extend(types);
    data.extend(strings.as_bytes());
    data
}

fn small(number: usize) -> u32 {
    u32::try_from(number).expect("a small number")
}

const fn info(kind: u32, len: u32) -> u32 {
    kind << 24 | len
}

/// int; struct a { int x; const b_t y; struct { int z; }; } with typedef struct b { int :4; int w:4; } b_t; and an enum.
fn example() -> Btf {
    const NAMES: &str = "\0int\0a\0x\0y\0b\0b_t\0w\0z\0e\0E_ONE\0";
    let at = |name: &str| NAMES.find(&format!("\0{name}\0")).map(small).expect("a name") + 1;
    let types = [
        &[at("int"), info(BTF_KIND_INT, 0), 4, 32][..],
        &[at("b"), info(BTF_KIND_STRUCT, 1) | 1 << 31, 4, at("w"), 1, 4 << 24 | 12],
        &[at("b_t"), info(BTF_KIND_TYPEDEF, 0), 2],
        &[0, info(BTF_KIND_CONST, 0), 3],
        &[0, info(BTF_KIND_STRUCT, 1), 4, at("z"), 1, 0],
        &[at("a"), info(BTF_KIND_STRUCT, 3), 16, at("x"), 1, 0, at("y"), 4, 32, 0, 5, 64],
        &[at("e"), info(BTF_KIND_ENUM, 1), 4, at("E_ONE"), 1],
        // No struct, though it has the name of one.
        &[at("x"), info(BTF_KIND_FUNC_PROTO, 1), 1, at("x"), 1],
    ];
    Btf::parse(btf(&types.concat(), NAMES)).expect("BTF")
}

#[test]
fn members_are_found_through_typedefs_and_anonymous_structs() {
    let btf = example();
    for (path, offset) in [("x", Some(0)), ("y", Some(4)), ("y.w", Some(5)), ("z", Some(8)), ("w", None)] {
        assert_eq!(btf.offset_of("a", path), offset, "{path}");
    }
    for (name, path) in [("a", "y.x"), ("a", "x.y"), ("b_t", "w"), ("x", "x"), ("", "z"), ("c", "x")] {
        let expected = (name.is_empty()).then_some(0);
        assert_eq!(btf.offset_of(name, path), expected, "{name} {path}");
    }
    assert!(btf.has_enumerator("e", "E_ONE"));
    assert!(!btf.has_enumerator("e", "E_TWO") && !btf.has_enumerator("a", "E_ONE"));
}

#[test]
fn what_is_damaged_is_refused_or_has_no_members() {
    let whole = example().data;
    for end in 0..whole.len() {
        assert!(Btf::parse(whole[..end].to_vec()).is_none(), "{end} bytes");
    }
    for at in 0..whole.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut data = whole.clone();
            data[at] = value;
            // Whatever it answers, it ends and does not panic.
            let _any = Btf::parse(data).map(|btf| btf.offset_of("a", "y.w"));
        }
    }
}

#[test]
fn a_struct_that_contains_itself_ends() {
    let types = [1, info(BTF_KIND_STRUCT, 1), 4, 0, 1, 0];
    let btf = Btf::parse(btf(&types, "\0a\0")).expect("BTF");
    assert_eq!(btf.offset_of("a", "x"), None);
}

#[test]
fn the_running_kernel_has_these() {
    let btf = Btf::read(Path::new(VMLINUX_BTF)).expect("BTF");
    // The two are unions of others, and the second is in an anonymous struct.
    assert_eq!(btf.offset_of("sock", "__sk_common.skc_family"), btf.offset_of("sock_common", "skc_family"));
    assert_eq!(btf.offset_of("sock_common", "skc_daddr"), Some(0));
    assert_eq!(btf.offset_of("list_head", "prev"), Some(small(size_of::<usize>())));
    assert!(btf.has_enumerator("bpf_func_id", "BPF_FUNC_map_lookup_elem"));
}
