//! The programs load on this kernel.
#[test]
fn loads() {
    let dir = std::path::Path::new("/work/t/bpf");
    std::fs::create_dir_all(dir).unwrap();
    let store = intercept_agent::store::Store::open(dir).unwrap();
    let _lock = store.lock().unwrap();
    store.create(&store.maps()).unwrap();
    store.create(&store.programs()).unwrap();
    let t = std::time::Instant::now();
    let r = intercept_agent::programs::load_shared(&store.maps(), &store.programs());
    println!("shared {:?}", t.elapsed());
    if let Err(e) = &r {
        let mut s: Option<&dyn std::error::Error> = Some(e);
        while let Some(x) = s {
            println!("{x}");
            s = x.source();
        }
    }
    let t = std::time::Instant::now();
    let l = intercept_agent::programs::load_lookup(&store.maps(), 77);
    println!("lookup {:?}", t.elapsed());
    if let Err(e) = &l {
        let mut s: Option<&dyn std::error::Error> = Some(e);
        while let Some(x) = s {
            println!("{x}");
            s = x.source();
        }
    }
    store.remove_all().unwrap();
    r.unwrap();
    l.unwrap();
}
