//! `sslmode=verify-full`: the certificate of the database must be for the host and from the authority that the URL names.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

use crate::support::cluster::Cluster;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command, output};

/// An authority of a test's own, and its certificate.
fn authority(name: &str) -> (Issuer<'static, KeyPair>, String) {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap().pem();
    (Issuer::new(params, key), certificate)
}

/// A server with TLS and a certificate for the host `localhost`.
fn server_of(authority: &Issuer<'static, KeyPair>) -> Cluster {
    let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap().pem();
    let cluster = Cluster::start("");
    cluster.place("server.crt", &certificate);
    cluster.place("server.key", &key.serialize_pem());
    cluster.crash();
    cluster.configure("ssl = on");
    cluster.launch();
    cluster
}

fn url(cluster: &Cluster, hosts: &str, mode: &str, root: &Path) -> String {
    let hosts = hosts.replace("PORT", &cluster.port.to_string());
    format!("postgres://postgres:s3cret@{hosts}/postgres?sslmode={mode}&sslrootcert={}", root.display())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_right_name_from_the_right_authority_passes_verify_full_and_a_refusal_says_which_is_wrong() {
    let (issuer, certificate) = authority("an authority of this test");
    let (_, other_certificate) = authority("another authority of this test");
    let cluster = server_of(&issuer);
    let directory = tempfile::tempdir().unwrap();
    let [right, wrong] = ["right.pem", "wrong.pem"].map(|name| directory.path().join(name));
    std::fs::write(&right, certificate).unwrap();
    std::fs::write(&wrong, other_certificate).unwrap();
    let database = TestDatabase::new().await;

    let mut serve = command(&database, &["serve"]);
    serve.env("DATABASE_URL", url(&cluster, "localhost:PORT", "verify-full", &right));
    let process = Process::start(serve);
    let encrypted: bool = cluster
        .scalar(
            "postgres",
            "select bool_and(ssl) from pg_stat_ssl join pg_stat_activity using (pid)
             where application_name = 'webhook-processor'",
        )
        .await;
    assert!(encrypted);
    drop(process);

    let is_for_another = "is for another name: write the host in DATABASE_URL as the certificate names it";
    let is_not_trusted = "was issued by no authority that is trusted here";
    for (hosts, mode, root, refusal) in [
        ("localhost:PORT", "verify-full", &right, None),
        ("127.0.0.1:PORT", "verify-ca", &right, None),
        ("127.0.0.1:PORT", "verify-full", &right, Some(is_for_another)),
        ("localhost:PORT", "verify-full", &wrong, Some(is_not_trusted)),
        ("localhost:PORT", "verify-ca", &wrong, Some(is_not_trusted)),
        // each of several hosts by its own name
        ("127.0.0.1:PORT,localhost:PORT", "verify-full", &right, None),
        ("127.0.0.1:PORT,localhost:PORT", "verify-full", &wrong, Some(is_not_trusted)),
    ] {
        let mut stats = command(&database, &["stats"]);
        stats.env("DATABASE_URL", url(&cluster, hosts, mode, root));
        let output = output(stats);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.success(), refusal.is_none(), "{hosts} {mode}: {said}");
        assert!(
            said.contains(refusal.unwrap_or_default()) && !said.contains("s3cret"),
            "{hosts} {mode}: {said}"
        );
    }
}
