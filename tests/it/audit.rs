//! The audit: what the schema says of itself, what it refuses, and the queries of `docs/audit.md`, run on real history.

use std::collections::BTreeSet;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use uuid::Uuid;

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::receiver::{Reply, TestReceiver};
use crate::support::service::{ApiClient, TestService};

const DOCUMENT: &str = include_str!("../../docs/audit.md");

/// A heading of the document with its query.
struct Question {
    heading: &'static str,
    sql: &'static str,
}

impl Question {
    fn all() -> Vec<Self> {
        let sections = DOCUMENT.split("\n## ").skip(1);
        sections
            .map(|section| {
                let (heading, text) = section.split_once('\n').unwrap();
                let blocks: Vec<_> = text.split("```sql\n").skip(1).collect();
                assert_eq!(blocks.len(), 1, "queries under {heading:?}");
                let (sql, _) = blocks[0].split_once("\n```").unwrap();
                Self { heading, sql }
            })
            .collect()
    }

    /// The rows, after a check that the block runs as it stands.
    async fn ask(&self, database: &TestDatabase) -> Vec<Value> {
        let plain = sqlx::raw_sql(self.sql).fetch_all(&database.pool).await;
        let plain = plain.unwrap_or_else(|error| panic!("{}: {error}", self.heading));
        let sql = self.sql.trim_end().trim_end_matches(';');
        let sql = AssertSqlSafe(format!("select coalesce(json_agg(answer), '[]') from ({sql}) answer"));
        let rows: Value = sqlx::query_scalar(sql).fetch_one(&database.pool).await.unwrap();
        let rows = rows.as_array().unwrap().clone();
        assert_eq!(rows.len(), plain.len());
        rows
    }
}

/// A service with a history in which there is something to find for every question of the document.
struct Story {
    service: TestService,
    shop: TestReceiver,
    /// Queue ids, by what is special about them.
    retried: String,
    lone_chargeback: String,
    lost_yesterday: String,
    dead_but_replayed: String,
    replay: String,
    outlived: String,
    died_with_its_worker: String,
}

impl Story {
    #[expect(clippy::too_many_lines, reason = "a story is told from its beginning to its end")]
    async fn tell() -> Self {
        let service = TestService::start().await;
        let api = &service.api;
        let [shop, broken, others] =
            [TestReceiver::start().await, TestReceiver::start().await, TestReceiver::start().await];
        broken.reply_always(Reply::status(500).body("broken"));
        let swift = |more: Value| {
            let mut settings = json!({"retry_base_ms": 1, "retry_cap_ms": 1, "max_retries": 1});
            settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            settings
        };
        let mut configs = Vec::new();
        for (receiver, settings) in [
            (&shop, json!({"name": "shop"})),
            (&broken, json!({"name": "refunds"})),
            (&others, json!({"name": "closing"})),
            (&others, json!({"name": "paused", "enabled": false})),
            (&others, json!({"name": "interrupted", "enabled": false})),
            (&others, json!({"name": "interrupted for good", "enabled": false, "max_retries": 0})),
        ] {
            configs.push(api.register(&receiver.url, swift(settings)).await);
        }
        assert_eq!(configs, [1, 2, 3, 4, 5, 6], "the document names configs by these ids");

        // shop: a credit at the second attempt, its chargeback, a chargeback without a credit, a value that is none
        shop.reply_with([Reply::status(503).body("try later")]);
        let retried = accept(
            api,
            1,
            "+credit",
            "txn-42",
            json!({"user_id": "user_123", "transaction_id": "txn-42", "value": "100.10"}),
        )
        .await;
        api.delivery_in(&retried, "completed").await;
        let chargeback = accept(
            api,
            1,
            "-debit",
            "back-42",
            json!({"user_id": "user_123", "transaction_id": "txn-42", "value": 100.10}),
        )
        .await;
        let lone_chargeback = accept(
            api,
            1,
            "-debit",
            "back-77",
            json!({"user_id": "user_7", "transaction_id": "txn-77", "value": 5}),
        )
        .await;
        let unreadable =
            accept(api, 1, "+credit", "txn-43", json!({"user_id": "user_7", "value": "a lot"})).await;
        let cancelled = accept_later(api, 1, json!({"user_id": "user_123", "value": 1})).await;
        assert_eq!(api.post(&format!("/webhooks/{cancelled}/cancel"), json!({})).await.status, 200);
        accept_later(api, 1, json!({"user_id": "user_7"})).await;

        // refunds: two dead letters, one of them replayed; then the receiver moves
        let lost_yesterday =
            accept(api, 2, "+credit", "txn-50", json!({"user_id": "user_50", "value": 10})).await;
        let dead_but_replayed =
            accept(api, 2, "+credit", "txn-51", json!({"user_id": "user_51", "value": 20})).await;
        for queue_id in [&lost_yesterday, &dead_but_replayed] {
            api.delivery_in(queue_id, "failed").await;
        }
        broken.reply_always(Reply::status(200));
        let replay = api.post(&format!("/webhooks/{dead_but_replayed}/replay"), json!({})).await.json();
        let replay = replay["queue_id"].as_str().unwrap().to_owned();
        api.delivery_in(&replay, "completed").await;
        let moved =
            api.patch("/api/webhooks/2", json!({"postback_url": format!("{}/moved", broken.url)})).await;
        assert_eq!(moved.status, 200, "{}", moved.text);

        // closing: one arrives, the other is cancelled with the config
        let before = accept(api, 3, "+credit", "txn-60", json!({"value": 7})).await;
        api.delivery_in(&before, "completed").await;
        let after = accept_later(api, 3, json!({"value": 8})).await;
        api.delete("/api/webhooks/3").await;
        api.delivery_in(&after, "cancelled").await;

        // paused: one waits. interrupted: the worker is lost in the middle of the first attempt
        accept(api, 4, "+credit", "txn-70", json!({"value": 9})).await;
        let outlived = accept(api, 5, "+credit", "txn-80", json!({"value": 30})).await;
        let died_with_its_worker = accept(api, 6, "+credit", "txn-81", json!({"value": 40})).await;
        service
            .database
            .execute(
                "update webhook_queue_open
                 set status = 'processing', worker_id = 'gone:1:00000000:1',
                     locked_at = now() - interval '10 minutes', lock_expires_at = now() - interval '5 minutes'
                 where config_id in (5, 6)",
            )
            .await;
        for config in [5, 6] {
            api.patch(&format!("/api/webhooks/{config}"), json!({"enabled": true})).await;
        }
        api.delivery_in(&outlived, "completed").await;
        api.delivery_in(&died_with_its_worker, "failed").await;

        for queue_id in [&chargeback, &lone_chargeback, &unreadable] {
            api.delivery_in(queue_id, "completed").await;
        }
        let database = service.database.clone();
        database
            .execute(
                "update webhook_queue set created_at = current_date - 1 + time '12:00'
                 where event_id in ('txn-50', 'txn-51') and replay_of is null",
            )
            .await;
        eventually("all that has ended is counted", async || {
            let counted: bool = database
                .scalar(
                    "select (select count(*) from webhook_queue where completed_at is not null)
                     = (select coalesce(sum(occurrences), 0) from webhook_statistics
                        where config_id = 0 and fact in ('completed', 'failed', 'cancelled'))",
                )
                .await;
            counted.then_some(())
        })
        .await;
        Self {
            service,
            shop,
            retried,
            lone_chargeback,
            lost_yesterday,
            dead_but_replayed,
            replay,
            outlived,
            died_with_its_worker,
        }
    }
}

async fn accept(
    api: &ApiClient,
    config_id: i64,
    event_type: &str,
    event_id: &str,
    url_params: Value,
) -> String {
    let event = json!({"event_type": event_type, "event_id": event_id, "config_id": config_id, "url_params": url_params});
    let answer = api.post("/webhooks", event).await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    answer.json()["queue_id"].as_str().unwrap().to_owned()
}

async fn accept_later(api: &ApiClient, config_id: i64, url_params: Value) -> String {
    let at = Utc::now() + TimeDelta::hours(1);
    let event = json!({"event_type": "+credit", "config_id": config_id, "url_params": url_params, "scheduled_at": at});
    let answer = api.post("/webhooks", event).await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    answer.json()["queue_id"].as_str().unwrap().to_owned()
}

/// The values of some columns, row by row.
fn columns(rows: &[Value], names: &[&str]) -> Value {
    rows.iter().map(|row| names.iter().map(|name| row[name].clone()).collect::<Value>()).collect()
}

/// What the story answers to a question; panics where it answers something else.
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn check_answer(heading: &str, rows: &[Value], story: &Story) {
    let columns = |names: &[&str]| columns(rows, names);
    match heading {
        "What exactly did we send for event txn-42, when, and what did they say?" => {
            let url =
                format!("{}/postback?user_id=user_123&transaction_id=txn-42&value=100.10", story.shop.url);
            let expected = json!([
                [story.retried, 0, url, 503, "try later", "the receiver answered 503"],
                [story.retried, 1, url, 200, "ok", null],
            ]);
            assert_eq!(
                columns(&["queue_id", "attempt", "webhook_url", "http_status", "response_body", "error"]),
                expected
            );
        }
        "Which credits of yesterday never arrived?" => {
            let expected = json!([[story.lost_yesterday, "user_50", "10", "failed", "retries exhausted"]]);
            assert_eq!(columns(&["queue_id", "user_id", "value", "status", "status_reason"]), expected);
        }
        "What was ever sent for user_123?" => {
            let expected = json!([
                ["+credit", "100.10", "completed", 2],
                ["-debit", "100.1", "completed", 1],
                ["+credit", "1", "cancelled", 0],
            ]);
            assert_eq!(columns(&["event_type", "value", "status", "attempts"]), expected);
        }
        "Which dead letters are there, by config and reason?" => {
            let expected = json!([
                ["refunds", "retries exhausted", 500, 2],
                ["interrupted for good", "retries exhausted", null, 1],
            ]);
            assert_eq!(
                columns(&["config_name", "status_reason", "last_http_status", "dead_letters"]),
                expected
            );
        }
        "Which deliveries took more than one attempt, and how long until success?" => {
            // the lost attempt began ten minutes ago
            let expected = json!([[story.outlived, 2, null], [story.retried, 2, 503]]);
            assert_eq!(columns(&["queue_id", "attempts", "first_http_status"]), expected);
            assert!(rows[0]["until_success"].as_str().unwrap().starts_with("00:10:"), "{}", rows[0]);
        }
        "Which receivers were the slowest today?" => {
            let by_config: BTreeSet<_> =
                rows.iter().map(|row| (row["config_id"].as_i64(), row["attempts"].as_i64())).collect();
            // lost attempts have no duration
            let attempts =
                [(1, 5), (2, 5), (3, 1), (5, 1)].map(|(config, attempts)| (Some(config), Some(attempts)));
            assert_eq!(by_config, attempts.into());
            for row in rows {
                let [p50, p95, max] = ["p50_ms", "p95_ms", "max_ms"].map(|name| row[name].as_i64().unwrap());
                assert!(0 <= p50 && p50 <= p95 && p95 <= max, "{row}");
            }
        }
        "What went wrong today, by config and kind of error?" => {
            let expected = json!([
                ["refunds", "http_status", 4],
                ["shop", "http_status", 1],
                ["interrupted", "outcome_unknown", 1],
                ["interrupted for good", "outcome_unknown", 1],
            ]);
            assert_eq!(columns(&["name", "error_kind", "attempts"]), expected);
        }
        "Which attempts have an unknown outcome?" => {
            let found: BTreeSet<_> =
                rows.iter().map(|row| (row["queue_id"].as_str().unwrap(), row["attempt"].as_i64())).collect();
            assert_eq!(
                found,
                [(story.outlived.as_str(), Some(0)), (story.died_with_its_worker.as_str(), Some(0))].into()
            );
        }
        "Which chargebacks had no earlier credit?" => {
            assert_eq!(
                columns(&["queue_id", "transaction_id", "value"]),
                json!([[story.lone_chargeback, "txn-77", "5"]])
            );
        }
        "What is waiting now, and for how long?" => {
            let expected = json!([["paused", false, 1, 0, 0, true], ["shop", true, 0, 1, 0, false]]);
            let waits: Vec<_> = rows.iter().map(|row| json!(row["oldest_ready_for"].is_string())).collect();
            let mut found = columns(&["name", "enabled", "ready", "scheduled", "under_way"]);
            for (row, waits) in found.as_array_mut().unwrap().iter_mut().zip(waits) {
                row.as_array_mut().unwrap().push(waits);
            }
            assert_eq!(found, expected);
        }
        "How did the success rate of config 1 change from hour to hour?" => {
            let sum = |name: &str| rows.iter().map(|row| row[name].as_i64().unwrap()).sum::<i64>();
            assert_eq!((sum("completed"), sum("failed")), (4, 0));
            assert!(rows.iter().all(|row| row["success_percent"] == 100.0), "{rows:?}");
        }
        "What was replayed, and what became of it?" => {
            let expected = json!([[story.dead_but_replayed, "failed", story.replay, "completed"]]);
            assert_eq!(columns(&["original", "original_status", "replay", "replay_status"]), expected);
        }
        "Which deliveries went to a URL that their config no longer has?" => {
            let found: BTreeSet<_> = rows.iter().map(|row| row["queue_id"].as_str().unwrap()).collect();
            assert_eq!(
                found,
                [&story.lost_yesterday, &story.dead_but_replayed, &story.replay].map(String::as_str).into()
            );
        }
        "How much was credited and charged back, by config and day?" => {
            let found: Vec<_> = rows
                .iter()
                .map(|row| {
                    ["config_id", "credited", "charged_back", "balance", "without_value"]
                        .map(|name| row[name].to_string())
                })
                .collect();
            let expected = [
                ["1", "100.1", "105.1", "-5.0", "1"],
                ["2", "20", "0", "20", "0"],
                ["3", "7", "0", "7", "0"],
                ["5", "30", "0", "30", "0"],
            ];
            assert_eq!(found, expected);
        }
        "What did the deleted config 3 leave behind?" => {
            let mut found = columns(&["name", "status", "status_reason", "deliveries"]);
            found.as_array_mut().unwrap().sort_by_key(|row| row[1].to_string());
            let expected = json!([
                ["closing", "cancelled", "the config was deleted", 1],
                ["closing", "completed", null, 1]
            ]);
            assert_eq!(found, expected);
        }
        other => panic!("no answer is known to {other:?}"),
    }
}

#[tokio::test]
async fn every_query_of_the_document_finds_what_happened() {
    let questions = Question::all();
    assert!(questions.len() >= 12, "{} queries", questions.len());
    assert_eq!(DOCUMENT.matches("```sql").count(), questions.len());
    let story = Story::tell().await;

    for question in questions {
        let rows = question.ask(&story.service.database).await;
        check_answer(question.heading, &rows, &story);
    }
    story.service.stop().await;
}

#[tokio::test]
async fn a_condition_on_completed_at_leaves_older_archives_unread() {
    let database = TestDatabase::new().await;
    database
        .execute(
            "create table webhook_queue_archive_20000101 partition of webhook_queue (primary key (queue_id))
             for values from ('2000-01-01') to ('2000-01-02')",
        )
        .await;
    for (beginning, prunes) in [
        ("Which dead letters", true),
        ("Which deliveries took more than one", true),
        ("Which credits of yesterday", true),
        ("What is waiting", true),
        ("How did the success rate", true),
        ("How much was credited", true),
        ("What was ever sent", false),
    ] {
        let question =
            Question::all().into_iter().find(|question| question.heading.starts_with(beginning)).unwrap();
        let explain = AssertSqlSafe(format!("explain {}", question.sql));
        let plan: Vec<String> = sqlx::query_scalar(explain).fetch_all(&database.pool).await.unwrap();
        let reads = plan.iter().any(|line| line.contains("webhook_queue_archive_20000101"));
        assert_eq!(reads, !prunes, "{}:\n{}", question.heading, plan.join("\n"));
    }
}

/// An attempt, as both the API and the view show it.
type AttemptFacts =
    (i64, DateTime<Utc>, Option<DateTime<Utc>>, Option<i64>, Option<i64>, Option<String>, Option<String>);

fn attempt_facts(attempt: &Value) -> AttemptFacts {
    let time = |name: &str| attempt[name].as_str().map(|text| text.parse::<DateTime<Utc>>().unwrap());
    let text = |name: &str| attempt[name].as_str().map(str::to_owned);
    (
        attempt["attempt"].as_i64().unwrap(),
        time("started_at").unwrap(),
        time("completed_at"),
        attempt["duration_ms"].as_i64(),
        attempt["http_status"].as_i64(),
        text("response_body"),
        text("error"),
    )
}

#[tokio::test]
async fn the_views_show_what_the_api_shows() {
    let story = Story::tell().await;
    let (api, database) = (&story.service.api, &story.service.database);

    let deliveries = api.get("/webhooks?limit=200").await.json()["items"].as_array().unwrap().clone();
    let count: i64 = database.scalar("select count(*) from webhook_queue").await;
    assert_eq!(i64::try_from(deliveries.len()).unwrap(), count);
    let mut attempts = 0;
    for delivery in &deliveries {
        let shown: Vec<_> = delivery["attempts"].as_array().unwrap().iter().map(attempt_facts).collect();
        attempts += shown.len();
        let viewed: Vec<AttemptFacts> = sqlx::query_as(
            "select attempt::bigint, started_at, completed_at, duration_ms::bigint, http_status::bigint, response_body, error
             from webhook_attempts where queue_id = $1 order by attempt",
        )
        .bind(delivery["queue_id"].as_str().unwrap().parse::<Uuid>().unwrap())
        .fetch_all(&database.pool)
        .await
        .unwrap();
        assert_eq!(viewed, shown, "{delivery}");
    }
    let viewed: i64 = database.scalar("select count(*) from webhook_attempts").await;
    assert_eq!(viewed, i64::try_from(attempts).unwrap());

    let failed =
        api.get("/webhooks?status=failed&limit=200").await.json()["items"].as_array().unwrap().clone();
    let mut failed: Vec<Value> = failed
        .iter()
        .map(|delivery| {
            let last = delivery["attempts"].as_array().unwrap().last().unwrap();
            json!([
                delivery["queue_id"],
                delivery["config_id"],
                delivery["event_id"],
                delivery["webhook_url"],
                delivery["url_params"],
                delivery["retry_count"],
                delivery["status_reason"],
                last["http_status"],
                last["error"],
            ])
        })
        .collect();
    failed.sort_by_key(Value::to_string);
    let dead: Value = database.scalar(
        "select json_agg(json_build_array(queue_id, config_id, event_id, webhook_url, url_params,
                                          retry_count, status_reason, last_http_status, last_error) order by queue_id)
         from webhook_dead_letters",
    ).await;
    assert_eq!(dead.as_array().unwrap(), &failed);
    assert_eq!(failed.len(), 3);
    story.service.stop().await;
}

#[tokio::test]
async fn every_column_has_a_comment() {
    let database = TestDatabase::new().await;
    let without_comment: Vec<String> = sqlx::query_scalar(
        r"select format('column %s.%s', c.relname, a.attname)
          from pg_class c
          join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
          where c.relname like 'webhook\_%' and c.relkind in ('r', 'p') and not c.relispartition
            and col_description(c.oid, a.attnum) is null
          union all
          select format('relation %s', c.relname)
          from pg_class c
          where c.relname like 'webhook\_%' and c.relkind in ('r', 'p', 'v') and obj_description(c.oid, 'pg_class') is null
          union all
          select format('function %s', p.proname)
          from pg_proc p
          where p.proname like 'webhook\_%' and obj_description(p.oid, 'pg_proc') is null
          order by 1",
    )
    .fetch_all(&database.pool)
    .await
    .unwrap();
    assert_eq!(without_comment, [""; 0]);
}

/// An INSERT of a delivery with these columns and values beside those that every delivery needs.
fn delivery(given: &[(&str, &str)]) -> String {
    let needed = [
        ("queue_id", "gen_random_uuid()"),
        ("event_type", "'+credit'"),
        ("event_id", "'e'"),
        ("config_id", "1"),
        ("webhook_url", "'http://receiver.example/'"),
        ("priority", "2"),
        ("max_retries", "6"),
    ];
    let needed = needed.iter().filter(|(name, _)| given.iter().all(|(other, _)| name != other));
    let (names, values): (Vec<_>, Vec<_>) = needed.chain(given).copied().unzip();
    format!("insert into webhook_queue ({}) values ({})", names.join(", "), values.join(", "))
}

#[expect(clippy::too_many_lines, reason = "a table of cases")]
#[tokio::test]
async fn impossible_rows_are_refused() {
    let database = TestDatabase::new().await;
    database
        .execute(
            "insert into webhook_configs (name, postback_url) values ('shop', 'http://receiver.example/')",
        )
        .await;
    let config = |change: &str| format!("update webhook_configs set {change}");
    let key = |values: &str| {
        format!("insert into webhook_api_keys (name, secret_digest, scopes, config_ids) values ({values})")
    };
    let ended = ("completed_at", "now()");
    let not_ready = ("ready_since", "null");
    let attempted = ("retry_0_started_at", "now()");
    let worker = ("worker_id", "'w'");
    let locked = ("locked_at", "now()");
    let expires = ("lock_expires_at", "now() + interval '1 minute'");

    // so that each refusal below is for the one thing that is wrong
    let possible = [
        delivery(&[]),
        delivery(&[not_ready]),
        delivery(&[("status", "'processing'"), worker, locked, expires]),
        delivery(&[("retry_count", "1"), attempted]),
        delivery(&[("status", "'completed'"), ended, not_ready, attempted]),
        delivery(&[("status", "'failed'"), ("status_reason", "'r'"), ended, not_ready, attempted]),
        delivery(&[("status", "'cancelled'"), ("status_reason", "'r'"), ended, not_ready]),
        config("enabled = false, disabled_reason = 'r', deleted_at = now()"),
        config("enabled = true, disabled_reason = null, deleted_at = null"),
        config("max_in_flight = 1, rate_limit_per_second = 1, circuit_failure_rate = 1"),
        config("circuit_state = 'open', circuit_reason = 'r', circuit_probe_at = now()"),
        config("circuit_state = 'open', circuit_reason = 'r', circuit_probe_at = null"),
        config("circuit_state = 'half_open', circuit_reason = 'r', circuit_probe_at = now()"),
        config("circuit_state = 'closed', circuit_reason = null, circuit_probe_at = null"),
    ];
    for statement in possible {
        sqlx::query(AssertSqlSafe(statement)).execute(&database.pool).await.unwrap();
    }

    let impossible = [
        ("terminal deliveries, and no others, have an end", delivery(&[("status", "'sent'"), not_ready])),
        ("terminal deliveries, and no others, have an end", delivery(&[ended])),
        (
            "terminal deliveries, and no others, have an end",
            delivery(&[("status", "'processing'"), worker, locked, expires, ended]),
        ),
        (
            "terminal deliveries, and no others, have an end",
            delivery(&[("status", "'completed'"), not_ready, attempted]),
        ),
        ("a circuit opens after 1 to 10,000 failures in a row", config("circuit_failures_in_row = 0")),
        ("a processing delivery, and no other, is under a lease", delivery(&[("status", "'processing'")])),
        (
            "a processing delivery, and no other, is under a lease",
            delivery(&[("status", "'processing'"), worker, locked]),
        ),
        (
            "a processing delivery, and no other, is under a lease",
            delivery(&[("status", "'processing'"), worker, locked, ("lock_expires_at", "now()")]),
        ),
        ("a processing delivery, and no other, is under a lease", delivery(&[worker])),
        (
            "a processing delivery, and no other, is under a lease",
            delivery(&[("status", "'completed'"), ended, not_ready, attempted, locked]),
        ),
        (
            "a processing delivery is ready, a terminal one is not",
            delivery(&[("status", "'processing'"), worker, locked, expires, not_ready]),
        ),
        (
            "a processing delivery is ready, a terminal one is not",
            delivery(&[("status", "'completed'"), ended, attempted]),
        ),
        ("retries are counted from 0 to a maximum of at most 6", delivery(&[("max_retries", "7")])),
        ("retries are counted from 0 to a maximum of at most 6", delivery(&[("retry_count", "-1")])),
        (
            "retries are counted from 0 to a maximum of at most 6",
            delivery(&[("max_retries", "0"), ("retry_count", "1"), attempted]),
        ),
        ("priority is from 0, critical, to 3, low", delivery(&[("priority", "4")])),
        ("priority is from 0, critical, to 3, low", delivery(&[("priority", "-1")])),
        ("the attempts made are as many as the retry count says", delivery(&[attempted])),
        ("the attempts made are as many as the retry count says", delivery(&[("retry_count", "1")])),
        (
            "the attempts made are as many as the retry count says",
            delivery(&[("status", "'completed'"), ended, not_ready]),
        ),
        (
            "the attempts made are as many as the retry count says",
            delivery(&[("status", "'cancelled'"), ("status_reason", "'r'"), ended, not_ready, attempted]),
        ),
        (
            "a failed or cancelled delivery, and no other, has a reason",
            delivery(&[("status", "'failed'"), ended, not_ready, attempted]),
        ),
        (
            "a failed or cancelled delivery, and no other, has a reason",
            delivery(&[("status", "'cancelled'"), ended, not_ready]),
        ),
        (
            "a failed or cancelled delivery, and no other, has a reason",
            delivery(&[("status", "'completed'"), ("status_reason", "'r'"), ended, not_ready, attempted]),
        ),
        ("a failed or cancelled delivery, and no other, has a reason", delivery(&[("status_reason", "'r'")])),
        (
            "the open partition holds open deliveries",
            delivery(&[("status", "'completed'"), ("completed_at", "'1999-12-31'"), not_ready, attempted]),
        ),
        ("an endpoint has a name", config("name = ''")),
        ("an endpoint has a postback or a chargeback URL", config("postback_url = null")),
        ("headers are an object", config("headers = '[]'")),
        ("an attempt takes from 1 ms to 5 min", config("timeout_ms = 0")),
        ("an attempt takes from 1 ms to 5 min", config("timeout_ms = 300001")),
        ("there are at most 6 retries", config("max_retries = 7")),
        ("there are at most 6 retries", config("max_retries = -1")),
        ("a retry waits from 1 ms to 1 day", config("retry_base_ms = 0")),
        ("a retry waits from 1 ms to 1 day", config("retry_base_ms = 2, retry_cap_ms = 1")),
        ("a retry waits from 1 ms to 1 day", config("retry_cap_ms = 86400001")),
        ("jitter is a share below 1", config("retry_jitter = 1")),
        ("jitter is a share below 1", config("retry_jitter = -0.1")),
        ("jitter is a share below 1", config("retry_jitter = 'NaN'")),
        ("priority is from 0, critical, to 3, low", config("priority = 4")),
        ("only a disabled endpoint has a reason for it", config("disabled_reason = 'r'")),
        ("a deleted endpoint is disabled", config("deleted_at = now()")),
        ("at most 1 to 10,000 attempts are in flight", config("max_in_flight = 0")),
        ("at most 1 to 10,000 attempts are in flight", config("max_in_flight = 10001")),
        ("a rate is limited to 1 to 100,000 per second", config("rate_limit_per_second = 0")),
        ("a circuit opens at a share of failures", config("circuit_failure_rate = 0")),
        ("a circuit opens at a share of failures", config("circuit_failure_rate = 1.1")),
        ("a circuit looks back 1 s to 1 h", config("circuit_window_ms = 999")),
        ("a circuit needs 1 to 10,000 attempts", config("circuit_attempts_min = 0")),
        ("a circuit cools down for 100 ms to 1 day", config("circuit_cooldown_ms = 99")),
        (
            "a circuit cools down for 100 ms to 1 day",
            config("circuit_cooldown_ms = 200, circuit_cooldown_cap_ms = 100"),
        ),
        ("a circuit is closed, open or half open", config("circuit_state = 'ajar', circuit_reason = 'r'")),
        ("a circuit that is not closed, and no other, has a reason", config("circuit_reason = 'r'")),
        ("a circuit that is not closed, and no other, has a reason", config("circuit_state = 'open'")),
        ("a closed circuit is not probed, a half-open one is", config("circuit_probe_at = now()")),
        (
            "a closed circuit is not probed, a half-open one is",
            config("circuit_state = 'half_open', circuit_reason = 'r'"),
        ),
        (
            "a fact is a final status, a kind of attempt, or a kind of error",
            "insert into webhook_statistics values (0, now(), 'pending', -1, 1, 0)".to_owned(),
        ),
        (
            "webhook_statistics_progress_only_row_check",
            "insert into webhook_statistics_progress values (false, 0, now())".to_owned(),
        ),
        ("a key has a name", key("'', sha256(''), array['read'], null")),
        ("a secret is stored as its SHA-256", key("'n', 's3cret', array['read'], null")),
        ("a key has at least one of the scopes", key("'n', sha256(''), array[]::text[], null")),
        ("a key has at least one of the scopes", key("'n', sha256(''), array['admin'], null")),
        (
            "a bound key names a config, and manages nothing",
            key("'n', sha256(''), array['read'], array[]::bigint[]"),
        ),
        (
            "a bound key names a config, and manages nothing",
            key("'n', sha256(''), array['manage'], array[1]"),
        ),
        (
            "an operator comes by the API, the command line or the console",
            "select webhook_note_action('o', 'mail', null, 'config.change', 'manage', '1', null, null)"
                .to_owned(),
        ),
    ];
    let mut refused = BTreeSet::new();
    for (constraint, statement) in impossible {
        let error = sqlx::query(AssertSqlSafe(statement.clone()))
            .execute(&database.pool)
            .await
            .expect_err(&statement);
        let violated =
            error.as_database_error().unwrap_or_else(|| panic!("{error}")).constraint().map(str::to_owned);
        assert_eq!(violated.as_deref(), Some(constraint), "{statement}");
        refused.insert(constraint.to_owned());
    }
    let all: Vec<String> = sqlx::query_scalar(
        r"select distinct k.conname::text from pg_constraint k join pg_class c on c.oid = k.conrelid
          where k.contype = 'c' and c.relname like 'webhook\_%'",
    )
    .fetch_all(&database.pool)
    .await
    .unwrap();
    assert_eq!(refused, all.into_iter().collect(), "every CHECK has a case");
}
