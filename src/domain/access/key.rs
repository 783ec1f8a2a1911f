//! API keys. A key's text is shown once; what is stored does not allow anyone to use it.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use chrono::{DateTime, Utc};
use rand::CryptoRng;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::domain::endpoint::EndpointId;
use crate::domain::invalid::{Faults, Invalid, bounded_text};

/// How each key's text begins, so that people and scanners recognize one.
const PREFIX: &str = "whk_";
/// The longest name of a key, in characters.
const NAME_CHARS_MAX: usize = 200;
/// The most endpoints that a key may be bound to.
const BOUND_MAX: usize = 1_000;

/// Names an API key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(i64);

impl KeyId {
    /// An id that comes from the store.
    pub fn from_stored(number: i64) -> Self {
        Self(number)
    }

    /// As it is stored.
    pub fn get(self) -> i64 {
        self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for KeyId {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text.parse() {
            Ok(number) if number > 0 => Ok(Self(number)),
            Ok(_) | Err(_) => Err(Invalid::field("id", "must be a positive whole number")),
        }
    }
}

/// What a key may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Hand in events.
    Enqueue,
    /// See deliveries, configs and figures.
    Read,
    /// Retry, cancel, replay, probe.
    Operate,
    /// Change configs and keys.
    Manage,
}

impl Scope {
    /// All scopes.
    pub const ALL: [Self; 4] = [Self::Enqueue, Self::Read, Self::Operate, Self::Manage];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enqueue => "enqueue",
            Self::Read => "read",
            Self::Operate => "operate",
            Self::Manage => "manage",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Scope {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let known = Self::ALL.into_iter().find(|scope| scope.as_str() == text);
        known.ok_or_else(|| Invalid::field("scopes", "must be enqueue, read, operate or manage"))
    }
}

/// The scopes of a key: at least one, each once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Scopes(Vec<Scope>);

impl Scopes {
    /// Accepts the names of one or more scopes.
    pub fn parse<T: AsRef<str>>(names: &[T]) -> Result<Self, Invalid> {
        let mut scopes = names.iter().map(|name| name.as_ref().parse()).collect::<Result<Vec<Scope>, _>>()?;
        scopes.sort_unstable();
        scopes.dedup();
        if scopes.is_empty() {
            return Err(Invalid::field(
                "scopes",
                "must name at least one of enqueue, read, operate and manage",
            ));
        }
        Ok(Self(scopes))
    }

    /// Whether `scope` is one of them.
    pub fn contains(&self, scope: Scope) -> bool {
        self.0.contains(&scope)
    }

    /// Each of them, in the order of [`Scope::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = Scope> {
        self.0.iter().copied()
    }
}

/// The part of a key's text that nobody can guess: 256 random bits. It has no `Debug`.
pub struct Secret([u8; 32]);

impl Secret {
    /// A new one.
    pub fn draw(random: &mut impl CryptoRng) -> Self {
        let mut bytes = [0; 32];
        random.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// One that no key has, for comparisons that must take their time.
    pub fn of_nobody() -> Self {
        Self([0; 32])
    }

    /// What is stored of it. A fast hash is enough: nobody can try 2²⁵⁶ secrets.
    pub fn digest(&self) -> SecretDigest {
        SecretDigest(Sha256::digest(self.0).into())
    }
}

/// The SHA-256 of a secret.
#[derive(Debug, Clone)]
pub struct SecretDigest([u8; 32]);

impl SecretDigest {
    /// A digest that comes from the store; `None` if it has another length.
    pub fn from_stored(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// One that no secret has, for comparisons that must take their time.
    pub fn of_nobody() -> Self {
        Self([0; 32])
    }

    /// As it is stored.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether it is the digest of `secret`. Takes the same time for any secret.
    pub fn is_of(&self, secret: &Secret) -> bool {
        self.0.ct_eq(&secret.digest().0).into()
    }
}

/// A key's text: `whk_`, the key's id, `_`, and the secret in 64 hexadecimal digits. It has no `Debug`.
pub struct Token {
    /// The key that it claims to be.
    pub id: KeyId,
    /// What proves it.
    pub secret: Secret,
}

impl Token {
    /// Reads what a caller presents; `None` if it is not of this form.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, digits) = text.strip_prefix(PREFIX)?.split_once('_')?;
        if digits.len() != 64 || !digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self { id: id.parse().ok()?, secret: Secret(bytes) })
    }

    /// As its holder keeps it.
    pub fn text(&self) -> String {
        let mut text = format!("{PREFIX}{}_", self.id);
        for byte in self.secret.0 {
            write!(text, "{byte:02x}").expect("a String takes it");
        }
        text
    }
}

/// A key to be made.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// For people.
    pub name: String,
    /// What it may be used for.
    pub scopes: Scopes,
    /// The only endpoints that it reaches; `None`: all.
    pub config_ids: Option<Vec<EndpointId>>,
}

impl NewKey {
    /// Accepts a name, scopes, and the numbers of the endpoints that the key is bound to.
    pub fn parse<T: AsRef<str>>(
        name: String,
        scopes: &[T],
        config_ids: Option<&[i64]>,
    ) -> Result<Self, Invalid> {
        let mut faults = Faults::default();
        faults.note(bounded_text("name", &name, NAME_CHARS_MAX));
        let scopes = faults.note(Scopes::parse(scopes));
        let config_ids = config_ids.map(|numbers| {
            if numbers.is_empty() || numbers.len() > BOUND_MAX {
                faults.push("config_ids", format!("must name from 1 to {BOUND_MAX} configs"));
            }
            let mut ids: Vec<EndpointId> = numbers
                .iter()
                .filter_map(|number| faults.note(EndpointId::parse("config_ids", *number)))
                .collect();
            ids.sort_unstable();
            ids.dedup();
            ids
        });
        let scopes = match scopes {
            Some(scopes) if scopes.contains(Scope::Manage) && config_ids.is_some() => {
                faults.push("scopes", "must not include manage, which reaches all configs and keys, in a key that is bound to configs");
                None
            }
            scopes => scopes,
        };
        faults.into_result()?;
        Ok(Self { name, scopes: scopes.expect("a fault would have been noted"), config_ids })
    }
}

/// A stored key.
#[derive(Debug, Clone)]
pub struct ApiKey {
    /// Names it.
    pub id: KeyId,
    /// For people.
    pub name: String,
    /// What it may be used for.
    pub scopes: Scopes,
    /// The only endpoints that it reaches; `None`: all.
    pub config_ids: Option<Vec<EndpointId>>,
    /// What a presented secret is compared with.
    pub digest: SecretDigest,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it was last used, to within a minute; `None`: never.
    pub last_used_at: Option<DateTime<Utc>>,
    /// When it was revoked; `None`: it is valid.
    pub revoked_at: Option<DateTime<Utc>>,
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    fn token(seed: u64) -> Token {
        Token { id: KeyId(7), secret: Secret::draw(&mut StdRng::seed_from_u64(seed)) }
    }

    #[test]
    fn a_token_is_read_as_it_was_written() {
        let text = token(1).text();
        assert!(text.starts_with("whk_7_") && text.len() == "whk_7_".len() + 64, "{text}");
        let read = Token::parse(&text).unwrap();
        assert_eq!(read.id, KeyId(7));
        assert!(token(1).secret.digest().is_of(&read.secret));
        assert!(!token(2).secret.digest().is_of(&read.secret));
    }

    #[test]
    fn what_is_not_exactly_a_token_is_none() {
        let text = token(1).text();
        for wrong in [
            "",
            "whk_",
            "whk_7",
            "whk_7_",
            &text[1..],
            &text[..text.len() - 1],
            &format!("{text}0"),
            &text.replace("whk_7", "whk_0"),
            &text.replace("whk_7", "whk_-7"),
            &text.replace("whk_7", "whk_99999999999999999999"),
            &format!("whk_7_{}", "+f".repeat(32)),
            &format!("whk_7_{}", "ä".repeat(32)),
        ] {
            assert!(Token::parse(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn a_new_key_needs_a_name_and_scopes_that_there_are() {
        let fields = |name: &str, scopes: &[&str], configs: Option<&[i64]>| {
            let faults = NewKey::parse(name.to_owned(), scopes, configs).err();
            faults.map(|faults| faults.errors().iter().map(|e| e.field.clone()).collect::<Vec<_>>())
        };
        assert_eq!(fields("shop", &["read", "enqueue", "read"], Some(&[2, 1])), None);
        assert_eq!(fields("", &[], Some(&[])).unwrap(), ["name", "scopes", "config_ids"]);
        assert_eq!(fields("shop", &["root"], Some(&[-1])).unwrap(), ["scopes", "config_ids"]);
        assert_eq!(fields("shop", &["manage"], Some(&[1])).unwrap(), ["scopes"]);
        let key = NewKey::parse("shop".into(), &["read", "enqueue", "read"], None).unwrap();
        assert_eq!(key.scopes.iter().collect::<Vec<_>>(), [Scope::Enqueue, Scope::Read]);
    }
}
