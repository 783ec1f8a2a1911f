//! API keys as JSON.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::domain::access::{ApiKey, NewKey, Scope, Token};
use crate::domain::endpoint::EndpointId;
use crate::domain::invalid::{Faults, Invalid};

/// A key to be made.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewKeyBody {
    /// For people.
    #[schema(
        example = "shop",
        min_length = 1,
        max_length = 200,
        pattern = r"^[^\u0000-\u001f\u007f-\u009f]*$"
    )]
    name: Option<String>,
    /// What it may be used for: `enqueue`, `read`, `operate`, `manage`.
    #[schema(value_type = Vec<String>, example = json!(["enqueue", "read"]), min_items = 1)]
    scopes: Option<Vec<String>>,
    /// The only configs that it reaches; left out or `null`: all. A key that is bound to configs cannot have `manage`.
    #[schema(min_items = 1, max_items = 1000)]
    config_ids: Option<Vec<i64>>,
}

impl TryFrom<NewKeyBody> for NewKey {
    type Error = Invalid;

    fn try_from(body: NewKeyBody) -> Result<Self, Invalid> {
        let mut faults = Faults::default();
        if body.name.is_none() {
            faults.push("name", "must be given");
        }
        if body.scopes.is_none() {
            faults.push("scopes", "must be given");
        }
        faults.into_result()?;
        Self::parse(
            body.name.unwrap_or_default(),
            &body.scopes.unwrap_or_default(),
            body.config_ids.as_deref(),
        )
    }
}

/// A key, without its text.
#[derive(Debug, Serialize, ToSchema)]
pub struct KeyView {
    /// Names it.
    id: i64,
    /// For people.
    name: String,
    /// What it may be used for.
    scopes: Vec<&'static str>,
    /// The only configs that it reaches; `null`: all.
    config_ids: Option<Vec<i64>>,
    /// When it was made.
    created_at: DateTime<Utc>,
    /// When it was last used, to within a minute; `null`: never.
    last_used_at: Option<DateTime<Utc>>,
    /// When it was revoked; `null`: it is valid.
    revoked_at: Option<DateTime<Utc>>,
}

impl From<ApiKey> for KeyView {
    fn from(key: ApiKey) -> Self {
        Self {
            id: key.id.get(),
            name: key.name,
            scopes: key.scopes.iter().map(Scope::as_str).collect(),
            config_ids: key.config_ids.map(|ids| ids.into_iter().map(EndpointId::get).collect()),
            created_at: key.created_at,
            last_used_at: key.last_used_at,
            revoked_at: key.revoked_at,
        }
    }
}

/// A new key with its text, which is shown this once.
#[derive(Serialize, ToSchema)]
pub struct CreatedKeyView {
    #[serde(flatten)]
    key: KeyView,
    /// What its holder sends as `Authorization: Bearer`. It is not stored and cannot be shown again.
    #[schema(example = "whk_1_5f2c…")]
    token: String,
}

impl CreatedKeyView {
    /// The key that was just made.
    pub fn new(key: ApiKey, token: &Token) -> Self {
        Self { key: key.into(), token: token.text() }
    }
}
