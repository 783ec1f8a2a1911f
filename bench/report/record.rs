//! The record in the repository: `bench/figures.json`, from which the page is made with its chart.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;

use super::chart::chart;
use super::document::document;
use super::figures::Sections;

/// What is committed, seen from the root of the repository.
const FIGURES: &str = "bench/figures.json";
const DOCUMENT: &str = "docs/benchmarks.md";
const CHART: &str = "docs/benchmarks.svg";

/// What is committed in the repository at `root`, or at least written there; nothing if there is none.
pub fn committed(root: &Path) -> Sections {
    let git = Command::new("git").arg("-C").arg(root).args(["show", &format!("HEAD:{FIGURES}")]).output();
    let text = match git {
        Ok(output) if output.status.success() => output.stdout,
        _ => fs::read(root.join(FIGURES)).unwrap_or_default(),
    };
    serde_json::from_slice(&text).unwrap_or_default()
}

/// Puts the figures of a run in the place of the last ones of their groups, and renders all.
pub fn write(root: &Path, sections: Sections) -> anyhow::Result<()> {
    let path = root.join(FIGURES);
    let mut all: Sections = match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?,
        Err(_) => Sections::new(),
    };
    all.extend(sections);
    for (name, text) in [
        (FIGURES, serde_json::to_string_pretty(&all)? + "\n"),
        (DOCUMENT, document(&all)),
        (CHART, chart(&all)),
    ] {
        let path = root.join(name);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::section;
    use super::*;
    use crate::groups::Group;

    #[test]
    fn one_group_replaces_only_its_own_section() {
        let root = tempfile::tempdir().unwrap();
        write(
            root.path(),
            Sections::from([(Group::Drain, section(1.0, 2.0)), (Group::Peers, section(5.0, 9.0))]),
        )
        .unwrap();
        write(root.path(), Sections::from([(Group::Drain, section(3.0, 4.0))])).unwrap();
        let kept = committed(root.path());
        assert_eq!(kept[&Group::Drain], section(3.0, 4.0));
        assert_eq!(kept[&Group::Peers], section(5.0, 9.0));
    }

    #[test]
    fn the_committed_page_is_made_from_the_committed_figures() {
        let figures = serde_json::from_str(include_str!("../figures.json")).unwrap();
        let pages = [
            (DOCUMENT, document(&figures), include_str!("../../docs/benchmarks.md")),
            (CHART, chart(&figures), include_str!("../../docs/benchmarks.svg")),
        ];
        for (name, made, committed) in pages {
            assert!(made == committed, "{name} is not what is made of {FIGURES}");
        }
    }
}
