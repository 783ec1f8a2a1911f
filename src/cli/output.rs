//! Output of commands: tables for people, JSON for programs, progress bars for long work.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, StdoutLock, Write as _};
use std::time::Duration;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;

/// Prints a value as one JSON document.
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    say(serde_json::to_string_pretty(value)?)
}

/// Prints a line to standard output.
pub fn say(line: impl Display) -> anyhow::Result<()> {
    write_or_leave(|out| writeln!(out, "{line}"))
}

/// Writes to standard output. If its reader has closed the pipe, as `head` does, that is no error.
fn write_or_leave(write: impl FnOnce(&mut StdoutLock<'_>) -> io::Result<()>) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match write(&mut out).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// An empty table with these headings.
pub fn table(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(headings);
    table
}

/// A table of names and values, from the fields of an object. A nested field is named by its path.
pub fn fields_table(value: &impl Serialize) -> anyhow::Result<Table> {
    let mut fields = table(&["field", "value"]);
    for (name, value) in fields_of(None, serde_json::to_value(value)?) {
        fields.add_row([name, value]);
    }
    Ok(fields)
}

fn fields_of(path: Option<&str>, value: Value) -> Vec<(String, String)> {
    match (path, value) {
        (path, Value::Object(object)) if path.is_none() || !object.is_empty() => {
            let path_of = |name: String| path.map_or_else(|| name.clone(), |path| format!("{path}.{name}"));
            object.into_iter().flat_map(|(name, value)| fields_of(Some(&path_of(name)), value)).collect()
        }
        (path, value) => vec![(path.unwrap_or_default().to_owned(), plain(&value))],
    }
}

/// A JSON value without quotes; nothing for null and empty objects.
pub fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::Object(object) if object.is_empty() => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// A progress bar on standard error, if that is a terminal. Without a `total` it only counts.
pub fn progress(total: Option<u64>, what: &'static str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{bar:30} {pos}/{len} {msg} {per_sec:.0} {eta}"),
        None => (ProgressBar::new_spinner(), "{spinner} {pos} {msg} {elapsed}"),
    };
    bar.set_style(ProgressStyle::with_template(template).expect("the template is well-formed"));
    bar.set_message(what);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nested_fields_become_rows_named_by_their_paths() {
        let fields =
            fields_of(None, json!({"total": 3, "duration_ms": {"p50": 7, "of": {"x": null}}, "headers": {}}));
        let fields: std::collections::BTreeMap<_, _> = fields.into_iter().collect();
        let expected = [("duration_ms.of.x", ""), ("duration_ms.p50", "7"), ("headers", ""), ("total", "3")];
        assert_eq!(fields, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    }
}
