//! Finds the Postgres server programs of this machine, and those that suit a data directory.

use std::cmp::Reverse;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, ensure};

/// The oldest major version that is supported.
const MAJOR_MIN: u32 = 15;

/// The programs that a directory must hold to be considered.
const PROGRAMS: [&str; 3] = ["initdb", "pg_ctl", "postgres"];

/// Where packages put server programs; a `*` stands for part of a name.
const PACKAGED: [&str; 5] = [
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
];

const HOW_TO_GET_THEM: &str = "install them (Debian, Ubuntu: `apt-get install postgresql`; \
     macOS: `brew install postgresql`), or set PG_BINDIR to the directory that holds initdb and pg_ctl, \
     or set DATABASE_URL to a server of your own";

/// One directory of server programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Binaries {
    directory: PathBuf,
    version: Version,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    major: u32,
    minor: u32,
}

impl Binaries {
    /// Lists the programs in the directory `named`, or else those of this machine; the list is never empty.
    ///
    /// If `PG_BINDIR` is set, nothing else is searched. Otherwise the first match on PATH comes first, then the
    /// directories of packages, newest version first.
    pub(super) fn list(named: Option<&Path>) -> Result<Vec<Self>> {
        let from_environment = env::var_os("PG_BINDIR").filter(|value| !value.is_empty()).map(PathBuf::from);
        let Some(directory) = named.map(Path::to_path_buf).or(from_environment) else {
            return list_everywhere(env::var_os("PATH").as_deref(), &PACKAGED);
        };
        let binaries = Self::in_directory(&directory).with_context(|| {
            format!("no PostgreSQL server programs in {}: {HOW_TO_GET_THEM}", directory.display())
        })?;
        Ok(vec![binaries])
    }

    /// Picks the first of `candidates` that can run on data of the major version `data_major`, or, if there is no
    /// data yet, the first that is new enough.
    pub(super) fn choose(candidates: &[Self], data_major: Option<u32>) -> Result<&Self> {
        let suits = |binaries: &&Self| match data_major {
            Some(major) => binaries.version.major == major,
            None => binaries.version.major >= MAJOR_MIN,
        };
        candidates.iter().find(suits).with_context(|| {
            let found = candidates
                .iter()
                .map(|it| format!("{} in {}", it.version.major, it.directory.display()))
                .collect::<Vec<_>>()
                .join(", ");
            match data_major {
                Some(major) => format!(
                    "the data was written by PostgreSQL {major}, and this machine has the server programs of \
                     PostgreSQL {found}: install PostgreSQL {major}, or convert the data with pg_upgrade"
                ),
                None => format!(
                    "PostgreSQL {MAJOR_MIN} or newer is needed, but only {found} was found: {HOW_TO_GET_THEM}"
                ),
            }
        })
    }

    pub(super) fn major(&self) -> u32 {
        self.version.major
    }

    /// The path of one program, such as `pg_ctl`.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Asks the server program in `directory` for its version; `None` if there is none.
    fn in_directory(directory: &Path) -> Option<Self> {
        if !PROGRAMS.iter().all(|name| directory.join(name).is_file()) {
            return None;
        }
        let output = Command::new(directory.join("postgres")).arg("--version").output().ok()?;
        let version = Version::parse(&String::from_utf8_lossy(&output.stdout))?;
        Some(Self { directory: directory.to_path_buf(), version })
    }
}

impl Version {
    /// Reads what `postgres --version` prints, such as `postgres (PostgreSQL) 15.18 (Debian
    /// 15.18-0+deb12u1)`.
    fn parse(printed: &str) -> Option<Self> {
        let (_, number) = printed.trim().split_once("(PostgreSQL) ")?;
        let (major, rest) = leading_number(number)?;
        let minor = rest.strip_prefix('.').and_then(leading_number).map_or(0, |(minor, _)| minor);
        Some(Self { major, minor })
    }
}

fn leading_number(text: &str) -> Option<(u32, &str)> {
    let end = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..end].parse().ok()?, &text[end..]))
}

/// Lists the first programs found on `path`, then those in the `packaged` directories, newest first.
fn list_everywhere(path: Option<&OsStr>, packaged: &[&str]) -> Result<Vec<Binaries>> {
    let mut candidates: Vec<_> = packaged
        .iter()
        .flat_map(|pattern| directories_like(pattern))
        .filter_map(|directory| Binaries::in_directory(&directory))
        .collect();
    candidates.sort_by_key(|binaries| Reverse(binaries.version));
    candidates
        .splice(..0, path.and_then(|path| env::split_paths(path).find_map(|it| Binaries::in_directory(&it))));
    ensure!(!candidates.is_empty(), "no PostgreSQL server programs on this machine: {HOW_TO_GET_THEM}");
    Ok(candidates)
}

/// Lists the directories that match a pattern with one `*`, which stands for the rest of one name.
fn directories_like(pattern: &str) -> Vec<PathBuf> {
    let (before, after) = pattern.split_once('*').expect("each pattern in PACKAGED has a star");
    let (parent, name_start) = before.rsplit_once('/').expect("each pattern in PACKAGED is absolute");
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(name_start))
        .map(|entry| entry.path().join(after.trim_start_matches('/')))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binaries(directory: &str, major: u32) -> Binaries {
        Binaries { directory: directory.into(), version: Version { major, minor: 0 } }
    }

    #[test]
    fn versions_are_read_as_postgres_prints_them() {
        for (printed, major, minor) in [
            ("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", 15, 18),
            ("postgres (PostgreSQL) 16.4 (Homebrew)", 16, 4),
            ("postgres (PostgreSQL) 18beta1", 18, 0),
            ("postgres (PostgreSQL) 17rc1 (Ubuntu 17~rc1-1.pgdg24.04+1)", 17, 0),
            ("postgres (PostgreSQL) 9.6.24", 9, 6),
        ] {
            assert_eq!(Version::parse(printed), Some(Version { major, minor }), "{printed}");
        }
    }

    #[test]
    fn other_text_is_not_taken_for_a_version() {
        for printed in ["", "postgres", "postgres (PostgreSQL)", "postgres (PostgreSQL) devel", "mysqld 15.1"]
        {
            assert_eq!(Version::parse(printed), None, "{printed}");
        }
    }

    #[test]
    fn new_data_gets_the_first_programs_that_are_not_too_old() {
        let candidates = [binaries("/old", 14), binaries("/a", 16), binaries("/b", 18)];
        assert_eq!(Binaries::choose(&candidates, None).unwrap(), &candidates[1]);
    }

    #[test]
    fn existing_data_gets_the_programs_of_its_own_version() {
        let candidates = [binaries("/a", 18), binaries("/b", 16)];
        assert_eq!(Binaries::choose(&candidates, Some(16)).unwrap(), &candidates[1]);
    }

    #[test]
    fn data_of_another_version_is_refused_with_both_versions() {
        let message = Binaries::choose(&[binaries("/b", 16)], Some(17)).unwrap_err().to_string();
        assert!(message.contains("by PostgreSQL 17") && message.contains("16 in /b"), "{message}");
    }

    #[test]
    fn old_programs_are_refused() {
        let message = Binaries::choose(&[binaries("/old", 14)], None).unwrap_err().to_string();
        assert!(
            message.contains("PostgreSQL 15 or newer is needed, but only 14 in /old was found"),
            "{message}"
        );
    }

    #[test]
    fn without_programs_the_message_says_what_to_install() {
        let message = list_everywhere(None, &["/nowhere/*/bin"]).unwrap_err().to_string();
        for hint in ["apt-get install postgresql", "brew install postgresql", "PG_BINDIR", "DATABASE_URL"] {
            assert!(message.contains(hint), "{message}");
        }
    }
}
