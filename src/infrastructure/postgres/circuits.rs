//! The state of circuits, in columns of `webhook_configs`. It is not part of an endpoint's revision, because nothing that was
//! made from the endpoint depends on it.

use std::time::Duration;

use async_trait::async_trait;

use super::errors::inconsistent;
use super::operators::change_row;
use super::within::within;
use super::{Database, REQUEST_LIMIT, from_micros};
use crate::application::ports::{
    Change, CircuitStore, HeldCircuit, ProbeLease, StoreError, UnsuccessfulProbe,
};
use crate::domain::circuit::Circuit;
use crate::domain::endpoint::EndpointId;
use crate::domain::invalid::Invalid;

#[async_trait]
impl CircuitStore for Database {
    async fn open(
        &self,
        id: EndpointId,
        url: &str,
        reason: &str,
        counted_for: Duration,
    ) -> Result<Option<Duration>, StoreError> {
        let probe_in = within!(self.engine, REQUEST_LIMIT, |connection| {
            sqlx::query_scalar!(
            r#"-- circuits.open
            update webhook_configs
            set circuit_state = 'open', circuit_reason = $2, circuit_probe_error = null, circuit_changed_at = now(),
                circuit_failed_probes = 0, circuit_probe_at = now() + circuit_cooldown_ms * interval '1 millisecond'
            where id = $1 and circuit_state = 'closed' and deleted_at is null
              -- what was counted before it closed, perhaps by another process, is over
              and (circuit_changed_at is null or circuit_changed_at <= now() - $3 * interval '1 microsecond'
                   -- nor does a clock that was ahead keep it closed
                   or circuit_changed_at > now() + interval '1 second')
              and (webhook_is_at($4, postback_url) or webhook_is_at($4, chargeback_url))
            returning circuit_cooldown_ms::bigint * 1000 as "probe_in_us!""#,
            id.get(),
            reason,
            counted_for.as_secs_f64() * 1e6,
            url,
        )
        .fetch_optional(&mut *connection)
        })?;
        Ok(probe_in.map(from_micros))
    }

    async fn reopen(
        &self,
        id: EndpointId,
        lease: ProbeLease,
        probe: &UnsuccessfulProbe,
    ) -> Result<Option<Duration>, StoreError> {
        let probe_in = within!(self.engine, REQUEST_LIMIT, |connection| {
            sqlx::query_scalar!(
            r#"-- circuits.reopen
            update webhook_configs c
            set circuit_state = 'open', circuit_probe_error = $2, circuit_failed_probes = next.failed_probes,
                circuit_probe_at = now() + next.cooldown_ms * interval '1 millisecond'
            from (
              select id, failed_probes,
                     greatest(least(circuit_cooldown_ms * 2.0 ^ least(failed_probes, 30), circuit_cooldown_cap_ms),
                              $4::double precision) as cooldown_ms
              -- a receiver that is up is asked again after the first cool-down
              from (select *, case when $3 then circuit_failed_probes + 1 else 0 end as failed_probes
                    from webhook_configs where id = $1) as config
            ) as next
            where c.id = next.id and c.circuit_state = 'half_open'
              -- the claim gave the probe's lease and the circuit the same end; another end is that of a later probe
              and c.circuit_probe_at = $5::timestamptz + $6 * interval '1 microsecond'
            returning (next.cooldown_ms * 1000)::bigint as "probe_in_us!""#,
            id.get(),
            probe.error,
            probe.receiver_fails,
            probe.retry_after.as_secs_f64() * 1e3,
            lease.began,
            lease.term.as_secs_f64() * 1e6,
        )
        .fetch_optional(&mut *connection)
        })?;
        Ok(probe_in.map(from_micros))
    }

    async fn probe_another(&self, id: EndpointId, lease: ProbeLease) -> Result<(), StoreError> {
        within!(self.engine, REQUEST_LIMIT, |connection| {
            sqlx::query!(
                "-- circuits.probe_another
            update webhook_configs set circuit_state = 'open', circuit_probe_at = now()
            where id = $1 and circuit_state = 'half_open'
              and circuit_probe_at = $2::timestamptz + $3 * interval '1 microsecond'",
                id.get(),
                lease.began,
                lease.term.as_secs_f64() * 1e6,
            )
            .execute(&mut *connection)
        })?;
        Ok(())
    }

    async fn probe_now(&self, id: EndpointId, change: &Change<'_>) -> Result<bool, StoreError> {
        within!(self.requests, REQUEST_LIMIT, |connection| {
            change_row(
                &mut connection,
                sqlx::query!(
                    "-- circuits.probe_now
                update webhook_configs set circuit_probe_at = now()
                where id = $1 and circuit_state = 'open' and circuit_probe_at is not null and deleted_at is null",
                    id.get(),
                ),
                change,
                id,
            )
        })
    }

    async fn close(&self, id: EndpointId) -> Result<bool, StoreError> {
        let done = within!(self.engine, REQUEST_LIMIT, |connection| {
            sqlx::query!(
            "-- circuits.close
            update webhook_configs
            set circuit_state = 'closed', circuit_reason = null, circuit_probe_error = null, circuit_changed_at = now(),
                circuit_probe_at = null
            where id = $1 and circuit_state = 'half_open'",
            id.get(),
        )
        .execute(&mut *connection)
        })?;
        Ok(done.rows_affected() == 1)
    }

    async fn held(&self, limit: usize) -> Result<Vec<HeldCircuit>, StoreError> {
        let rows = within!(self.requests, REQUEST_LIMIT, |connection| {
            sqlx::query!(
            "-- circuits.held
            select id, circuit_state, circuit_reason, circuit_probe_error, circuit_changed_at, circuit_probe_at
            from webhook_configs
            where circuit_state <> 'closed' and deleted_at is null
            order by id
            limit $1",
            i64::try_from(limit).unwrap_or(i64::MAX),
        )
        .fetch_all(&mut *connection)
        })?;
        let circuits = rows.into_iter().map(|row| {
            Ok(HeldCircuit {
                config_id: EndpointId::from_stored(row.id),
                circuit: Circuit {
                    state: row.circuit_state.parse().map_err(|invalid: Invalid| inconsistent(invalid))?,
                    reason: row.circuit_reason,
                    probe_error: row.circuit_probe_error,
                    changed_at: row.circuit_changed_at,
                    probe_at: row.circuit_probe_at,
                },
            })
        });
        circuits.collect()
    }
}
