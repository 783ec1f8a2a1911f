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

/// The host and the process id that the names of this process's workers begin with.
pub fn worker_names() -> WorkerNames {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = match host.trim() {
        "" => "unknown-host",
        name => name,
    };
    WorkerNames { host: host.to_owned(), pid: std::process::id() }
}
