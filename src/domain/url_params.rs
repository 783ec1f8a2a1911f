//! The parameters that become the query of a postback: scalars, in the given order, exactly as they were written.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::value::RawValue;

use super::invalid::{Faults, Invalid};

/// The most parameters that one event may have.
pub const PARAMS_MAX: usize = 100;

/// The parameters of one event, in the given order.
#[derive(Debug, Clone, Default)]
pub struct UrlParams(Vec<(String, Param)>);

/// The value of a parameter.
#[derive(Debug, Clone)]
enum Param {
    /// Left out of the query.
    Null,
    Text(String),
    /// A number or a boolean, as it was written: `100.10` stays `100.10`, and `1e3` stays `1e3`.
    Literal(Box<RawValue>),
    /// An array or an object.
    Nested,
}

impl UrlParams {
    /// The names and texts of the query. A `null` parameter is left out.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().filter_map(|(name, value)| match value {
            Param::Null | Param::Nested => None,
            Param::Text(text) => Some((name.as_str(), text.as_str())),
            Param::Literal(literal) => Some((name.as_str(), literal.get())),
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
                Param::Nested => {
                    faults.push(field(), "must be a string, a number, a boolean or null");
                }
                Param::Text(text) if text.contains('\0') => {
                    faults.push(field(), "must not contain NUL characters");
                }
                Param::Null | Param::Text(_) | Param::Literal(_) => {}
            }
            if name.contains('\0') {
                faults.push(field(), "must not contain NUL characters in its name");
            }
        }
        faults.into_result()
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for UrlParams {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        Self(pairs.into_iter().map(|(name, text)| (name.into(), Param::Text(text.into()))).collect())
    }
}

impl Serialize for Param {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null | Self::Nested => serializer.serialize_unit(),
            Self::Text(text) => serializer.serialize_str(text),
            Self::Literal(literal) => literal.serialize(serializer),
        }
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

/// Reads an object into pairs, which keeps order and repetition.
struct InOrder;

impl<'de> Visitor<'de> for InOrder {
    type Value = UrlParams;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings, numbers, booleans and nulls")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UrlParams, A::Error> {
        let mut pairs = Vec::new();
        while let Some((name, value)) = map.next_entry::<String, Box<RawValue>>()? {
            if pairs.len() > PARAMS_MAX {
                return Err(A::Error::custom(format_args!("must have at most {PARAMS_MAX} parameters")));
            }
            let value = match value.get().as_bytes() {
                [b'"', ..] => Param::Text(serde_json::from_str(value.get()).map_err(A::Error::custom)?),
                [b'n', ..] => Param::Null,
                [b'[' | b'{', ..] => Param::Nested,
                _ => Param::Literal(value),
            };
            pairs.push((name, value));
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
        let params =
            parse(r#"{"z":100.10,"a":12345678901234567890123,"e":1E5,"m":true,"gone":null,"t":"x y"}"#);
        let pairs: Vec<_> = params.pairs().map(|(n, v)| format!("{n}={v}")).collect();
        assert_eq!(pairs, ["z=100.10", "a=12345678901234567890123", "e=1E5", "m=true", "t=x y"]);
        let stored = serde_json::to_string(&params).unwrap();
        assert_eq!(
            stored,
            r#"{"z":100.10,"a":12345678901234567890123,"e":1E5,"m":true,"gone":null,"t":"x y"}"#
        );
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
