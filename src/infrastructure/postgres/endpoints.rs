//! The rows of `webhook_configs`.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Map, Value};
use sqlx::Connection as _;
use tracing::error;

use super::errors::inconsistent;
use super::operators::{change_row, record};
use super::within::within;
use super::{Database, REQUEST_LIMIT};
use crate::application::ports::{Change, EndpointStore, StoreError};
use crate::domain::circuit::{Circuit, CircuitCommand, CircuitParts, CircuitPolicy, OPENED_BY_HAND};
use crate::domain::delivery::Priority;
use crate::domain::endpoint::{Endpoint, EndpointId, EndpointUrl, ExtraHeaders};
use crate::domain::endpoint_settings::EndpointSettings;
use crate::domain::invalid::Invalid;
use crate::domain::retry::RetryPolicy;

/// A checked statement that returns endpoints. `SETTINGS` stands for the columns that hold settings, which are listed only
/// here, and `ENDPOINT` for all columns of an [`EndpointRow`].
macro_rules! endpoints {
    (@$settings:literal, $first:literal $(SETTINGS $next:literal)* ENDPOINT $($end:literal)? $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            EndpointRow,
            $first $(+ $settings + $next)* + $settings
            + ", id, circuit_state, circuit_reason, circuit_probe_error, circuit_changed_at, circuit_probe_at,
               disabled_reason, created_at, updated_at, deleted_at"
            $(+ $end)?
            $(, $argument)*
        )
    };
    ($($statement:tt)*) => {
        endpoints!(
            @"name, postback_url, chargeback_url, headers, timeout_ms, max_retries, retry_base_ms, retry_cap_ms,
              retry_jitter, priority, max_in_flight, rate_limit_per_second, circuit_failure_rate, circuit_window_ms,
              circuit_attempts_min, circuit_failures_in_row, circuit_cooldown_ms, circuit_cooldown_cap_ms, enabled",
            $($statement)*
        )
    };
}

#[async_trait]
impl EndpointStore for Database {
    async fn register(
        &self,
        settings: &EndpointSettings,
        change: &Change<'_>,
    ) -> Result<Endpoint, StoreError> {
        let stored = within!(self.requests, REQUEST_LIMIT, |connection| async {
            let mut transaction = connection.begin().await?;
            let stored = endpoints!(
                "-- endpoints.register
                insert into webhook_configs (" SETTINGS ")
                select " SETTINGS "
                from jsonb_populate_record(null::webhook_configs, $1)
                returning " ENDPOINT,
                columns_of(settings),
            )
            .fetch_one(&mut *transaction)
            .await?;
            record(&mut transaction, change, stored.id).await?;
            transaction.commit().await?;
            Ok(stored)
        })?;
        stored.try_into().map_err(inconsistent)
    }

    async fn find_all(&self, ids: &[EndpointId]) -> Result<Vec<Endpoint>, StoreError> {
        let ids: Vec<i64> = ids.iter().copied().map(EndpointId::get).collect();
        // the engine cannot do without
        let rows = within!(self.engine, REQUEST_LIMIT, |connection| endpoints!(
            "-- endpoints.find
            select " ENDPOINT "
            from webhook_configs
            where id = any($1)",
            &ids,
        )
        .fetch_all(&mut *connection))?;
        rows.into_iter().map(|row| row.try_into().map_err(inconsistent)).collect()
    }

    async fn list(&self, after: Option<EndpointId>, limit: usize) -> Result<Vec<Endpoint>, StoreError> {
        let rows = within!(self.requests, REQUEST_LIMIT, |connection| endpoints!(
            "-- endpoints.list
            select " ENDPOINT "
            from webhook_configs
            where id > $1 and deleted_at is null
            order by id
            limit $2",
            after.map_or(0, EndpointId::get),
            i64::try_from(limit).unwrap_or(i64::MAX),
        )
        .fetch_all(&mut *connection))?;
        let endpoints = rows.into_iter().filter_map(|row| {
            let id = row.id;
            // one row that someone wrote by hand must not hide the others
            row.try_into()
                .inspect_err(|invalid| error!(config_id = id, error = %invalid, "a config cannot be read"))
                .ok()
        });
        Ok(endpoints.collect())
    }

    async fn change(
        &self,
        id: EndpointId,
        revision: DateTime<Utc>,
        settings: &EndpointSettings,
        command: Option<CircuitCommand>,
        change: &Change<'_>,
    ) -> Result<Option<Endpoint>, StoreError> {
        // a revision is never reused, even by two changes within one tick of the clock
        let changed = within!(self.requests, REQUEST_LIMIT, |connection| async {
            let mut transaction = connection.begin().await?;
            let changed = endpoints!(
            "-- endpoints.change
            update webhook_configs
            set (" SETTINGS ") = (select " SETTINGS " from jsonb_populate_record(null::webhook_configs, $3)),
                disabled_reason = case when next.is_enabled then null else disabled_reason end,
                circuit_state = coalesce(next.state, circuit_state),
                circuit_reason = case next.state when 'closed' then null when 'open' then $5 else circuit_reason end,
                circuit_probe_error = case when next.state is null then circuit_probe_error end,
                circuit_probe_at = case when next.state is null then circuit_probe_at end,
                circuit_changed_at = case when (next.state = 'closed') <> (circuit_state = 'closed') then now() else circuit_changed_at end,
                updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')
            from (
              -- what another URL did says nothing about this one; a circuit that someone opened stays as it is
              select new.enabled as is_enabled, coalesce($4, case
                       when old.circuit_probe_at is not null
                            and (old.postback_url, old.chargeback_url) is distinct from (new.postback_url, new.chargeback_url)
                       then 'closed' end) as state
              from webhook_configs as old, jsonb_populate_record(null::webhook_configs, $3) as new
              where old.id = $1
            ) as next
            where id = $1 and updated_at = $2 and deleted_at is null
            returning " ENDPOINT,
            id.get(),
            revision,
            columns_of(settings),
            command.map(|command| match command {
                CircuitCommand::Close => "closed",
                CircuitCommand::Open => "open",
            }),
            OPENED_BY_HAND,
        )
            .fetch_optional(&mut *transaction)
            .await?;
            if changed.is_some() {
                record(&mut transaction, change, id).await?;
            }
            transaction.commit().await?;
            Ok(changed)
        })?;
        changed.map(TryInto::try_into).transpose().map_err(inconsistent)
    }

    async fn delete(&self, id: EndpointId, change: &Change<'_>) -> Result<bool, StoreError> {
        within!(self.requests, REQUEST_LIMIT, |connection| change_row(
            &mut connection,
            sqlx::query!(
                "-- endpoints.delete
                update webhook_configs
                set deleted_at = now(), enabled = false,
                    updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')
                where id = $1 and deleted_at is null",
                id.get(),
            ),
            change,
            id,
        ))
    }
}

/// Settings by the names of their columns. Those of the circuit get the prefix `circuit_`.
fn columns_of(settings: &EndpointSettings) -> Value {
    let mut columns = spelled(settings);
    let circuit = spelled(&settings.circuit);
    columns.extend(circuit.into_iter().map(|(name, value)| (format!("circuit_{name}"), value)));
    columns.into()
}

fn spelled(value: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(value) {
        Ok(Value::Object(fields)) => fields,
        Ok(_) | Err(_) => unreachable!("it is a struct of plain data"),
    }
}

/// A row of a query.
struct EndpointRow {
    id: i64,
    name: String,
    postback_url: Option<String>,
    chargeback_url: Option<String>,
    headers: Value,
    timeout_ms: i32,
    max_retries: i16,
    retry_base_ms: i32,
    retry_cap_ms: i32,
    retry_jitter: f64,
    priority: i16,
    max_in_flight: Option<i32>,
    rate_limit_per_second: Option<i32>,
    circuit_failure_rate: Option<f64>,
    circuit_window_ms: i32,
    circuit_attempts_min: i32,
    circuit_failures_in_row: Option<i32>,
    circuit_cooldown_ms: i32,
    circuit_cooldown_cap_ms: i32,
    circuit_state: String,
    circuit_reason: Option<String>,
    circuit_probe_error: Option<String>,
    circuit_changed_at: Option<DateTime<Utc>>,
    circuit_probe_at: Option<DateTime<Utc>>,
    enabled: bool,
    disabled_reason: Option<String>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    deleted_at: Option<DateTime<Utc>>,
}

impl TryFrom<EndpointRow> for Endpoint {
    type Error = Invalid;

    fn try_from(row: EndpointRow) -> Result<Self, Invalid> {
        let headers: BTreeMap<String, String> = serde_json::from_value(row.headers)
            .map_err(|_| Invalid::field("headers", "must be an object of texts"))?;
        let url = |field, text: Option<String>| text.map(|text| EndpointUrl::parse(field, &text)).transpose();
        let settings = EndpointSettings {
            name: row.name,
            postback_url: url("postback_url", row.postback_url)?,
            chargeback_url: url("chargeback_url", row.chargeback_url)?,
            headers: ExtraHeaders::parse(headers)?,
            timeout: Duration::from_millis(u64::from(row.timeout_ms.unsigned_abs())),
            retry: RetryPolicy::default().changed(
                Some(row.max_retries.into()),
                Some(row.retry_base_ms.into()),
                Some(row.retry_cap_ms.into()),
                Some(row.retry_jitter),
            )?,
            priority: Priority::parse("priority", row.priority.into())?,
            max_in_flight: row.max_in_flight.map(i32::unsigned_abs),
            rate_limit_per_second: row.rate_limit_per_second.map(i32::unsigned_abs),
            circuit: CircuitPolicy::default().changed(&CircuitParts {
                state: None,
                failure_rate: Some(row.circuit_failure_rate),
                window_ms: Some(row.circuit_window_ms.into()),
                attempts_min: Some(row.circuit_attempts_min.into()),
                failures_in_row: Some(row.circuit_failures_in_row.map(Into::into)),
                cooldown_ms: Some(row.circuit_cooldown_ms.into()),
                cooldown_cap_ms: Some(row.circuit_cooldown_cap_ms.into()),
            })?,
            enabled: row.enabled,
        };
        let circuit = Circuit {
            state: row.circuit_state.parse()?,
            reason: row.circuit_reason,
            probe_error: row.circuit_probe_error,
            changed_at: row.circuit_changed_at,
            probe_at: row.circuit_probe_at,
        };
        Ok(Self {
            id: EndpointId::from_stored(row.id),
            settings,
            circuit,
            disabled_reason: row.disabled_reason,
            created_at: row.created_at,
            updated_at: row.updated_at,
            deleted_at: row.deleted_at,
        })
    }
}
