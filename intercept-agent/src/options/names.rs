//! What a pod's /etc says: the ids of users and groups, and its name servers.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

/// More than any list of users or groups has; what is longer is refused rather than read.
const MAX_FILE: u64 = 4 << 20;
/// More than any resolv.conf has.
const MAX_RESOLV_CONF: u64 = 64 << 10;

/// The names a pod knows.
pub trait Names {
    /// The id of a user.
    fn user(&self, name: &str) -> io::Result<Option<u32>>;
    /// The id of a group.
    fn group(&self, name: &str) -> io::Result<Option<u32>>;
    /// The text of the pod's resolv.conf.
    fn resolv_conf(&self) -> io::Result<String>;
}

/// [`Names`] from the files below a root, such as `/proc/PID/root`.
///
/// Users and groups that are not there are looked up in this host's own files; the servers are the pod's
/// alone. The pod writes these files, so they are opened as seen from its root, where a link cannot lead out.
#[derive(Clone, Debug)]
pub struct EtcFiles {
    root: PathBuf,
}

impl EtcFiles {
    /// The files below `root`.
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The third field of the line of `name` in `file`, below the root or else here.
    fn id(&self, file: &str, name: &str) -> io::Result<Option<u32>> {
        let host = Path::new("/");
        let roots = std::iter::once(self.root.as_path()).chain((self.root != host).then_some(host));
        for root in roots {
            match read_below(root, file, MAX_FILE) {
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

impl Names for EtcFiles {
    fn user(&self, name: &str) -> io::Result<Option<u32>> {
        self.id("etc/passwd", name)
    }

    fn group(&self, name: &str) -> io::Result<Option<u32>> {
        self.id("etc/group", name)
    }

    fn resolv_conf(&self) -> io::Result<String> {
        read_below(&self.root, "etc/resolv.conf", MAX_RESOLV_CONF)
    }
}

/// The id of `name` in the text of a passwd or group file: `name:password:id:...`.
fn id_of(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

fn read_below(root: &Path, file: &str, limit: u64) -> io::Result<String> {
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", root.join(file).display()));
    read_in_root(root, file, limit).map_err(named)
}

fn read_in_root(root: &Path, file: &str, limit: u64) -> io::Result<String> {
    let directory =
        rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // NONBLOCK: a FIFO in the file's place must not stop us.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat2(&directory, file, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    read_text(File::from(file), limit)
}

/// The text of a resolv.conf anywhere on this host.
pub(super) fn read_resolv_conf(path: &str) -> io::Result<String> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    read_text(File::from(file), MAX_RESOLV_CONF)
}

/// The text of a regular file; what is not UTF-8 in it is replaced.
fn read_text(file: File, limit: u64) -> io::Result<String> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
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
