//! The complete URL of a delivery: an endpoint's URL joined with the event's parameters.

use std::fmt::Write as _;

use super::endpoint::EndpointUrl;
use super::invalid::Invalid;
use super::url_params::UrlParams;

/// The longest URL that is sent, in bytes. Common servers refuse longer request lines.
pub const URL_BYTES_MAX: usize = 8000;

/// Appends `params` to the query of `base`, before a fragment, percent-encoded by RFC 3986. Fails if the URL becomes longer than
/// [`URL_BYTES_MAX`].
pub fn build(base: &EndpointUrl, params: &UrlParams) -> Result<String, Invalid> {
    let (address, fragment) = match base.as_str().split_once('#') {
        Some((address, fragment)) => (address, Some(fragment)),
        None => (base.as_str(), None),
    };
    let mut url = address.to_owned();
    for (name, value) in params.pairs() {
        if !url.contains('?') {
            url.push('?');
        } else if !url.ends_with(['?', '&']) {
            url.push('&');
        }
        encode_into(&mut url, name);
        url.push('=');
        encode_into(&mut url, value);
    }
    if let Some(fragment) = fragment {
        url.push('#');
        url.push_str(fragment);
    }
    if url.len() > URL_BYTES_MAX {
        return Err(Invalid::field(
            "url_params",
            format!("make the URL too long: {} bytes, at most {URL_BYTES_MAX} are sent", url.len()),
        ));
    }
    Ok(url)
}

/// Percent-encodes every byte that is not unreserved (RFC 3986, section 2.3).
fn encode_into(url: &mut String, text: &str) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            url.push(char::from(byte));
        } else {
            write!(url, "%{byte:02X}").expect("writing to a String cannot fail");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn built(base: &str, params: &str) -> String {
        let base = EndpointUrl::parse("postback_url", base).unwrap();
        build(&base, &serde_json::from_str(params).unwrap()).unwrap()
    }

    #[test]
    fn parameters_become_the_query_to_the_letter() {
        for (base, params, expected) in [
            ("http://h/p", r#"{"a":"1"}"#, "http://h/p?a=1"),
            ("http://h/p?k=v", r#"{"a":"1"}"#, "http://h/p?k=v&a=1"),
            ("http://h/p?", r#"{"a":"1"}"#, "http://h/p?a=1"),
            ("http://h/p?k=v&", r#"{"a":"1"}"#, "http://h/p?k=v&a=1"),
            ("http://h/p#frag", r#"{"a":"1"}"#, "http://h/p?a=1#frag"),
            ("http://h/p?k=v#frag?x", r#"{"a":"1"}"#, "http://h/p?k=v&a=1#frag?x"),
            ("http://h/p", r#"{"b":2,"a":true,"c":null,"d":1.50}"#, "http://h/p?b=2&a=true&d=1.50"),
            ("http://h/p", r#"{"q":"a b&c=d/é+~"}"#, "http://h/p?q=a%20b%26c%3Dd%2F%C3%A9%2B~"),
            ("http://h/p", r#"{"e":""}"#, "http://h/p?e="),
            ("http://h/p", "{}", "http://h/p"),
            ("http://h/p#f", r#"{"gone":null}"#, "http://h/p#f"),
        ] {
            assert_eq!(built(base, params), expected, "{base} {params}");
        }
    }

    #[test]
    fn a_url_that_would_be_too_long_is_refused() {
        let base = EndpointUrl::parse("postback_url", "http://h/p").unwrap();
        let params = UrlParams::from_iter([("a", "x".repeat(URL_BYTES_MAX))]);
        assert_eq!(build(&base, &params).unwrap_err().errors()[0].field, "url_params");
    }

    proptest! {
        #[test]
        fn what_is_built_is_what_an_http_client_sends(
            pairs in prop::collection::vec(("\\PC{1,8}", "\\PC{0,12}"), 0..6),
            base in prop::sample::select(vec!["https://h.example/p", "http://h/?k=v#f", "http://[::1]:8/a%20b?"]),
        ) {
            let base = EndpointUrl::parse("postback_url", base).unwrap();
            let params: UrlParams = pairs.iter().cloned().collect();
            let url = build(&base, &params).unwrap();
            let parsed = url::Url::parse(&url).unwrap();
            prop_assert_eq!(parsed.as_str(), &url);
            let query: Vec<_> = parsed.query_pairs().map(|(n, v)| (n.into_owned(), v.into_owned())).collect();
            prop_assert!(query.ends_with(&pairs));
        }
    }
}
