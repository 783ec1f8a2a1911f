//! Who may do what: keys, scopes, bindings, and the record of what operators change.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};
use webhook_processor::domain::access::Action;
use webhook_processor::infrastructure::http::openapi;
use webhook_processor::infrastructure::service::Role;

use crate::support::postgres::TestDatabase;
use crate::support::process::{command, output};
use crate::support::receiver::{Reply, TestReceiver};
use crate::support::service::{Answer, ApiClient, TestService};

/// Makes a key by the command line.
fn key(database: &TestDatabase, args: &[&str]) -> String {
    let made = output(command(database, &[&["keys", "create", "--name", "test"], args].concat()));
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let text = String::from_utf8(made.stdout).unwrap();
    assert!(text.starts_with("whk_") && text.trim().lines().count() == 1, "only the key is printed");
    text.trim().to_owned()
}

/// A service that asks for keys, and a client with all scopes.
async fn guarded() -> (TestService, ApiClient) {
    let database = TestDatabase::new().await;
    let all = key(&database, &["--scope", "enqueue,read,operate,manage"]);
    let service = TestService::start_with(Role::Serve, database, &[("AUTH", "keys")]).await;
    let client = service.api.with_key(&all);
    (service, client)
}

/// The routes of the API with the scope that each needs, as the OpenAPI document names them; `None`: open to everyone.
fn routes() -> Vec<(Method, String, Option<String>)> {
    let document = serde_json::to_value(openapi()).unwrap();
    let mut routes = Vec::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let scope = operation["security"][0]["api_key"][0].as_str().map(str::to_owned);
            routes.push((method.to_uppercase().parse().unwrap(), path.clone(), scope));
        }
    }
    routes
}

/// Calls a route with plausible parameters.
async fn call(api: &ApiClient, method: &Method, path: &str, config_id: i64, queue_id: &str) -> Answer {
    let path_of_a_key = path.starts_with("/api/keys");
    let id = if path_of_a_key { "999999".to_owned() } else { config_id.to_string() };
    let concrete = path.replace("{queue_id}", queue_id).replace("{id}", &id);
    let mut request = api.request(method.clone(), &concrete);
    let event = json!({"event_type": "+credit", "config_id": config_id});
    let body = match (method.as_str(), path) {
        ("POST", "/webhooks") => Some(event),
        ("POST", "/webhooks/batch") => Some(json!([event])),
        ("POST", "/api/keys") => Some(json!({"name": "more", "scopes": ["manage"]})),
        ("POST", "/api/webhooks" | "/api/webhooks/register") => {
            Some(json!({"name": "more", "postback_url": "http://127.0.0.1:1/"}))
        }
        ("PATCH", _) => Some(json!({"name": "changed"})),
        _ => None,
    };
    if let Some(body) = body {
        request = request.json(&body);
    }
    api.send(request).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_but_health_needs_a_key_with_its_scope() {
    let (service, admin) = guarded().await;
    let receiver = TestReceiver::start().await;
    let config_id = admin.register(&receiver.url, json!({"enabled": false})).await;
    let queue_id = admin.credit(config_id).await;
    let keys: Vec<(&str, ApiClient)> = ["enqueue", "read", "operate", "manage"]
        .map(|scope| (scope, service.api.with_key(&key(&service.database, &["--scope", scope]))))
        .into();
    let mut open = BTreeSet::new();
    let mut scopes = BTreeSet::new();
    // what ends something comes last
    let mut routes = routes();
    routes.sort_by_key(|(method, path, _)| (*method == Method::DELETE, path.contains("cancel")));
    for (method, path, scope) in routes {
        let without = call(&service.api, &method, &path, config_id, &queue_id).await;
        let Some(scope) = scope else {
            assert!(without.status != 401 && without.status != 403, "{method} {path}: {}", without.status);
            open.insert(path);
            continue;
        };
        assert_eq!(without.status, 401, "{method} {path}: {}", without.text);
        let challenge = without.headers["www-authenticate"].to_str().unwrap();
        assert!(challenge.starts_with("Bearer "), "{challenge}");
        for (held, client) in &keys {
            let answer = call(client, &method, &path, config_id, &queue_id).await;
            if *held == scope {
                assert!(
                    answer.status != 401 && answer.status != 403,
                    "{method} {path} with {held}: {}",
                    answer.text
                );
            } else {
                assert_eq!(answer.status, 403, "{method} {path} with {held}: {}", answer.text);
                assert!(answer.text.contains(&scope), "{}", answer.text);
            }
        }
        scopes.insert(scope);
    }
    assert_eq!(open, ["/health", "/health/live", "/health/ready"].map(str::to_owned).into());
    assert_eq!(scopes.len(), 4, "{scopes:?}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_bound_to_a_config_reaches_no_other() {
    let (service, admin) = guarded().await;
    let receiver = TestReceiver::start().await;
    receiver.reply_always(Reply::status(500));
    let (own, other) = (
        admin.register(&receiver.url, json!({"enabled": false})).await,
        admin.register(&receiver.url, json!({"enabled": false})).await,
    );
    let (mine, theirs) = (admin.credit(own).await, admin.credit(other).await);
    let bound = ["--scope", "enqueue,read,operate", "--config", &own.to_string()];
    let bound = service.api.with_key(&key(&service.database, &bound));
    for (method, path, scope) in routes() {
        // metrics are those of the process; managing is not for bound keys
        if scope.is_none() || scope.as_deref() == Some("manage") || path == "/metrics" {
            continue;
        }
        let answer = call(&bound, &method, &path, other, &theirs).await;
        match path.as_str() {
            "/webhooks/batch" => {
                let results = answer.json();
                assert_eq!(results["results"][0]["error"]["status"], 403, "{results}");
            }
            "/webhooks" if method == Method::POST => assert_eq!(answer.status, 403, "{}", answer.text),
            "/webhooks" => {
                let items = answer.json()["items"].as_array().unwrap().clone();
                assert_eq!(items.len(), 1, "{items:?}");
                assert_eq!(items[0]["queue_id"], mine.as_str());
                assert_eq!(bound.get(&format!("/webhooks?config_id={other}")).await.status, 403);
            }
            "/webhooks/stats" => {
                assert_eq!(answer.json()["pending"], 1, "{}", answer.text);
                assert_eq!(bound.get(&format!("/webhooks/stats?config_id={other}")).await.status, 403);
            }
            "/api/webhooks" => {
                let items = answer.json()["items"].as_array().unwrap().clone();
                assert_eq!(items.iter().map(|item| item["id"].as_i64().unwrap()).collect::<Vec<_>>(), [own]);
            }
            _ => assert_eq!(answer.status, 404, "{method} {path}: {}", answer.text),
        }
    }
    for (path, status) in [(format!("/webhooks/{mine}"), 200), (format!("/api/webhooks/{own}"), 200)] {
        assert_eq!(bound.get(&path).await.status, status, "{path}");
    }
    assert_eq!(bound.credit(own).await.len(), 36);
    let wrong =
        service.api.with_key(&key(&service.database, &["--scope", "read", "--config", "1", "--config", "2"]));
    assert_eq!(
        wrong.get("/webhooks/stats").await.fields(),
        ["config_id"],
        "bound to several, it must say which"
    );
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_shown_once_and_refused_once_it_is_revoked() {
    let (service, admin) = guarded().await;
    let made = admin.post("/api/keys", json!({"name": "shop", "scopes": ["read"]})).await;
    assert_eq!(made.status, 201, "{}", made.text);
    assert_eq!(made.headers["cache-control"], "no-store");
    let (id, token) = (made.json()["id"].clone(), made.json()["token"].as_str().unwrap().to_owned());
    let shop = service.api.with_key(&token);
    assert_eq!(shop.get("/webhooks").await.status, 200);
    let listed = admin.get("/api/keys").await;
    assert!(!listed.text.contains(&token[6..]), "the list shows no secrets");
    let shown =
        listed.json()["items"].as_array().unwrap().iter().find(|key| key["id"] == id).unwrap().clone();
    assert!(shown["last_used_at"].is_string() && shown["revoked_at"].is_null(), "{shown}");

    assert_eq!(admin.delete(&format!("/api/keys/{id}")).await.status, 204);
    assert_eq!(shop.get("/webhooks").await.status, 401);
    assert_eq!(admin.delete(&format!("/api/keys/{id}")).await.status, 404);
    // what is stored does not allow anyone to use it
    let secret = token.rsplit('_').next().unwrap();
    let dump = service
        .database
        .scalar::<String>(
            "select string_agg(k::text || encode(secret_digest, 'hex'), '') || coalesce((select string_agg(a::text, '') from webhook_operator_actions a), '') from webhook_api_keys k",
        )
        .await;
    assert!(!dump.contains(secret));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_makes_none_that_may_do_more_and_wrong_ones_are_refused_by_field() {
    let (service, admin) = guarded().await;
    let manager = service.api.with_key(&key(&service.database, &["--scope", "manage"]));
    let refused = manager.post("/api/keys", json!({"name": "more", "scopes": ["manage", "operate"]})).await;
    assert_eq!((refused.status, refused.fields()), (403, vec!["scopes".to_owned()]), "{}", refused.text);
    for (body, fields) in [
        (json!({}), vec!["name", "scopes"]),
        (json!({"name": "", "scopes": ["root"], "config_ids": [0]}), vec!["name", "scopes", "config_ids"]),
        (json!({"name": "x", "scopes": ["manage"], "config_ids": [1]}), vec!["scopes"]),
    ] {
        let refused = admin.post("/api/keys", body).await;
        assert_eq!(
            (refused.status, refused.fields()),
            (422, fields.iter().map(|f| (*f).to_owned()).collect()),
            "{}",
            refused.text
        );
    }
    let wrong = output(command(&service.database, &["keys", "create", "--name", "x", "--scope", "root"]));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("enqueue, read, operate or manage"));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_keys_are_limited_per_address_and_a_right_one_still_counts() {
    let (service, admin) = guarded().await;
    let stranger = service.api.with_key(&format!("whk_1_{}", "0".repeat(64)));
    let mut limited = None;
    for _ in 0..100 {
        let answer = stranger.get("/webhooks").await;
        if answer.status == 429 {
            limited = Some(answer);
            break;
        }
        assert_eq!(answer.status, 401, "{}", answer.text);
    }
    let limited = limited.expect("an address has 20 tries");
    assert!(limited.headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(admin.get("/webhooks").await.status, 200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_a_service_that_asks_for_keys_does_not_start() {
    let database = TestDatabase::new().await;
    let mut serve = command(&database, &["api"]);
    serve.env("LISTEN_ADDR", "0.0.0.0:0");
    let refused = output(serve);
    let log = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success());
    assert!(
        log.contains("LISTEN_ADDR: ") && log.contains("keys create") && log.contains("AUTH=none"),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_keys_only_requests_meant_for_this_machine_are_answered() {
    let service = TestService::start().await;
    let ask = async |name: &'static str, value: &'static str| {
        service.api.send(service.api.request(Method::GET, "/webhooks").header(name, value)).await.status
    };
    assert_eq!(service.api.get("/webhooks").await.status, 200);
    assert_eq!(ask("host", "localhost:8080").await, 200);
    assert_eq!(ask("host", "rebound.example").await, 403, "a name that was made to lead here");
    assert_eq!(ask("origin", "https://elsewhere.example").await, 403, "a page of another site");
    assert_eq!(ask("authorization", "Bearer whk_1_nonsense").await, 401, "a key that is presented counts");
    service.stop().await;

    let open = TestService::start_with(Role::Serve, TestDatabase::new().await, &[("AUTH", "none")]).await;
    let request = open.api.request(Method::GET, "/webhooks").header("host", "hooks.example");
    assert_eq!(open.api.send(request).await.status, 200);
    open.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_docs_have_settings_of_their_own() {
    let (service, admin) = guarded().await;
    assert_eq!(service.api.get("/metrics").await.status, 401);
    assert_eq!(admin.get("/metrics").await.status, 200);
    assert_eq!(service.api.get("/openapi.json").await.status, 200);
    let settings = [("AUTH", "keys"), ("METRICS_AUTH", "none"), ("DOCS", "off")];
    let database = service.database.clone();
    service.stop().await;
    let service = TestService::start_with(Role::Serve, database, &settings).await;
    assert_eq!(service.api.get("/metrics").await.status, 200);
    assert_eq!(service.api.get("/openapi.json").await.status, 404);
    assert_eq!(service.api.get("/docs").await.status, 404);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_operators_change_is_recorded_with_who_and_why_and_without_secrets() {
    let (service, admin) = guarded().await;
    let receiver = TestReceiver::start().await;
    receiver.reply_always(Reply::status(500));
    let because = |request: reqwest::RequestBuilder| request.header("x-operator-reason", "ticket 7");
    let post = async |path: String, body: Value| {
        admin.send(because(admin.request(Method::POST, &path).json(&body))).await
    };
    let config = post(
        "/api/webhooks".into(),
        json!({"name": "partner", "postback_url": receiver.url, "headers": {"authorization": "s3cret"},
               "max_retries": 0, "circuit": {"failures_in_row": 1, "attempts_min": 1000, "cooldown_ms": 300_000}}),
    )
    .await;
    assert_eq!(config.status, 201, "{}", config.text);
    let config_id = config.json()["id"].as_i64().unwrap();
    let scheduled = async || {
        let answer = admin.post("/webhooks", json!({"event_type": "+credit", "config_id": config_id, "scheduled_at": (chrono::Utc::now() + chrono::TimeDelta::days(2)).to_rfc3339()})).await;
        assert_eq!(answer.status, 201, "{}", answer.text);
        answer.json()["queue_id"].as_str().unwrap().to_owned()
    };
    let (first, second) = (scheduled().await, scheduled().await);
    assert_eq!(post(format!("/webhooks/{first}/cancel"), json!({})).await.status, 200);
    assert_eq!(post(format!("/webhooks/{first}/replay"), json!({})).await.status, 201);
    assert_eq!(
        post(format!("/webhooks/{first}/cancel"), json!({})).await.status,
        409,
        "a refusal changes nothing"
    );
    assert_eq!(post(format!("/webhooks/{second}/retry"), json!({})).await.status, 200);
    crate::support::eventually("the circuit opens", async || {
        let config = admin.get(&format!("/api/webhooks/{config_id}")).await.json();
        (config["circuit"]["state"] == "open").then_some(())
    })
    .await;
    assert_eq!(post(format!("/api/webhooks/{config_id}/probe"), json!({})).await.status, 200);
    let change =
        admin.request(Method::PATCH, &format!("/api/webhooks/{config_id}")).json(&json!({"name": "other"}));
    assert_eq!(admin.send(because(change)).await.status, 200);
    let made = post("/api/keys".into(), json!({"name": "shop", "scopes": ["read"]})).await;
    let revoke = admin.request(Method::DELETE, &format!("/api/keys/{}", made.json()["id"]));
    assert_eq!(admin.send(because(revoke)).await.status, 204);
    let delete = admin.request(Method::DELETE, &format!("/api/webhooks/{config_id}"));
    assert_eq!(admin.send(because(delete)).await.status, 204);

    let recorded = service
        .database
        .scalar::<Value>(
            "select jsonb_agg(to_jsonb(a) order by id) from webhook_operator_actions a where reason = 'ticket 7'",
        )
        .await;
    let recorded = recorded.as_array().unwrap();
    let actions: BTreeSet<&str> = recorded.iter().map(|action| action["action"].as_str().unwrap()).collect();
    assert_eq!(actions, Action::ALL.map(Action::as_str).into(), "each action that there is");
    assert_eq!(recorded.len(), Action::ALL.len(), "{recorded:?}");
    for action in recorded {
        assert_eq!(
            (&action["operator"], &action["way"]),
            (&json!("key 1 (test)"), &json!("api")),
            "{action}"
        );
        assert!(!action.to_string().contains("s3cret"), "{action}");
    }
    let of = |name: &str| recorded.iter().find(|action| action["action"] == name).unwrap();
    assert_eq!(of("config.change")["before"]["name"], "partner");
    assert_eq!(of("config.change")["after"]["name"], "other");
    assert_eq!(of("config.register")["after"]["headers"], json!({"authorization": "(not shown)"}));
    assert_eq!(of("delivery.cancel")["subject"], first.as_str());
    assert_eq!(of("delivery.replay")["subject"], first.as_str());

    // the command line is recorded, too
    let change = [
        "--reason",
        "by hand",
        "configs",
        "register",
        "--name",
        "cli",
        "--postback-url",
        "http://127.0.0.1:1/",
    ];
    assert!(output(command(&service.database, &change)).status.success());
    let by_hand = service
        .database
        .scalar::<Value>("select to_jsonb(a) from webhook_operator_actions a where reason = 'by hand'")
        .await;
    assert_eq!((&by_hand["action"], &by_hand["way"]), (&json!("config.register"), &json!("cli")));
    assert!(by_hand["operator"].as_str().unwrap().contains('@'), "{by_hand}");
    service.stop().await;
}

#[test]
fn the_table_of_routes_and_scopes_is_true() {
    let text = include_str!("../../docs/access.md");
    let mut listed = BTreeSet::new();
    for line in text.lines().filter(|line| line.starts_with("| `") && line.contains(" /")) {
        let mut cells = line.trim_matches('|').split('|').map(str::trim);
        let scope = cells.next().unwrap().trim_matches('`').to_owned();
        for route in cells.next().unwrap().split(" · ") {
            listed.insert((route.trim_matches('`').to_owned(), scope.clone()));
        }
    }
    let routes =
        routes().into_iter().filter_map(|(method, path, scope)| Some((format!("{method} {path}"), scope?)));
    assert_eq!(listed, routes.collect());
}
