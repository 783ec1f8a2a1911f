//! What an attempt keeps to settle a dispute with its receiver, beside status and body.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The most headers of a response that are kept.
pub const HEADERS_KEPT_MAX: usize = 32;
/// The most bytes that they have together, names and values.
pub const HEADER_BYTES_KEPT_MAX: usize = 2048;
/// The most characters of one value.
pub const HEADER_VALUE_CHARS_KEPT_MAX: usize = 256;

/// Where a request went, and what can be said of its answer. It is spelled as it is stored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// The address that was called; `None` if none was, or several and none of them answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// From the start of the attempt until the head of the answer was there, in milliseconds; `None` if it did not come.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_byte_ms: Option<i32>,
    /// The start of the answer's headers; `None` if no answer came.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub headers: Option<ResponseHeaders>,
    /// Whether the answer's body is kept only in part, or was not read up to its end; `None` if no answer came.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_cut: Option<bool>,
}

impl Evidence {
    /// What is known if no answer came: the address at most.
    pub fn of_address(address: Option<SocketAddr>) -> Self {
        Self { address, ..Self::default() }
    }

    /// This evidence without the texts that came from outside.
    #[must_use]
    pub fn without_text(self) -> Self {
        Self { headers: None, ..self }
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Headers of a response by lower-case name, bounded in number and size. Cookies are left out: they are credentials of the
/// receiver, and nothing is disputed by them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResponseHeaders(BTreeMap<String, String>);

impl ResponseHeaders {
    /// Keeps headers in their order as long as there is room. A value that is too long is kept up to its limit, and what does
    /// not fit at all is left out. Values of the same name are joined (RFC 9110, section 5.3).
    pub fn keep<'a>(headers: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        let (mut kept, mut bytes) = (BTreeMap::<String, String>::new(), 0);
        for (name, value) in headers {
            if matches!(name, "set-cookie" | "set-cookie2") {
                continue;
            }
            let value: String =
                String::from_utf8_lossy(value).chars().take(HEADER_VALUE_CHARS_KEPT_MAX).collect();
            let size = name.len() + value.len() + 2;
            let has_room = kept.len() < HEADERS_KEPT_MAX || kept.contains_key(name);
            if !has_room || bytes + size > HEADER_BYTES_KEPT_MAX {
                continue;
            }
            bytes += size;
            kept.entry(name.to_owned())
                .and_modify(|joined| {
                    joined.push_str(", ");
                    joined.push_str(&value);
                })
                .or_insert(value);
        }
        Self(kept)
    }

    /// How much is kept.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|(name, value)| name.len() + value.len()).sum()
    }

    /// By name.
    pub fn into_map(self) -> BTreeMap<String, String> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kept(headers: &[(&str, &str)]) -> Vec<(String, String)> {
        let headers = headers.iter().map(|(name, value)| (*name, value.as_bytes()));
        ResponseHeaders::keep(headers).into_map().into_iter().collect()
    }

    #[test]
    fn values_of_one_name_are_joined_and_cookies_are_left_out() {
        let headers = [("via", "a"), ("set-cookie", "session=s3cret"), ("server", "nginx"), ("via", "b")];
        let expected = [("server", "nginx"), ("via", "a, b")].map(|(n, v)| (n.to_owned(), v.to_owned()));
        assert_eq!(kept(&headers), expected);
    }

    #[test]
    fn it_is_stored_without_what_is_not_known() {
        let nothing = serde_json::to_string(&Evidence::default()).unwrap();
        assert_eq!(nothing, "{}");
        assert_eq!(serde_json::from_str::<Evidence>(&nothing).unwrap(), Evidence::default());
        let all = Evidence {
            address: Some("127.0.0.1:80".parse().unwrap()),
            first_byte_ms: Some(3),
            headers: Some(ResponseHeaders::keep([("server", &b"nginx"[..])])),
            body_cut: Some(false),
        };
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(
            text,
            r#"{"address":"127.0.0.1:80","first_byte_ms":3,"headers":{"server":"nginx"},"body_cut":false}"#
        );
        assert_eq!(serde_json::from_str::<Evidence>(&text).unwrap(), all);
    }

    proptest! {
        #[test]
        fn however_many_headers_come_what_is_kept_is_bounded(
            headers in prop::collection::vec(("[a-z]{1,40}", prop::collection::vec(any::<u8>(), 0..600)), 0..100),
        ) {
            let kept = ResponseHeaders::keep(headers.iter().map(|(n, v)| (n.as_str(), v.as_slice())));
            prop_assert!(kept.bytes() <= HEADER_BYTES_KEPT_MAX);
            prop_assert!(kept.into_map().len() <= HEADERS_KEPT_MAX);
        }
    }
}
