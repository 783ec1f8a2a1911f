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
use webhook_processor::infrastructure::http::{self, Asks, Door, Openness, Operations};
use webhook_processor::infrastructure::postgres::Database;
use webhook_processor::infrastructure::service::{Application, Role};

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::receiver::{Reply, TestReceiver};
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

    assert_eq!(retire(&database, 90 * DAY).await.len(), 1);
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
    assert!(retire(&database, 90 * DAY).await.is_empty(), "there is nothing left to drop");
}

/// What a process does for the retention: takes out what is past it, and forgets until nothing is left. Another process may
/// be at it at the same time. Answers which archives were taken out.
async fn retire(database: &TestDatabase, retention: Duration) -> Vec<String> {
    let repositories = repositories(database);
    let retired = repositories.retire_archives(retention).await.unwrap();
    let left = "select count(*) from webhook_retired_archives where dropped_at is null";
    eventually("all that was taken out is forgotten", async || {
        repositories.forget_retired().await.unwrap();
        (database.scalar::<i64>(left).await == 0).then_some(())
    })
    .await;
    retired
}

/// Moves what has ended, with all its times and those of its keys, so many days into the past.
async fn age_what_has_ended(database: &TestDatabase, days: i32) {
    make_archive(database, days).await;
    sqlx::query(
        "with aged as (
           update webhook_queue
           set created_at = created_at - $1 * interval '1 day', completed_at = completed_at - $1 * interval '1 day'
           where completed_at is not null)
         update webhook_event_keys set remembered_at = remembered_at - $1 * interval '1 day'",
    )
    .bind(days)
    .execute(&database.pool)
    .await
    .unwrap();
}

/// An API without workers, a config of a receiver that takes everything, and a delivery that has failed.
async fn with_a_dead_letter() -> (TestService, i64, String) {
    let receiver = TestReceiver::start().await;
    receiver.reply_always(Reply::status(500));
    let database = TestDatabase::new().await;
    let workers = TestService::start_with(Role::Serve, database.clone(), &[]).await;
    let config_id = workers.api.register(&receiver.url, json!({"max_retries": 0})).await;
    let answer = workers.api.post("/webhooks", named(config_id, "credit-1")).await;
    let queue_id = answer.json()["queue_id"].as_str().unwrap().to_owned();
    workers.api.delivery_in(&queue_id, "failed").await;
    workers.stop().await;
    let service = TestService::start_with(Role::Api, database, &[]).await;
    (service, config_id, queue_id)
}

fn named(config_id: i64, event_id: &str) -> Value {
    json!({"event_type": "+credit", "event_id": event_id, "config_id": config_id})
}

#[tokio::test]
async fn a_delivery_is_replayed_once_for_as_long_as_it_can_be_found() {
    let (service, config_id, dead) = with_a_dead_letter().await;
    let replay = async || service.api.post(&format!("/webhooks/{dead}/replay"), json!({})).await;
    let first = replay().await;
    assert_eq!(first.status, 201, "{}", first.text);
    // it died early on its day, and its replay is as old as the retention, whereas its archive is not yet
    age_what_has_ended(&service.database, 90).await;
    service
        .database
        .execute("update webhook_event_keys set remembered_at = now() - interval '90 days 1 minute'")
        .await;

    assert!(retire(&service.database, 90 * DAY).await.is_empty(), "its day is not past");

    let again = replay().await;
    assert_eq!((again.status, &again.json()["queue_id"]), (200, &first.json()["queue_id"]), "{}", again.text);
    assert_eq!(service.api.post("/webhooks", named(config_id, "credit-1")).await.status, 200, "a duplicate");

    assert_eq!(retire(&service.database, 89 * DAY).await.len(), 1);
    assert_eq!(replay().await.status, 404, "it can no longer be replayed");
    let keys: i64 = service.database.scalar("select count(*) from webhook_event_keys").await;
    assert_eq!(keys, 1, "what guarded its replay went with it");
    // its replay is still owed, so the event is not accepted beside it
    let again = service.api.post("/webhooks", named(config_id, "credit-1")).await;
    assert_eq!((again.status, &again.json()["queue_id"]), (200, &first.json()["queue_id"]), "{}", again.text);

    // once that is past the retention, too, nothing is left
    let replay = first.json()["queue_id"].as_str().unwrap().to_owned();
    service.api.post(&format!("/webhooks/{replay}/cancel"), json!({})).await;
    assert_eq!(
        service.api.post("/webhooks", named(config_id, "credit-1")).await.status,
        409,
        "it was cancelled"
    );
    age_what_has_ended(&service.database, 91).await;
    assert_eq!(retire(&service.database, 89 * DAY).await.len(), 1);
    let keys: i64 = service.database.scalar("select count(*) from webhook_event_keys").await;
    assert_eq!(keys, 0);
    let anew = service.api.post("/webhooks", named(config_id, "credit-1")).await;
    assert_eq!(anew.status, 201, "{}", anew.text);
    service.stop().await;
}

#[tokio::test]
async fn an_event_is_remembered_for_as_long_as_its_delivery_is_open() {
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;
    let config_id = service.api.register("http://127.0.0.1:9", json!({})).await;
    let mut bonus = named(config_id, "bonus-7");
    bonus["scheduled_at"] = json!(Utc::now() + TimeDelta::days(3));
    let first = service.api.post("/webhooks", bonus.clone()).await;
    assert_eq!(first.status, 201);
    service
        .database
        .execute(
            "update webhook_event_keys set remembered_at = now() - interval '2 days';
             update webhook_queue_open set created_at = now() - interval '2 days'",
        )
        .await;

    retire(&service.database, DAY).await;
    let again = service.api.post("/webhooks", bonus).await;
    assert_eq!((again.status, &again.json()["queue_id"]), (200, &first.json()["queue_id"]), "{}", again.text);
    service.stop().await;
}

#[tokio::test]
async fn what_guarded_an_archive_is_forgotten_in_steps_that_any_process_may_go_on_with() {
    let database = TestDatabase::new().await;
    make_archive(&database, 91).await;
    // 5,000 of the archive, each with its key and the key of a replay; of some, failed probes; and as many others
    database.execute(
        "insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries, status,
                                    ready_since, completed_at, settled_in, retry_0_started_at)
         select gen_random_uuid(), '+credit', n::text, 1, 'http://receiver.example/', 2, 6, 'completed',
                null, now() - interval '91 days', 1, now() from generate_series(1, 5000) as n;
         insert into webhook_event_keys (config_id, event_type, event_id, queue_id)
         select config_id, event_type, event_id, queue_id from webhook_queue;
         insert into webhook_event_keys (config_id, event_type, event_id, queue_id)
         select config_id, 'replay', queue_id::text, gen_random_uuid() from webhook_queue;
         -- the same event was accepted again, or by another config
         update webhook_event_keys set queue_id = gen_random_uuid() where event_id = '1';
         insert into webhook_event_keys (config_id, event_type, event_id, queue_id)
         select 2, '+credit', n::text, gen_random_uuid() from generate_series(1, 5000) as n;
         insert into webhook_probes (queue_id, number, attempt, started_at, completed_at)
         select queue_id, 1, 0, now(), now() from webhook_queue limit 10;
         insert into webhook_probes (queue_id, number, attempt, started_at, completed_at)
         select gen_random_uuid(), 1, 0, now(), now();
         analyze",
    ).await;
    let repositories = repositories(&database);

    let retired = repositories.retire_archives(90 * DAY).await.unwrap();
    assert_eq!(retired.len(), 1);
    assert_eq!(
        database.scalar::<i64>("select count(*) from webhook_queue").await,
        0,
        "nothing is found any more"
    );
    // a process that ends after two steps
    for _ in 0..2 {
        database.execute("select webhook_forget_retired(2000)").await;
    }
    let left: i64 =
        database.scalar("select count(*) from webhook_event_keys where event_type = 'replay'").await;
    assert_eq!(left, 1_000);
    // one that is broken off
    let mut broken_off = database.pool.begin().await.unwrap();
    sqlx::query("select webhook_forget_retired(2000)").execute(&mut *broken_off).await.unwrap();
    let meanwhile = repositories.forget_retired().await.unwrap();
    assert_eq!((meanwhile.keys, meanwhile.left), (0, false), "one process at a time");
    broken_off.rollback().await.unwrap();

    let rest = repositories.forget_retired().await.unwrap();
    assert!((1_999..=2_000).contains(&rest.keys), "{rest:?}");
    assert_eq!((&rest.dropped, rest.left), (&retired, false));

    let kept: Vec<(i64, String, i64)> = sqlx::query_as(
        "select config_id, event_type, count(*) from webhook_event_keys group by 1, 2 order by 1, 2",
    )
    .fetch_all(&database.pool)
    .await
    .unwrap();
    assert_eq!(kept, [(1, "+credit".to_owned(), 1), (2, "+credit".to_owned(), 5_000)]);
    assert_eq!(database.scalar::<i64>("select count(*) from webhook_probes").await, 1);
    let gone: bool = database
        .scalar(
            "select to_regclass(archive) is null and dropped_at is not null from webhook_retired_archives",
        )
        .await;
    assert!(gone);
}

#[tokio::test]
async fn a_clock_that_is_far_ahead_costs_a_few_archives_an_hour() {
    let database = TestDatabase::new().await;
    for days_ago in 1..=10 {
        make_archive(&database, days_ago).await;
    }
    let repositories = repositories(&database);

    let first = repositories.retire_archives(Duration::from_mins(1)).await.unwrap();
    assert_eq!(first.len(), 4);
    assert!(first.is_sorted(), "the oldest go first: {first:?}");
    assert!(repositories.retire_archives(Duration::from_mins(1)).await.unwrap().is_empty());
    assert_eq!(archive_days(&database).await[..6], [-6, -5, -4, -3, -2, -1]);

    database.execute("update webhook_retired_archives set retired_at = now() - interval '61 minutes'").await;
    assert_eq!(repositories.retire_archives(Duration::from_mins(1)).await.unwrap().len(), 4);
}

#[tokio::test]
async fn a_process_takes_out_what_is_past_the_retention_and_goes_on_with_what_another_left() {
    let database = TestDatabase::new().await;
    for days_ago in [3, 4] {
        make_archive(&database, days_ago).await;
    }
    database
        .execute(
            "insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries, status,
                                        ready_since, completed_at, settled_in, retry_0_started_at)
             select gen_random_uuid(), '+credit', days::text, 1, 'http://receiver.example/', 2, 6, 'completed',
                    null, now() - days * interval '1 day', 1, now() from unnest(array[3, 4]) as days;
             insert into webhook_event_keys (config_id, event_type, event_id, queue_id)
             select config_id, event_type, event_id, queue_id from webhook_queue",
        )
        .await;
    // a process that ended after it had taken out one of them
    database.execute("select webhook_retire_archives('3 days', 1)").await;

    let service =
        TestService::start_with(Role::Worker, database.clone(), &[("ARCHIVE_RETENTION", "1d")]).await;

    eventually("both are dropped", async || {
        let dropped: i64 = database
            .scalar("select count(*) from webhook_retired_archives where dropped_at is not null")
            .await;
        (dropped == 2).then_some(())
    })
    .await;
    assert_eq!(archive_days(&database).await, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(database.scalar::<i64>("select count(*) from webhook_event_keys").await, 0);
    service.stop().await;
}

#[tokio::test]
async fn an_event_whose_delivery_has_just_been_taken_out_is_to_be_sent_again_later() {
    let (service, config_id, _) = with_a_dead_letter().await;
    age_what_has_ended(&service.database, 90).await;
    let repositories = repositories(&service.database);
    // the service, which has just started, leaves it to whoever is at it already
    let mut another = service.database.pool.begin().await.unwrap();
    sqlx::raw_sql("select pg_advisory_xact_lock(hashtextextended('webhook_retired_archives', 0))")
        .execute(&mut *another)
        .await
        .unwrap();
    assert_eq!(repositories.retire_archives(89 * DAY).await.unwrap().len(), 1);

    let meanwhile = service.api.post("/webhooks", named(config_id, "credit-1")).await;
    assert_eq!(meanwhile.status, 503, "{}", meanwhile.text);
    assert!(meanwhile.headers.contains_key("retry-after"));
    another.rollback().await.unwrap();
    assert_eq!(retire(&service.database, 89 * DAY).await, [""; 0], "nothing else is to be taken out");
    assert_eq!(service.api.post("/webhooks", named(config_id, "credit-1")).await.status, 201);
    service.stop().await;
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
    let openness = Openness {
        door: Door::new(application.api.access.clone(), Asks::NothingOfAnyone),
        guards_metrics: false,
        shows_docs: false,
    };
    let router = http::router(operations, Some(application.api), openness);
    tokio::spawn(async { axum::serve(listener, router).await });
    api
}

/// `count` terminal deliveries of three configs that ended in the last `hours`, up to two retries each, with durations
/// below a second; some attempts were lost with their workers and have none. Those that another followed have errors.
async fn write_history(database: &TestDatabase, count: i32, hours: i32) {
    sqlx::query(
        "insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries, retry_count,
           status, status_reason, ready_since, created_at, completed_at, settled_in,
           retry_0_started_at, retry_0_duration_ms, retry_1_started_at, retry_1_duration_ms, retry_2_started_at, retry_2_duration_ms,
           retry_0_error_kind, retry_1_error_kind)
         select gen_random_uuid(), '+credit', n::text, 1 + n % 3, 'http://receiver.example/', 2, 2, retries,
           status, case when status <> 'completed' then 'r' end, null, ended, ended, pg_current_xact_id()::text::bigint,
           case when attempts > 0 then ended end, case when attempts > 0 and n % 11 > 0 then n * 7919 % 1000 end,
           case when attempts > 1 then ended end, case when attempts > 1 then n::bigint * 104729 % 997 end,
           case when attempts > 2 then ended end, case when attempts > 2 then n::bigint * 1299709 % 991 end,
           case when attempts > 1 then (array['timeout', 'http_status', 'reset'])[1 + n % 3] end,
           case when attempts > 2 then (array['timeout', 'dns'])[1 + n % 2] end
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
           'errors', (select coalesce(json_object_agg(error_kind, attempts), '{}') from (
             select error_kind, count(*) as attempts from a where error_kind is not null group by 1) as e),
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
            for name in [
                "total",
                "pending",
                "processing",
                "completed",
                "failed",
                "cancelled",
                "attempts",
                "retries",
                "errors",
            ] {
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
    check_statistics(&api, &database, "restored and counted again").await;
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

#[tokio::test]
async fn after_the_clock_of_the_database_was_ahead_statistics_stay_exact() {
    let database = TestDatabase::new().await;
    database
        .execute(
            "insert into webhook_configs (name, postback_url) values ('shop', 'http://receiver.example/')",
        )
        .await;
    let api = api_without_upkeep(&database).await;
    let repositories = repositories(&database);
    // one ended while the clock was two days ahead, and was counted then or since
    database
        .execute(
            "insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries,
               status, ready_since, completed_at, settled_in, retry_0_started_at, retry_0_duration_ms)
             values (gen_random_uuid(), '+credit', 'e', 1, 'http://receiver.example/', 2, 6,
               'completed', null, now() + interval '2 days', pg_current_xact_id()::text::bigint, now(), 5)",
        )
        .await;
    assert_eq!(count_all(&database).await, 1);
    // a process of the version before may have noted it as it was
    database.execute("update webhook_statistics_progress set counted_at = now() + interval '2 days'").await;

    // the clock is right again
    for _ in 0..3 {
        database.execute(SETTLE_ONE).await;
    }
    assert_eq!(api.get("/webhooks/stats").await.json()["completed"], 4, "before they are counted");
    assert_eq!(count_all(&database).await, 3);
    assert_eq!(api.get("/webhooks/stats").await.json()["completed"], 4, "counted");
    let ahead: bool = database.scalar("select counted_at > now() from webhook_statistics_progress").await;
    assert!(!ahead, "what is counted must not run ahead of the clock");
    assert_eq!(repositories.count_statistics(Duration::ZERO).await.unwrap(), 0);
}

/// Locks the archives of days that are more than two days away from today against everybody, until it is dropped.
async fn lock_distant_archives(database: &TestDatabase) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let mut lock = database.pool.begin().await.unwrap();
    let sql = "do $$
        declare
          distant text;
        begin
          for distant in select archive from webhook_archives where archive_day < current_date - 2 loop
            execute format('lock table %I in access exclusive mode', distant);
          end loop;
        end $$";
    sqlx::raw_sql(sql).execute(&mut *lock).await.unwrap();
    lock
}

#[tokio::test]
async fn what_is_asked_of_recent_deliveries_waits_for_no_archive_of_other_days() {
    let database = TestDatabase::new().await;
    for days_ago in 3..103 {
        make_archive(&database, days_ago).await;
    }
    let service = TestService::start_with(Role::Serve, database.clone(), &[]).await;
    let api = &service.api;
    let receiver = TestReceiver::start().await;
    let config_id = api.register(&receiver.url, json!({})).await;
    let event = |event_id: &str, more: Value| {
        let mut event = json!({"event_type": "+credit", "config_id": config_id, "event_id": event_id});
        event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        event
    };
    let accepted = api.post("/webhooks", event("ended", json!({}))).await.json();
    let ended = accepted["queue_id"].as_str().unwrap().to_owned();
    api.delivery_in(&ended, "completed").await;
    let later = json!({"scheduled_at": Utc::now() + TimeDelta::hours(1)});
    let mut waiting = Vec::new();
    for name in ["one", "other"] {
        let answer = api.post("/webhooks", event(name, later.clone())).await.json();
        waiting.push(answer["queue_id"].as_str().unwrap().to_owned());
    }

    // until something is counted, all archives are what is not counted yet; the service may be at it, too
    eventually("it is counted", async || {
        count_all(&database).await;
        let counted: bool =
            database.scalar("select counted_at > '-infinity' from webhook_statistics_progress").await;
        counted.then_some(())
    })
    .await;

    let lock = lock_distant_archives(&database).await;

    let statistics = api.get("/webhooks/stats").await;
    assert_eq!((statistics.status, &statistics.json()["completed"]), (200, &json!(1)));
    repositories(&database).count_statistics(Duration::ZERO).await.unwrap();
    let shown = api.get(&format!("/webhooks/{ended}")).await;
    assert_eq!((shown.status, &shown.json()["status"]), (200, &json!("completed")));
    let listed = api.get("/webhooks?event_id=ended").await.json();
    assert_eq!(listed["items"][0]["queue_id"], ended.as_str(), "{listed}");
    assert_eq!(api.post("/webhooks", event("ended", json!({}))).await.status, 200, "a duplicate");
    assert_eq!(api.post(&format!("/webhooks/{}/cancel", waiting[0]), json!({})).await.status, 200);
    assert_eq!(api.post(&format!("/webhooks/{}/retry", waiting[1]), json!({})).await.status, 200);
    assert_eq!(api.post(&format!("/webhooks/{ended}/replay"), json!({})).await.status, 201);
    lock.rollback().await.unwrap();

    // one that has to wait for the archive of today has locked few relations until then
    let mut today = database.pool.begin().await.unwrap();
    let sql = "do $$ begin
          execute format('lock table %I in access exclusive mode', (select archive from webhook_archives where archive_day = current_date));
        end $$";
    sqlx::raw_sql(sql).execute(&mut *today).await.unwrap();
    let path = format!("/webhooks/{ended}");
    let (_, locked) = tokio::join!(api.get(&path), async {
        let locked: i64 = eventually("a look-up waits", async || {
            database
                .scalar::<Option<i64>>(
                    "select count(distinct l.relation) filter (where l.granted)
                     from pg_stat_activity a join pg_locks l using (pid)
                     where a.datname = current_database() and a.query like '-- records.find%'
                     group by a.pid having bool_or(not l.granted)
                     union all select null limit 1",
                )
                .await
        })
        .await;
        today.rollback().await.unwrap();
        locked
    });
    assert!(locked < 30, "{locked} relations, of more than 100 archives with two indexes each");
    service.stop().await;
}

#[tokio::test]
async fn deliveries_are_found_wherever_they_ended() {
    let database = TestDatabase::new().await;
    make_archive(&database, 40).await;
    let api = api_without_upkeep(&database).await;
    // v7 ids: of 40 days ago that ended then, of 40 days ago that ended today, of today by a clock that was ahead; and
    // one that does not say when it was made
    database
        .execute(
            "insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries,
               status, ready_since, completed_at, settled_in, retry_0_started_at, retry_0_duration_ms)
             select case when made is null then '6e4c5a1b-0c3f-4d2a-9d57-1f2e3d4c5b6a'
                    else (lpad(to_hex((extract(epoch from now() - made) * 1000)::bigint), 12, '0') || '7000800000000000' || lpad(n::text, 4, '0'))::uuid end,
               '+credit', 'event-' || n, 1, 'http://receiver.example/', 2, 6, 'completed', null, now() - ended,
               pg_current_xact_id()::text::bigint, now(), 5
             from (values (1, interval '40 days', interval '40 days'), (2, interval '40 days', interval '0'),
                          (3, interval '0', interval '40 days'), (4, null, interval '40 days')) as d (n, made, ended);
             insert into webhook_event_keys (config_id, event_type, event_id, queue_id)
             select config_id, event_type, event_id, queue_id from webhook_queue",
        )
        .await;
    let ids: Vec<sqlx::types::Uuid> =
        database.scalar("select array_agg(queue_id order by event_id) from webhook_queue").await;
    assert_eq!(ids.len(), 4);

    for (n, id) in (1..).zip(ids) {
        assert_eq!(api.get(&format!("/webhooks/{id}")).await.status, 200, "{n}");
        let listed = api.get(&format!("/webhooks?event_id=event-{n}")).await;
        assert_eq!(listed.json()["items"][0]["queue_id"], id.to_string(), "{n}: {}", listed.text);
    }
}

#[tokio::test]
async fn an_event_named_like_a_delivery_does_not_list_that_delivery() {
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;
    let config_id = service.api.register("http://127.0.0.1:9", json!({})).await;
    let named = json!({"event_type": "+credit", "config_id": config_id, "event_id": "order-1"});
    let first = service.api.post("/webhooks", named).await.json();
    let nameless = service.api.credit(config_id).await;
    let first_id = first["queue_id"].as_str().unwrap();
    let namesake = json!({"event_type": "+credit", "config_id": config_id, "event_id": first_id});
    let second = service.api.post("/webhooks", namesake).await.json();

    let listed = async |event_id: &str| -> Vec<Value> {
        let answer = service.api.get(&format!("/webhooks?event_id={event_id}")).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let items = answer.json()["items"].as_array().unwrap().clone();
        items.iter().map(|item| item["queue_id"].clone()).collect()
    };
    assert_eq!(listed(first_id).await, [second["queue_id"].clone()]);
    assert_eq!(listed("order-1").await, [json!(first_id)]);
    assert_eq!(
        listed(&nameless).await,
        [json!(nameless)],
        "an event without a name has that of its delivery"
    );
    assert!(listed("").await.is_empty());
    service.stop().await;
}

#[tokio::test]
async fn of_a_deliverys_failed_probes_the_newest_are_kept_and_all_are_counted() {
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;
    let config_id = service.api.register("http://127.0.0.1:9", json!({})).await;
    let queue_id = service.api.credit(config_id).await;
    // 130 probes, each as a worker writes it
    service
        .database
        .execute(
            "do $$ begin
               for n in 1..130 loop
                 update webhook_queue_open
                 set status = 'processing', worker_id = 'w', locked_at = now(), lock_expires_at = now() + interval '1 minute';
                 perform webhook_settle_probe(array[queue_id], array['w'], array[now()], array[(1000 - n) * 1000000::bigint], array[0::bigint],
                   array[n], array[500::smallint], array['body ' || n], array['the receiver answered 500'], array[false]) from webhook_queue_open;
               end loop;
             end $$",
        )
        .await;

    let kept: Vec<i32> =
        service.database.scalar("select array_agg(duration_ms order by id) from webhook_probes").await;
    assert_eq!(kept, (31..=130).collect::<Vec<_>>());
    let shown = service.api.get(&format!("/webhooks/{queue_id}")).await.json();
    assert_eq!(shown["failed_probes"], 130);
    let attempts = shown["attempts"].as_array().unwrap();
    assert!(attempts.iter().all(|attempt| attempt["probe"] == true));
    let bodies: Vec<_> = attempts.iter().map(|attempt| attempt["response_body"].as_str().unwrap()).collect();
    assert_eq!(bodies, (111..=130).map(|n| format!("body {n}")).collect::<Vec<_>>());
    let listed = service.api.get("/webhooks").await.json();
    assert_eq!(listed["items"][0]["failed_probes"], 130);
    assert_eq!(listed["items"][0]["attempts"], json!([]), "a list reads no bodies of probes");
    service.stop().await;
}

/// The check of this name in an answer about health.
fn check_named<'a>(health: &'a Value, name: &str) -> &'a Value {
    let checks = health["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{name} in {health}"))
}

#[tokio::test]
async fn what_is_held_is_counted_and_aged_apart_from_what_is_ready() {
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;
    let api = &service.api;
    let mut configs = Vec::new();
    for (waiting, more) in [
        (1, json!({})),
        (2, json!({"enabled": false})),
        (3, json!({})),
        (4, json!({"max_in_flight": 1})),
        (5, json!({"rate_limit_per_second": 1})),
    ] {
        let config_id = api.register("http://127.0.0.1:9", more).await;
        for _ in 0..waiting {
            api.credit(config_id).await;
        }
        configs.push(config_id);
    }
    let later = json!({"event_type": "+credit", "config_id": configs[0], "scheduled_at": Utc::now() + TimeDelta::hours(1)});
    assert_eq!(api.post("/webhooks", later).await.status, 201);
    api.patch(&format!("/api/webhooks/{}", configs[2]), json!({"circuit": {"state": "open"}})).await;
    // what a probe left: ready since a moment ago, due since long; one has failed before, one is being attempted
    service
        .database
        .execute(
            "update webhook_queue_open set next_retry_at = now() - interval '13 minutes', ready_since = now() - interval '1 second'
             where config_id = 3 and ready_since is not null;
             update webhook_queue_open set next_retry_at = now() - interval '5 minutes' where config_id = 2;
             update webhook_queue_open set retry_count = 1, retry_0_started_at = now(), retry_0_duration_ms = 7 where config_id = 3;
             update webhook_queue_open
             set status = 'processing', worker_id = 'w', locked_at = now(), lock_expires_at = now() + interval '1 hour'
             where queue_id = (select queue_id from webhook_queue_open where config_id = 4 limit 1)",
        )
        .await;

    let health = api.get("/health").await;
    assert_eq!(health.status, 200, "{}", health.text);
    let held = check_named(&health.json(), "held_deliveries").clone();
    assert_eq!(
        (&held["status"], &held["detail"]),
        (
            &json!("ok"),
            &json!(
                "13 are held, the oldest for 13 m: 3 by an open circuit, 2 by a paused config, 8 by a limit"
            )
        )
    );

    let statistics = api.get("/webhooks/stats").await.json();
    for (name, expected) in [("total", 16), ("pending", 15), ("processing", 1), ("attempts", 3)] {
        assert_eq!(statistics[name], expected, "{name} in {statistics}");
    }
    let held = &statistics["held"];
    for (name, expected) in [("total", 13), ("paused", 2), ("circuit_open", 3), ("limited", 8)] {
        assert_eq!(held[name], expected, "{name} in {statistics}");
    }
    let minutes = |age: &Value| age.as_u64().map(|ms| ms / 60_000);
    assert_eq!(minutes(&held["oldest_age_ms"]), Some(13));
    assert_eq!(minutes(&statistics["oldest_ready_age_ms"]), Some(0), "what is ready has an age of its own");
    assert_eq!(statistics["attempt_success_rate"], 0.0, "all attempts so far have failed");
    assert!(statistics["success_rate"].is_null(), "none has ended");

    let paused = api.get(&format!("/webhooks/stats?config_id={}", configs[1])).await.json();
    assert_eq!(
        (&paused["pending"], &paused["held"]["paused"], &paused["held"]["total"]),
        (&json!(2), &json!(2), &json!(2))
    );
    assert_eq!(minutes(&paused["held"]["oldest_age_ms"]), Some(5));
    assert!(paused["oldest_ready_age_ms"].is_null() && paused["attempt_success_rate"].is_null());

    // the recorder of metrics is one for all tests, so other values than of this moment may be seen
    let line = |metrics: &str, name: &str, value: &str| {
        metrics.lines().any(|line| line == format!("{name} {value}"))
    };
    eventually("the metrics show what is held", async || {
        let metrics = api.get("/metrics").await.text;
        let shown = line(&metrics, "webhook_queue_depth{state=\"ready\"}", "1")
            && line(&metrics, "webhook_queue_depth{state=\"held\"}", "13")
            && line(&metrics, "webhook_queue_depth{state=\"scheduled\"}", "1")
            && line(&metrics, "webhook_queue_depth{state=\"processing\"}", "1")
            && line(&metrics, "webhook_held_deliveries{reason=\"circuit_open\"}", "3")
            && line(&metrics, "webhook_held_deliveries{reason=\"paused\"}", "2")
            && line(&metrics, "webhook_held_deliveries{reason=\"limited\"}", "8")
            && !line(&metrics, "webhook_oldest_held_age_seconds", "0");
        shown.then_some(())
    })
    .await;
    service.stop().await;
}

#[tokio::test]
async fn nothing_waits_is_not_said_while_something_is_held() {
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;
    let config_id = service.api.register("http://127.0.0.1:9", json!({"enabled": false})).await;
    assert_eq!(
        check_named(&service.api.get("/health/ready").await.json(), "held_deliveries")["detail"],
        "none are held"
    );
    service.api.credit(config_id).await;

    let ready = service.api.get("/health/ready").await;
    assert_eq!(ready.status, 200);
    let detail = check_named(&ready.json(), "oldest_ready_delivery")["detail"].clone();
    assert_eq!(detail, "nothing waits that could be claimed");
    eventually("it is counted", async || {
        let health = service.api.get("/health/ready").await.json();
        let detail = check_named(&health, "held_deliveries")["detail"].as_str().unwrap().to_owned();
        detail.starts_with("1 is held, the oldest for ").then_some(())
    })
    .await;
    service.stop().await;
}
