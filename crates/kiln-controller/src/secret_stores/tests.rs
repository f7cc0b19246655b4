use super::*;

fn stores(text: &str) -> Result<SecretStores, StoresError> {
    #[derive(Deserialize)]
    struct File {
        stores: Vec<StoreConfig>,
    }
    let file: File = serde_json::from_str(text).expect("a file");
    SecretStores::new(&file.stores)
}

fn source(text: &str) -> SecretSource {
    text.parse().expect("a source")
}

#[test]
fn sources_name_one_place_and_nothing_else() {
    for good in [
        "vault:a",
        "v-1:ci/acme/npm#token",
        "aws:prod/db@x_+=.-#a.b_c-d",
        "env:NPM_TOKEN",
    ] {
        assert_eq!(source(good).to_string(), good);
    }
    for bad in [
        "", "a", "a:", ":a", "A:b", "a b:c", "a:/b", "a:b/", "a:b//c", "a:../b", "a:b/../c",
        "a:./b", "a:b?x", "a:b%2f", "a:b#", "a:b#c d", "a:b#c#d", "a:b c", "a:b\nc", "a:ü",
    ] {
        assert!(bad.parse::<SecretSource>().is_err(), "{bad:?}");
    }
    assert!(
        format!("a:{}", "b".repeat(PATH_MAX + 1))
            .parse::<SecretSource>()
            .is_err()
    );
}

#[test]
fn a_tenant_names_what_it_was_granted() {
    let stores = stores(
        r#"{"stores": [{"name": "host", "env": true, "grants": {"acme": ["KILN_A", "ci/*"], "ops": ["*"]}}]}"#,
    );
    let stores = stores.expect("stores");
    let may = |tenant: &str, text: &str| {
        stores
            .granted(&tenant.parse().expect("a tenant"), &source(text))
            .is_ok()
    };
    assert!(may("acme", "host:KILN_A") && may("acme", "host:ci/a") && may("acme", "host:ci/a/b"));
    assert!(may("ops", "host:PATH"));
    for (tenant, text) in [
        ("acme", "host:KILN_AB"),
        ("acme", "host:KILN"),
        ("acme", "host:ci"),
        ("acme", "host:cix/a"),
        ("acme", "other:KILN_A"),
        ("nobody", "host:KILN_A"),
    ] {
        assert!(!may(tenant, text), "{tenant} {text}");
    }
    let acme = "acme".parse().expect("a tenant");
    let never = stores.fetch(&acme, &source("host:KILN_A"));
    assert_eq!(never, Err(FetchError::Missing("host:KILN_A".to_owned())));
    let ops = "ops".parse().expect("a tenant");
    assert!(
        stores
            .fetch(&ops, &source("host:PATH"))
            .is_ok_and(|value| !value.is_empty())
    );
}

#[test]
fn stores_that_can_never_work_are_refused() {
    for (text, why) in [
        (
            r#"{"stores": [{"name": "A", "env": true, "grants": {}}]}"#,
            "no name",
        ),
        (
            r#"{"stores": [{"name": "a", "env": true, "grants": {}}, {"name": "a", "env": true, "grants": {}}]}"#,
            "two stores",
        ),
        (
            r#"{"stores": [{"name": "a", "env": true, "grants": {"acme": ["a*b"]}}]}"#,
            "no path",
        ),
        (
            r#"{"stores": [{"name": "a", "vault": {"url": "http://vault.example", "auth": {"method": "token", "file": "/t"}}, "grants": {}}]}"#,
            "not https",
        ),
        (
            r#"{"stores": [{"name": "a", "vault": {"url": "https://v.example", "auth": {"method": "token", "file": "t"}}, "grants": {}}]}"#,
            "absolute",
        ),
        (
            r#"{"stores": [{"name": "a", "vault": {"url": "https://v.example", "mount": "../sys", "auth": {"method": "token", "file": "/t"}}, "grants": {}}]}"#,
            "no mount",
        ),
        (
            r#"{"stores": [{"name": "a", "aws": {"region": "eu/west", "credentials": "/c"}, "grants": {}}]}"#,
            "no region",
        ),
    ] {
        let error = stores(text).expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_field_is_the_named_one_or_the_only_one() {
    let of = |text: &str, field| of_json(text.as_bytes(), field).ok();
    assert_eq!(
        of(r#"{"a": "x", "b": "y"}"#, Some("b")),
        Some(b"y".to_vec())
    );
    assert_eq!(of(r#"{"a": "x"}"#, None), Some(b"x".to_vec()));
    assert_eq!(
        of(r#"{"a": {"b": 1}}"#, Some("a")),
        Some(br#"{"b":1}"#.to_vec())
    );
    for (text, field) in [
        (r#"{"a": "x", "b": "y"}"#, None),
        ("{}", None),
        (r#"{"a": null}"#, Some("a")),
        ("[1]", None),
        ("x", None),
    ] {
        assert_eq!(of(text, field), None, "{text}");
    }
}
