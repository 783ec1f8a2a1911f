//! What a process asks of the system that it runs on.

use tracing::warn;

use crate::application::workers::WorkerNames;

/// Lets this process have as many files open as the system allows it: each connection is one, and a common limit is 1,024.
pub fn raise_open_files_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "the limit of open files cannot be raised");
    }
}

/// Two workers never have the same name, wherever they run.
pub fn worker_names() -> WorkerNames {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = match host.trim() {
        "" => "unknown-host",
        name => name,
    };
    WorkerNames { host: host.to_owned(), pid: std::process::id() }
}
