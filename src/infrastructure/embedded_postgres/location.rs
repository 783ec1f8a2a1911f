//! Chooses where a private server keeps its files and its socket, out of reach of other local users.

use std::fs::{self, DirBuilder, Permissions};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use tracing::info;

use super::account::Account;

/// The longest socket path that every system accepts (Linux: 107 bytes, macOS: 103).
const SOCKET_PATH_BYTES_MAX: usize = 103;

/// The name that the server gives its socket; the number is its port.
pub(super) const SOCKET_NAME: &str = ".s.PGSQL.5432";

/// The directories of one private server.
#[derive(Debug, Clone)]
pub(super) struct Location {
    /// Holds the data, the log and the locks; only the server's account may enter it.
    pub(super) directory: PathBuf,
    /// Holds the socket: `directory`, unless the socket's path would be too long there.
    pub(super) socket_directory: PathBuf,
    pub(super) account: Account,
}

impl Location {
    /// Chooses the directories of the server that is wanted in `wanted`, and creates them.
    ///
    /// Root may ask for a directory that the unprivileged account cannot reach. Then another directory, whose name
    /// is derived from `wanted`, stands in for it: in `/var/lib` if the server is durable, since systems delete
    /// old files from `/var/tmp`.
    pub(super) fn prepare(wanted: &Path, durable: bool) -> Result<Self> {
        let wanted = absolute(wanted)?;
        ensure!(
            !wanted.as_os_str().as_bytes().contains(&b'\n'),
            "PostgreSQL does not accept a path that contains a line break"
        );
        let account = Account::for_directory(&wanted)?;
        let parent = wanted.parent().unwrap_or(Path::new("/"));
        let directory = if account.may_enter(parent)? {
            make_own(&wanted, account)?;
            wanted
        } else {
            let elsewhere = stand_in(stand_ins(durable), &wanted);
            info!(
                "the private PostgreSQL runs as user {}, which may not enter {}; its files are in {} instead",
                account.uid(),
                parent.display(),
                elsewhere.display()
            );
            make_private(&elsewhere, account)?;
            elsewhere
        };
        let socket_directory = socket_directory(&directory);
        if socket_directory != directory {
            make_private(&socket_directory, account)?;
        }
        Ok(Self { directory, socket_directory, account })
    }

    /// Where the files of the server wanted in `wanted` would be; `None` if even the parent directory is missing.
    /// Creates nothing.
    pub(super) fn find(wanted: &Path, durable: bool) -> Result<Option<PathBuf>> {
        let path =
            std::path::absolute(wanted).with_context(|| format!("{} is not a path", wanted.display()))?;
        if !path.parent().is_some_and(Path::exists) {
            return Ok(None);
        }
        let wanted = absolute(&path)?;
        let account = Account::for_directory(&wanted)?;
        let parent = wanted.parent().unwrap_or(Path::new("/"));
        Ok(Some(if account.may_enter(parent)? { wanted } else { stand_in(stand_ins(durable), &wanted) }))
    }

    pub(super) fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.socket_directory.join(SOCKET_NAME)
    }
}

/// Makes the path absolute and resolves symbolic links, so that two names of one directory become equal.
fn absolute(wanted: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(wanted).with_context(|| format!("{} is not a path", wanted.display()))?;
    if let Ok(path) = fs::canonicalize(&path) {
        return Ok(path);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(path) };
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let parent = fs::canonicalize(parent).with_context(|| format!("cannot resolve {}", parent.display()))?;
    Ok(parent.join(name))
}

/// The parent of the directories that stand in for others.
fn stand_ins(durable: bool) -> &'static Path {
    Path::new(if durable { "/var/lib" } else { "/var/tmp" })
}

/// The directory in `base` that stands in for `path`; the same path always gets the same one.
fn stand_in(base: &Path, path: &Path) -> PathBuf {
    base.join(format!("webhook-processor-{:016x}", fnv1a(path.as_os_str().as_bytes())))
}

fn socket_directory(directory: &Path) -> PathBuf {
    if directory.join(SOCKET_NAME).as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
        directory.to_path_buf()
    } else {
        stand_in(Path::new("/tmp"), directory)
    }
}

/// The 64-bit FNV-1a hash: unlike the standard library's, it is the same in every release.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Creates the directory that was asked for. An existing one is closed to other users if it holds a server's data, or
/// is empty; otherwise it is refused.
fn make_own(path: &Path, account: Account) -> Result<()> {
    if path.is_dir() {
        let entries = fs::read_dir(path)
            .with_context(|| format!("cannot read {}; does it belong to another user?", path.display()))?;
        let names: Vec<_> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        let foreign = names.iter().find(|name| !may_be_left_behind(name));
        if let Some(name) = foreign.filter(|_| !path.join("data").exists()) {
            bail!("cannot use {} for a private PostgreSQL: it already holds {name}", path.display());
        }
        fs::set_permissions(path, Permissions::from_mode(0o700))
            .with_context(|| format!("cannot close {} to other users", path.display()))?;
    }
    make_private(path, account)
}

/// Whether an interrupted first start may leave a file of this name.
fn may_be_left_behind(name: &str) -> bool {
    ["log", "start.lock", "users.lock"].contains(&name) || name.starts_with("initdb-")
}

/// Creates a directory that only `account` may enter, or checks that the existing one is private to it.
///
/// In a parent that everybody may write to, another user could have created it first.
fn make_private(path: &Path, account: Account) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return account.give(path),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).with_context(|| format!("cannot create {}", path.display())),
    }
    let found = fs::symlink_metadata(path)
        .with_context(|| format!("cannot read the permissions of {}", path.display()))?;
    ensure!(
        found.is_dir() && account.made_by(found.uid()) && found.mode() & 0o777 == 0o700,
        "{} should be a directory that only user {} may enter, but is not; inspect it, then remove it",
        path.display(),
        account.uid()
    );
    account.give(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_published_one() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn a_stand_in_is_stable_and_differs_from_path_to_path() {
        let one = stand_in(Path::new("/var/tmp"), Path::new("/root/a"));
        assert_eq!(one, stand_in(Path::new("/var/tmp"), Path::new("/root/a")));
        assert_ne!(one, stand_in(Path::new("/var/tmp"), Path::new("/root/b")));
        assert!(one.starts_with("/var/tmp"));
    }

    #[test]
    fn the_socket_lives_in_the_directory_unless_its_path_is_too_long() {
        let name_bytes = "/".len() + SOCKET_NAME.len();
        for (bytes, inside) in
            [(20, true), (SOCKET_PATH_BYTES_MAX - name_bytes, true), (104 - name_bytes, false)]
        {
            let directory = PathBuf::from(format!("/{}", "x".repeat(bytes - 1)));
            assert_eq!(socket_directory(&directory) == directory, inside, "{bytes}");
        }
        let far = socket_directory(Path::new(&format!("/{}", "x".repeat(200))));
        assert!(far.join(SOCKET_NAME).as_os_str().len() <= SOCKET_PATH_BYTES_MAX);
    }
}
