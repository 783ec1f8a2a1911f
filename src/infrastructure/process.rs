//! What a process needs from the operating system.

use tracing::warn;

use crate::application::workers::WorkerNames;

/// Raises the limit of open files to what the system allows. Each connection is an open file, and a common limit is 1,024.
pub fn raise_open_files_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "cannot raise the limit of open files");
    }
}

/// The user and the host that a command is recorded under.
pub fn user_name() -> String {
    let named = ["USER", "LOGNAME"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok().filter(|user| !user.is_empty()));
    let user = named.unwrap_or_else(|| format!("user {}", rustix::process::getuid().as_raw()));
    format!("{user}@{}", host_name())
}

fn host_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match host.trim() {
        "" => "unknown-host".to_owned(),
        name => name.to_owned(),
    }
}

/// The host and the process id that the names of this process's workers begin with.
pub fn worker_names() -> WorkerNames {
    WorkerNames { host: host_name(), pid: std::process::id() }
}
