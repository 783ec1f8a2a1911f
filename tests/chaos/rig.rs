//! A server, processes, a receiver, and proxies between them: what faults are done to, and how.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};
use tokio::time::sleep;
use webhook_processor::infrastructure::embedded_postgres::{EmbeddedOptions, EmbeddedPostgres};

use super::audit::Sampling;
use super::faults::{Fault, PROCESSES, Plan};
use super::proxy::{Mode, Proxy, Target};
use super::receiver::Receiver;

/// The role of the service, which can be refused without refusing us.
const ROLE: &str = "chaos";
/// How long a process or the server may take to start.
const START_MAX: Duration = Duration::from_secs(60);

/// A run's world.
pub struct Rig {
    directory: PathBuf,
    options: EmbeddedOptions,
    server: EmbeddedPostgres,
    database: Proxy,
    pub receiver: Receiver,
    to_receiver: Proxy,
    processes: Vec<Served>,
    pub config_id: i64,
}

/// A process, or the one that was started after it.
struct Served {
    number: usize,
    address: SocketAddr,
    child: Mutex<Child>,
    /// Held while it is ended and started again: a second SIGTERM would end it at once.
    ending: tokio::sync::Mutex<()>,
}

impl Rig {
    /// Starts it all.
    pub async fn start(seed: u64) -> anyhow::Result<Self> {
        let directory =
            std::env::temp_dir().join(format!("webhook-processor-chaos-{}-{seed}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        let options =
            EmbeddedOptions { directory: directory.join("postgres"), durable: true, binaries: None };
        let server = EmbeddedPostgres::start(&options).await?;
        let database = Proxy::start(Target::Unix(server.socket_directory().join(".s.PGSQL.5432"))).await?;
        let receiver = Receiver::start(seed).await?;
        let to_receiver = Proxy::start(Target::Tcp(receiver.address)).await?;
        let mut rig = Self {
            directory,
            options,
            server,
            database,
            receiver,
            to_receiver,
            processes: Vec::new(),
            config_id: 0,
        };
        let name = rig.connect_options().get_database().context("a database")?.to_owned();
        rig.execute(&format!("create role {ROLE} login; alter database \"{name}\" owner to {ROLE}; alter schema public owner to {ROLE}"))
            .await?;
        for number in 0..PROCESSES {
            let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
            let child = Mutex::new(rig.spawn(number, address)?);
            rig.processes.push(Served { number, address, child, ending: tokio::sync::Mutex::default() });
        }
        for served in &rig.processes {
            rig.wait_until_ready(served.address).await?;
        }
        rig.config_id = rig.register().await?;
        Ok(rig)
    }

    /// Where the processes listen.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.processes.iter().map(|served| served.address).collect()
    }

    /// Past the proxy, as a role that is never refused.
    pub fn connect_options(&self) -> PgConnectOptions {
        self.server.connect_options()
    }

    /// Looks at the audit all the time, so that a change of what was written is seen.
    pub fn sample_audit(&self) -> Sampling {
        Sampling::start(self.connect_options())
    }

    fn spawn(&self, number: usize, address: SocketAddr) -> anyhow::Result<Child> {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.join(format!("process-{number}.log")))?;
        let name = self.connect_options().get_database().context("a database")?.to_owned();
        let url = format!("postgres://{ROLE}@{}/{name}?sslmode=disable", self.database.address);
        // another program, such as an older one, to see that this run would find its faults
        let program =
            std::env::var("PROGRAM").unwrap_or_else(|_| env!("CARGO_BIN_EXE_webhook-processor").to_owned());
        Command::new(program)
            .arg("serve")
            .current_dir(&self.directory)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("DATABASE_URL", url)
            .env("LISTEN_ADDR", address.to_string())
            .env("EGRESS_ALLOW", "127.0.0.0/8")
            .env("HTTP_TIMEOUT", "1s")
            // as short as may be
            .env("WORKER_LOCK_DURATION", "16s")
            .env("WORKER_POLL_INTERVAL", "1s")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("starting a process")
    }

    async fn wait_until_ready(&self, address: SocketAddr) -> anyhow::Result<()> {
        let (client, begun) = (client(), Instant::now());
        loop {
            let ready = client.get(format!("http://{address}/health/ready")).send().await;
            if ready.is_ok_and(|answer| answer.status().is_success()) {
                return Ok(());
            }
            ensure!(begun.elapsed() < START_MAX, "the process at {address} does not become ready");
            sleep(Duration::from_millis(100)).await;
        }
    }

    async fn register(&self) -> anyhow::Result<i64> {
        let body = serde_json::json!({
            "name": "chaos",
            "postback_url": format!("http://{}/", self.to_receiver.address),
            "retry_base_ms": 200,
            "retry_cap_ms": 5_000,
            "circuit": {"cooldown_ms": 200, "cooldown_cap_ms": 1_000},
        });
        let url = format!("http://{}/api/webhooks", self.processes[0].address);
        let answer = client().post(url).json(&body).send().await?.error_for_status()?;
        let config: serde_json::Value = answer.json().await?;
        config["id"].as_i64().context("a config has an id")
    }

    /// Does what the plan says, each fault at its time; those that take long run beside each other.
    pub async fn suffer(&self, plan: &Plan) -> anyhow::Result<()> {
        let begun = tokio::time::Instant::now();
        let faults = plan.faults.iter().map(|&(at, fault)| async move {
            tokio::time::sleep_until(begun + at).await;
            self.inflict(fault).await.with_context(|| format!("{fault:?}"))
        });
        for outcome in futures_util::future::join_all(faults).await {
            outcome?;
        }
        Ok(())
    }

    async fn inflict(&self, fault: Fault) -> anyhow::Result<()> {
        match fault {
            Fault::Kill { process } => {
                let _ending = self.processes[process].ending.lock().await;
                self.end(process, "KILL").await?;
                sleep(Duration::from_secs(1)).await;
                self.restart(process)
            }
            Fault::Stop { process } => {
                let _ending = self.processes[process].ending.lock().await;
                self.end(process, "TERM").await?;
                self.restart(process)
            }
            Fault::Pause { process, length } => {
                // another process may stand in its place then, which a signal to go on does no harm
                let pid = self.pid(process);
                signal(pid, "STOP");
                sleep(length).await;
                signal(pid, "CONT");
                Ok(())
            }
            Fault::RestartDatabase => self.restart_database().await,
            Fault::EndSessions => self.end_sessions().await,
            Fault::LockQueue { length } => {
                let mut connection = self.connect().await?;
                let mut transaction = connection.begin().await?;
                // a fault beside this one may end the session
                let locked = sqlx::raw_sql("lock table webhook_queue in access exclusive mode")
                    .execute(&mut *transaction)
                    .await;
                if locked.is_ok() {
                    sleep(length).await;
                }
                Ok(())
            }
            Fault::WithdrawAccess { length } => {
                self.alter_role("nologin").await?;
                self.end_sessions().await?;
                sleep(length).await;
                self.alter_role("login").await
            }
            Fault::NoConnections { length } => {
                self.alter_role("connection limit 2").await?;
                self.end_sessions().await?;
                sleep(length).await;
                self.alter_role("connection limit -1").await
            }
            Fault::StallCommits { length } => {
                self.standby("nobody").await?;
                sleep(length).await;
                self.standby("").await
            }
            Fault::StallDatabase { length } => {
                self.database.disturb(Mode::Stall, length).await;
                Ok(())
            }
            Fault::CutDatabase => {
                self.database.cut();
                Ok(())
            }
            Fault::SwallowAnswers { length } => {
                self.database.disturb(Mode::SwallowAnswers, length).await;
                Ok(())
            }
            Fault::StallReceiver { length } => {
                self.to_receiver.disturb(Mode::Stall, length).await;
                Ok(())
            }
            Fault::CutReceiver => {
                self.to_receiver.cut();
                Ok(())
            }
            Fault::SwallowReceipts { length } => {
                self.to_receiver.disturb(Mode::SwallowAnswers, length).await;
                Ok(())
            }
        }
    }

    /// Undoes what faults beside each other may have left behind.
    pub async fn heal(&self) -> anyhow::Result<()> {
        self.database.set(Mode::Pass);
        self.to_receiver.set(Mode::Pass);
        self.alter_role("login connection limit -1").await?;
        self.standby("").await?;
        for served in &self.processes {
            signal(self.pid(served.number), "CONT");
            self.wait_until_ready(served.address).await?;
        }
        Ok(())
    }

    /// Waits until nothing is open any more.
    pub async fn wait_until_quiet(&self, limit: Duration) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            let mut connection = self.connect().await?;
            let open: i64 = sqlx::query_scalar("select count(*) from webhook_queue_open")
                .fetch_one(&mut connection)
                .await?;
            connection.close().await?;
            if open == 0 {
                return Ok(());
            }
            ensure!(
                begun.elapsed() < limit,
                "{open} deliveries are still open {limit:?} after the last fault"
            );
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// The statistics as a process reports them.
    pub async fn statistics(&self) -> anyhow::Result<serde_json::Value> {
        let url = format!("http://{}/webhooks/stats", self.processes[0].address);
        Ok(client().get(url).send().await?.error_for_status()?.json().await?)
    }

    /// Ends everything, keeps the files, and returns their directory.
    pub fn keep(self) -> PathBuf {
        self.directory.clone()
    }

    /// Ends everything and removes it.
    pub async fn remove(self) -> anyhow::Result<()> {
        let Self { directory, server, processes, .. } = self;
        drop(processes);
        server.stop().await?;
        std::fs::remove_dir_all(&directory).with_context(|| format!("removing {}", directory.display()))
    }

    fn pid(&self, process: usize) -> u32 {
        self.processes[process].child.lock().expect("nothing panics while it is held").id()
    }

    /// Ends a process and waits until it has ended.
    async fn end(&self, process: usize, with: &str) -> anyhow::Result<()> {
        let pid = self.pid(process);
        // one that is paused would not hear of it
        signal(pid, "CONT");
        signal(pid, with);
        let begun = Instant::now();
        loop {
            if self.processes[process]
                .child
                .lock()
                .expect("nothing panics while it is held")
                .try_wait()?
                .is_some()
            {
                return Ok(());
            }
            ensure!(begun.elapsed() < START_MAX, "process {process} does not end after SIG{with}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts a process that has ended again.
    fn restart(&self, process: usize) -> anyhow::Result<()> {
        let served = &self.processes[process];
        let child = self.spawn(process, served.address)?;
        *served.child.lock().expect("nothing panics while it is held") = child;
        Ok(())
    }

    async fn restart_database(&self) -> anyhow::Result<()> {
        let pid_file = self.server.directory().join("data").join("postmaster.pid");
        let pid = std::fs::read_to_string(&pid_file).context("reading postmaster.pid")?;
        // what pg_ctl stop -m immediate sends
        signal(pid.lines().next().context("a process id")?.trim().parse()?, "QUIT");
        let begun = Instant::now();
        while pid_file.exists() {
            ensure!(begun.elapsed() < START_MAX, "the server does not end");
            sleep(Duration::from_millis(20)).await;
        }
        // this run holds the server anyway, so this stops nothing
        EmbeddedPostgres::start(&self.options).await?.stop().await?;
        Ok(())
    }

    async fn end_sessions(&self) -> anyhow::Result<()> {
        self.execute(&format!(
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = '{ROLE}'"
        ))
        .await
    }

    async fn alter_role(&self, how: &str) -> anyhow::Result<()> {
        self.execute(&format!("set synchronous_commit = local; alter role {ROLE} {how}")).await
    }

    async fn standby(&self, name: &str) -> anyhow::Result<()> {
        self.execute(&format!(
            "alter system set synchronous_standby_names = '{name}'; select pg_reload_conf()"
        ))
        .await
    }

    /// A connection past the proxy. The server may be starting.
    pub async fn connect(&self) -> anyhow::Result<sqlx::PgConnection> {
        let begun = Instant::now();
        loop {
            match self.connect_options().connect().await {
                Ok(connection) => return Ok(connection),
                Err(error) if begun.elapsed() > START_MAX => return Err(error).context("connecting"),
                Err(_) => sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Runs statements, again if a fault beside this one broke the connection.
    async fn execute(&self, sql: &str) -> anyhow::Result<()> {
        for _ in 0..20 {
            let mut connection = self.connect().await?;
            let mut outcome = Ok(());
            for statement in sql.split(';') {
                let done = sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut connection).await;
                outcome = done.map(|_| ());
                if outcome.is_err() {
                    break;
                }
            }
            match outcome {
                Ok(()) => return Ok(()),
                Err(sqlx::Error::Io(_)) => sleep(Duration::from_millis(200)).await,
                Err(sqlx::Error::Database(error))
                    if error.code().is_some_and(|code| code.starts_with("57P")) =>
                {
                    sleep(Duration::from_millis(200)).await;
                }
                Err(error) => return Err(error).with_context(|| sql.to_owned()),
            }
        }
        bail!("{sql}: the connection broke again and again")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let mut child = self.child.lock().expect("nothing panics while it is held");
        // it may have ended already
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().expect("a plain client")
}

/// One that has ended does not mind.
fn signal(pid: u32, name: &str) {
    let sent =
        Command::new("kill").args([format!("-{name}"), pid.to_string()]).stderr(Stdio::null()).status();
    sent.expect("kill can be run");
}
