//! W3C trace context: the header `traceparent` (W3C Recommendation "Trace Context", level 1, §3.2).
//!
//! ```text
//! traceparent: 00-<trace id, 32 hex>-<parent id, 16 hex>-<flags, 2 hex>
//! ```
//! Pure: random ids come from the caller. `tracestate` is not carried.

use std::fmt;
use std::str::FromStr;

/// Name of the header.
pub const TRACEPARENT: &str = "traceparent";

/// One span's place in a trace.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TraceContext {
    trace: [u8; 16],
    span: [u8; 8],
    sampled: bool,
}

/// Why a text is not a trace context.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "not a trace context: write 00-<32 hex digits>-<16 hex digits>-<2 hex digits>, ids not all zero"
)]
pub struct ParseTraceError;

impl TraceContext {
    /// The first span of a new trace. Nothing when an id is all zero, which the standard forbids.
    #[must_use]
    pub fn root(trace: [u8; 16], span: [u8; 8], sampled: bool) -> Option<Self> {
        (trace != [0; 16] && span != [0; 8]).then_some(Self {
            trace,
            span,
            sampled,
        })
    }

    /// A span below this one. Nothing when the id is all zero.
    #[must_use]
    pub fn child(&self, span: [u8; 8]) -> Option<Self> {
        Self::root(self.trace, span, self.sampled)
    }

    /// The span of this name below this one: the same name gives the same id, so that whoever knows both need not be told.
    #[must_use]
    pub fn named(&self, name: &str) -> Self {
        let seed = fnv(
            fnv(fnv(FNV_START, &self.trace), &self.span),
            name.as_bytes(),
        );
        Self {
            span: seed.max(1).to_be_bytes(),
            ..*self
        }
    }

    /// The top of a trace of its own, recorded; the same name gives the same ids.
    #[must_use]
    pub fn of_name(name: &str) -> Self {
        let seed = |salt: u8| fnv(fnv(FNV_START, &[salt]), name.as_bytes()).max(1);
        let mut trace = [0; 16];
        trace[..8].copy_from_slice(&seed(1).to_be_bytes());
        trace[8..].copy_from_slice(&seed(2).to_be_bytes());
        Self {
            trace,
            span: seed(3).to_be_bytes(),
            sampled: true,
        }
    }

    /// Id of the trace, 32 hex digits.
    #[must_use]
    pub fn trace_id(&self) -> String {
        hex(&self.trace)
    }

    /// Id of the span, 16 hex digits.
    #[must_use]
    pub fn span_id(&self) -> String {
        hex(&self.span)
    }

    /// A span for one phase (a name of [`crate::span`]) with these ids: in JSON logs they stand beside every line written within
    /// it, and the line at its end has its times.
    #[must_use]
    pub fn phase_span(&self, phase: &'static str) -> tracing::Span {
        tracing::info_span!(
            "phase",
            phase,
            trace_id = self.trace_id(),
            span_id = self.span_id()
        )
    }

    /// Whether the caller records this trace.
    #[must_use]
    pub fn is_sampled(&self) -> bool {
        self.sampled
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flags = u8::from(self.sampled);
        write!(f, "00-{}-{}-{flags:02x}", self.trace_id(), self.span_id())
    }
}

impl FromStr for TraceContext {
    type Err = ParseTraceError;

    fn from_str(text: &str) -> Result<Self, ParseTraceError> {
        let bytes = text.as_bytes();
        // Version 00 is exactly 55 bytes; a later version may have more after another hyphen (§3.2.4).
        let (version, rest) = bytes.split_at_checked(2).ok_or(ParseTraceError)?;
        let [version] = unhex::<1>(version)?;
        let long_enough = match version {
            0 => bytes.len() == 55,
            0xff => false,
            _ => bytes.len() == 55 || bytes.get(55) == Some(&b'-'),
        };
        if !long_enough || rest[0] != b'-' || rest[33] != b'-' || rest[50] != b'-' {
            return Err(ParseTraceError);
        }
        let [flags] = unhex::<1>(&rest[51..53])?;
        Self::root(unhex(&rest[1..33])?, unhex(&rest[34..50])?, flags & 1 == 1)
            .ok_or(ParseTraceError)
    }
}

/// First state of [`fnv`].
const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a of 64 bits: spreads names over ids. Ids have to differ, not to be secret.
fn fnv(state: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(state, |state, byte| {
        (state ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Lower-case hex digits only, as the standard wants.
fn unhex<const N: usize>(digits: &[u8]) -> Result<[u8; N], ParseTraceError> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Ok(byte - b'0'),
        b'a'..=b'f' => Ok(byte - b'a' + 10),
        _ => Err(ParseTraceError),
    };
    let mut out = [0; N];
    if digits.len() != 2 * N {
        return Err(ParseTraceError);
    }
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Example of the standard, §3.2.2.
    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_standards_example() {
        let context: TraceContext = EXAMPLE.parse().expect("legal");
        assert_eq!(context.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(context.span_id(), "00f067aa0ba902b7");
        assert!(context.is_sampled());
        assert_eq!(context.to_string(), EXAMPLE);
        let child = context.child([1; 8]).expect("not zero");
        assert_eq!(child.trace_id(), context.trace_id());
        assert_eq!(child.span_id(), "0101010101010101");
        assert!(context.child([0; 8]).is_none());
        let named = context.named("build");
        assert_eq!(
            (named, named.trace_id()),
            (context.named("build"), context.trace_id())
        );
        assert_ne!(named.span_id(), context.named("push").span_id());
        let own = TraceContext::of_name("b1");
        assert_eq!(own.to_string().parse(), Ok(TraceContext::of_name("b1")));
        assert_ne!(own.trace_id(), TraceContext::of_name("b2").trace_id());
    }

    #[test]
    fn a_later_version_is_read_as_far_as_it_is_known() {
        let later = format!("cc{}-what-comes", &EXAMPLE[2..]);
        assert_eq!(later.parse::<TraceContext>(), EXAMPLE.parse());
        for bad in [
            String::new(),
            "00".to_owned(),
            format!("ff{}", &EXAMPLE[2..]),
            format!("{EXAMPLE}-x"),
            format!("cc{}x", &EXAMPLE[2..]),
            EXAMPLE.to_uppercase(),
            EXAMPLE.replace('-', "_"),
            EXAMPLE.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            EXAMPLE.replace("00f067aa0ba902b7", &"0".repeat(16)),
            format!(" {}", &EXAMPLE[1..]),
        ] {
            assert!(bad.parse::<TraceContext>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(trace: [u8; 16], span: [u8; 8], sampled: bool) {
            if let Some(context) = TraceContext::root(trace, span, sampled) {
                prop_assert_eq!(context.to_string().parse(), Ok(context));
            } else {
                prop_assert!(trace == [0; 16] || span == [0; 8]);
            }
        }

        #[test]
        fn any_text_is_a_context_or_not(text in ".{0,80}", tail in "[0-9a-f-]{40,70}") {
            for text in [text, tail.clone(), format!("00-{tail}")] {
                if let Ok(context) = text.parse::<TraceContext>() {
                    prop_assert_eq!(context.to_string().parse(), Ok(context));
                }
            }
        }
    }
}
