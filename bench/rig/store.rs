//! A database of a run, which is filled before workers find it.

use anyhow::Context as _;
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions as _, PgConnection};
use webhook_processor::application::ports::{DeliveryQueue as _, Incoming};
use webhook_processor::domain::endpoint::{Endpoint, EndpointId};
use webhook_processor::infrastructure::postgres::Database;
use webhook_processor::infrastructure::service::Application;
use webhook_processor::infrastructure::settings::Settings;

use super::payload::new_delivery;

/// Deliveries that one statement stores while a run is prepared.
const FILL_BATCH: usize = 1_000;

/// A database of a run.
pub struct Store {
    pub name: String,
    pub url: String,
    pub(super) options: PgConnectOptions,
    pub endpoint: Endpoint,
    pub(super) settings: Settings,
}

impl Store {
    /// Pools on it. Close them: their statistics count then.
    pub fn open(&self) -> Database {
        Database::new(self.options.clone(), self.settings.request_connections)
    }

    pub async fn connect(&self) -> anyhow::Result<PgConnection> {
        Ok(self.options.connect().await?)
    }

    pub async fn execute(&self, statement: &str) -> anyhow::Result<()> {
        execute(&mut self.connect().await?, statement).await
    }

    /// Stores deliveries, in turn for each of the endpoints.
    pub async fn fill(&self, endpoints: &[Endpoint], deliveries: usize) -> anyhow::Result<()> {
        let database = self.open();
        for begin in (0..deliveries).step_by(FILL_BATCH) {
            let batch: Vec<_> = (begin..deliveries.min(begin + FILL_BATCH))
                .map(|number| new_delivery(&endpoints[number % endpoints.len()]))
                .collect();
            let plain = |delivery| Incoming { delivery, lease: None };
            database.enqueue(&batch.iter().map(plain).collect::<Vec<_>>()).await?;
        }
        database.close().await;
        Ok(())
    }

    /// Where the deliveries of the first endpoint go.
    pub fn endpoint_url(&self) -> &str {
        self.endpoint.settings.postback_url.as_ref().expect("it was registered with one").as_str()
    }

    /// More endpoints like the first one.
    pub async fn more_endpoints(&self, count: usize) -> anyhow::Result<Vec<Endpoint>> {
        let ids: Vec<i64> = sqlx::query_scalar(
            "insert into webhook_configs (name, postback_url, created_at, updated_at)
             select 'bench ' || n, $1, $2, $2 from generate_series(1, $3::bigint) as n returning id",
        )
        .bind(self.endpoint_url())
        .bind(self.endpoint.updated_at)
        .bind(i64::try_from(count)?)
        .fetch_all(&mut self.connect().await?)
        .await?;
        let like_the_first = |id| Endpoint { id: EndpointId::from_stored(id), ..self.endpoint.clone() };
        Ok(ids.into_iter().map(like_the_first).collect())
    }

    /// Registers or changes endpoints, and what else the application does.
    pub fn application(&self, database: &Database) -> Application {
        Application::new(database, &self.settings)
    }
}

/// Runs statements that only this program has written.
pub async fn execute(connection: &mut PgConnection, statements: &str) -> anyhow::Result<()> {
    let ran = sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(connection).await;
    ran.map(drop).with_context(|| format!("running {}", statements.lines().next().unwrap_or_default()))
}
