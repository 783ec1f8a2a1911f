//! Documents that must stay true: the OpenAPI document, its page, `.env.example`, `--help`, the README's settings.

use std::collections::BTreeMap;

use serde_json::Value;
use webhook_processor::infrastructure::http::openapi;
use webhook_processor::infrastructure::service::Role;
use webhook_processor::infrastructure::settings::SETTINGS;

use crate::support::postgres::TestDatabase;
use crate::support::process::{command, output};
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
    for foreign in ["https://", "http://"] {
        assert!(!page.text.contains(foreign), "the page loads something from elsewhere");
    }
    service.stop().await;
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
async fn help_and_the_readme_tell_of_every_setting() {
    let help = output(command(&TestDatabase::empty().await, &["--help"]));
    let help = String::from_utf8(help.stdout).unwrap();
    let readme = include_str!("../../README.md");
    for setting in &SETTINGS {
        assert!(help.contains(setting.name), "{}", setting.name);
        assert!(readme.contains(&format!("`{}`", setting.name)), "{}", setting.name);
    }
    for command in [
        "serve", "api", "worker", "migrate", "enqueue", "stats", "show", "replay", "configs", "receiver",
        "bench",
    ] {
        assert!(help.contains(&format!("  {command} ")), "{command}");
    }
}
