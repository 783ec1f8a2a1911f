//! Settings: from the environment, then `.env`, then defaults. Unknown or contradictory ones are refused at start.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use config::{Config, Map, Value, ValueKind};
use ipnet::IpNet;
use sqlx::postgres::PgConnectOptions;

use super::logs::LogFormat;
use crate::application::workers::WorkerSettings;
use crate::domain::address::AddressPolicy;
use crate::domain::egress::Egress;
use crate::domain::endpoint_settings::TIMEOUT_MAX;

/// A lease term must exceed the time limit of an attempt by this much, to leave time to record the outcome.
pub const LOCK_MARGIN: Duration = Duration::from_secs(15);

/// A setting, as `--help` shows it.
pub struct Setting {
    /// The environment variable.
    pub name: &'static str,
    /// The default value as text; empty if unset.
    pub default: &'static str,
    /// One line for `--help`.
    pub meaning: &'static str,
}

/// All settings, in the order of `.env.example`.
pub const SETTINGS: [Setting; 22] = [
    setting(
        "DATABASE_URL",
        "",
        "PostgreSQL 15 or newer; if unset, a private one from the server programs on this machine",
    ),
    setting(
        "LISTEN_DATABASE_URL",
        "",
        "a direct URL for wakeups and migrations, needed if DATABASE_URL leads to a pooler",
    ),
    setting(
        "DATABASE_MAX_CONNECTIONS",
        "10",
        "connections for API requests; the engine uses 8 more, and one for wakeups",
    ),
    setting("DATA_DIR", ".data", "directory for the files of the private PostgreSQL"),
    setting("LISTEN_ADDR", "127.0.0.1:8080", "API address"),
    setting(
        "AUTH",
        "",
        "keys: API calls need a key; none: they need none; unset: on loopback none, else keys",
    ),
    setting(
        "METRICS_AUTH",
        "keys",
        "keys: /metrics needs a key with scope read if the API needs keys; none: it never does",
    ),
    setting("DOCS", "on", "on or off: whether /docs and /openapi.json are answered"),
    setting("WORKER_COUNT", "10", "workers per process"),
    setting("WORKER_BATCH_SIZE", "50", "leases per worker: how many attempts it can make at the same time"),
    setting("WORKER_POLL_INTERVAL", "5s", "how often a worker looks for deliveries if nothing wakes it"),
    setting("WORKER_LOCK_DURATION", "5m", "lease term; at least 15s longer than HTTP_TIMEOUT"),
    setting(
        "HTTP_TIMEOUT",
        "30s",
        "time limit of one attempt, from connecting to the end of the response body; at most 5m",
    ),
    setting(
        "RESPONSE_BODY_MAX",
        "4096",
        "bytes of a response body that are read, and kept with the attempt; at most 65536",
    ),
    setting(
        "EGRESS_ALLOW",
        "",
        "non-public networks that may be called, comma-separated, such as 127.0.0.0/8",
    ),
    setting(
        "EGRESS_PORTS_ALLOW",
        "",
        "ports of other protocols that receivers may have all the same, comma-separated, such as 6000",
    ),
    setting("HTTPS_ONLY", "false", "true: receivers must use https"),
    setting(
        "EGRESS_DNS",
        "",
        "name servers that resolve receivers' names, comma-separated, such as 10.0.0.2; unset: the system's",
    ),
    setting("ARCHIVE_RETENTION", "90d", "how long terminal deliveries are kept; at least 1d"),
    setting(
        "READY_AGE_MAX",
        "15m",
        "/health/ready fails while the oldest ready delivery has waited longer than this",
    ),
    setting(
        "LOG_LEVEL",
        "info",
        "error, warn, info, debug or trace; or directives such as info,webhook_processor=debug",
    ),
    setting("LOG_FORMAT", "pretty", "pretty, json or logfmt"),
];

const fn setting(name: &'static str, default: &'static str, meaning: &'static str) -> Setting {
    Setting { name, default, meaning }
}

/// Where a name server listens if its address names no port.
const DNS_PORT: u16 = 53;

/// Prefixes of variables that other programs read from the same `.env`.
const FOREIGN_PREFIXES: [&str; 5] = ["POSTGRES_", "PG", "COMPOSE_", "DOCKER_", "RUST_"];

/// The values of `sslmode`. <https://www.postgresql.org/docs/current/libpq-ssl.html>
const SSL_MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];

/// Why a setting is refused.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {message}")]
pub struct SettingsError {
    name: String,
    message: String,
}

impl SettingsError {
    fn new(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self { name: name.into(), message: message.into() }
    }
}

/// All settings. They may hold passwords, so there is no `Debug`.
#[derive(Clone)]
pub struct Settings {
    /// `None`: a private PostgreSQL.
    pub database: Option<PgConnectOptions>,
    /// For wakeups and migrations, if it differs from `database`.
    pub listen_database: Option<PgConnectOptions>,
    pub request_connections: u32,
    pub data_dir: PathBuf,
    /// Where the API, health and metrics are served.
    pub listen_addr: SocketAddr,
    /// Whether API calls need a key; `None`: unless the address is one of loopback.
    pub auth: Option<Auth>,
    /// Whether metrics need a key if API calls do.
    pub metrics_auth: Auth,
    /// Whether the documentation is answered.
    pub docs: bool,
    pub workers: WorkerSettings,
    /// Time limit of one attempt, from connecting to the end of the response body.
    pub http_timeout: Duration,
    /// How many bytes of a response body are read and kept.
    pub response_bytes_max: usize,
    /// Non-public networks that may be called.
    pub egress_allow: Vec<IpNet>,
    /// Ports of other protocols that receivers may have all the same.
    pub egress_ports_allow: Vec<u16>,
    /// Whether receivers must use https.
    pub https_only: bool,
    /// The name servers that resolve receivers' names; empty: those of the system.
    pub name_servers: Vec<SocketAddr>,
    /// How long terminal deliveries are kept.
    pub archive_retention: Duration,
    /// The service is not ready while the oldest ready delivery is older than this.
    pub ready_age_max: Duration,
    /// A level, or filter directives.
    pub log_level: String,
    pub log_format: LogFormat,
}

/// Whether calls need a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Auth {
    /// They do.
    Keys,
    /// They do not.
    None,
}

impl FromStr for Auth {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "keys" => Ok(Self::Keys),
            "none" => Ok(Self::None),
            _ => Err(()),
        }
    }
}

impl Settings {
    /// Reads the environment of this process and `.env` in its working directory.
    pub fn load() -> Result<Self, SettingsError> {
        let file = match dotenvy::dotenv_iter() {
            Ok(lines) => {
                let lines = lines.collect::<Result<BTreeMap<_, _>, _>>();
                lines.map_err(|error| {
                    SettingsError::new(".env", format!("cannot be read: {}", without_line(&error)))
                })?
            }
            Err(error) if error.not_found() => BTreeMap::new(),
            Err(error) => {
                return Err(SettingsError::new(".env", format!("cannot be read: {}", without_line(&error))));
            }
        };
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Self::from_sources(file, environment)
    }

    /// Where requests to receivers may go.
    pub fn egress(&self) -> Egress {
        let addresses = AddressPolicy::new(self.egress_allow.clone());
        Egress::new(addresses, self.egress_ports_allow.clone(), self.https_only)
    }

    /// Reads settings from the lines of a file and from an environment. The environment takes precedence.
    pub fn from_sources(
        file: BTreeMap<String, String>,
        environment: HashMap<String, String>,
    ) -> Result<Self, SettingsError> {
        let is_foreign = |name: &str| FOREIGN_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        if let Some(name) = file.keys().find(|name| !is_setting(name) && !is_foreign(name)) {
            let meant = misspelt(name).map(|meant| format!("; did you mean {meant}?")).unwrap_or_default();
            return Err(SettingsError::new(
                name,
                format!("is set in .env, but there is no such setting{meant}"),
            ));
        }
        if let Some((name, meant)) = environment.keys().find_map(|name| Some((name, misspelt(name)?))) {
            return Err(SettingsError::new(name, format!("there is no such setting; did you mean {meant}?")));
        }
        Source::new(file, environment)?.settings()
    }
}

/// The setting that `name` probably misspells. `None` if it is a setting, or the variable of another program.
fn misspelt(name: &str) -> Option<&'static str> {
    // a short name is near to many others: AUTH to PATH
    let near =
        |setting: &&Setting| setting.name.len() >= 8 && strsim::damerau_levenshtein(name, setting.name) <= 2;
    if is_setting(name) { None } else { SETTINGS.iter().find(near).map(|setting| setting.name) }
}

fn is_setting(name: &str) -> bool {
    SETTINGS.iter().any(|setting| setting.name == name)
}

/// The error of dotenvy, with the faulty line's number instead of its text, which may hold a password.
fn without_line(error: &dotenvy::Error) -> String {
    match error {
        dotenvy::Error::LineParse(faulty, column) => {
            let text = std::env::current_dir()
                .ok()
                .and_then(|directory| {
                    directory.ancestors().map(|d| d.join(".env")).find(|path| path.is_file())
                })
                .and_then(|path| std::fs::read_to_string(path).ok());
            match text.as_deref().and_then(|text| line_number(text, faulty)) {
                Some(number) => format!("line {number} is not NAME=value (at column {})", column + 1),
                None => format!("a line is not NAME=value (at column {})", column + 1),
            }
        }
        other => other.to_string(),
    }
}

/// The number, from 1, of the line that could not be parsed.
fn line_number(text: &str, faulty: &str) -> Option<usize> {
    let first = faulty.lines().next()?.trim_end();
    text.lines().position(|line| line.trim_end() == first).map(|index| index + 1)
}

/// The value of a parameter in a URL's query.
fn parameter<'a>(url: &'a str, name: &str) -> Option<&'a str> {
    let (_, query) = url.split_once('?')?;
    query.split('&').filter_map(|pair| pair.split_once('=')).find(|(found, _)| *found == name).map(|(_, v)| v)
}

/// A duration in words, in the largest unit that divides it.
fn in_words(duration: Duration) -> String {
    const UNITS: [(&str, u128); 6] = [
        ("year", 365 * 86_400_000),
        ("day", 86_400_000),
        ("hour", 3_600_000),
        ("minute", 60_000),
        ("second", 1_000),
        ("millisecond", 1),
    ];
    let millis = duration.as_millis();
    let fits = |(_, unit): &&(&str, u128)| millis >= *unit && millis.is_multiple_of(*unit);
    let (name, unit) = UNITS.iter().find(fits).unwrap_or(&UNITS[5]);
    let count = millis / unit;
    format!("{count} {name}{}", if count == 1 { "" } else { "s" })
}

/// The merged layers of settings, from which each setting is parsed.
struct Source(Config);

impl Source {
    fn new(
        file: BTreeMap<String, String>,
        environment: HashMap<String, String>,
    ) -> Result<Self, SettingsError> {
        let mut builder = Config::builder();
        for setting in &SETTINGS {
            builder = builder
                .set_default(setting.name.to_lowercase(), setting.default)
                .map_err(|error| SettingsError::new(setting.name, error.to_string()))?;
        }
        let known = |(name, value): (String, String)| {
            // an empty variable counts as unset, because compose files write unset ones like that
            (is_setting(&name) && !value.is_empty())
                .then(|| (name.to_lowercase(), Value::new(None, ValueKind::String(value))))
        };
        let file: Map<String, Value> = file.into_iter().filter_map(known).collect();
        let environment: Map<String, Value> = environment.into_iter().filter_map(known).collect();
        for layer in [file, environment] {
            builder = builder.add_source(Layer(layer));
        }
        Ok(Self(builder.build().map_err(|error| SettingsError::new("settings", error.to_string()))?))
    }

    fn settings(&self) -> Result<Settings, SettingsError> {
        let http_timeout = self.duration("HTTP_TIMEOUT", Duration::from_millis(1), TIMEOUT_MAX)?;
        let lease_term =
            self.duration("WORKER_LOCK_DURATION", Duration::from_secs(1), Duration::from_hours(24))?;
        if lease_term < http_timeout + LOCK_MARGIN {
            return Err(SettingsError::new(
                "WORKER_LOCK_DURATION",
                format!(
                    "must be at least {1} longer than HTTP_TIMEOUT ({0}), or deliveries could be sent twice",
                    in_words(http_timeout),
                    in_words(LOCK_MARGIN),
                ),
            ));
        }
        Ok(Settings {
            database: self.database("DATABASE_URL")?,
            listen_database: self.database("LISTEN_DATABASE_URL")?,
            request_connections: self.number("DATABASE_MAX_CONNECTIONS", 1..=1_000)?,
            data_dir: self.text("DATA_DIR")?.into(),
            listen_addr: self.parse("LISTEN_ADDR", "an address and a port, such as 127.0.0.1:8080")?,
            auth: if self.text("AUTH")?.is_empty() {
                None
            } else {
                Some(self.parse("AUTH", "keys or none")?)
            },
            metrics_auth: self.parse("METRICS_AUTH", "keys or none")?,
            docs: match self.text("DOCS")?.as_str() {
                "on" => true,
                "off" => false,
                _ => return Err(SettingsError::new("DOCS", "must be on or off")),
            },
            workers: WorkerSettings {
                count: self.number("WORKER_COUNT", 1..=1_000)?,
                batch_size: self.number("WORKER_BATCH_SIZE", 1..=1_000)?,
                poll_interval: self.duration(
                    "WORKER_POLL_INTERVAL",
                    Duration::from_millis(10),
                    Duration::from_hours(1),
                )?,
                lease_term,
            },
            http_timeout,
            response_bytes_max: self.number("RESPONSE_BODY_MAX", 0..=65_536)?,
            egress_allow: self.networks("EGRESS_ALLOW")?,
            egress_ports_allow: self
                .list("EGRESS_PORTS_ALLOW", "ports such as 6000,10080", |part| part.parse().ok())?,
            https_only: self.parse("HTTPS_ONLY", "true or false")?,
            name_servers: self.list("EGRESS_DNS", "addresses such as 10.0.0.2 or 10.0.0.2:5353", |part| {
                part.parse().ok().or_else(|| Some(SocketAddr::new(part.parse().ok()?, DNS_PORT)))
            })?,
            archive_retention: self.duration(
                "ARCHIVE_RETENTION",
                Duration::from_hours(24),
                Duration::from_hours(24 * 36_500),
            )?,
            ready_age_max: self.duration(
                "READY_AGE_MAX",
                Duration::from_secs(1),
                Duration::from_hours(24 * 365),
            )?,
            log_level: self.log_level("LOG_LEVEL")?,
            log_format: self.parse("LOG_FORMAT", "pretty, json or logfmt")?,
        })
    }

    fn text(&self, name: &'static str) -> Result<String, SettingsError> {
        self.0.get_string(&name.to_lowercase()).map_err(|error| SettingsError::new(name, error.to_string()))
    }

    fn parse<T: FromStr>(&self, name: &'static str, expected: &str) -> Result<T, SettingsError> {
        self.text(name)?.parse().map_err(|_| SettingsError::new(name, format!("must be {expected}")))
    }

    fn number<T>(&self, name: &'static str, range: RangeInclusive<T>) -> Result<T, SettingsError>
    where
        T: FromStr + PartialOrd + std::fmt::Display,
    {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        let number = self.parse(name, &expected)?;
        if range.contains(&number) {
            Ok(number)
        } else {
            Err(SettingsError::new(name, format!("must be {expected}")))
        }
    }

    fn duration(&self, name: &'static str, min: Duration, max: Duration) -> Result<Duration, SettingsError> {
        let fault = || {
            let [min, max] = [min, max].map(in_words);
            SettingsError::new(
                name,
                format!("must be a duration from {min} to {max}, such as 30s, 5m or 90d"),
            )
        };
        let duration = humantime::parse_duration(&self.text(name)?).map_err(|_| fault())?;
        if (min..=max).contains(&duration) { Ok(duration) } else { Err(fault()) }
    }

    fn database(&self, name: &'static str) -> Result<Option<PgConnectOptions>, SettingsError> {
        let url = self.text(name)?;
        if url.is_empty() {
            return Ok(None);
        }
        // the driver's message may repeat parts of the URL, which holds a password
        let fault = |message: &str| SettingsError::new(name, message);
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(fault("must be a URL such as postgres://user:password@host:5432/database"));
        }
        if let Some(mode) = parameter(&url, "sslmode")
            && !SSL_MODES.contains(&mode)
        {
            return Err(fault(&format!("sslmode={mode:?} is not one of {}", SSL_MODES.join(", "))));
        }
        if let Some(hosts) = url.split(['/', '?']).nth(2).and_then(|part| part.rsplit('@').next())
            && hosts.contains(',')
        {
            return Err(fault("must name one host; a list of hosts, as libpq accepts it, is not supported"));
        }
        let must_be = "must be a URL such as postgres://user:password@host:5432/database; in user and password, characters \
                       such as # / ? @ : % must be percent-encoded (# is %23)";
        // the driver drops everything after a #, so part of the password would become the host
        if url.contains('#') {
            return Err(fault(must_be));
        }
        url.parse().map(Some).map_err(|_| fault(must_be))
    }

    fn networks(&self, name: &'static str) -> Result<Vec<IpNet>, SettingsError> {
        self.list(name, "networks such as 127.0.0.0/8,10.1.0.0/16", |part| {
            part.parse().ok().or_else(|| part.parse::<IpAddr>().ok().map(IpNet::from))
        })
    }

    /// The parts between commas.
    fn list<T>(
        &self,
        name: &'static str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Vec<T>, SettingsError> {
        let text = self.text(name)?;
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let fault = || SettingsError::new(name, format!("must be {expected}"));
        parts.map(|part| parse(part).ok_or_else(fault)).collect()
    }

    fn log_level(&self, name: &'static str) -> Result<String, SettingsError> {
        let text = self.text(name)?;
        match text.parse::<tracing_subscriber::EnvFilter>() {
            // a single word that is not a level would be read as the name of a module
            Ok(_)
                if text.contains(['=', ','])
                    || text.parse::<tracing_subscriber::filter::LevelFilter>().is_ok() =>
            {
                Ok(text)
            }
            Ok(_) | Err(_) => Err(SettingsError::new(
                name,
                "must be error, warn, info, debug or trace, or filter directives",
            )),
        }
    }
}

/// A layer of values that have been read already.
#[derive(Debug, Clone)]
struct Layer(Map<String, Value>);

impl config::Source for Layer {
    fn clone_into_box(&self) -> Box<dyn config::Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, config::ConfigError> {
        Ok(self.0.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(environment: &[(&str, &str)]) -> Result<Settings, String> {
        let pairs = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Settings::from_sources(BTreeMap::new(), pairs.collect()).map_err(|error| error.to_string())
    }

    #[test]
    fn everything_has_a_default() {
        let settings = load(&[]).unwrap();
        assert_eq!((settings.workers.count, settings.workers.batch_size), (10, 50));
        assert_eq!(settings.archive_retention, Duration::from_hours(24 * 90));
        assert!(settings.database.is_none());
    }

    #[test]
    fn a_name_server_has_the_usual_port_unless_it_names_another() {
        let settings = load(&[("EGRESS_DNS", "10.0.0.2, 10.0.0.3:5353,::1")]).unwrap();
        assert_eq!(
            settings.name_servers,
            ["10.0.0.2:53", "10.0.0.3:5353", "[::1]:53"].map(|a| a.parse().unwrap())
        );
        assert_eq!(load(&[]).unwrap().name_servers, []);
    }

    #[test]
    fn the_environment_takes_precedence_over_the_file_and_empty_counts_as_unset() {
        let file =
            BTreeMap::from([("WORKER_COUNT".into(), "3".into()), ("WORKER_BATCH_SIZE".into(), "7".into())]);
        let environment =
            HashMap::from([("WORKER_COUNT".into(), "4".into()), ("WORKER_BATCH_SIZE".into(), String::new())]);
        let settings = Settings::from_sources(file, environment).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((settings.workers.count, settings.workers.batch_size), (4, 7));
    }

    #[test]
    fn a_wrong_setting_is_reported_by_name_and_without_its_value() {
        for (name, value) in [
            ("WORKER_COUNT", "0"),
            ("WORKER_COUNT", "many"),
            ("WORKER_POLL_INTERVAL", "5"),
            ("HTTP_TIMEOUT", "6m"),
            ("WORKER_LOCK_DURATION", "40s"),
            ("LISTEN_ADDR", "8080"),
            ("EGRESS_ALLOW", "localhost"),
            ("AUTH", "basic"),
            ("METRICS_AUTH", "read"),
            ("DOCS", "yes"),
            ("EGRESS_PORTS_ALLOW", "smtp"),
            ("EGRESS_PORTS_ALLOW", "65536"),
            ("HTTPS_ONLY", "yes"),
            ("EGRESS_DNS", "dns.example"),
            ("LOG_LEVEL", "loud"),
            ("LOG_FORMAT", "xml"),
            ("DATABASE_URL", "mysql://u:s3cret@h/d"),
            ("DATABASE_URL", "postgres://u:s3cret@h:port/d"),
            ("DATABASE_URL", "postgres://u:s3cret#1@h/d"),
            ("DATABASE_URL", "postgres://u:s3cret@h,h2/d"),
            ("DATABASE_URL", "postgres://u:s3cret@h/d?sslmode=bogus"),
            ("WORKER_COUT", "3"),
            ("ARCHIVE_RETENTION", "1h"),
        ] {
            let error = load(&[(name, value)]).err().unwrap_or_else(|| panic!("{name}={value} was accepted"));
            assert!(error.starts_with(&format!("{name}: ")), "{error}");
            assert!(!error.contains("s3cret") && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_file_may_hold_variables_of_other_programs_but_no_unknown_name() {
        let file =
            |name: &str| Settings::from_sources(BTreeMap::from([(name.into(), "x".into())]), HashMap::new());
        assert!(file("POSTGRES_PASSWORD").is_ok());
        let refused = |name: &str| file(name).err().unwrap().to_string();
        assert_eq!(refused("WEBHOOK_COUNT"), "WEBHOOK_COUNT: is set in .env, but there is no such setting");
        assert!(refused("LOG_LEVL").ends_with("no such setting; did you mean LOG_LEVEL?"));
    }

    #[test]
    fn a_wrong_sslmode_is_reported_with_the_valid_ones() {
        let error = load(&[("DATABASE_URL", "postgres://u@h/d?sslmode=bogus")]).err().unwrap();
        assert_eq!(
            error,
            "DATABASE_URL: sslmode=\"bogus\" is not one of disable, allow, prefer, require, verify-ca, verify-full"
        );
    }

    #[test]
    fn ranges_of_durations_are_reported_in_words() {
        let error = load(&[("ARCHIVE_RETENTION", "1h")]).err().unwrap();
        assert!(error.contains("from 1 day to 100 years, such as"), "{error}");
        let error = load(&[("HTTP_TIMEOUT", "0s")]).err().unwrap();
        assert!(error.contains("from 1 millisecond to 5 minutes"), "{error}");
    }

    #[test]
    fn the_line_that_cannot_be_parsed_is_found() {
        assert_eq!(line_number("A=1\n\nB C\r\n", "B C"), Some(3));
        assert_eq!(line_number("A=1\n", "B C"), None);
    }
}
