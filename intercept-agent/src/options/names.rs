//! What a pod's /etc says: the ids of users and groups, and its name servers.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use crate::cgroup::CgroupDir;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

/// More than any list of users or groups has; what is longer is refused rather than read.
const MAX_FILE: u64 = 4 << 20;
/// More than any resolv.conf has.
const MAX_RESOLV_CONF: u64 = 64 << 10;

/// The names a pod knows.
pub trait NameSource {
    /// The id of a user.
    fn user(&self, name: &str) -> io::Result<Option<u32>>;
    /// The id of a group.
    fn group(&self, name: &str) -> io::Result<Option<u32>>;
    /// The text of the pod's resolv.conf.
    fn resolv_conf(&self) -> io::Result<String>;
}

/// [`NameSource`] from the files below a root, such as `/proc/PID/root`.
///
/// Users and groups that are not there are looked up in this host's own files; the servers are the pod's
/// alone. The pod writes these files, so they are opened as seen from its root, where a link cannot lead out.
#[derive(Clone, Debug)]
pub struct EtcFiles {
    root: PathBuf,
    /// Whose they are: of one pod, one file is read at a time.
    owner: String,
}

/// How long a pod's file may take. It may be on a filesystem whose server is in the pod, and never answers.
const PATIENCE: Duration = Duration::from_millis(500);

/// The pods a file of which is being read. One that hangs keeps a thread for as long as its pod likes, but only one.
static READING: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static DONE: Condvar = Condvar::new();

impl EtcFiles {
    /// The files below `root`.
    pub fn below(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        Self { owner: root.display().to_string(), root }
    }

    fn of_pod(cgroup: &CgroupDir) -> Self {
        let first = cgroup.processes().ok().and_then(|pids| pids.first().copied());
        let root = first.map_or_else(|| PathBuf::from("/"), |pid| PathBuf::from(format!("/proc/{pid}/root")));
        Self { root, owner: format!("cgroup {}", cgroup.id()) }
    }

    fn read(&self, root: &Path, file: &'static str, limit: u64) -> io::Result<String> {
        let read = if root == Path::new("/") {
            read_in_root(root, file, limit)
        } else {
            self.read_in_time(root, file, limit)
        };
        read.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", root.join(file).display())))
    }

    /// On a thread of its own, which is left to itself when it takes too long.
    fn read_in_time(&self, root: &Path, file: &'static str, limit: u64) -> io::Result<String> {
        let late = |what: &str| io::Error::new(io::ErrorKind::TimedOut, what.to_owned());
        let reading = READING.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = DONE.wait_timeout_while(reading, PATIENCE, |reading| reading.contains(&self.owner));
        let (mut reading, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !reading.insert(self.owner.clone()) {
            return Err(late(
                "an earlier reading of the pod's files hangs; what serves them must answer first",
            ));
        }
        drop(reading);
        let (owner, root) = (self.owner.clone(), root.to_owned());
        let (answer, answered) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("pod-file".to_owned()).spawn(move || {
            let read = read_in_root(&root, file, limit);
            READING.lock().unwrap_or_else(PoisonError::into_inner).remove(&owner);
            DONE.notify_all();
            // The receiver is gone if it took too long.
            drop(answer.send(read));
        });
        if let Err(error) = thread {
            READING.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.owner);
            return Err(error);
        }
        answered.recv_timeout(PATIENCE).unwrap_or_else(|_| Err(late("the pod's file takes too long to read")))
    }

    /// The third field of the line of `name` in `file`, below the root or else here.
    fn id(&self, file: &'static str, name: &str) -> io::Result<Option<u32>> {
        let host = Path::new("/");
        let roots = std::iter::once(self.root.as_path()).chain((self.root != host).then_some(host));
        for root in roots {
            match self.read(root, file, MAX_FILE) {
                Ok(text) => {
                    if let Some(id) = id_of(&text, name) {
                        return Ok(Some(id));
                    }
                }
                // An image without users has no such file.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

impl NameSource for EtcFiles {
    fn user(&self, name: &str) -> io::Result<Option<u32>> {
        self.id("etc/passwd", name)
    }

    fn group(&self, name: &str) -> io::Result<Option<u32>> {
        self.id("etc/group", name)
    }

    fn resolv_conf(&self) -> io::Result<String> {
        self.read(&self.root, "etc/resolv.conf", MAX_RESOLV_CONF)
    }
}

/// The files of the pod with this cgroup, below the root of its first process; of this machine if nothing runs in it. The
/// processes are listed when the first name is looked up.
pub struct PodFiles<'a> {
    cgroup: &'a CgroupDir,
    files: OnceCell<EtcFiles>,
}

impl<'a> PodFiles<'a> {
    /// Looks nothing up yet.
    pub fn of(cgroup: &'a CgroupDir) -> Self {
        Self { cgroup, files: OnceCell::new() }
    }

    /// Whether a name was looked up.
    pub fn is_used(&self) -> bool {
        self.files.get().is_some()
    }

    fn files(&self) -> &EtcFiles {
        self.files.get_or_init(|| EtcFiles::of_pod(self.cgroup))
    }
}

impl NameSource for PodFiles<'_> {
    fn user(&self, name: &str) -> io::Result<Option<u32>> {
        self.files().user(name)
    }

    fn group(&self, name: &str) -> io::Result<Option<u32>> {
        self.files().group(name)
    }

    fn resolv_conf(&self) -> io::Result<String> {
        self.files().resolv_conf()
    }
}

/// The id of `name` in the text of a passwd or group file: `name:password:id:...`.
fn id_of(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

fn read_in_root(root: &Path, file: &str, limit: u64) -> io::Result<String> {
    let directory =
        rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // NONBLOCK: a FIFO in the file's place must not stop us.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = rustix::fs::openat2(&directory, file, flags, Mode::empty(), resolve)?;
    read_text(File::from(file), limit)
}

/// The text of a resolv.conf anywhere on this host.
pub(super) fn read_resolv_conf(path: &str) -> io::Result<String> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    read_text(File::from(file), MAX_RESOLV_CONF)
}

/// The text of a regular file; what is not UTF-8 in it is replaced.
fn read_text(file: File, limit: u64) -> io::Result<String> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    // With room for the whole file and its end, two reads are enough.
    let expected = usize::try_from(metadata.len().min(limit)).map_or(0, |len| len + 1);
    let mut bytes = Vec::with_capacity(expected);
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > limit) {
        let text = format!("it is longer than {limit} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::symlink;

    use super::*;

    fn pod() -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        fs::create_dir(root.path().join("etc")).expect("etc");
        root
    }

    #[test]
    fn finds_ids_by_whole_names() {
        let text = "root:x:0:0:r:/:/bin/sh\nistio-proxy-x:x:1:1::/:\n\nbroken\nshort:x\nodd:x:many:1\nistio-proxy:x:1337:1338::/:\n";
        for (name, id) in [
            ("root", Some(0)),
            ("istio-proxy", Some(1337)),
            ("istio", None),
            ("short", None),
            ("odd", None),
            ("", None),
        ] {
            assert_eq!(id_of(text, name), id, "{name}");
        }
    }

    #[test]
    fn looks_below_the_root_and_then_here() {
        let root = pod();
        fs::write(root.path().join("etc/passwd"), "root:x:77:0::/:\napp:x:1001:1::/:\n").expect("passwd");
        let names = EtcFiles::below(root.path());
        assert_eq!(names.user("app").expect("read"), Some(1001));
        assert_eq!(names.user("root").expect("read"), Some(77), "the pod's own files come first");
        assert_eq!(names.group("root").expect("read"), Some(0), "this host's file is the fallback");
        assert_eq!(names.user("no such user").expect("read"), None);
    }

    #[test]
    fn follows_the_root_of_a_process() {
        let names = EtcFiles::below(format!("/proc/{}/root", std::process::id()));
        assert_eq!(names.user("root").expect("read"), Some(0));
        let error = EtcFiles::below("/proc/0/root").resolv_conf().expect_err("no such process").to_string();
        assert!(error.starts_with("/proc/0/root/etc/resolv.conf: "), "{error}");
    }

    #[test]
    fn a_link_stays_below_the_root() {
        let root = pod();
        fs::write(root.path().join("etc/real"), "app:x:5:5::/:\n").expect("real");
        symlink("/etc/real", root.path().join("etc/passwd")).expect("link");
        symlink("../../../../../../../../etc/hostname", root.path().join("etc/resolv.conf")).expect("link");
        let names = EtcFiles::below(root.path());
        assert_eq!(names.user("app").expect("read"), Some(5));
        assert_eq!(names.resolv_conf().expect_err("this host's file").kind(), io::ErrorKind::NotFound);
    }

    /// A filesystem whose server never answers.
    struct Silent {
        folder: tempfile::TempDir,
        _server: File,
    }

    impl Silent {
        fn mount() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let server = File::options().read(true).write(true).open("/dev/fuse").expect("FUSE");
            let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
            let options = std::ffi::CString::new(options).expect("text");
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("silent", folder.path(), "fuse", flags, options.as_c_str())
                .expect("mounted");
            Self { folder, _server: server }
        }
    }

    impl Drop for Silent {
        fn drop(&mut self) {
            use rustix::mount::{UnmountFlags, unmount};
            // By force, so that who waits for an answer gets an error.
            unmount(self.folder.path(), UnmountFlags::FORCE | UnmountFlags::DETACH).expect("unmounted");
        }
    }

    #[test]
    fn a_file_that_is_never_served_is_given_up() {
        let (silent, other) = (Silent::mount(), pod());
        let names = EtcFiles::below(silent.folder.path());
        let started = std::time::Instant::now();
        let error = names.resolv_conf().expect_err("no answer");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        assert!(error.to_string().contains("etc/resolv.conf: the pod's file takes too long"), "{error}");
        let threads = || {
            let tasks = fs::read_dir("/proc/self/task").expect("threads").flatten();
            let name = |task: &fs::DirEntry| fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            tasks.filter(|task| name(task).trim() == "pod-file").count()
        };
        let before = threads();
        for _ in 0..3 {
            let error = names.user("app").expect_err("no answer");
            assert!(error.to_string().contains("an earlier reading of the pod's files hangs"), "{error}");
        }
        assert_eq!(threads(), before, "no other thread hangs");
        assert!(started.elapsed() < 6 * PATIENCE, "{:?}", started.elapsed());
        // Another pod's files are read meanwhile.
        fs::write(other.path().join("etc/passwd"), "app:x:5:5::/:\n").expect("passwd");
        assert_eq!(EtcFiles::below(other.path()).user("app").expect("read"), Some(5));
    }

    #[test]
    fn refuses_what_is_no_file() {
        let root = pod();
        fs::create_dir(root.path().join("etc/passwd")).expect("folder");
        rustix::fs::mknodat(
            CWD,
            root.path().join("etc/resolv.conf"),
            rustix::fs::FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .expect("fifo");
        let names = EtcFiles::below(root.path());
        assert!(names.user("app").expect_err("a folder").to_string().contains("etc/passwd"));
        assert!(names.resolv_conf().expect_err("a fifo").to_string().contains("not a regular file"));
        let huge = File::create(root.path().join("etc/group")).expect("file");
        huge.set_len(MAX_FILE + 1).expect("grow");
        let error = names.group("app").expect_err("too long").to_string();
        assert!(error.contains("longer than 4194304 bytes"), "{error}");
        fs::remove_file(root.path().join("etc/resolv.conf")).expect("removed");
        let resolv_conf = File::create(root.path().join("etc/resolv.conf")).expect("file");
        resolv_conf.set_len(MAX_RESOLV_CONF).expect("grow");
        names.resolv_conf().expect("just fits");
        resolv_conf.set_len(MAX_RESOLV_CONF + 1).expect("grow");
        let error = names.resolv_conf().expect_err("too long").to_string();
        assert!(error.contains("longer than 65536 bytes"), "{error}");
    }
}
