//! Documents that must stay true: the OpenAPI document, its page, `.env.example`, `--help`, the README's settings.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use webhook_processor::infrastructure::http::openapi;
use webhook_processor::infrastructure::metrics::{METRICS, MetricKind};
use webhook_processor::infrastructure::service::Role;
use webhook_processor::infrastructure::settings::SETTINGS;

use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command, output};
use crate::support::service::TestService;

#[tokio::test]
async fn the_openapi_document_and_its_page_are_served() {
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;
    let served = service.api.get("/openapi.json").await;
    assert_eq!(served.status, 200);
    assert_eq!(served.json(), serde_json::to_value(openapi()).unwrap());
    let page = service.api.get("/docs/").await;
    assert_eq!(page.status, 200);
    assert!(page.headers["content-type"].to_str().unwrap().starts_with("text/html"));
    assert!(page.text.contains("<title>webhook-processor: API</title>"), "{}", page.text);
    for foreign in ["https://", "http://"] {
        assert!(!page.text.contains(foreign), "the page loads something from elsewhere");
    }
    service.stop().await;
}

/// So that a change of the contract is seen in review. `make openapi` regenerates it.
#[test]
fn the_openapi_document_is_committed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
    let current = serde_json::to_string_pretty(&openapi()).unwrap() + "\n";
    if std::env::var_os("WRITE_OPENAPI").is_some() {
        std::fs::write(path, &current).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap();
    assert!(committed == current, "docs/openapi.json is stale: run `make openapi`");
}

/// The business does not know what it runs on: a change of database, framework or clock stays at the edge.
#[test]
fn the_inner_layers_know_nothing_of_the_outer_ones() {
    const OUTSIDE: [&str; 6] = ["sqlx", "axum", "hyper", "reqwest", "crate::infrastructure", "crate::cli"];
    const AMBIENT: [&str; 5] = ["Utc::now", "Instant::now", "SystemTime", "rand::rng", "std::env"];
    for (layer, forbidden) in [
        ("domain", [&OUTSIDE[..], &AMBIENT].concat()),
        ("application", OUTSIDE.to_vec()),
        ("contract", OUTSIDE.to_vec()),
    ] {
        let mut directories =
            vec![std::path::PathBuf::from(format!("{}/src/{layer}", env!("CARGO_MANIFEST_DIR")))];
        let mut paths = Vec::new();
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { directories.push(path) } else { paths.push(path) }
            }
        }
        assert!(paths.len() > 5, "{layer}");
        for path in paths {
            assert!(
                path.extension().is_some_and(|extension| extension == "rs"),
                "{} is not looked into",
                path.display()
            );
            let text = std::fs::read_to_string(&path).unwrap();
            let text = text.split("#[cfg(test)]").next().unwrap();
            for word in &forbidden {
                assert!(!text.contains(word), "{} names {word}", path.display());
            }
        }
    }
}

#[test]
fn the_openapi_document_names_every_route_of_the_contract() {
    let document = serde_json::to_value(openapi()).unwrap();
    let mut routes: Vec<String> = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        routes.extend(
            methods.as_object().unwrap().keys().map(|method| format!("{} {path}", method.to_uppercase())),
        );
    }
    routes.sort();
    let mut expected = [
        "POST /webhooks",
        "GET /webhooks",
        "POST /webhooks/batch",
        "GET /webhooks/stats",
        "GET /webhooks/{queue_id}",
        "POST /webhooks/{queue_id}/retry",
        "POST /webhooks/{queue_id}/cancel",
        "POST /webhooks/{queue_id}/replay",
        "POST /api/webhooks/register",
        "POST /api/webhooks",
        "GET /api/webhooks",
        "GET /api/webhooks/{id}",
        "PATCH /api/webhooks/{id}",
        "DELETE /api/webhooks/{id}",
        "POST /api/webhooks/{id}/probe",
        "GET /api/keys",
        "POST /api/keys",
        "DELETE /api/keys/{id}",
        "GET /health",
        "GET /health/live",
        "GET /health/ready",
        "GET /metrics",
    ];
    expected.sort_unstable();
    assert_eq!(routes, expected);
    // references lead somewhere
    let text = document.to_string();
    for reference in text.split("\"$ref\":\"#").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        assert_ne!(document.pointer(reference), None::<&Value>, "{reference}");
    }
}

#[test]
fn every_operation_has_a_name_of_its_own_and_every_answer_a_description() {
    let document = serde_json::to_value(openapi()).unwrap();
    let mut ids = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let id = operation["operationId"].as_str().unwrap();
            assert!(ids.insert(id.to_owned()), "{id} is not unique");
            for (status, answer) in operation["responses"].as_object().unwrap() {
                let description = answer["description"].as_str().unwrap_or_default();
                assert!(!description.is_empty(), "{method} {path} {status} has no description");
            }
        }
    }
}

/// The example of a schema: its own, or those of its properties put together.
fn example(document: &Value, schema: &Value) -> Option<Value> {
    if let Some(reference) = schema["$ref"].as_str() {
        return example(document, document.pointer(reference.trim_start_matches('#')).unwrap());
    }
    if let Some(example) = schema["examples"].get(0).or(schema.get("example")) {
        return Some(example.clone());
    }
    let properties = schema["properties"].as_object()?;
    let examples = properties
        .iter()
        .filter_map(|(name, property)| example(document, property).map(|example| (name.clone(), example)));
    Some(examples.collect())
}

#[tokio::test]
async fn the_examples_of_bodies_are_accepted_as_they_stand() {
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;
    let document = serde_json::to_value(openapi()).unwrap();
    let body = |method: &str, path: &str| {
        let schema = &document["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"];
        example(&document, schema).unwrap()
    };

    for path in ["/api/webhooks/register", "/api/webhooks"] {
        let registered = service.api.post(path, body("post", path)).await;
        assert_eq!(registered.status, 201, "{}", registered.text);
    }
    let changed = service.api.patch("/api/webhooks/1", body("patch", "/api/webhooks/{id}")).await;
    assert_eq!(changed.status, 200, "{}", changed.text);
    let accepted = service.api.post("/webhooks", body("post", "/webhooks")).await;
    assert_eq!(accepted.status, 201, "{}", accepted.text);
    service.stop().await;
}

#[tokio::test]
async fn the_defaults_of_the_document_are_those_of_a_new_config() {
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;
    let document = serde_json::to_value(openapi()).unwrap();
    let id = service.api.register("http://127.0.0.1:1", json!({})).await;
    let config = service.api.get(&format!("/api/webhooks/{id}")).await.json();
    for (schema, values) in [("ConfigBody", &config), ("CircuitBody", &config["circuit"])] {
        for (name, property) in document["components"]["schemas"][schema]["properties"].as_object().unwrap() {
            if let Some(default) = property.get("default") {
                assert_eq!(values[name].as_f64(), default.as_f64(), "{schema}.{name}");
            }
        }
    }
    service.stop().await;
}

#[test]
fn every_metric_that_the_program_records_is_described() {
    let described: BTreeSet<&str> = METRICS.iter().map(|metric| metric.name).collect();
    assert_eq!(described.len(), METRICS.len(), "a metric is described twice");
    let mut recorded = BTreeSet::new();
    let mut folders = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let source = std::fs::read_to_string(&path).unwrap();
            for kind in ["counter!(", "gauge!(", "histogram!("] {
                for call in source.split(kind).skip(1) {
                    if let Some(name) = call.trim_start().strip_prefix('"') {
                        recorded.insert(name.split('"').next().unwrap().to_owned());
                    }
                }
            }
        }
    }
    assert_eq!(recorded.iter().map(String::as_str).collect::<BTreeSet<_>>(), described);
}

#[tokio::test]
async fn metrics_whose_labels_are_known_are_there_from_the_start() {
    let process = Process::start(command(&TestDatabase::new().await, &["serve"]));
    let metrics = process.api().get("/metrics").await.text;
    for metric in METRICS.iter().filter(|metric| !metric.at_start.is_empty()) {
        assert!(metrics.contains(&format!("# HELP {} ", metric.name)), "{}", metric.name);
        for labels in metric.at_start {
            let series = match metric.kind {
                MetricKind::Histogram => format!("{}_count", metric.name),
                MetricKind::Counter | MetricKind::Gauge => metric.name.to_owned(),
            };
            let found = metrics.lines().any(|line| {
                line.starts_with(&series)
                    && labels.iter().all(|(name, value)| line.contains(&format!("{name}=\"{value}\"")))
            });
            assert!(found, "{series} {labels:?} is missing in\n{metrics}");
        }
    }
}

#[test]
fn the_example_of_settings_lists_them_all_with_their_defaults() {
    let example = include_str!("../../.env.example");
    let mut listed = BTreeMap::new();
    for line in example.lines() {
        let line = line.strip_prefix('#').unwrap_or(line);
        if let Some((name, value)) = line.split_once('=')
            && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
        {
            listed.insert(name, value);
        }
    }
    for setting in &SETTINGS {
        assert_eq!(listed.remove(setting.name), Some(setting.default), "{}", setting.name);
        assert!(example.contains(setting.meaning), "the meaning of {}", setting.name);
    }
    listed.remove("POSTGRES_PASSWORD");
    assert!(listed.is_empty(), "no such settings: {listed:?}");
}

#[tokio::test]
async fn help_and_the_readme_list_every_setting() {
    let help = output(command(&TestDatabase::empty().await, &["--help"]));
    let help = String::from_utf8(help.stdout).unwrap();
    let readme = include_str!("../../README.md");
    for setting in &SETTINGS {
        assert!(help.contains(setting.name), "{}", setting.name);
        assert!(readme.contains(&format!("`{}`", setting.name)), "{}", setting.name);
    }
    for command in
        ["serve", "api", "worker", "migrate", "enqueue", "stats", "show", "replay", "configs", "receiver"]
    {
        assert!(help.contains(&format!("  {command} ")), "{command}");
    }
}
