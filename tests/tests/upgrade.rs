//! A new build of the agent puts its programs under the pods that are attached, without a gap.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tests::{
    actor::{Actor, Bind, Dial, Listen, Outcome, Transport, binary},
    testbed::{Ids, Pod, PodSpec},
};

struct Bpffs(tempfile::TempDir);

impl Drop for Bpffs {
    fn drop(&mut self) {
        let unmounted = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
        assert!(unmounted.is_ok() || std::thread::panicking(), "{unmounted:?}");
    }
}

fn programs(bpffs: &Path) -> Vec<String> {
    let version =
        fs::read_dir(bpffs.join("intercept")).expect("a store").next().expect("a layout").expect("an entry");
    let mut names: Vec<String> = fs::read_dir(version.path())
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .filter(|name| name.starts_with("programs-"))
        .collect();
    names.sort();
    names
}

#[test]
fn programs_are_replaced_without_a_gap() {
    let agent = binary::locate("intercept-agent", "INTERCEPT_AGENT").expect("the agent");
    let bpffs = Bpffs(tempfile::tempdir().expect("a folder"));
    let pod = Pod::new(PodSpec::new("upgrade")).expect("a pod");
    let inside = Actor::start(&pod).expect("an actor");
    let bind = Bind::new(Ids::PROXY, SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 15001));
    inside.listen(Listen { name: "outbound".into(), transport: Transport::Tcp, bind }).expect("a proxy");
    let attach = || {
        let output = Command::new(&agent)
            .args(["attach", "-i", "*", "-u", "1337", "--cgroup-path"])
            .arg(pod.cgroup.path())
            .arg("--netns")
            .arg(pod.netns.path())
            .arg("--bpffs")
            .arg(bpffs.0.path())
            .output()
            .expect("the agent starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    assert!(attach().starts_with("attached"));
    let own = programs(bpffs.0.path());
    assert_eq!(own.len(), 1, "{own:?}");

    let to = SocketAddr::from(([10, 96, 0, 10], 80));
    let (stop, dialled) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        // Every connection reaches the proxy and knows where it was going, whatever happens meanwhile.
        let client = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                match inside.dial(Dial::new(Ids::APP, to)).expect("dialled").outcome {
                    Outcome::Answered(answer) => assert_eq!(answer.server, "outbound"),
                    other => panic!("after {}: {other:?}", dialled.load(Ordering::Relaxed)),
                }
                dialled.fetch_add(1, Ordering::Relaxed);
            }
        });
        for other in ["programs-0000000000000001", "programs-0000000000000002"] {
            // As another build would have left them.
            let version = bpffs.0.path().join("intercept").join("v1");
            fs::rename(version.join(&own[0]), version.join(other)).expect("renamed");
            assert!(attach().starts_with("unchanged"));
            assert_eq!(programs(bpffs.0.path()), own, "the other build's are gone");
        }
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = client.join() {
            std::panic::resume_unwind(panic);
        }
    });
    assert!(dialled.load(Ordering::Relaxed) > 20, "too few connections to tell");
    let detached = Command::new(&agent)
        .args(["detach", "--all", "--bpffs"])
        .arg(bpffs.0.path())
        .status()
        .expect("detach");
    assert!(detached.success());
    assert!(!bpffs.0.path().join("intercept").exists());
}
