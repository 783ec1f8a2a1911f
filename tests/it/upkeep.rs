//! Upkeep: archives, statistics, and what is forgotten or cancelled in time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use webhook_processor::application::ports::Upkeep as _;
use webhook_processor::infrastructure::http::{self, Operations};
use webhook_processor::infrastructure::postgres::Database;
use webhook_processor::infrastructure::service::{Application, Role};

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::receiver::TestReceiver;
use crate::support::service::{ApiClient, TestService, metrics, settings_for};

const DAY: Duration = Duration::from_hours(24);

/// The repositories, without a service that would do upkeep of its own accord.
fn repositories(database: &TestDatabase) -> Database {
    Database::new(database.options.clone(), 2)
}

/// Makes an archive of a day in the past, in the way of `webhook_ensure_archives`.
async fn make_archive(database: &TestDatabase, days_ago: i32) {
    let sql = format!(
        "do $$
         declare
           archive_day constant date := current_date - {days_ago};
           archive constant text := 'webhook_queue_archive_' || to_char(archive_day, 'YYYYMMDD');
         begin
           execute format('create table %I partition of webhook_queue (primary key (queue_id)) for values from (%L) to (%L)',
                          archive, archive_day::timestamptz, (archive_day + 1)::timestamptz);
           execute format('create index %I on %I using brin (settled_in) with (pages_per_range = 64)',
                          archive || '_settled_in', archive);
         end $$"
    );
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&database.pool).await.unwrap();
}

const DROP_ALL_ARCHIVES: &str = "do $$
    declare
      old text;
    begin
      for old in select archive from webhook_archives loop
        execute format('alter table webhook_queue detach partition %I', old);
        execute format('drop table %I', old);
      end loop;
    end $$";

/// Forgets all counts, as if nothing had ever been counted.
const COUNT_ANEW: &str = "delete from webhook_statistics;
    update webhook_statistics_progress set counted_before = 0, counted_at = '-infinity'";

/// Stores a delivery that ends in the same transaction.
const SETTLE_ONE: &str = "insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries,
      status, ready_since, completed_at, settled_in, retry_0_started_at, retry_0_duration_ms)
    values (gen_random_uuid(), '+credit', 'e', 1, 'http://receiver.example/', 2, 6,
      'completed', null, now(), pg_current_xact_id()::text::bigint, now(), 5)";

/// Days of archives, relative to today.
async fn archive_days(database: &TestDatabase) -> Vec<i32> {
    database
        .scalar("select array_agg(archive_day - current_date order by archive_day) from webhook_archives")
        .await
}

/// Counts everything that has ended.
async fn count_all(database: &TestDatabase) -> u64 {
    wait_for_older_transactions(database).await;
    repositories(database).count_statistics(Duration::ZERO).await.unwrap()
}

/// What other databases of the server write at the same time holds counts back.
async fn wait_for_older_transactions(database: &TestDatabase) {
    eventually("no older transaction is under way", async || {
        let free: bool = database.scalar(
            "select max(settled_in) < pg_snapshot_xmin(pg_current_snapshot())::text::bigint from webhook_queue",
        ).await;
        free.then_some(())
    }).await;
}

#[tokio::test]
async fn archives_are_made_for_today_and_the_seven_days_ahead() {
    let database = TestDatabase::empty().await;
    let repositories = repositories(&database);
    repositories.migrate().await.unwrap();

    assert_eq!(repositories.ensure_archives().await.unwrap(), 8);

    assert_eq!(archive_days(&database).await, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(repositories.ensure_archives().await.unwrap(), 0, "there is nothing left to make");
}

#[tokio::test]
async fn archives_made_at_the_same_time_by_two_processes_are_made_once() {
    let database = TestDatabase::empty().await;
    let [one, other] = [repositories(&database), repositories(&database)];
    one.migrate().await.unwrap();

    let (first, second) = tokio::join!(one.ensure_archives(), other.ensure_archives());

    assert_eq!(first.unwrap() + second.unwrap(), 8);
}

#[tokio::test]
async fn an_archive_is_dropped_with_its_statistics_once_its_whole_day_is_past_the_retention() {
    let database = TestDatabase::new().await;
    for days_ago in [91, 90] {
        make_archive(&database, days_ago).await;
    }
    database.execute(
        "insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries, status,
                                    ready_since, completed_at, settled_in, retry_0_started_at, retry_0_duration_ms)
         select gen_random_uuid(), '+credit', days_ago::text, 1, 'http://receiver.example/', 2, 6, 'completed',
                null, current_date - days_ago + time, pg_current_xact_id()::text::bigint, now(), 5
         from unnest(array[91, 90]) as days_ago, unnest(array['00:00', '23:59:59.999999']::time[]) as time",
    ).await;
    database.execute(COUNT_ANEW).await;
    assert_eq!(count_all(&database).await, 4);
    let repositories = repositories(&database);
    repositories.coarsen_statistics().await.unwrap();

    assert_eq!(repositories.drop_archives(90 * DAY).await.unwrap(), 1);
    repositories.forget_statistics().await.unwrap();

    assert_eq!(archive_days(&database).await[0], -90, "the next day is kept");
    let kept: Vec<String> = database.scalar("select array_agg(event_id) from webhook_queue").await;
    assert_eq!(kept, ["90", "90"]);
    let counted: i64 = database.scalar("select sum(occurrences)::bigint from webhook_statistics where config_id = 1 and fact = 'completed'").await;
    assert_eq!(counted, 2);
    let days: Vec<i32> = database
        .scalar("select array_agg(distinct period_start::date - current_date) from webhook_statistics")
        .await;
    assert_eq!(days, [-90]);
    assert_eq!(repositories.drop_archives(90 * DAY).await.unwrap(), 0, "there is nothing left to drop");
}

#[tokio::test]
async fn an_event_is_accepted_anew_once_it_is_forgotten() {
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;
    let config_id = service.api.register("http://127.0.0.1:9", json!({})).await;
    let enqueue = async |event_id: &str| {
        let event = json!({"event_type": "+credit", "event_id": event_id, "config_id": config_id});
        let answer = service.api.post("/webhooks", event).await;
        (answer.status, answer.json()["queue_id"].as_str().unwrap().to_owned())
    };
    let (_, old) = enqueue("old").await;
    let (_, young) = enqueue("young").await;
    assert_eq!(enqueue("old").await, (200, old.clone()));
    service.database.execute(
        "update webhook_event_keys
         set remembered_at = now() - case event_id when 'old' then interval '90 days 1 minute' else interval '89 days 23 hours' end",
    ).await;

    assert_eq!(repositories(&service.database).forget_events(90 * DAY).await.unwrap(), 1);

    let (status, anew) = enqueue("old").await;
    assert_eq!(status, 201);
    assert_ne!(anew, old);
    assert_eq!(enqueue("old").await, (200, anew));
    assert_eq!(enqueue("young").await, (200, young));
    service.stop().await;
}

#[tokio::test]
async fn more_events_are_forgotten_than_fit_into_one_step() {
    let database = TestDatabase::new().await;
    database.execute(
        "insert into webhook_event_keys (config_id, event_type, event_id, queue_id, remembered_at)
         select 1, '+credit', n::text, gen_random_uuid(), now() - interval '91 days' from generate_series(1, 20001) as n",
    ).await;

    assert_eq!(repositories(&database).forget_events(90 * DAY).await.unwrap(), 20_001);

    assert_eq!(database.scalar::<i64>("select count(*) from webhook_event_keys").await, 0);
}

#[tokio::test]
async fn a_closed_archive_gets_its_indexes_and_an_open_one_does_not() {
    let database = TestDatabase::new().await;
    make_archive(&database, 2).await;
    let repositories = repositories(&database);

    assert_eq!(repositories.index_closed_archives().await.unwrap(), 1);

    let indexes: Vec<String> = database.scalar(
        "select array_agg(right(indexname, -length(tablename)) || ' of ' || split_part(indexdef, ' USING ', 2) order by indexname)
         from pg_indexes
         where tablename = 'webhook_queue_archive_' || to_char(current_date - 2, 'YYYYMMDD')",
    ).await;
    assert_eq!(
        indexes,
        [
            "_config_id of btree (config_id, queue_id)",
            "_event_id of btree (event_id)",
            "_pkey of btree (queue_id)",
            "_settled_in of brin (settled_in) WITH (pages_per_range='64')",
        ]
    );
    let archives_with_both: i64 = database
        .scalar("select count(*) from webhook_archives where to_regclass(archive || '_event_id') is not null")
        .await;
    assert_eq!(archives_with_both, 1);
    assert_eq!(repositories.index_closed_archives().await.unwrap(), 0, "there is nothing left to index");
}

#[tokio::test]
async fn a_count_reads_only_what_is_new() {
    let database = TestDatabase::new().await;
    let repositories = repositories(&database);
    repositories.ensure_archives().await.unwrap();
    // more than a range of pages, in one transaction
    database
        .execute(
            "insert into webhook_configs (name, postback_url) values ('a', 'http://127.0.0.1:1/');
             insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries, status, completed_at,
               ready_since, settled_in, retry_0_started_at)
             select gen_random_uuid(), '+credit', n::text, 1, 'http://127.0.0.1:1/', 2, 6, 'completed', now(),
                    null, txid_current(), now() from generate_series(1, 5000) n",
        )
        .await;

    // an archive that is being vacuumed is not waited for
    let mut vacuum = database.pool.begin().await.unwrap();
    let lock = "do $$ begin
          execute (select format('lock table %I in share update exclusive mode', min(archive)) from webhook_archives);
        end $$";
    sqlx::raw_sql(lock).execute(&mut *vacuum).await.unwrap();
    assert_eq!(count_all(&database).await, 5_000);
    vacuum.rollback().await.unwrap();

    database.execute(COUNT_ANEW).await;
    assert_eq!(count_all(&database).await, 5_000);
    let left: i32 = database
        .scalar("select brin_summarize_new_values((min(archive) || '_settled_in')::regclass) from webhook_archives")
        .await;
    assert_eq!(left, 0, "it was summarized with the count");
}

/// A receiver that keeps each request waiting until it is let go: then a postback is taken and a chargeback refused.
struct HoldingReceiver {
    url: String,
    arrived: Arc<AtomicUsize>,
    let_go: Arc<Semaphore>,
}

impl HoldingReceiver {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (arrived, let_go) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let hold = |status: StatusCode| {
            let (arrived, let_go) = (arrived.clone(), let_go.clone());
            get(async move || {
                arrived.fetch_add(1, Ordering::SeqCst);
                let_go.acquire().await.unwrap().forget();
                status
            })
        };
        let router = Router::new()
            .route("/postback", hold(StatusCode::OK))
            .route("/chargeback", hold(StatusCode::INTERNAL_SERVER_ERROR));
        tokio::spawn(async { axum::serve(listener, router).await });
        Self { url, arrived, let_go }
    }
}

#[tokio::test]
async fn deleting_a_config_cancels_what_waits_and_lets_attempts_end() {
    let service = TestService::start().await;
    let api = &service.api;
    let receiver = HoldingReceiver::start().await;
    let config_id = api.register(&receiver.url, json!({"retry_base_ms": 1, "retry_cap_ms": 1})).await;
    let bystander = api.register(&receiver.url, json!({"enabled": false})).await;
    let spared = api.credit(bystander).await;
    let accept = async |more: Value| {
        let mut event = json!({"event_type": "+credit", "config_id": config_id});
        event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = api.post("/webhooks", event).await;
        assert_eq!(answer.status, 201, "{}", answer.text);
        answer.json()["queue_id"].as_str().unwrap().to_owned()
    };
    let succeeding = accept(json!({})).await;
    let failing = accept(json!({"event_type": "-debit"})).await;
    eventually("two attempts are under way", async || {
        (receiver.arrived.load(Ordering::SeqCst) == 2).then_some(())
    })
    .await;
    api.patch(&format!("/api/webhooks/{config_id}"), json!({"enabled": false})).await;
    let pending = accept(json!({})).await;
    let scheduled = accept(json!({"scheduled_at": Utc::now() + TimeDelta::hours(1)})).await;

    assert_eq!(api.delete(&format!("/api/webhooks/{config_id}")).await.status, 204);

    for queue_id in [&pending, &scheduled] {
        let cancelled = api.delivery_in(queue_id, "cancelled").await;
        assert_eq!(cancelled["status_reason"], "the config was deleted");
    }
    for queue_id in [&succeeding, &failing] {
        assert_eq!(api.get(&format!("/webhooks/{queue_id}")).await.json()["status"], "processing");
    }
    receiver.let_go.add_permits(2);
    let completed = api.delivery_in(&succeeding, "completed").await;
    assert_eq!(completed["attempts"][0]["http_status"], 200);
    let cancelled = api.delivery_in(&failing, "cancelled").await;
    assert_eq!(cancelled["status_reason"], "the config was deleted");
    assert_eq!(cancelled["attempts"].as_array().unwrap().len(), 1);
    assert_eq!(cancelled["attempts"][0]["http_status"], 500);
    assert_eq!(api.get(&format!("/webhooks/{spared}")).await.json()["status"], "pending");
    service.stop().await;
}

#[tokio::test]
async fn deliveries_end_even_where_there_is_no_archive_for_today() {
    let database = TestDatabase::new().await;
    database.execute(DROP_ALL_ARCHIVES).await;
    let service = TestService::start_with(Role::Serve, database.clone(), &[]).await;
    eventually("archives are made at the start", async || {
        let days: Option<Vec<i32>> = database
            .scalar("select array_agg(archive_day - current_date order by 1) from webhook_archives")
            .await;
        (days? == [0, 1, 2, 3, 4, 5, 6, 7]).then_some(())
    })
    .await;
    // upkeep looks again in an hour: until then it is for the settle to make them
    database.execute(DROP_ALL_ARCHIVES).await;
    let receiver = TestReceiver::start().await;
    let config_id = service.api.register(&receiver.url, json!({})).await;

    let queue_id = service.api.credit(config_id).await;
    service.api.delivery_in(&queue_id, "completed").await;

    assert_eq!(receiver.count(), 1, "it was sent once");
    assert_eq!(archive_days(&database).await, [0, 1, 2, 3, 4, 5, 6, 7]);
    service.stop().await;
}

/// The API alone: nothing counts unless the test does.
async fn api_without_upkeep(database: &TestDatabase) -> ApiClient {
    let settings = settings_for(database, &[]);
    let repositories = repositories(database);
    let application = Application::new(&repositories, &settings);
    let operations = Operations::new(repositories, metrics(), settings.ready_age_max);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let api = ApiClient::new(format!("http://{}", listener.local_addr().unwrap()));
    tokio::spawn(async { axum::serve(listener, http::router(operations, Some(application.api))).await });
    api
}

/// `count` terminal deliveries of three configs that ended in the last `hours`, up to two retries each, with durations
/// below a second; some attempts were lost with their workers and have none.
async fn write_history(database: &TestDatabase, count: i32, hours: i32) {
    sqlx::query(
        "insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries, retry_count,
           status, status_reason, ready_since, created_at, completed_at, settled_in,
           retry_0_started_at, retry_0_duration_ms, retry_1_started_at, retry_1_duration_ms, retry_2_started_at, retry_2_duration_ms)
         select gen_random_uuid(), '+credit', n::text, 1 + n % 3, 'http://receiver.example/', 2, 2, retries,
           status, case when status <> 'completed' then 'r' end, null, ended, ended, pg_current_xact_id()::text::bigint,
           case when attempts > 0 then ended end, case when attempts > 0 and n % 11 > 0 then n * 7919 % 1000 end,
           case when attempts > 1 then ended end, case when attempts > 1 then n::bigint * 104729 % 997 end,
           case when attempts > 2 then ended end, case when attempts > 2 then n::bigint * 1299709 % 991 end
         from generate_series(1, $1) as n
         cross join lateral (
           select n % 4 % 3 as retries, case n % 7 when 0 then 'failed' when 1 then 'cancelled' else 'completed' end as status,
                  now() - n * $2 * interval '1 hour' / $1 as ended) as d
         cross join lateral (select retries + case status when 'cancelled' then 0 else 1 end as attempts) as a",
    )
    .bind(count)
    .bind(hours)
    .execute(&database.pool)
    .await
    .unwrap();
}

/// What the statistics should say, computed from the deliveries and attempts themselves.
async fn counted_directly(
    database: &TestDatabase,
    config_id: Option<i64>,
    from: Option<DateTime<Utc>>,
) -> Value {
    sqlx::query_scalar(
        "with d as (
           select * from webhook_queue
           where ($1::bigint is null or config_id = $1) and ($2::timestamptz is null or completed_at is null or completed_at >= $2)
         ), a as (
           select a.* from webhook_attempts a join d using (queue_id)
         )
         select json_build_object(
           'total', count(*),
           'pending', count(*) filter (where status = 'pending'),
           'processing', count(*) filter (where status = 'processing'),
           'completed', count(*) filter (where status = 'completed'),
           'failed', count(*) filter (where status = 'failed'),
           'cancelled', count(*) filter (where status = 'cancelled'),
           'attempts', (select count(*) from a),
           'retries', (select count(*) from a where attempt > 0),
           'p50', (select percentile_disc(0.50) within group (order by duration_ms) from a),
           'p95', (select percentile_disc(0.95) within group (order by duration_ms) from a),
           'p99', (select percentile_disc(0.99) within group (order by duration_ms) from a),
           'avg', (select avg(duration_ms)::float8 from a))
         from d",
    )
    .bind(config_id)
    .bind(from)
    .fetch_one(&database.pool)
    .await
    .unwrap()
}

/// The answers of the API for all kinds of scopes are those of a direct count.
async fn check_statistics(api: &ApiClient, database: &TestDatabase, stage: &str) {
    for config_id in [None, Some(2)] {
        for (window, window_seconds, unit) in [
            (None, 0, ""),
            (Some("1m"), 60, "minute"),
            (Some("1h"), 3_600, "minute"),
            (Some("3h"), 10_800, "minute"),
            (Some("4h"), 14_400, "hour"),
            (Some("3d"), 259_200, "hour"),
            (Some("4d"), 345_600, "day"),
            (Some("30d"), 2_592_000, "day"),
        ] {
            let what = format!("{stage}, config {config_id:?}, window {window:?}");
            let beginning = async || -> DateTime<Utc> {
                let begins =
                    sqlx::query_scalar("select date_trunc($1, now() - $2 * interval '1 second', 'UTC')");
                begins.bind(unit).bind(f64::from(window_seconds)).fetch_one(&database.pool).await.unwrap()
            };
            let mut query = vec![];
            query.extend(config_id.map(|id| format!("config_id={id}")));
            query.extend(window.map(|window| format!("window={window}")));
            let earliest = if window.is_some() { Some(beginning().await) } else { None };
            let answer = api.get(&format!("/webhooks/stats?{}", query.join("&"))).await;
            assert_eq!(answer.status, 200, "{}", answer.text);
            let statistics = answer.json();

            let from = statistics["from"].as_str().map(|text| text.parse::<DateTime<Utc>>().unwrap());
            if let Some(earliest) = earliest {
                let from = from.unwrap_or_else(|| panic!("{what}: {statistics}"));
                assert!(earliest <= from && from <= beginning().await, "{what}: {from}");
            } else {
                assert_eq!(from, None, "{what}");
            }
            let direct = counted_directly(database, config_id, from).await;
            for name in
                ["total", "pending", "processing", "completed", "failed", "cancelled", "attempts", "retries"]
            {
                assert_eq!(statistics[name], direct[name], "{what}: {name}");
            }
            for name in ["p50", "p95", "p99"] {
                assert_eq!(statistics["duration_ms"][name], direct[name], "{what}: {name}");
            }
            if let Some(avg) = direct["avg"].as_f64() {
                let told = statistics["duration_ms"]["avg"].as_f64().unwrap();
                assert!((told - avg).abs() < 1e-6, "{what}: avg {told}, not {avg}");
            }
            let [completed, failed] = ["completed", "failed"].map(|name| direct[name].as_f64().unwrap());
            if completed + failed > 0.0 {
                let told = statistics["success_rate"].as_f64().unwrap();
                assert!(
                    (told - completed / (completed + failed)).abs() < 1e-9,
                    "{what}: success_rate {told}"
                );
            } else {
                assert_eq!(statistics["success_rate"], Value::Null, "{what}");
            }
        }
    }
}

#[tokio::test]
async fn statistics_are_exact_at_every_stage_of_counting() {
    let database = TestDatabase::new().await;
    for days_ago in 1..=7 {
        make_archive(&database, days_ago).await;
    }
    database.execute(
        "insert into webhook_configs (name, postback_url)
         select 'config ' || n, 'http://receiver.example/' from generate_series(1, 3) as n;
         -- ready, scheduled, processing; of each the second and third have failed once and twice
         insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries, retry_count,
           status, ready_since, worker_id, locked_at, lock_expires_at,
           retry_0_started_at, retry_0_duration_ms, retry_1_started_at, retry_1_duration_ms)
         select gen_random_uuid(), '+credit', 'e', 1 + (n + state) % 3, 'http://receiver.example/', 2, 6, n,
           case state when 2 then 'processing' else 'pending' end, case when state <> 1 then now() end,
           case state when 2 then 'w' end, case state when 2 then now() end, case state when 2 then now() + interval '1 hour' end,
           case when n > 0 then now() end, case when n > 0 then 100 + state end,
           case when n > 1 then now() end, case when n > 1 then 200 + state end
         from generate_series(0, 2) as n, generate_series(0, 2) as state",
    ).await;
    database.execute(COUNT_ANEW).await;
    let api = api_without_upkeep(&database).await;
    let repositories = repositories(&database);

    check_statistics(&api, &database, "nothing has ended").await;

    write_history(&database, 2_000, 6 * 24).await;
    check_statistics(&api, &database, "nothing is counted").await;

    assert_eq!(count_all(&database).await, 2_000);
    check_statistics(&api, &database, "all is counted").await;

    write_history(&database, 300, 20).await;
    check_statistics(&api, &database, "part is counted").await;

    assert_eq!(count_all(&database).await, 300);
    assert_eq!(repositories.count_statistics(Duration::ZERO).await.unwrap(), 0);
    check_statistics(&api, &database, "counted twice in a row").await;

    let rows: i64 = database.scalar("select count(*) from webhook_statistics").await;
    assert!(repositories.coarsen_statistics().await.unwrap() > 0);
    let fewer: i64 = database.scalar("select count(*) from webhook_statistics").await;
    assert!(fewer < rows, "{rows} rows became {fewer}");
    assert_eq!(repositories.coarsen_statistics().await.unwrap(), 0, "there is nothing left to merge");
    check_statistics(&api, &database, "merged").await;

    write_history(&database, 100, 1).await;
    check_statistics(&api, &database, "merged, part is counted").await;
    assert_eq!(count_all(&database).await, 100);
    check_statistics(&api, &database, "merged, all is counted").await;

    // a dump of another server, whose transactions have far higher numbers
    database.execute(
        "update webhook_statistics_progress set counted_before = 9000000000000000;
         update webhook_queue set settled_in = 9000000000000000 - case when completed_at > now() - interval '1 hour' then 0 else 1000 end
         where completed_at is not null",
    ).await;
    assert_eq!(repositories.count_statistics(Duration::ZERO).await.unwrap(), 2_400);
    check_statistics(&api, &database, "restored and counted anew").await;
    write_history(&database, 50, 1).await;
    check_statistics(&api, &database, "restored, part is counted").await;
    assert_eq!(count_all(&database).await, 50);
    check_statistics(&api, &database, "restored, all is counted").await;
}

#[tokio::test]
async fn what_a_transaction_under_way_will_end_is_counted_once_it_commits() {
    let database = TestDatabase::new().await;
    database
        .execute(
            "insert into webhook_configs (name, postback_url) values ('shop', 'http://receiver.example/')",
        )
        .await;
    let api = api_without_upkeep(&database).await;
    let mut slow = database.pool.begin().await.unwrap();
    sqlx::query(SETTLE_ONE).execute(&mut *slow).await.unwrap();
    database.execute(SETTLE_ONE).await;
    let repositories = repositories(&database);

    assert_eq!(
        repositories.count_statistics(Duration::ZERO).await.unwrap(),
        0,
        "a later transaction waits for the slow one"
    );
    assert_eq!(api.get("/webhooks/stats").await.json()["completed"], 1);
    slow.commit().await.unwrap();

    assert_eq!(api.get("/webhooks/stats").await.json()["completed"], 2);
    assert_eq!(count_all(&database).await, 2);
    assert_eq!(api.get("/webhooks/stats").await.json()["completed"], 2);
}

#[tokio::test]
async fn what_another_process_has_just_counted_up_to_is_left_for_later() {
    let database = TestDatabase::new().await;
    database.execute(SETTLE_ONE).await;
    assert_eq!(count_all(&database).await, 1);
    database.execute(SETTLE_ONE).await;
    wait_for_older_transactions(&database).await;

    assert_eq!(repositories(&database).count_statistics(DAY).await.unwrap(), 0);
    assert_eq!(repositories(&database).count_statistics(Duration::ZERO).await.unwrap(), 1);
}

#[tokio::test]
async fn a_window_in_which_nothing_happened_still_says_when_it_began() {
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;

    let statistics = service.api.get("/webhooks/stats?window=1h").await.json();

    assert_eq!(statistics["total"], 0);
    let from = statistics["from"].as_str().expect("a beginning").parse::<DateTime<Utc>>().unwrap();
    let age = Utc::now() - from;
    assert!(TimeDelta::minutes(59) < age && age < TimeDelta::minutes(62), "{age}");
    service.stop().await;
}
