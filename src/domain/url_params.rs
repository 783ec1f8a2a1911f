//! The parameters that become the query of a postback: scalars, in the order given, exactly as they were written.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;

use super::invalid::{Faults, Invalid};

/// The most parameters that one event may have.
pub const PARAMS_MAX: usize = 100;

/// Ordered parameters. A number keeps the digits it came with: `100.10` stays `100.10`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UrlParams(Vec<(String, Value)>);

impl UrlParams {
    /// Names and texts to put into the query; a parameter that is `null` is left out.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, std::borrow::Cow<'_, str>)> {
        self.0.iter().filter_map(|(name, value)| match value {
            Value::Null => None,
            Value::String(text) => Some((name.as_str(), text.into())),
            scalar => Some((name.as_str(), scalar.to_string().into())),
        })
    }

    /// Refuses what a query cannot carry: arrays and objects, NUL characters, empty and repeated names.
    pub(super) fn check(&self) -> Result<(), Invalid> {
        let mut faults = Faults::default();
        if self.0.len() > PARAMS_MAX {
            faults.push("url_params", format!("must have at most {PARAMS_MAX} parameters"));
        }
        let mut seen = std::collections::HashSet::new();
        for (name, value) in &self.0 {
            let field = || format!("url_params.{}", name.replace('\0', ""));
            if name.is_empty() {
                faults.push("url_params", "must not have a parameter without a name");
            }
            if !seen.insert(name) {
                faults.push(field(), "must be given once");
            }
            match value {
                Value::Array(_) | Value::Object(_) => {
                    faults.push(field(), "must be a string, a number, a boolean or null");
                }
                Value::String(text) if text.contains('\0') => {
                    faults.push(field(), "must not contain NUL characters");
                }
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
            }
            if name.contains('\0') {
                faults.push(field(), "must not contain NUL characters in its name");
            }
        }
        faults.into_result()
    }
}

impl<N: Into<String>, V: Into<Value>> FromIterator<(N, V)> for UrlParams {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        Self(pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

impl Serialize for UrlParams {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for UrlParams {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(InOrder)
    }
}

/// Reads an object into pairs, so that order and repetition are seen.
struct InOrder;

impl<'de> Visitor<'de> for InOrder {
    type Value = UrlParams;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings, numbers, booleans and nulls")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UrlParams, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            if pairs.len() > PARAMS_MAX {
                return Err(A::Error::custom(format_args!("must have at most {PARAMS_MAX} parameters")));
            }
            pairs.push(pair);
        }
        Ok(UrlParams(pairs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> UrlParams {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn order_and_digits_survive() {
        let params = parse(r#"{"z":100.10,"a":12345678901234567890123,"m":true,"gone":null,"t":"x y"}"#);
        let pairs: Vec<_> = params.pairs().map(|(n, v)| format!("{n}={v}")).collect();
        assert_eq!(pairs, ["z=100.10", "a=12345678901234567890123", "m=true", "t=x y"]);
        let stored = serde_json::to_string(&params).unwrap();
        assert_eq!(stored, r#"{"z":100.10,"a":12345678901234567890123,"m":true,"gone":null,"t":"x y"}"#);
    }

    #[test]
    fn what_a_query_cannot_carry_is_refused_by_name() {
        for (json, field) in [
            (r#"{"a":[1]}"#, "url_params.a"),
            (r#"{"a":{"b":1}}"#, "url_params.a"),
            (r#"{"a":"x\u0000y"}"#, "url_params.a"),
            (r#"{"":1}"#, "url_params"),
            (r#"{"a":1,"a":2}"#, "url_params.a"),
        ] {
            let invalid = parse(json).check().unwrap_err();
            assert_eq!(invalid.errors()[0].field, field, "{json}");
        }
    }
}
