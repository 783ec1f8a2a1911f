//! The program itself, as a user starts it.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use super::PATIENCE;
use super::postgres::TestDatabase;
use super::service::ApiClient;

/// A command of the program on a test's database, in an empty environment.
pub fn command(database: &TestDatabase, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_webhook-processor"));
    command
        .args(args)
        .current_dir(std::env::temp_dir())
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("DATABASE_URL", database.url())
        .envs(std::env::var_os("PG_BINDIR").map(|directory| ("PG_BINDIR", directory)))
        .env("EGRESS_ALLOW", "127.0.0.0/8")
        .env("EGRESS_PORTS_ALLOW", "1,9")
        .env("LISTEN_ADDR", "127.0.0.1:0");
    command
}

/// Runs a command to its end and returns its output.
pub fn output(mut command: Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

/// A running process; killed when it goes out of scope.
pub struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Process {
    /// Starts a service and waits until it is ready.
    pub fn start(command: Command) -> Self {
        let process = Self::start_waiting(command);
        process.wait_for_log("the service is ready");
        process
    }

    /// Starts a service and waits until it listens: its database may not be there yet.
    pub fn start_waiting(mut command: Command) -> Self {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        thread::spawn({
            let log = log.clone();
            move || {
                let mut line = String::new();
                while lines.read_line(&mut line).is_ok_and(|read| read > 0) {
                    log.lock().unwrap().push_str(&line);
                    line.clear();
                }
                let _ = lines.read_to_string(&mut line);
            }
        });
        let process = Self { child, log };
        process.wait_for_log("listening");
        process
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits until a line of the log contains this.
    pub fn wait_for_log(&self, text: &str) {
        let begun = Instant::now();
        while !self.log().contains(text) {
            assert!(begun.elapsed() < PATIENCE, "waited in vain for {text:?} in:\n{}", self.log());
            thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Its API.
    pub fn api(&self) -> ApiClient {
        let log = self.log();
        let address = log.split("address=").nth(1).unwrap().split_whitespace().next().unwrap();
        ApiClient::new(format!("http://{address}"))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        let status =
            Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for its end and returns its exit code; `None` if a signal ended it.
    pub fn wait(mut self) -> Option<i32> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(begun.elapsed() < PATIENCE, "does not end:\n{}", self.log());
            thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // it may have ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
