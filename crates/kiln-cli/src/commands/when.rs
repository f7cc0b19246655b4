//! Times and spans as people read them.

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// `just now`, `5 min ago`, `3 h ago`, `2 d ago`.
pub(crate) fn ago(then_unix_ms: u64, now_unix_ms: u64) -> String {
    let seconds = now_unix_ms.saturating_sub(then_unix_ms) / 1000;
    match seconds {
        0..10 => "just now".to_owned(),
        10..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

/// `85 ms`, `4.2 s`, `3 min 05 s`, `2 h 10 min`, `89 d 23 h`.
pub(crate) fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{seconds}.{} s", ms % 1000 / 100),
        60_000..3_600_000 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        3_600_000..172_800_000 => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// `2031-05-04 13:02:11`, in UTC.
pub(crate) fn stamp(unix_ms: u64) -> String {
    let time = i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok());
    match time {
        Some(time) => time
            .to_zoned(TimeZone::UTC)
            .strftime("%Y-%m-%d %H:%M:%S UTC")
            .to_string(),
        None => "unknown".to_owned(),
    }
}

/// Milliseconds since the Unix epoch of a file's time.
pub(crate) fn unix_ms(time: std::time::SystemTime) -> u64 {
    let since = time
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_times() {
        let now = 1_000_000_000;
        for (age_s, words) in [
            (0, "just now"),
            (59, "59 s ago"),
            (60, "1 min ago"),
            (7300, "2 h ago"),
            (260_000, "3 d ago"),
        ] {
            assert_eq!(ago(now - age_s * 1000, now), words);
        }
        assert_eq!(ago(now + 5000, now), "just now");
        for (ms, words) in [
            (85, "85 ms"),
            (4_250, "4.2 s"),
            (185_000, "3 min 05 s"),
            (7_800_000, "2 h 10 min"),
            (7_775_999_000, "89 d 23 h"),
        ] {
            assert_eq!(span(ms), words);
        }
        assert_eq!(stamp(1_700_000_000_000), "2023-11-14 22:13:20 UTC");
        assert_eq!(stamp(u64::MAX), "unknown");
    }
}
