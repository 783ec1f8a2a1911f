//! The account that the server runs under: Postgres refuses to run as root.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The accounts that root tries, in this order, to run a server.
const UNPRIVILEGED: [&str; 2] = ["postgres", "nobody"];

/// The user and the group that run the server and own its files.
#[derive(Debug, Clone, Copy)]
pub(super) struct Account {
    uid: u32,
    gid: u32,
    /// Whether this process is root and has to switch to this account.
    from_root: bool,
}

impl Account {
    /// Chooses the account for the server in `directory`: our own, unless we are root.
    ///
    /// Root takes the account of the directory's owner if that is not root, so that it joins a server under the
    /// user who started it. Otherwise it takes `postgres` or `nobody`.
    pub(super) fn for_directory(directory: &Path) -> Result<Self> {
        let uid = ask_id(&["-u"])?.context("`id -u` printed no user id")?;
        if uid != 0 {
            let gid = ask_id(&["-g"])?.context("`id -g` printed no group id")?;
            return Ok(Self { uid, gid, from_root: false });
        }
        match fs::metadata(directory) {
            Ok(metadata) if metadata.uid() != 0 => {
                return Ok(Self { uid: metadata.uid(), gid: metadata.gid(), from_root: true });
            }
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error)
                    .with_context(|| format!("cannot read the owner of {}", directory.display()));
            }
            _ => {}
        }
        for name in UNPRIVILEGED {
            if let (Some(uid), Some(gid)) = (ask_id(&["-u", name])?, ask_id(&["-g", name])?) {
                return Ok(Self { uid, gid, from_root: true });
            }
        }
        bail!(
            "PostgreSQL refuses to run as root, and this machine has neither a user `postgres` nor `nobody`"
        )
    }

    pub(super) fn uid(&self) -> u32 {
        self.uid
    }

    /// Whether a file owned by `uid` was made by this account, or by root on its behalf.
    pub(super) fn made_by(&self, uid: u32) -> bool {
        uid == self.uid || (self.from_root && uid == 0)
    }

    /// Makes `command` run under this account.
    ///
    /// `Command::uid` also drops root's supplementary groups, so only the group of the account remains.
    pub(super) fn run_as<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        if self.from_root { command.uid(self.uid).gid(self.gid) } else { command }
    }

    /// Makes this account the owner of `path`, which we created.
    pub(super) fn give(&self, path: &Path) -> Result<()> {
        if !self.from_root {
            return Ok(());
        }
        chown(path, Some(self.uid), Some(self.gid))
            .with_context(|| format!("cannot give {} to user {}", path.display(), self.uid))
    }

    /// Whether this account may enter `directory`.
    pub(super) fn may_enter(&self, directory: &Path) -> Result<bool> {
        if !self.from_root {
            return Ok(true);
        }
        let mut command = Command::new("test");
        command.arg("-x").arg(directory).current_dir("/");
        Ok(self.run_as(&mut command).status().context("cannot run `test`")?.success())
    }
}

/// Asks `id` for a number: the standard library has no user ids, and on some systems `/etc/passwd` does not list
/// every user.
fn ask_id(arguments: &[&str]) -> Result<Option<u32>> {
    let output = Command::new("id").args(arguments).output().context("cannot run `id`")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse().ok())
}
