//! The two range headers: `Range` of downloads (RFC 9110 §14.1.2) and `Content-Range` of upload
//! chunks, which the OCI distribution-spec v1.1 writes as `<start>-<end>` without a unit.

/// What a `Range` header asks of content of a known size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wanted {
    /// All of it: no header, another unit, several ranges, or a header that is not well formed.
    All,
    /// These bytes: start, and how many (never zero).
    Part { start: u64, len: u64 },
    /// Bytes that are not there.
    Unsatisfiable,
}

/// Reads a `Range` header. Headers that cannot be understood are ignored, as RFC 9110 says.
pub(crate) fn wanted(header: Option<&str>, size: u64) -> Wanted {
    let Some((first, last)) = header
        .and_then(|text| text.trim().strip_prefix("bytes="))
        .filter(|text| !text.contains(','))
        .and_then(|text| text.split_once('-'))
    else {
        return Wanted::All;
    };
    let (first, last) = (first.trim(), last.trim());
    let part = |start: u64, end: u64| Wanted::Part {
        start,
        len: end - start + 1,
    };
    match (number(first), number(last)) {
        (Some(start), _) if start >= size && (last.is_empty() || number(last).is_some()) => {
            Wanted::Unsatisfiable
        }
        (Some(start), None) if last.is_empty() => part(start, size - 1),
        (Some(start), Some(end)) if end >= start => part(start, end.min(size - 1)),
        (None, Some(0)) if first.is_empty() => Wanted::Unsatisfiable,
        (None, Some(_)) if first.is_empty() && size == 0 => Wanted::Unsatisfiable,
        (None, Some(count)) if first.is_empty() => part(size - count.min(size), size - 1),
        _ => Wanted::All,
    }
}

/// Reads a chunk's `Content-Range`: first and last byte, both counted from 0.
pub(crate) fn chunk(text: &str) -> Option<(u64, u64)> {
    let (start, end) = text.split_once('-')?;
    let (start, end) = (number(start)?, number(end)?);
    (start <= end).then_some((start, end))
}

/// Digits only: no sign, no spaces.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_form_of_range() {
        let part = |start, len| Wanted::Part { start, len };
        for (header, expected) in [
            ("bytes=0-0", part(0, 1)),
            ("bytes=0-", part(0, 10)),
            ("bytes=3-5", part(3, 3)),
            ("bytes=8-99", part(8, 2)),
            ("bytes=-3", part(7, 3)),
            ("bytes=-30", part(0, 10)),
            ("bytes=10-", Wanted::Unsatisfiable),
            ("bytes=10-20", Wanted::Unsatisfiable),
            ("bytes=-0", Wanted::Unsatisfiable),
            ("bytes=5-3", Wanted::All),
            ("bytes=0-1,3-4", Wanted::All),
            ("lines=0-1", Wanted::All),
            ("bytes=a-b", Wanted::All),
            ("bytes=+1-2", Wanted::All),
            ("", Wanted::All),
        ] {
            assert_eq!(wanted(Some(header), 10), expected, "{header}");
        }
        assert_eq!(wanted(Some("bytes=0-"), 0), Wanted::Unsatisfiable);
        assert_eq!(wanted(None, 10), Wanted::All);
    }

    #[test]
    fn chunks_have_no_unit() {
        assert_eq!(chunk("0-9"), Some((0, 9)));
        for bad in [
            "bytes=0-9",
            "9-0",
            "-9",
            "0-",
            "0-9/10",
            " 0-9",
            "0-99999999999999999999",
        ] {
            assert_eq!(chunk(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_part_lies_within_the_content(
            header in "bytes=[0-9]{0,20}-[0-9]{0,20}|\\PC{0,30}", size in any::<u64>()
        ) {
            if let Wanted::Part { start, len } = wanted(Some(&header), size) {
                prop_assert!(len > 0 && start < size && len <= size - start);
            }
        }

        #[test]
        fn chunk_round_trip(start in any::<u64>(), more in any::<u64>()) {
            let end = start.saturating_add(more);
            prop_assert_eq!(chunk(&format!("{start}-{end}")), Some((start, end)));
        }
    }
}
