//! `webhook-processor keys`: the same as `/api/keys`.

use clap::Subcommand;

use super::output::{plain, print_json, say, table};
use crate::contract::keys::{CreatedKeyView, KeyView};
use crate::domain::access::{KeyId, NewKey, Operator, Secret};
use crate::infrastructure::service::Application;

#[derive(Subcommand)]
pub enum KeysCommand {
    /// Make a key. Its text is printed once and cannot be shown again.
    Create {
        /// For people: who holds it.
        #[arg(long)]
        name: String,
        /// What it may be used for: enqueue, read, operate, manage. May be repeated, or separated by commas.
        #[arg(long = "scope", value_name = "SCOPE", required = true, value_delimiter = ',')]
        scopes: Vec<String>,
        /// A config that it reaches; may be repeated. Without any, it reaches all.
        #[arg(long = "config", value_name = "ID")]
        config_ids: Vec<i64>,
    },
    /// List all keys, including revoked ones.
    List,
    /// Revoke a key. Running processes refuse it within a second.
    Revoke {
        /// Its id: the first number in its text.
        id: KeyId,
    },
}

pub async fn run(
    command: KeysCommand,
    application: &Application,
    by: &Operator,
    json: bool,
) -> anyhow::Result<()> {
    let access = &application.api.access;
    match command {
        KeysCommand::Create { name, scopes, config_ids } => {
            let config_ids = (!config_ids.is_empty()).then_some(&config_ids[..]);
            let key = NewKey::parse(name, &scopes, config_ids)?;
            let secret = Secret::draw(&mut rand::rng());
            let (key, token) = access.create(key, secret, by).await?;
            if json {
                print_json(&CreatedKeyView::new(key, &token))
            } else {
                // alone on standard output, so that a script can keep it
                eprintln!("key {} is made; this is its text, which cannot be shown again:", key.id);
                say(token.text())
            }
        }
        KeysCommand::List => {
            let views: Vec<KeyView> = access.list().await?.into_iter().map(KeyView::from).collect();
            if json {
                return print_json(&views);
            }
            let columns = ["id", "name", "scopes", "config_ids", "created_at", "last_used_at", "revoked_at"];
            let mut rows = table(&columns);
            for view in &views {
                let view = serde_json::to_value(view)?;
                rows.add_row(columns.map(|column| plain(&view[column])));
            }
            say(rows)
        }
        KeysCommand::Revoke { id } => {
            access.revoke(id, by).await?;
            if json {
                return print_json(&serde_json::json!({"revoked": id.get()}));
            }
            say(format!("key {id} is revoked"))
        }
    }
}
