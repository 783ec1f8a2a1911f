//! The account that the server runs under: Postgres refuses to run as root.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Whom root becomes, in this order, to run a server.
const UNPRIVILEGED: [&str; 2] = ["postgres", "nobody"];

/// The user and the group of the server, who own its files.
#[derive(Debug, Clone, Copy)]
pub(super) struct Account {
    uid: u32,
    gid: u32,
    /// Whether this process is root and has to become somebody else.
    from_root: bool,
}

impl Account {
    /// Chooses the account for the server in `directory`: our own, unless we are root.
    ///
    /// Root becomes the owner of the directory where it has an unprivileged one, so that a server that a user
    /// started is joined as that user, and `postgres` or `nobody` otherwise.
    pub(super) fn for_directory(directory: &Path) -> Result<Self> {
        let uid = ask_id(&["-u"])?.context("`id -u` does not know who we are")?;
        if uid != 0 {
            let gid = ask_id(&["-g"])?.context("`id -g` does not know our group")?;
            return Ok(Self { uid, gid, from_root: false });
        }
        match fs::metadata(directory) {
            Ok(metadata) if metadata.uid() != 0 => {
                return Ok(Self { uid: metadata.uid(), gid: metadata.gid(), from_root: true });
            }
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot look at {}", directory.display()));
            }
            _ => {}
        }
        for name in UNPRIVILEGED {
            if let (Some(uid), Some(gid)) = (ask_id(&["-u", name])?, ask_id(&["-g", name])?) {
                return Ok(Self { uid, gid, from_root: true });
            }
        }
        bail!("PostgreSQL refuses to run as root, and there is neither a user `postgres` nor a user `nobody`")
    }

    pub(super) fn uid(&self) -> u32 {
        self.uid
    }

    /// Whether a file of `uid` is one that this account, or root on its behalf, has made.
    pub(super) fn made_by(&self, uid: u32) -> bool {
        uid == self.uid || (self.from_root && uid == 0)
    }

    /// Lets `command` run under this account.
    ///
    /// `Command::uid` also drops root's supplementary groups, so the server is left with its one group.
    pub(super) fn run_as<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        if self.from_root { command.uid(self.uid).gid(self.gid) } else { command }
    }

    /// Hands `path`, which we have made, to this account.
    pub(super) fn give(&self, path: &Path) -> Result<()> {
        if !self.from_root {
            return Ok(());
        }
        chown(path, Some(self.uid), Some(self.gid))
            .with_context(|| format!("cannot give {} to user {}", path.display(), self.uid))
    }

    /// Whether this account may reach what lies in `directory`.
    pub(super) fn may_enter(&self, directory: &Path) -> Result<bool> {
        if !self.from_root {
            return Ok(true);
        }
        let mut command = Command::new("test");
        command.arg("-x").arg(directory).current_dir("/");
        Ok(self.run_as(&mut command).status().context("cannot run `test`")?.success())
    }
}

/// Asks `id` for a number: the standard library does not know user ids, and the password file not those of
/// every system.
fn ask_id(arguments: &[&str]) -> Result<Option<u32>> {
    let output = Command::new("id").args(arguments).output().context("cannot run `id`")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse().ok())
}
