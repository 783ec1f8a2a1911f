//! The state of circuits, columns of `webhook_configs`. It is no part of an endpoint's revision: nothing that was made
//! from the endpoint changes with it.

use std::time::Duration;

use async_trait::async_trait;

use super::{Database, REQUEST_LIMIT, from_micros, inconsistent, within};
use crate::application::ports::{CircuitStore, HeldCircuit, StoreError};
use crate::domain::circuit::Circuit;
use crate::domain::endpoint::EndpointId;
use crate::domain::invalid::Invalid;

#[async_trait]
impl CircuitStore for Database {
    async fn open(&self, id: EndpointId, reason: &str) -> Result<Option<Duration>, StoreError> {
        let probe_in = within!(self.engine, REQUEST_LIMIT, |connection| {
            sqlx::query_scalar!(
            r#"-- circuits.open
            update webhook_configs
            set circuit_state = 'open', circuit_reason = $2, circuit_changed_at = now(), circuit_failed_probes = 0,
                circuit_probe_at = now() + circuit_cooldown_ms * interval '1 millisecond'
            where id = $1 and circuit_state = 'closed' and deleted_at is null
            returning circuit_cooldown_ms::bigint * 1000 as "probe_in_us!""#,
            id.get(),
            reason,
        )
        .fetch_optional(&mut *connection)
        })?;
        Ok(probe_in.map(from_micros))
    }

    async fn reopen(&self, id: EndpointId, reason: &str) -> Result<Option<Duration>, StoreError> {
        let probe_in = within!(self.engine, REQUEST_LIMIT, |connection| {
            sqlx::query_scalar!(
            r#"-- circuits.reopen
            update webhook_configs c
            set circuit_state = 'open', circuit_reason = $2, circuit_changed_at = now(),
                circuit_failed_probes = c.circuit_failed_probes + 1,
                circuit_probe_at = now() + next.cooldown_ms * interval '1 millisecond'
            from (select id, least(circuit_cooldown_ms * 2.0 ^ least(circuit_failed_probes + 1, 30), circuit_cooldown_cap_ms) as cooldown_ms
                  from webhook_configs where id = $1) as next
            where c.id = next.id and c.circuit_state = 'half_open'
            returning (next.cooldown_ms * 1000)::bigint as "probe_in_us!""#,
            id.get(),
            reason,
        )
        .fetch_optional(&mut *connection)
        })?;
        Ok(probe_in.map(from_micros))
    }

    async fn close(&self, id: EndpointId) -> Result<bool, StoreError> {
        let done = within!(self.engine, REQUEST_LIMIT, |connection| {
            sqlx::query!(
            "-- circuits.close
            update webhook_configs
            set circuit_state = 'closed', circuit_reason = null, circuit_changed_at = now(), circuit_probe_at = null
            where id = $1 and circuit_state = 'half_open'",
            id.get(),
        )
        .execute(&mut *connection)
        })?;
        Ok(done.rows_affected() == 1)
    }

    async fn held(&self, limit: usize) -> Result<Vec<HeldCircuit>, StoreError> {
        let rows = within!(self.requests, REQUEST_LIMIT, |connection| sqlx::query!(
            "-- circuits.held
            select id, circuit_state, circuit_reason, circuit_changed_at, circuit_probe_at
            from webhook_configs
            where circuit_state <> 'closed' and deleted_at is null
            order by id
            limit $1",
            i64::try_from(limit).unwrap_or(i64::MAX),
        )
        .fetch_all(&mut *connection))?;
        let circuits = rows.into_iter().map(|row| {
            Ok(HeldCircuit {
                config_id: EndpointId::from_stored(row.id),
                circuit: Circuit {
                    state: row.circuit_state.parse().map_err(|invalid: Invalid| inconsistent(invalid))?,
                    reason: row.circuit_reason,
                    changed_at: row.circuit_changed_at,
                    probe_at: row.circuit_probe_at,
                },
            })
        });
        circuits.collect()
    }
}
