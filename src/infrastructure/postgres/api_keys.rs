//! The rows of `webhook_api_keys`.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sqlx::Connection as _;

use super::errors::inconsistent;
use super::operators::{change_row, record};
use super::within::within;
use super::{Database, REQUEST_LIMIT};
use crate::application::ports::{Change, KeyStore, StoreError};
use crate::domain::access::{ApiKey, KeyId, NewKey, Scope, Scopes, SecretDigest};
use crate::domain::endpoint::EndpointId;
use crate::domain::invalid::Invalid;

#[async_trait]
impl KeyStore for Database {
    async fn create(
        &self,
        key: &NewKey,
        digest: &SecretDigest,
        change: &Change<'_>,
    ) -> Result<ApiKey, StoreError> {
        let scopes: Vec<&str> = key.scopes.iter().map(Scope::as_str).collect();
        let config_ids = key.config_ids.as_ref();
        let config_ids: Option<Vec<i64>> = config_ids.map(|ids| ids.iter().map(|id| id.get()).collect());
        let row = within!(self.requests, REQUEST_LIMIT, |connection| async {
            let mut transaction = connection.begin().await?;
            let row = sqlx::query_as!(
                KeyRow,
                "-- keys.create
                insert into webhook_api_keys (name, secret_digest, scopes, config_ids)
                values ($1, $2, $3, $4)
                returning *",
                key.name,
                digest.as_bytes(),
                &scopes as &[&str],
                config_ids.as_deref(),
            )
            .fetch_one(&mut *transaction)
            .await?;
            record(&mut transaction, change, row.id).await?;
            transaction.commit().await?;
            Ok(row)
        })?;
        row.try_into().map_err(inconsistent)
    }

    async fn all(&self) -> Result<Vec<ApiKey>, StoreError> {
        let rows = within!(self.requests, REQUEST_LIMIT, |connection| sqlx::query_as!(
            KeyRow,
            "-- keys.all
            select * from webhook_api_keys order by id"
        )
        .fetch_all(&mut *connection))?;
        rows.into_iter().map(|row| row.try_into().map_err(inconsistent)).collect()
    }

    async fn valid(&self) -> Result<Vec<ApiKey>, StoreError> {
        let rows = within!(self.engine, REQUEST_LIMIT, |connection| sqlx::query_as!(
            KeyRow,
            "-- keys.valid
            select * from webhook_api_keys where revoked_at is null"
        )
        .fetch_all(&mut *connection))?;
        rows.into_iter().map(|row| row.try_into().map_err(inconsistent)).collect()
    }

    async fn revoke(&self, id: KeyId, change: &Change<'_>) -> Result<bool, StoreError> {
        within!(self.requests, REQUEST_LIMIT, |connection| change_row(
            &mut connection,
            sqlx::query!(
                "-- keys.revoke
                update webhook_api_keys set revoked_at = now() where id = $1 and revoked_at is null",
                id.get(),
            ),
            change,
            id,
        ))
    }

    async fn note_use(&self, id: KeyId) -> Result<(), StoreError> {
        within!(self.requests, REQUEST_LIMIT, |connection| sqlx::query!(
            "-- keys.note_use
            update webhook_api_keys set last_used_at = now()
            where id = $1 and (last_used_at is null or last_used_at < now() - interval '1 minute')",
            id.get(),
        )
        .execute(&mut *connection))?;
        Ok(())
    }
}

/// What a query answers.
struct KeyRow {
    id: i64,
    name: String,
    secret_digest: Vec<u8>,
    scopes: Vec<String>,
    config_ids: Option<Vec<i64>>,
    created_at: DateTime<Utc>,
    last_used_at: Option<DateTime<Utc>>,
    revoked_at: Option<DateTime<Utc>>,
}

impl TryFrom<KeyRow> for ApiKey {
    type Error = Invalid;

    fn try_from(row: KeyRow) -> Result<Self, Invalid> {
        let digest = SecretDigest::from_stored(&row.secret_digest)
            .ok_or_else(|| Invalid::field("secret_digest", "must have 32 bytes"))?;
        let config_ids = row.config_ids.map(|ids| ids.into_iter().map(EndpointId::from_stored).collect());
        Ok(Self {
            id: KeyId::from_stored(row.id),
            name: row.name,
            scopes: Scopes::parse(&row.scopes)?,
            config_ids,
            digest,
            created_at: row.created_at,
            last_used_at: row.last_used_at,
            revoked_at: row.revoked_at,
        })
    }
}
