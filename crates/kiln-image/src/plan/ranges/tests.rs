//! Known answers, and the laws that hold for all ranges.

use proptest::prelude::*;

use super::*;

fn v(text: &str) -> Version {
    Partial::parse(text).expect("a version").low()
}

#[test]
fn npm_ranges_hold_what_npm_says() {
    for (range, yes, no) in [
        (">=18", "18.0.0 20.19.2 99.0.0", "17.9.9"),
        (">=18 <21 || ^22", "18.0.0 20.5.0 22.3.0", "21.0.0 23.0.0"),
        (">= 18.17 < 21", "18.17.0 20.0.0", "18.16.9 21.0.0"),
        ("20", "20.0.0 20.99.0", "19.9.9 21.0.0"),
        ("20.x", "20.1.0", "21.0.0"),
        ("v20.11", "20.11.5", "20.12.0"),
        ("20.11.1", "20.11.1", "20.11.2"),
        ("=20.11.1", "20.11.1", "20.11.0"),
        ("~20.11.1", "20.11.9", "20.12.0 20.11.0"),
        ("~20", "20.99.0", "21.0.0"),
        ("~> 20.1", "20.1.7", "20.2.0"),
        ("^20.11.1", "20.99.0", "20.11.0 21.0.0"),
        ("^0.2.3", "0.2.9", "0.3.0 0.2.2"),
        ("^0.0.3", "0.0.3", "0.0.4"),
        ("^0.0", "0.0.9", "0.1.0"),
        ("^0", "0.9.0", "1.0.0"),
        ("^0.0.0", "0.0.0", "0.0.1"),
        (">20.11", "20.12.0", "20.11.9"),
        ("<=20.11", "20.11.9", "20.12.0"),
        ("<=20.11.1", "20.11.1", "20.11.2"),
        ("18.0.0 - 20", "18.0.0 20.99.0", "21.0.0"),
        ("1.2 - 2.3.4", "1.2.0 2.3.4", "2.3.5"),
        ("*", "0.0.0 99.0.0", ""),
        ("", "0.0.0 99.0.0", ""),
        (">=20.0.0-0", "20.0.0", "19.0.0"),
        ("<0.0.0", "", "0.0.0"),
        (">*", "", "1.0.0"),
    ] {
        check(&Ranges::npm(range).expect(range), range, yes, no);
    }
    for bad in [
        "latest", ">=a", "20.b", ">=", "1..2", ">>1", "20 - x.1", "^",
    ] {
        assert!(Ranges::npm(bad).is_none(), "{bad}");
    }
    assert_eq!(
        Ranges::npm("v20.11.1").expect("legal").exact(),
        Some([20, 11, 1])
    );
    assert_eq!(Ranges::npm("20.11").expect("legal").exact(), None);
    assert_eq!(Ranges::npm("~20.11.1").expect("legal").exact(), None);
}

#[test]
fn python_ranges_hold_what_pep_440_says() {
    for (range, yes, no) in [
        (">=3.11", "3.11.0 3.13.5", "3.10.9"),
        (">=3.11,<3.14", "3.13.5", "3.14.0"),
        ("~=3.11", "3.11.0 3.13.0", "4.0.0 3.10.0"),
        ("~=3.11.2", "3.11.9", "3.12.0 3.11.1"),
        ("==3.13.*", "3.13.0 3.13.9", "3.12.9 3.14.0"),
        ("==3.13", "3.13.0", "3.13.1"),
        (">=3.8,!=3.12.*", "3.11.9 3.13.0", "3.12.4"),
        ("!=3.12.4", "3.12.3 3.12.5", "3.12.4"),
        (">3.12", "3.12.1 3.13.0", "3.12.0"),
        ("<=3.12", "3.12.0 3.11.0", "3.12.1"),
        ("<3.13", "3.12.99", "3.13.0"),
        (">=3.9,<4.0", "3.13.1", "4.0.0"),
        (">= 3.9 , < 4", "3.13.1", "4.0.0"),
        (">=3.13.0rc1", "3.13.0", "3.12.9"),
        ("", "0.0.0 3.13.0", ""),
    ] {
        check(&Ranges::pep440(range).expect(range), range, yes, no);
    }
    for bad in ["3.11", "^3.11", ">=", "~=3", ">=3.*", "=>3", ">=3 <4"] {
        assert!(Ranges::pep440(bad).is_none(), "{bad}");
    }
}

#[test]
fn poetry_constraints_are_both() {
    for (range, yes, no) in [
        ("^3.11", "3.11.0 3.13.0", "4.0.0 3.10.0"),
        ("~3.11", "3.11.9", "3.12.0"),
        ("3.13.*", "3.13.2", "3.12.0"),
        (">=3.11,<4.0 || 3.9.*", "3.9.1 3.12.0", "3.10.0"),
        ("*", "3.1.0", ""),
    ] {
        check(&Ranges::poetry(range).expect(range), range, yes, no);
    }
    assert!(Ranges::poetry("abc").is_none());
}

fn check(ranges: &Ranges, range: &str, yes: &str, no: &str) {
    for version in yes.split_whitespace() {
        assert!(ranges.contains(v(version)), "{range} holds {version}");
    }
    for version in no.split_whitespace() {
        assert!(
            !ranges.contains(v(version)),
            "{range} does not hold {version}"
        );
    }
}

fn simple() -> impl Strategy<Value = String> {
    let number = 0_u64..4;
    (
        prop::sample::select(vec!["", "=", ">", ">=", "<", "<=", "~", "^"]),
        number.clone(),
        prop::option::of(number.clone()),
        prop::option::of(number),
    )
        .prop_map(|(operator, a, b, c)| match (b, c) {
            (Some(b), Some(c)) => format!("{operator}{a}.{b}.{c}"),
            (Some(b), None) => format!("{operator}{a}.{b}"),
            _ => format!("{operator}{a}"),
        })
}

proptest! {
    #[test]
    fn space_is_and_bars_are_or(
        a in simple(), b in simple(), x in 0_u64..5, y in 0_u64..5, z in 0_u64..5,
    ) {
        let version = [x, y, z];
        let holds = |text: &str| Ranges::npm(text).expect("legal").contains(version);
        let (in_a, in_b) = (holds(&a), holds(&b));
        prop_assert_eq!(holds(&format!("{a} {b}")), in_a && in_b);
        let either = format!("{a} || {b}");
        prop_assert_eq!(holds(&either), in_a || in_b);
    }

    #[test]
    fn npm_agrees_with_cargo_where_they_mean_the_same(
        operator in prop::sample::select(vec!["=", ">", ">=", "<", "<=", "~", "^"]),
        a in 0_u64..3, b in 0_u64..3, c in 0_u64..3, x in 0_u64..4, y in 0_u64..4, z in 0_u64..4,
        parts in 1_usize..4,
    ) {
        let text = match parts {
            1 => format!("{operator}{a}"),
            2 => format!("{operator}{a}.{b}"),
            _ => format!("{operator}{a}.{b}.{c}"),
        };
        let cargo = semver::VersionReq::parse(&text).expect("legal");
        let want = cargo.matches(&semver::Version::new(x, y, z));
        prop_assert_eq!(Ranges::npm(&text).expect("legal").contains([x, y, z]), want, "{}", text);
    }

    #[test]
    fn not_equal_is_the_opposite(a in 0_u64..4, b in 0_u64..4, x in 0_u64..5, y in 0_u64..5, z in 0_u64..3) {
        for text in [format!("{a}.{b}"), format!("{a}.{b}.1"), format!("{a}.{b}.*"), format!("{a}.*")] {
            let same = Ranges::pep440(&format!("=={text}")).expect("legal").contains([x, y, z]);
            let other = Ranges::pep440(&format!("!={text}")).expect("legal").contains([x, y, z]);
            prop_assert_ne!(same, other, "{}", text);
        }
    }

    #[test]
    fn any_text_is_a_range_or_not(text in r"[0-9.x*<>=~^!|, va-]{0,24}") {
        for ranges in [Ranges::npm(&text), Ranges::pep440(&text), Ranges::poetry(&text)].into_iter().flatten() {
            for interval in &ranges.intervals {
                prop_assert!(interval.high.is_none_or(|high| interval.low < high), "{}", text);
            }
        }
    }
}
