//! A database that may forget what it has acknowledged: the program says so, at start and in its health, and stays ready.

use sqlx::{ConnectOptions as _, Connection as _};
use webhook_processor::infrastructure::embedded_postgres::{EmbeddedOptions, EmbeddedPostgres};

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command};
use crate::support::service::ApiClient;

/// The check `durability`, once its status is this, and its detail.
async fn durability_is(api: &ApiClient, status: &str) -> String {
    eventually(&format!("durability is {status}"), async || {
        let health = api.get("/health").await;
        assert_eq!((health.status, health.json()["status"].as_str()), (200, Some("ok")), "{}", health.text);
        let checks = health.json()["checks"].as_array().unwrap().clone();
        let check = checks.iter().find(|check| check["name"] == "durability").unwrap().clone();
        (check["status"] == status).then(|| check["detail"].as_str().unwrap().to_owned())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_may_forget_is_a_warning_at_start_and_in_health_until_it_no_longer_does() {
    let directory = std::env::temp_dir().join(format!("webhook-processor-forgets-{}", std::process::id()));
    let options = EmbeddedOptions { directory, durable: true, binaries: None };
    let server = EmbeddedPostgres::start(&options).await.unwrap();
    let mut connection = server.connect_options().connect().await.unwrap();
    let database = TestDatabase::new().await;
    let serve = || {
        let mut serve = command(&database, &["serve"]);
        serve.env("DATABASE_URL", server.connect_options().to_url_lossy().to_string());
        Process::start(serve)
    };

    let durable = serve();
    durability_is(&durable.api(), "ok").await;
    assert!(!durable.log().contains("does not keep"), "{}", durable.log());

    for setting in ["fsync", "full_page_writes", "synchronous_commit"] {
        let off = format!("alter system set {setting} = off");
        sqlx::raw_sql(sqlx::AssertSqlSafe(off)).execute(&mut connection).await.unwrap();
        sqlx::raw_sql("select pg_reload_conf()").execute(&mut connection).await.unwrap();
        let detail = durability_is(&durable.api(), "warning").await;
        assert!(
            detail.contains(&format!("{setting} is off")) && detail.matches(" is off:").count() == 1,
            "{detail}"
        );
        let started_now = serve();
        let said = format!("the database does not keep all that it acknowledges: {setting} is off");
        assert_eq!(started_now.log().matches(&said).count(), 1, "{}", started_now.log());
        drop(started_now);
        sqlx::raw_sql("alter system reset all").execute(&mut connection).await.unwrap();
        sqlx::raw_sql("select pg_reload_conf()").execute(&mut connection).await.unwrap();
        durability_is(&durable.api(), "ok").await;
    }

    connection.close().await.unwrap();
    drop(durable);
    server.stop().await.unwrap();
    let _ = std::fs::remove_dir_all(&options.directory);
}
