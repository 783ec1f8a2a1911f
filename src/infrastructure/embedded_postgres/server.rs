//! Runs the server of one location: `initdb` creates it, `pg_ctl` starts and stops it, its files show its state.
//!
//! Everything here blocks, and the caller must hold the location's start lock.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};
use std::{env, thread};

use anyhow::{Context, Result, bail};
use tracing::info;

use super::binaries::Binaries;
use super::location::{Location, SOCKET_NAME};

/// How long `pg_ctl` waits for a start, which after a crash replays the write-ahead log, or for a stop, which writes
/// a checkpoint.
const PATIENCE: Duration = Duration::from_mins(5);

/// How long the child processes of a killed server may take to exit.
const FAREWELL: Duration = Duration::from_secs(30);

/// A server that is out of reach for this long has lost its socket.
const CERTAINTY: Duration = Duration::from_secs(5);

/// How many lines of a log an error shows.
const LOG_LINES_SHOWN: usize = 12;

/// Holds the output of the server until it writes its own log.
const START_LOG: &str = "start.log";

/// Holds our settings, in the data directory.
const SETTINGS_FILE: &str = "webhook-processor.conf";

/// A process id that is larger than any that a system assigns.
const NOBODY: u32 = i32::MAX as u32;

#[derive(Debug, Clone)]
pub(super) struct Server {
    location: Location,
    binaries: Binaries,
    durable: bool,
}

/// The state of a server, as its socket and its files show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It accepts connections on its socket.
    Listening,
    /// Its process runs, but its socket does not accept connections.
    Unreachable {
        pid: u32,
    },
    Stopped,
}

impl Server {
    /// Chooses the programs that suit the existing data, or creates a new data directory.
    pub(super) fn prepare(candidates: &[Binaries], location: Location, durable: bool) -> Result<Self> {
        let data_major = data_major(&location.data())?;
        let binaries = Binaries::choose(candidates, data_major)?.clone();
        let server = Self { location, binaries, durable };
        if data_major.is_none() {
            server.make_data()?;
        }
        Ok(server)
    }

    pub(super) fn location(&self) -> &Location {
        &self.location
    }

    /// The state, once it is certain: a server that is starting or stopping is out of reach for a moment.
    pub(super) fn state(&self) -> State {
        let begun = Instant::now();
        loop {
            let state = self.state_now();
            if !matches!(state, State::Unreachable { .. }) || begun.elapsed() > CERTAINTY {
                return state;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn state_now(&self) -> State {
        if UnixStream::connect(self.location.socket()).is_ok() {
            return State::Listening;
        }
        match pid_in(&self.pid_file()) {
            Some(pid) if serves(pid, &self.location.data()) => State::Unreachable { pid },
            _ => State::Stopped,
        }
    }

    /// Starts the server and waits until it answers. After a crash, this includes its recovery.
    pub(super) fn launch(&self) -> Result<()> {
        self.write_settings()?;
        self.disown_dead_server()?;
        let (begun, begun_at) = (Instant::now(), SystemTime::now());
        loop {
            let log = self.location.log().join(START_LOG);
            if log.exists() {
                fs::remove_file(&log).with_context(|| format!("cannot remove {}", log.display()))?;
            }
            let output = self.pg_ctl("start", &["-l", &format!("log/{START_LOG}")])?;
            if output.status.success() {
                let (major, directory) = (self.binaries.major(), self.location.directory.display());
                info!(major, %directory, "started the private PostgreSQL");
                return Ok(());
            }
            // The child processes of a killed server exit when they have finished their current work.
            let children_linger =
                fs::read_to_string(&log).is_ok_and(|log| log.contains("shared memory block"));
            if !children_linger || begun.elapsed() > FAREWELL {
                bail!("{}{}", said(&output), self.last_words(begun_at));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Stops the server: open transactions are rolled back, everything committed is on disk.
    pub(super) fn shut_down(&self) -> Result<()> {
        if self.state() == State::Stopped {
            return Ok(());
        }
        let begun_at = SystemTime::now();
        let output = self.pg_ctl("stop", &["-m", "fast"])?;
        if !output.status.success() && self.state() != State::Stopped {
            bail!("cannot stop the private PostgreSQL: {}{}", said(&output), self.last_words(begun_at));
        }
        info!(directory = %self.location.directory.display(), "stopped the private PostgreSQL");
        if self.location.socket_directory != self.location.directory {
            // A failure does no harm: the next start uses the directory again.
            let _ = fs::remove_dir(&self.location.socket_directory);
        }
        Ok(())
    }

    /// Writes our settings to a separate file, which `postgresql.conf` includes. So what initdb found out about
    /// the machine stays in force, and settings made by `ALTER SYSTEM` override both.
    pub(super) fn write_settings(&self) -> Result<()> {
        let path = self.location.data().join(SETTINGS_FILE);
        fs::write(&path, settings(&self.location.socket_directory, self.durable))
            .with_context(|| format!("cannot write {}", path.display()))?;
        self.location.account.give(&path)?;

        let path = self.location.data().join("postgresql.conf");
        let include = format!("include '{SETTINGS_FILE}'");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if text.lines().any(|line| line == include) {
            return Ok(());
        }
        OpenOptions::new()
            .append(true)
            .open(&path)
            .and_then(|mut file| writeln!(file, "\n{include}"))
            .with_context(|| format!("cannot append to {}", path.display()))
    }

    /// The last lines of the logs that were written to since `begun_at`, for an error message.
    pub(super) fn last_words(&self, begun_at: SystemTime) -> String {
        let mut words = String::new();
        for entry in fs::read_dir(self.location.log()).into_iter().flatten().flatten() {
            let written_at = entry.metadata().and_then(|metadata| metadata.modified());
            if written_at.is_ok_and(|written_at| written_at >= begun_at) {
                let text = fs::read(entry.path()).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let lines: Vec<_> = text.lines().collect();
                let end = lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n  ");
                let _ = write!(words, "\nthe last lines of {}:\n  {end}", entry.path().display());
            }
        }
        words
    }

    /// Creates the data directory under a temporary name and renames it, so that `data` is always complete.
    fn make_data(&self) -> Result<()> {
        let Location { directory, account, .. } = &self.location;
        let entries =
            fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with("initdb-") {
                let unfinished = entry.path();
                info!(directory = %unfinished.display(), "removing the files of an interrupted first start");
                // An initdb that still runs fails without its files, but may add one while we remove them.
                let _ = fs::remove_dir_all(unfinished);
            }
        }
        let log = self.location.log();
        fs::create_dir_all(&log).with_context(|| format!("cannot create {}", log.display()))?;
        account.give(&log)?;

        let unfinished_name = format!("initdb-{}", std::process::id());
        let mut initdb = self.command("initdb");
        initdb.arg("-D").arg(&unfinished_name);
        initdb.args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]);
        if !self.durable {
            initdb.arg("--no-sync");
        }
        let output = initdb.output().context("cannot run initdb")?;
        if !output.status.success() {
            bail!("initdb failed: {}", said(&output));
        }
        let data = self.location.data();
        fs::rename(directory.join(&unfinished_name), &data)
            .with_context(|| format!("cannot create {}", data.display()))?;
        if self.durable {
            File::open(directory)
                .and_then(|directory| directory.sync_all())
                .with_context(|| format!("cannot flush {}", directory.display()))?;
        }
        Ok(())
    }

    /// Clears the process id of a crashed server from its lock files, because Postgres would wait for that process
    /// to end: another program has the id by now, or nobody has reaped the dead process yet (common in
    /// containers).
    ///
    /// The rest of the files stays: Postgres needs it to find child processes of the dead server that still write.
    fn disown_dead_server(&self) -> Result<()> {
        let socket_lock = self.location.socket_directory.join(format!("{SOCKET_NAME}.lock"));
        for path in [self.pid_file(), socket_lock] {
            let Some(pid) = pid_in(&path) else { continue };
            if !exists(pid) || serves(pid, &self.location.data()) {
                continue;
            }
            info!(pid, file = %path.display(), "clearing the process id of a crashed server from its lock file");
            fs::read_to_string(&path)
                .map(|text| match text.split_once('\n') {
                    Some((_, rest)) => format!("{NOBODY}\n{rest}"),
                    None => format!("{NOBODY}\n"),
                })
                .and_then(|text| fs::write(&path, text))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    fn pid_file(&self) -> PathBuf {
        self.location.data().join("postmaster.pid")
    }

    fn pg_ctl(&self, action: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = self.command("pg_ctl");
        command.args([action, "-D", "data"]).args(arguments);
        command.args(["-s", "-w", "-t", &PATIENCE.as_secs().to_string()]);
        command.output().with_context(|| format!("cannot run pg_ctl {action}"))
    }

    /// A command that runs a server program under the server's account, out of reach of the terminal's Ctrl-C and
    /// without our environment, which may hold secrets and settings for other servers. Its paths are relative to
    /// the location's directory, because it passes them to a shell.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.binaries.program(program));
        command.env_clear().env("LC_ALL", "C");
        for name in ["PATH", "LD_LIBRARY_PATH"] {
            if let Some(value) = env::var_os(name) {
                command.env(name, value);
            }
        }
        command.current_dir(&self.location.directory).process_group(0).stdin(Stdio::null());
        self.location.account.run_as(&mut command);
        command
    }
}

/// The major version of the files in `data`; `None` if there are none yet.
fn data_major(data: &Path) -> Result<Option<u32>> {
    let path = data.join("PG_VERSION");
    match fs::read_to_string(&path) {
        Ok(text) => {
            let major = text
                .trim()
                .parse()
                .with_context(|| format!("{} does not contain a version", path.display()))?;
            Ok(Some(major))
        }
        Err(_) if fs::read_dir(data).map_or(true, |mut entries| entries.next().is_none()) => Ok(None),
        Err(error) => Err(error).with_context(|| {
            format!(
                "cannot read {}: if you need nothing in its directory, remove that directory",
                path.display()
            )
        }),
    }
}

/// The server's settings, for a small machine that also runs other programs.
fn settings(socket_directory: &Path, durable: bool) -> String {
    let socket_directory = socket_directory.to_string_lossy().replace('"', "\"\"");
    let socket_directory = socket_directory.replace('\\', "\\\\").replace('\'', "''");
    let safe = if durable { "on" } else { "off" };
    format!(
        "# Rewritten at each start; use ALTER SYSTEM to change a setting permanently.\n\
         cluster_name = 'webhook-processor'\n\
         listen_addresses = ''\n\
         port = 5432\n\
         unix_socket_directories = '\"{socket_directory}\"'\n\
         unix_socket_permissions = 0700\n\
         max_connections = 150\n\
         shared_buffers = '128MB'\n\
         max_wal_size = '2GB'\n\
         wal_compression = on\n\
         autovacuum_naptime = '15s'\n\
         timezone = 'UTC'\n\
         lc_messages = 'C'\n\
         # One file per day of the week, overwritten a week later.\n\
         logging_collector = on\n\
         log_directory = '../log'\n\
         log_filename = 'server-%a.log'\n\
         log_rotation_age = '1d'\n\
         log_rotation_size = 0\n\
         log_truncate_on_rotation = on\n\
         log_timezone = 'UTC'\n\
         # Log neither statements nor rows: they hold payloads and secrets.\n\
         log_min_error_statement = 'panic'\n\
         log_error_verbosity = 'terse'\n\
         fsync = {safe}\n\
         synchronous_commit = {safe}\n\
         full_page_writes = {safe}\n"
    )
}

/// The exit status of a failed program, and its output.
fn said(output: &Output) -> String {
    let text = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
    format!("{}: {}", output.status, String::from_utf8_lossy(text).trim())
}

/// Whether process `pid` is the server whose files are in `data`. If in doubt, yes.
fn serves(pid: u32, data: &Path) -> bool {
    let Some(name) = process_name(pid) else { return false };
    if name != "postgres" && name != "postmaster" {
        return false;
    }
    // A server's working directory is its data directory. Without /proc, or permission to read it, the name must
    // suffice.
    fs::read_link(format!("/proc/{pid}/cwd")).map_or(true, |directory| directory == data)
}

/// The process id in a lock file of Postgres.
fn pid_in(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.lines().next()?.trim().parse().ok()
}

/// Whether the process id is in use. A process that has ended but was not reaped counts, too.
fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists() || process_name(pid).is_some()
}

/// The name of a running process; `None` for one that has ended, even if its parent has not reaped it.
fn process_name(pid: u32) -> Option<String> {
    let mut stat = String::new();
    if let Ok(mut file) = File::open(format!("/proc/{pid}/stat")) {
        file.read_to_string(&mut stat).ok()?;
        let (_, rest) = stat.split_once('(')?;
        let (name, rest) = rest.rsplit_once(')')?;
        return (!rest.trim_start().starts_with(['Z', 'X'])).then(|| name.to_owned());
    }
    if Path::new("/proc/self/stat").exists() {
        return None;
    }
    let output = Command::new("ps").args(["-p", &pid.to_string(), "-o", "stat=,comm="]).output().ok()?;
    let printed = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let (stat, path) = printed.split_once(' ')?;
    let name = Path::new(path.trim()).file_name()?.to_string_lossy().into_owned();
    (!stat.starts_with('Z')).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_durable_server_keeps_every_promise_of_a_commit() {
        for (durable, value) in [(true, "on"), (false, "off")] {
            let settings = settings(Path::new("/data"), durable);
            for promise in ["fsync", "synchronous_commit", "full_page_writes"] {
                assert!(settings.contains(&format!("\n{promise} = {value}\n")), "{settings}");
            }
        }
    }

    #[test]
    fn the_server_listens_on_its_socket_only() {
        let settings = settings(Path::new("/a 'b\", c\\d"), true);
        assert!(settings.contains("listen_addresses = ''\n"));
        assert!(settings.contains("unix_socket_directories = '\"/a ''b\"\", c\\\\d\"'\n"), "{settings}");
    }

    #[test]
    fn a_process_is_known_by_its_name_and_a_missing_one_has_none() {
        assert!(process_name(std::process::id()).is_some());
        assert_eq!(process_name(NOBODY), None);
        assert!(!exists(NOBODY));
    }

    #[test]
    fn another_program_does_not_serve() {
        assert!(!serves(std::process::id(), Path::new("/")));
    }
}
