//! Makes, lists and revokes API keys, and recognizes those that callers present.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::ports::{Change, KeyStore, StoreError};
use crate::domain::access::{Action, ApiKey, Caller, KeyId, NewKey, Operator, Secret, SecretDigest, Token};
use crate::domain::invalid::Invalid;

/// For how long the keys are known once they were read. A key that is revoked elsewhere is refused after this time.
const KNOWN_FOR: Duration = Duration::from_secs(1);
/// For how long they are known if they cannot be read again.
const KNOWN_WITHOUT_STORE_FOR: Duration = Duration::from_mins(1);
/// A key that is not known may have been made a moment ago, elsewhere. The keys are read again for it, but no more often.
const READ_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// How often the use of a key is noted.
const NOTE_USE_EVERY: Duration = Duration::from_mins(1);

/// Why a request about keys was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// There is no such key, or it was revoked.
    #[error("there is no key {0}, or it was revoked before")]
    Unknown(KeyId),
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error(transparent)]
    Store(#[from] StoreError),
}

pub struct Access {
    store: Arc<dyn KeyStore>,
    ring: Mutex<Ring>,
}

/// The valid keys.
#[derive(Default)]
struct Ring {
    keys: HashMap<KeyId, Held>,
    /// When they were read.
    read_at: Option<Instant>,
    /// When they were last read, or could not be read.
    tried_at: Option<Instant>,
}

struct Held {
    key: Arc<ApiKey>,
    use_noted_at: Option<Instant>,
}

impl Access {
    pub fn new(store: Arc<dyn KeyStore>) -> Self {
        Self { store, ring: Mutex::default() }
    }

    /// Makes a key with a new secret. Its text cannot be had again.
    pub async fn create(
        &self,
        key: NewKey,
        secret: Secret,
        by: &Operator,
    ) -> Result<(ApiKey, Token), AccessError> {
        let made = serde_json::json!({
            "name": key.name,
            "scopes": key.scopes,
            "config_ids": key.config_ids.as_ref().map(|ids| ids.iter().map(|id| id.get()).collect::<Vec<_>>()),
        });
        let change = Change::new(by, Action::CreateKey).to(made);
        let key = self.store.create(&key, &secret.digest(), &change).await?;
        let token = Token { id: key.id, secret };
        Ok((key, token))
    }

    /// All keys, including revoked ones.
    pub async fn list(&self) -> Result<Vec<ApiKey>, AccessError> {
        Ok(self.store.all().await?)
    }

    /// Revokes a key. This process refuses it from now on, others within a second.
    pub async fn revoke(&self, id: KeyId, by: &Operator) -> Result<(), AccessError> {
        let revoked = self.store.revoke(id, &Change::new(by, Action::RevokeKey)).await?;
        self.ring.lock().await.keys.remove(&id);
        if revoked { Ok(()) } else { Err(AccessError::Unknown(id)) }
    }

    /// Whether there is a valid key.
    pub async fn has_key(&self) -> Result<bool, StoreError> {
        Ok(!self.store.valid().await?.is_empty())
    }

    /// Who presents `text`; `None` if it is not the text of a valid key. `look_again` allows to read the keys once more if it
    /// is not. A wrong text costs the same as a right one.
    pub async fn recognize(&self, text: &str, look_again: bool) -> Result<Option<Caller>, StoreError> {
        let token = Token::parse(text);
        let mut ring = self.ring.lock().await;
        self.renew(&mut ring, KNOWN_FOR).await?;
        let mut is_known = ring.accepts(token.as_ref());
        if !is_known && look_again && token.is_some() {
            // it may have been made after the last look; nobody else waits meanwhile
            let since_last = ring.tried_at.map_or(READ_AGAIN_AFTER, |tried| tried.elapsed());
            drop(ring);
            sleep(READ_AGAIN_AFTER.saturating_sub(since_last)).await;
            ring = self.ring.lock().await;
            self.renew(&mut ring, READ_AGAIN_AFTER).await?;
            is_known = ring.accepts(token.as_ref());
        }
        let Some(held) = token.filter(|_| is_known).and_then(|token| ring.keys.get_mut(&token.id)) else {
            return Ok(None);
        };
        let key = held.key.clone();
        if held.use_noted_at.is_none_or(|noted| noted.elapsed() >= NOTE_USE_EVERY) {
            held.use_noted_at = Some(Instant::now());
            drop(ring);
            // it is for people: no request fails for it
            if let Err(error) = self.store.note_use(key.id).await {
                warn!(key_id = key.id.get(), error = error.report(), "the use of a key could not be noted");
            }
        }
        Ok(Some(Caller::Key(key)))
    }

    /// Reads the keys unless that was done or tried less than `age_max` ago.
    async fn renew(&self, ring: &mut Ring, age_max: Duration) -> Result<(), StoreError> {
        let younger = |time: Option<Instant>, age: Duration| time.is_some_and(|time| time.elapsed() < age);
        if younger(ring.tried_at, age_max) && younger(ring.read_at, KNOWN_WITHOUT_STORE_FOR) {
            return Ok(());
        }
        let read = self.store.valid().await;
        let now = Instant::now();
        ring.tried_at = Some(now);
        match read {
            Ok(keys) => {
                let mut before = std::mem::take(&mut ring.keys);
                ring.keys = keys
                    .into_iter()
                    .map(|key| {
                        let use_noted_at = before.remove(&key.id).and_then(|held| held.use_noted_at);
                        (key.id, Held { key: Arc::new(key), use_noted_at })
                    })
                    .collect();
                ring.read_at = Some(now);
                Ok(())
            }
            Err(error) if younger(ring.read_at, KNOWN_WITHOUT_STORE_FOR) => {
                warn!(error = error.report(), "the API keys cannot be read; those known before still count");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

impl Ring {
    /// Whether this is the text of a valid key. Something is compared in any case, so that time tells nothing.
    fn accepts(&self, token: Option<&Token>) -> bool {
        let nobody = Secret::of_nobody();
        let secret = token.map_or(&nobody, |token| &token.secret);
        let key = token.and_then(|token| self.keys.get(&token.id));
        let digest = key.map_or_else(SecretDigest::of_nobody, |held| held.key.digest.clone());
        digest.is_of(secret) && key.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::PoisonError;

    use async_trait::async_trait;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;
    use crate::domain::access::{NewKey, Way};

    /// Keys in memory, which can be made unreadable.
    #[derive(Default)]
    struct Keys {
        keys: std::sync::Mutex<Vec<ApiKey>>,
        reads: std::sync::atomic::AtomicUsize,
        is_away: std::sync::atomic::AtomicBool,
    }

    impl Keys {
        fn keys(&self) -> std::sync::MutexGuard<'_, Vec<ApiKey>> {
            self.keys.lock().unwrap_or_else(PoisonError::into_inner)
        }

        fn reads(&self) -> usize {
            self.reads.load(std::sync::atomic::Ordering::Relaxed)
        }
    }

    #[async_trait]
    impl KeyStore for Keys {
        async fn create(
            &self,
            key: &NewKey,
            digest: &SecretDigest,
            _: &Change<'_>,
        ) -> Result<ApiKey, StoreError> {
            let mut keys = self.keys();
            let key = ApiKey {
                id: KeyId::from_stored(i64::try_from(keys.len()).unwrap() + 1),
                name: key.name.clone(),
                scopes: key.scopes.clone(),
                config_ids: key.config_ids.clone(),
                digest: digest.clone(),
                created_at: chrono::DateTime::UNIX_EPOCH,
                last_used_at: None,
                revoked_at: None,
            };
            keys.push(key.clone());
            Ok(key)
        }

        async fn all(&self) -> Result<Vec<ApiKey>, StoreError> {
            Ok(self.keys().clone())
        }

        async fn valid(&self) -> Result<Vec<ApiKey>, StoreError> {
            self.reads.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if self.is_away.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(StoreError::Unavailable(Arc::new(anyhow::anyhow!("away"))));
            }
            Ok(self.keys().iter().filter(|key| key.revoked_at.is_none()).cloned().collect())
        }

        async fn revoke(&self, id: KeyId, _: &Change<'_>) -> Result<bool, StoreError> {
            let mut keys = self.keys();
            let key = keys.iter_mut().find(|key| key.id == id && key.revoked_at.is_none());
            Ok(key.map(|key| key.revoked_at = Some(chrono::DateTime::UNIX_EPOCH)).is_some())
        }

        async fn note_use(&self, id: KeyId) -> Result<(), StoreError> {
            let mut keys = self.keys();
            let key = keys.iter_mut().find(|key| key.id == id).unwrap();
            key.last_used_at = Some(chrono::DateTime::UNIX_EPOCH);
            Ok(())
        }
    }

    fn operator() -> Operator {
        Operator { name: "test".into(), way: Way::CommandLine, reason: None }
    }

    async fn made(access: &Access, seed: u64) -> (ApiKey, String) {
        let key = NewKey::parse("shop".into(), &["read"], None).unwrap();
        let (key, token) =
            access.create(key, Secret::draw(&mut StdRng::seed_from_u64(seed)), &operator()).await.unwrap();
        (key, token.text())
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_is_recognized_by_its_whole_text_until_it_is_revoked() {
        let store = Arc::new(Keys::default());
        let access = Access::new(store.clone());
        let (key, text) = made(&access, 1).await;
        let (_, other) = made(&access, 2).await;
        assert!(access.recognize(&text, true).await.unwrap().is_some());
        assert!(store.keys()[0].last_used_at.is_some());
        let mixed = other.replace("whk_2", "whk_1");
        for wrong in ["", "whk_", &text[..text.len() - 1], &mixed, &text.replace("whk_1", "whk_3")] {
            assert!(access.recognize(wrong, true).await.unwrap().is_none(), "{wrong}");
        }
        access.revoke(key.id, &operator()).await.unwrap();
        assert!(access.recognize(&text, true).await.unwrap().is_none());
        assert!(access.recognize(&other, true).await.unwrap().is_some());
        assert!(matches!(access.revoke(key.id, &operator()).await, Err(AccessError::Unknown(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn keys_made_and_revoked_elsewhere_are_noticed_within_a_second() {
        let store = Arc::new(Keys::default());
        let (here, elsewhere) = (Access::new(store.clone()), Access::new(store.clone()));
        assert!(here.recognize("whk_1_", true).await.unwrap().is_none());
        let (key, text) = made(&elsewhere, 1).await;
        assert!(
            here.recognize(&text, false).await.unwrap().is_none(),
            "nothing is read for who may not ask again"
        );
        assert!(here.recognize(&text, true).await.unwrap().is_some());
        elsewhere.revoke(key.id, &operator()).await.unwrap();
        tokio::time::advance(KNOWN_FOR).await;
        assert!(here.recognize(&text, true).await.unwrap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn wrong_texts_do_not_make_it_read_the_keys_each_time() {
        let store = Arc::new(Keys::default());
        let access = Access::new(store.clone());
        let (_, text) = made(&access, 1).await;
        let wrong = text.replace("whk_1", "whk_9");
        let begun = Instant::now();
        for _ in 0..1_000 {
            assert!(access.recognize(&wrong, false).await.unwrap().is_none());
        }
        assert_eq!(store.reads(), 1);
        for _ in 0..50 {
            assert!(access.recognize(&wrong, true).await.unwrap().is_none());
        }
        let reads_max = begun.elapsed().as_millis() / READ_AGAIN_AFTER.as_millis() + 1;
        assert!(store.reads() as u128 <= reads_max, "{} of {reads_max}", store.reads());
    }

    #[tokio::test(start_paused = true)]
    async fn without_its_store_it_knows_the_keys_for_a_minute() {
        let store = Arc::new(Keys::default());
        let access = Access::new(store.clone());
        let (_, text) = made(&access, 1).await;
        assert!(access.recognize(&text, true).await.unwrap().is_some());
        store.is_away.store(true, std::sync::atomic::Ordering::Relaxed);
        tokio::time::advance(KNOWN_WITHOUT_STORE_FOR / 2).await;
        assert!(access.recognize(&text, true).await.unwrap().is_some());
        tokio::time::advance(KNOWN_WITHOUT_STORE_FOR / 2).await;
        assert!(access.recognize(&text, true).await.is_err());
        store.is_away.store(false, std::sync::atomic::Ordering::Relaxed);
        assert!(access.recognize(&text, true).await.unwrap().is_some());
    }
}
