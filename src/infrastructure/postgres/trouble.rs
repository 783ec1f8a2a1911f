//! Explains why the database cannot be used, in one sentence that names the place, the fault and the remedy.

use std::io::ErrorKind;

use rustls::CertificateError;
use sqlx::postgres::PgConnectOptions;

/// The oldest supported version, in the format of `server_version_num`.
const VERSION_MIN: i32 = 15_00_00;

/// Why the database cannot be used. The text never holds a password, so it may be shown to anyone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{sentence}")]
pub struct Trouble {
    sentence: String,
    /// Whether waiting may help, because someone starts, frees or corrects something elsewhere.
    passes: bool,
}

impl Trouble {
    fn passing(sentence: impl Into<String>) -> Self {
        Self { sentence: sentence.into(), passes: true }
    }

    /// A trouble that waiting does not end.
    pub(super) fn lasting(sentence: impl Into<String>) -> Self {
        Self { sentence: sentence.into(), passes: false }
    }

    /// Whether waiting may help.
    pub fn passes(&self) -> bool {
        self.passes
    }

    /// The schema is older than this program needs.
    pub(super) fn old_schema(found: Option<i64>, needed: i64) -> Self {
        Self::passing(match found {
            None => format!(
                "the database has no schema yet, this program needs version {needed}: run webhook-processor migrate"
            ),
            Some(found) => format!(
                "the database's schema is of version {found}, this program needs {needed}: run webhook-processor migrate"
            ),
        })
    }

    /// Explains a driver's error from the connection to `place`, or from its first use.
    pub(super) fn of(error: &sqlx::Error, place: &Place) -> Self {
        let Place { setting, address, user, database, .. } = place;
        match error {
            sqlx::Error::Io(error) => Self::passing(io_sentence(error, place)),
            sqlx::Error::Tls(cause) => Self::passing(format!(
                "TLS with PostgreSQL at {address} failed: {cause}; check sslmode and sslrootcert in {setting}"
            )),
            sqlx::Error::Protocol(_) => Self::passing(format!(
                "what answers at {address} does not speak PostgreSQL's protocol as expected; check host and port in {setting}"
            )),
            sqlx::Error::PoolTimedOut => {
                Self::passing(format!("PostgreSQL at {address} let no connection become free in time"))
            }
            sqlx::Error::Database(refusal) => {
                let message = refusal.message();
                match refusal.code().as_deref().unwrap_or_default() {
                    "28P01" => Self::passing(format!(
                        "PostgreSQL at {address} refuses the password of user \"{user}\" for database \"{database}\": \
                         correct it in {setting}; characters such as # / ? @ : % in it must be percent-encoded"
                    )),
                    code if code.starts_with("28") => Self::passing(format!(
                        "PostgreSQL at {address} does not let user \"{user}\" into database \"{database}\": {message}; \
                         correct the user in {setting}, or let it in (CREATE ROLE, LOGIN, pg_hba.conf)"
                    )),
                    "3D000" => Self::passing(format!(
                        "PostgreSQL at {address} has no database \"{database}\": create it, or correct its name in {setting}"
                    )),
                    "55000" if message.contains("accepting connections") => Self::passing(format!(
                        "PostgreSQL at {address} does not let user \"{user}\" into database \"{database}\": {message}; \
                         ALTER DATABASE … ALLOW_CONNECTIONS true opens it"
                    )),
                    "42501" => Self::passing(format!(
                        "user \"{user}\" may not do what is needed in database \"{database}\" at {address}: {message}; \
                         grant it (CONNECT on the database, CREATE and USAGE on the schema), or use the owner"
                    )),
                    "53300" => Self::passing(format!(
                        "too many connections to PostgreSQL at {address} (user \"{user}\", database \"{database}\"): \
                         {message}; raise max_connections, lower DATABASE_MAX_CONNECTIONS, or use a pooler"
                    )),
                    "25006" => Self::read_only(place),
                    code if code.starts_with("57P") => {
                        Self::passing(format!("PostgreSQL at {address} is not ready: {message}"))
                    }
                    // locks, serialization, resources, and the errors of a pooler
                    code if ["55P03", "40001", "40P01", "57014"].contains(&code)
                        || code.starts_with("53")
                        || code.starts_with("08") =>
                    {
                        Self::passing(format!(
                            "PostgreSQL at {address} (user \"{user}\", database \"{database}\") refused for now: {message}"
                        ))
                    }
                    code => Self::lasting(format!(
                        "PostgreSQL at {address} (user \"{user}\", database \"{database}\") refused: {message} (SQLSTATE {code})"
                    )),
                }
            }
            other => Self::lasting(format!("database \"{database}\" at {address} cannot be used: {other}")),
        }
    }

    /// The database is read-only.
    pub(super) fn read_only(Place { setting, address, database, .. }: &Place) -> Self {
        Self::passing(format!(
            "database \"{database}\" at {address} is read-only, so nothing can be stored: it is a standby, or \
             default_transaction_read_only is on; {setting} must lead to the primary"
        ))
    }

    /// None of several hosts accepts writes. `reasons` says why, for each.
    pub(super) fn no_primary(setting: &'static str, reasons: &str, passes: bool) -> Self {
        Self { sentence: format!("no host in {setting} accepts writes: {reasons}"), passes }
    }

    pub(super) fn silence(place: &Place) -> Self {
        let Place { setting, address, .. } = place;
        Self::passing(format!(
            "PostgreSQL at {address} does not answer: check host and port in {setting}, and what lies between"
        ))
    }
}

/// Why the certificate of the server was not accepted; the driver reports that as an error of the connection.
fn certificate_sentence(error: &std::io::Error, Place { setting, address, .. }: &Place) -> Option<String> {
    let rustls::Error::InvalidCertificate(fault) = error.get_ref()?.downcast_ref()? else { return None };
    Some(match fault {
        CertificateError::UnknownIssuer => format!(
            "the certificate of PostgreSQL at {address} was issued by no authority that is trusted here: name its authority \
             in {setting} by sslrootcert=/path/to/ca.pem"
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => format!(
            "the certificate of PostgreSQL at {address} is for another name: write the host in {setting} as the certificate \
             names it, or give the server another certificate"
        ),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            format!("the certificate of PostgreSQL at {address} has expired: give the server a new one")
        }
        other => format!(
            "the certificate of PostgreSQL at {address} is not accepted ({other}); sslmode and sslrootcert in {setting} \
             decide about it"
        ),
    })
}

fn io_sentence(error: &std::io::Error, place: &Place) -> String {
    if let Some(sentence) = certificate_sentence(error, place) {
        return sentence;
    }
    let Place { setting, address, .. } = place;
    match error.kind() {
        ErrorKind::ConnectionRefused => format!(
            "nothing listens at {address}: start PostgreSQL there, or correct host and port in {setting}"
        ),
        ErrorKind::NotFound => {
            format!("there is no PostgreSQL at {address}: start it, or correct the directory in {setting}")
        }
        ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
            format!("PostgreSQL at {address} cannot be reached ({error}): check host and port in {setting}")
        }
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => format!(
            "what listens at {address} ended the connection: PostgreSQL is stopping, or host and port in {setting} lead elsewhere"
        ),
        // errors of the name resolver have no `ErrorKind`, so their text decides
        _ if error.to_string().contains("lookup address") => format!(
            "the host of {address} cannot be found ({error}): correct it in {setting}; a password with # / ? @ in it must \
             be percent-encoded"
        ),
        _ => format!("PostgreSQL at {address} cannot be reached: {error}; check host and port in {setting}"),
    }
}

/// The address of a database, for error texts. It never holds the password.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// The setting that names this database.
    setting: &'static str,
    address: String,
    user: String,
    database: String,
}

impl Place {
    /// `options` is the value of the setting with the name `setting`.
    pub(super) fn of(options: &PgConnectOptions, setting: &'static str) -> Self {
        let address = match options.get_socket() {
            Some(directory) => format!("{}/.s.PGSQL.{}", directory.display(), options.get_port()),
            None if options.get_host().starts_with('/') => {
                format!("{}/.s.PGSQL.{}", options.get_host(), options.get_port())
            }
            None => format!("{}:{}", options.get_host(), options.get_port()),
        };
        let user = options.get_username().to_owned();
        let database = options.get_database().unwrap_or(&user).to_owned();
        Self { setting, address, user, database }
    }

    /// Host and port, or the path of a socket.
    pub(super) fn address(&self) -> &str {
        &self.address
    }
}

/// Refuses a server that is too old, or a database that is not in UTF-8.
pub(super) fn judge_server(version: i32, encoding: &str, place: &Place) -> Result<(), Trouble> {
    let Place { address, database, .. } = place;
    if version < VERSION_MIN {
        return Err(Trouble::lasting(format!(
            "PostgreSQL at {address} is of version {}: version {} or newer is needed",
            version / 10_000,
            VERSION_MIN / 10_000
        )));
    }
    if encoding != "UTF8" {
        return Err(Trouble::lasting(format!(
            "database \"{database}\" at {address} has the encoding {encoding}, in which not every answer of a receiver \
             can be stored: create one with ENCODING 'UTF8' TEMPLATE template0"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        let options = PgConnectOptions::new_without_pgpass().host("db").port(5433).username("app");
        Place::of(&options.password("s3cret").database("shop"), "DATABASE_URL")
    }

    #[test]
    fn an_old_server_and_an_encoding_that_loses_text_are_refused_for_good() {
        assert_eq!(judge_server(150_000, "UTF8", &place()), Ok(()));
        for (version, encoding, said) in [
            (140_018, "UTF8", "is of version 14: version 15 or newer is needed"),
            (180_006, "LATIN1", "has the encoding LATIN1"),
        ] {
            let trouble = judge_server(version, encoding, &place()).unwrap_err();
            assert!(trouble.to_string().contains(said), "{trouble}");
            assert!(!trouble.passes());
        }
    }

    #[test]
    fn a_sentence_names_the_place_and_the_setting_and_never_the_password() {
        let refused = sqlx::Error::Io(ErrorKind::ConnectionRefused.into());
        let sentence = Trouble::of(&refused, &place()).to_string();
        assert_eq!(
            sentence,
            "nothing listens at db:5433: start PostgreSQL there, or correct host and port in DATABASE_URL"
        );
        assert!(!format!("{:?}", place()).contains("s3cret"));
    }
}
