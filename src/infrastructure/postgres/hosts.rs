//! The hosts that a database URL lists, as libpq writes them:
//! `postgres://user@h1:5432,h2:5433/db?target_session_attrs=read-write`, or with `host` and `port` among the parameters.
//! <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-MULTIPLE-HOSTS>

use std::str::FromStr;

use sqlx::postgres::PgConnectOptions;
use url::form_urlencoded;

/// All hosts are asked at the same time, so there may not be many.
const HOSTS_MAX: usize = 8;
/// The values of `target_session_attrs`.
const SESSION_ATTRS: [&str; 6] = ["any", "read-write", "read-only", "primary", "standby", "prefer-standby"];
/// Those that mean the host that accepts writes.
const WRITING_ATTRS: [&str; 2] = ["read-write", "primary"];

/// The hosts of one database, in the order of the setting; there is at least one. They hold the password, so there is no `Debug`.
#[derive(Clone)]
pub struct Hosts(Vec<PgConnectOptions>);

impl Hosts {
    pub(super) fn into_options(self) -> Vec<PgConnectOptions> {
        self.0
    }
}

impl From<PgConnectOptions> for Hosts {
    fn from(options: PgConnectOptions) -> Self {
        Self(vec![options])
    }
}

/// Why a URL is refused. The text repeats nothing of the URL, which may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostsError {
    /// It is not a URL that the driver understands.
    #[error("is no URL of a database")]
    Malformed,
    /// Its hosts, ports or `target_session_attrs` contradict each other.
    #[error("{0}")]
    Contradictory(String),
}

impl FromStr for Hosts {
    type Err = HostsError;

    fn from_str(url: &str) -> Result<Self, HostsError> {
        let parts = Parts::of(url)?;
        let hosts = parts.hosts()?;
        parts.judge_session_attrs(hosts.len())?;
        if hosts.len() > HOSTS_MAX {
            return Err(HostsError::Contradictory(format!("must not list more than {HOSTS_MAX} hosts")));
        }
        // the URL of a single host means what the driver makes of it
        let urls = if hosts.len() > 1 { hosts } else { vec![parts.in_front.clone()] };
        let options = urls.iter().map(|host| parts.url_of(host).parse().map_err(|_| HostsError::Malformed));
        Ok(Self(options.collect::<Result<_, _>>()?))
    }
}

/// The parts of a URL as far as hosts are concerned. The rest stays as it was written.
struct Parts {
    scheme: String,
    /// `user:password@`, or nothing.
    credentials: String,
    /// What stands between the credentials and the path: hosts with their ports.
    in_front: String,
    path: String,
    /// The values of the parameters `host` and `port`, a list each.
    hosts: Vec<String>,
    ports: Vec<String>,
    session_attrs: Vec<String>,
    /// Whether there is a `hostaddr`.
    has_address: bool,
    query: String,
}

impl Parts {
    fn of(url: &str) -> Result<Self, HostsError> {
        let (scheme, rest) = url.split_once("://").ok_or(HostsError::Malformed)?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
        let (credentials, in_front) =
            authority.rfind('@').map_or(("", authority), |at| authority.split_at(at + 1));
        let values = |name: &str| {
            let pairs = form_urlencoded::parse(query.as_bytes()).filter(|(key, _)| key == name);
            pairs.map(|(_, value)| value.into_owned()).collect::<Vec<_>>()
        };
        let list = |name: &str| -> Vec<String> {
            values(name).iter().flat_map(|value| value.split(',')).map(str::to_owned).collect()
        };
        Ok(Self {
            scheme: scheme.to_owned(),
            credentials: credentials.to_owned(),
            in_front: in_front.to_owned(),
            path: path.to_owned(),
            hosts: list("host"),
            ports: list("port"),
            session_attrs: values("target_session_attrs"),
            has_address: !values("hostaddr").is_empty(),
            query: query.to_owned(),
        })
    }

    /// Each host as a URL names it, with its port.
    fn hosts(&self) -> Result<Vec<String>, HostsError> {
        let refused = |message: &str| Err(HostsError::Contradictory(message.to_owned()));
        let in_front: Vec<&str> = self.in_front.split(',').collect();
        if in_front.len() < 2 && self.hosts.len() < 2 && self.ports.len() < 2 {
            return Ok(vec![self.in_front.clone()]);
        }
        if self.has_address {
            return refused("must not have hostaddr with several hosts");
        }
        if !self.hosts.is_empty() && !self.in_front.is_empty() {
            return refused("must list its hosts in one place: before the path, or as host=");
        }
        if self.hosts.is_empty() {
            if !self.ports.is_empty() {
                return refused("must give the port of each host behind it, as in h1:5432,h2:5433");
            }
            if in_front.iter().any(|host| host.is_empty() || host.starts_with(':')) {
                return refused("lists a host without a name");
            }
            return Ok(in_front.into_iter().map(str::to_owned).collect());
        }
        if ![0, 1, self.hosts.len()].contains(&self.ports.len()) {
            return refused("must have one port= for all hosts, or one for each");
        }
        if self.hosts.iter().any(String::is_empty) {
            return refused("lists a host without a name");
        }
        let port_of = |index: usize| self.ports.get(index).or(self.ports.first()).map_or("", String::as_str);
        let hosts = self.hosts.iter().enumerate();
        Ok(hosts.map(|(index, host)| format!("{}:{}", in_url(host), port_of(index))).collect())
    }

    fn judge_session_attrs(&self, hosts: usize) -> Result<(), HostsError> {
        let allowed: &[&str] = if hosts > 1 { &WRITING_ATTRS } else { &SESSION_ATTRS };
        if self.session_attrs.iter().all(|value| allowed.contains(&value.as_str())) {
            return Ok(());
        }
        Err(HostsError::Contradictory(if hosts > 1 {
            "must have target_session_attrs=read-write (or primary) with several hosts, or none: only the host that accepts \
             writes is of use"
                .to_owned()
        } else {
            format!("must have one of {} as target_session_attrs", SESSION_ATTRS.join(", "))
        }))
    }

    /// The URL of one of several hosts, or of the only one, without what the driver does not know.
    fn url_of(&self, host: &str) -> String {
        let is_list = self.in_front != host;
        let foreign = |pair: &&str| {
            let name = pair.split('=').next().unwrap_or_default();
            name == "target_session_attrs" || (is_list && ["host", "port"].contains(&name))
        };
        let query: Vec<&str> =
            self.query.split('&').filter(|pair| !pair.is_empty() && !foreign(pair)).collect();
        let query = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
        format!("{}://{}{host}{}{query}", self.scheme, self.credentials, self.path)
    }
}

/// A host of the parameters, as it is written before the path of a URL.
fn in_url(host: &str) -> String {
    if host.contains(':') && !host.starts_with('[') {
        return format!("[{host}]");
    }
    if host.starts_with('/') {
        return form_urlencoded::byte_serialize(host.as_bytes()).collect::<String>().replace('+', "%20");
    }
    host.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each host with its port, the user and the database.
    fn hosts(url: &str) -> Result<Vec<String>, String> {
        let hosts = url.parse::<Hosts>().map_err(|error| error.to_string())?;
        let shown = hosts.into_options().into_iter().map(|options| {
            let host = options
                .get_socket()
                .map_or_else(|| options.get_host().to_owned(), |directory| directory.display().to_string());
            format!(
                "{}@{host}:{}/{}",
                options.get_username(),
                options.get_port(),
                options.get_database().unwrap_or_default()
            )
        });
        Ok(shown.collect())
    }

    #[test]
    fn hosts_are_listed_before_the_path_or_as_parameters_in_their_order() {
        for (url, expected) in [
            ("postgres://u:p@h1:5433/d", &["u@h1:5433/d"][..]),
            ("postgres://u@h1:5433/d?target_session_attrs=any&sslmode=disable", &["u@h1:5433/d"]),
            ("postgres://u@h1/d?host=h2&port=5439", &["u@h2:5439/d"]),
            (
                "postgres://u:p@h1:5433,h2:5434/d?target_session_attrs=read-write",
                &["u@h1:5433/d", "u@h2:5434/d"],
            ),
            ("postgresql://u@[::1]:5433,%2Frun%2Fb:5434/d", &["u@[::1]:5433/d", "u@/run/b:5434/d"]),
            ("postgres:///d?user=u&host=h1,h2&port=5433", &["u@h1:5433/d", "u@h2:5433/d"]),
            ("postgres:///d?user=u&host=h1%2Ch2&port=1,2", &["u@h1:1/d", "u@h2:2/d"]),
            ("postgres:///d?user=u&host=%2Frun%2Fa&port=1&host=::1&port=2", &["u@/run/a:1/d", "u@[::1]:2/d"]),
            ("postgres://u:p%40,h@h1:1,h2:2,h3:3/d?sslmode=require", &["u@h1:1/d", "u@h2:2/d", "u@h3:3/d"]),
        ] {
            assert_eq!(
                hosts(url).as_deref(),
                Ok(&expected.iter().map(|&e| e.to_owned()).collect::<Vec<_>>()[..]),
                "{url}"
            );
        }
    }

    #[test]
    fn lists_that_contradict_themselves_are_refused_without_a_word_of_the_url() {
        for (url, said) in [
            ("postgres://u:s3cret@h1:port,h2/d", "is no URL"),
            ("postgres://u:s3cret@h1,,h2/d", "without a name"),
            ("postgres://u:s3cret@h1,:5433/d", "without a name"),
            ("postgres://u:s3cret@h1,h2/d?port=5433", "the port of each host"),
            ("postgres://u:s3cret@h1/d?host=h2,h3", "in one place"),
            ("postgres:///d?host=h1,h2&port=1,2,3", "one port= for all hosts, or one for each"),
            ("postgres:///d?host=h1,h2&port=1,x", "is no URL"),
            ("postgres://u:s3cret@h1,h2/d?hostaddr=10.0.0.1", "hostaddr"),
            ("postgres://u:s3cret@h1,h2/d?target_session_attrs=any", "target_session_attrs=read-write"),
            ("postgres://u:s3cret@h1,h2/d?target_session_attrs=standby", "target_session_attrs=read-write"),
            ("postgres://u:s3cret@h1/d?target_session_attrs=bogus", "must have one of any, read-write"),
            ("postgres://u:s3cret@a,b,c,d,e,f,g,h,i/d", "more than 8 hosts"),
        ] {
            let refusal = hosts(url).unwrap_err();
            assert!(refusal.contains(said) && !refusal.contains("s3cret"), "{url}: {refusal}");
        }
    }
}
