//! The frame: the only thing that travels on a session once its preamble was echoed.
//!
//! ```text
//! u32 LE length | u8 type | u32 LE stream | body
//! ```
//!
//! `length` counts type, stream and body, and is at most [`FRAME_LEN_MAX`]. The decoder works on
//! borrowed bytes, refuses a bad header as soon as its first bytes are there, allocates nothing
//! and never panics. It knows the shape of frames, not their order: that is [`crate::mux`].
//!
//! Two properties other parts rely on: the fourth byte of every frame is zero (a length above
//! 64 KiB is refused), and therefore every run of [`FRAME_SPAN_MAX`] bytes of a well-framed
//! stream holds a zero byte. [`crate::preamble`] builds the session restart on that.

use thiserror::Error;

mod buffer;
pub use buffer::FrameBuffer;

/// Most bytes that type, stream and body of one frame take together.
pub const FRAME_LEN_MAX: usize = 64 * 1024;
/// Bytes before the body: length, type, stream.
pub const HEADER_LEN: usize = 9;
/// Type and stream, the part of the header that `length` counts.
const COUNTED_HEADER_LEN: usize = 5;
/// Most bytes one frame takes on the wire, its length field included.
pub const FRAME_SPAN_MAX: usize = 4 + FRAME_LEN_MAX;
/// Most bytes one Data frame carries.
pub const DATA_LEN_MAX: usize = FRAME_LEN_MAX - COUNTED_HEADER_LEN;
/// Most bytes the payload of one Open frame has.
pub const OPEN_PAYLOAD_MAX: usize = 16 * 1024;
/// Most bytes the JSON body of a Hello frame has.
pub const HELLO_LEN_MAX: usize = 16 * 1024;
/// Most bytes the reason of a Reset or Close frame has (UTF-8).
pub const REASON_LEN_MAX: usize = 256;

const TYPE_HELLO: u8 = 1;
const TYPE_OPEN: u8 = 2;
const TYPE_DATA: u8 = 3;
const TYPE_CREDIT: u8 = 4;
const TYPE_EOF: u8 = 5;
const TYPE_RESET: u8 = 6;
const TYPE_PING: u8 = 7;
const TYPE_PONG: u8 = 8;
const TYPE_CLOSE: u8 = 9;

/// One frame, borrowing its body from the buffer it was read from or will be written from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// The guest's first frame: JSON, see [`crate::Hello`].
    Hello(&'a [u8]),
    /// Opens a stream.
    Open {
        /// Id chosen by the opener: odd from the host, even from the guest, rising, never 0.
        stream: u32,
        /// What the stream is for; the meaning belongs to the messages, not to the frame.
        kind: u8,
        /// First bytes for the acceptor, at most [`OPEN_PAYLOAD_MAX`].
        payload: &'a [u8],
    },
    /// Bytes of a stream, never empty, at most [`DATA_LEN_MAX`].
    Data {
        /// The stream.
        stream: u32,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// Gives `bytes` more credit to the sender of a stream.
    Credit {
        /// The stream.
        stream: u32,
        /// How many more bytes may be sent; never 0.
        bytes: u32,
    },
    /// No more Data from this side of the stream.
    Eof {
        /// The stream.
        stream: u32,
    },
    /// Ends a stream in both directions at once.
    Reset {
        /// The stream.
        stream: u32,
        /// Why, as a number: see the `RESET_*` constants of [`crate::mux`].
        code: u16,
        /// Why, in words; at most [`REASON_LEN_MAX`] bytes.
        reason: &'a str,
    },
    /// Asks for a Pong with the same number.
    Ping(u64),
    /// Answers a Ping.
    Pong(u64),
    /// Ends the session.
    Close {
        /// Why, as a number: see the `CLOSE_*` constants of [`crate::mux`].
        code: u16,
        /// Why, in words; at most [`REASON_LEN_MAX`] bytes.
        reason: &'a str,
    },
}

/// Why bytes are not a frame. Each variant is a protocol violation by the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The length field is below the header or above [`FRAME_LEN_MAX`].
    #[error("frame length {len} is outside 5..=65536")]
    Length {
        /// What the field said.
        len: u32,
    },
    /// The type byte is none of this generation's.
    #[error("unknown frame type {kind}")]
    UnknownType {
        /// The type byte.
        kind: u8,
    },
    /// The body is too short or too long for the type.
    #[error("frame type {kind} cannot have a body of {len} bytes")]
    BodyLen {
        /// The type byte.
        kind: u8,
        /// Length of the body.
        len: usize,
    },
    /// A session frame with a stream, or a stream frame without one.
    #[error("frame type {kind} cannot be on stream {stream}")]
    Stream {
        /// The type byte.
        kind: u8,
        /// The stream field.
        stream: u32,
    },
    /// A reason is not UTF-8.
    #[error("the reason in a frame of type {kind} is not UTF-8")]
    Reason {
        /// The type byte.
        kind: u8,
    },
    /// A Credit frame that gives nothing.
    #[error("a credit of zero bytes on stream {stream}")]
    ZeroCredit {
        /// The stream.
        stream: u32,
    },
}

/// Smallest and largest body of a type, `None` for an unknown type.
fn body_bounds(kind: u8) -> Option<(usize, usize)> {
    Some(match kind {
        TYPE_HELLO => (0, HELLO_LEN_MAX),
        TYPE_OPEN => (1, 1 + OPEN_PAYLOAD_MAX),
        TYPE_DATA => (1, DATA_LEN_MAX),
        TYPE_CREDIT => (4, 4),
        TYPE_EOF => (0, 0),
        TYPE_RESET | TYPE_CLOSE => (2, 2 + REASON_LEN_MAX),
        TYPE_PING | TYPE_PONG => (8, 8),
        _ => return None,
    })
}

/// The longest prefix of `reason` that fits a Reset or Close frame, cut between characters.
pub fn clip_reason(reason: &str) -> &str {
    let mut end = reason.len().min(REASON_LEN_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}

fn reason_of(kind: u8, body: &[u8]) -> Result<(u16, &str), FrameError> {
    let (code, reason) = body.split_first_chunk::<2>().ok_or(FrameError::BodyLen {
        kind,
        len: body.len(),
    })?;
    let reason = std::str::from_utf8(reason).map_err(|_| FrameError::Reason { kind })?;
    Ok((u16::from_le_bytes(*code), reason))
}

fn fixed<const N: usize>(kind: u8, body: &[u8]) -> Result<[u8; N], FrameError> {
    body.try_into().map_err(|_| FrameError::BodyLen {
        kind,
        len: body.len(),
    })
}

impl<'a> Frame<'a> {
    /// Reads one frame from the start of `buf` and returns it with the bytes it took.
    ///
    /// `Ok(None)` means that `buf` holds a valid beginning and more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`] as soon as the bytes present cannot begin a frame.
    pub fn decode(buf: &'a [u8]) -> Result<Option<(Frame<'a>, usize)>, FrameError> {
        let Some((length, rest)) = buf.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let claimed = u32::from_le_bytes(*length);
        let len = claimed as usize;
        if !(COUNTED_HEADER_LEN..=FRAME_LEN_MAX).contains(&len) {
            return Err(FrameError::Length { len: claimed });
        }
        let Some((&kind, rest)) = rest.split_first() else {
            return Ok(None);
        };
        let body_len = len - COUNTED_HEADER_LEN;
        let (least, most) = body_bounds(kind).ok_or(FrameError::UnknownType { kind })?;
        if !(least..=most).contains(&body_len) {
            return Err(FrameError::BodyLen {
                kind,
                len: body_len,
            });
        }
        let Some((stream, rest)) = rest.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let stream = u32::from_le_bytes(*stream);
        let on_stream = !matches!(kind, TYPE_HELLO | TYPE_PING | TYPE_PONG | TYPE_CLOSE);
        if on_stream == (stream == 0) {
            return Err(FrameError::Stream { kind, stream });
        }
        let Some(body) = rest.get(..body_len) else {
            return Ok(None);
        };
        Ok(Some((Self::of_parts(kind, stream, body)?, 4 + len)))
    }

    fn of_parts(kind: u8, stream: u32, body: &'a [u8]) -> Result<Frame<'a>, FrameError> {
        Ok(match kind {
            TYPE_HELLO => Frame::Hello(body),
            TYPE_OPEN => {
                let (&open_kind, payload) = body
                    .split_first()
                    .ok_or(FrameError::BodyLen { kind, len: 0 })?;
                Frame::Open {
                    stream,
                    kind: open_kind,
                    payload,
                }
            }
            TYPE_DATA => Frame::Data {
                stream,
                bytes: body,
            },
            TYPE_CREDIT => match u32::from_le_bytes(fixed(kind, body)?) {
                0 => return Err(FrameError::ZeroCredit { stream }),
                bytes => Frame::Credit { stream, bytes },
            },
            TYPE_EOF => Frame::Eof { stream },
            TYPE_RESET => {
                let (code, reason) = reason_of(kind, body)?;
                Frame::Reset {
                    stream,
                    code,
                    reason,
                }
            }
            TYPE_PING => Frame::Ping(u64::from_le_bytes(fixed(kind, body)?)),
            TYPE_PONG => Frame::Pong(u64::from_le_bytes(fixed(kind, body)?)),
            TYPE_CLOSE => {
                let (code, reason) = reason_of(kind, body)?;
                Frame::Close { code, reason }
            }
            _ => return Err(FrameError::UnknownType { kind }),
        })
    }

    /// Appends the frame to `out`.
    ///
    /// A reason that is too long is clipped. The caller keeps the other bounds
    /// ([`OPEN_PAYLOAD_MAX`], [`DATA_LEN_MAX`], [`HELLO_LEN_MAX`]); in debug builds they are
    /// asserted, and a peer would refuse the frame.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        match *self {
            Frame::Hello(body) => put(out, TYPE_HELLO, 0, &[body]),
            Frame::Open {
                stream,
                kind,
                payload,
            } => {
                put(out, TYPE_OPEN, stream, &[&[kind], payload]);
            }
            Frame::Data { stream, bytes } => put(out, TYPE_DATA, stream, &[bytes]),
            Frame::Credit { stream, bytes } => {
                put(out, TYPE_CREDIT, stream, &[&bytes.to_le_bytes()]);
            }
            Frame::Eof { stream } => put(out, TYPE_EOF, stream, &[]),
            Frame::Reset {
                stream,
                code,
                reason,
            } => put(
                out,
                TYPE_RESET,
                stream,
                &[&code.to_le_bytes(), clip_reason(reason).as_bytes()],
            ),
            Frame::Ping(number) => put(out, TYPE_PING, 0, &[&number.to_le_bytes()]),
            Frame::Pong(number) => put(out, TYPE_PONG, 0, &[&number.to_le_bytes()]),
            Frame::Close { code, reason } => {
                put(
                    out,
                    TYPE_CLOSE,
                    0,
                    &[&code.to_le_bytes(), clip_reason(reason).as_bytes()],
                );
            }
        }
    }
}

/// Appends a Data frame whose bytes lie in two pieces, as those of a ring buffer do.
pub(crate) fn put_data(out: &mut Vec<u8>, stream: u32, head: &[u8], tail: &[u8]) {
    put(out, TYPE_DATA, stream, &[head, tail]);
}

fn put(out: &mut Vec<u8>, kind: u8, stream: u32, body: &[&[u8]]) {
    let body_len: usize = body.iter().map(|part| part.len()).sum();
    debug_assert!(
        body_bounds(kind).is_some_and(|(least, most)| (least..=most).contains(&body_len)),
        "frame type {kind} with a body of {body_len} bytes",
    );
    let len = (COUNTED_HEADER_LEN + body_len) as u32;
    out.reserve(HEADER_LEN + body_len);
    out.extend_from_slice(&len.to_le_bytes());
    out.push(kind);
    out.extend_from_slice(&stream.to_le_bytes());
    for part in body {
        out.extend_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoded(frame: Frame<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        frame.encode_into(&mut out);
        out
    }

    #[test]
    fn wire_layout_is_fixed() {
        assert_eq!(
            encoded(Frame::Data {
                stream: 0x0102_0304,
                bytes: b"ab"
            }),
            [7, 0, 0, 0, 3, 4, 3, 2, 1, b'a', b'b']
        );
        assert_eq!(
            encoded(Frame::Reset {
                stream: 2,
                code: 0x0605,
                reason: "x"
            }),
            [8, 0, 0, 0, 6, 2, 0, 0, 0, 5, 6, b'x']
        );
    }

    #[test]
    fn bad_headers_are_refused_before_the_body_arrives() {
        let refused = |bytes: &[u8]| Frame::decode(bytes).unwrap_err();
        assert_eq!(refused(&[4, 0, 0, 0]), FrameError::Length { len: 4 });
        assert_eq!(refused(&[1, 0, 1, 0]), FrameError::Length { len: 65537 });
        assert_eq!(
            refused(&[9, 0, 0, 0, 77]),
            FrameError::UnknownType { kind: 77 }
        );
        assert_eq!(
            refused(&[6, 0, 0, 0, 5]),
            FrameError::BodyLen { kind: 5, len: 1 }
        );
        assert_eq!(
            refused(&[5, 0, 0, 0, 3]),
            FrameError::BodyLen { kind: 3, len: 0 }
        );
        let eof_on_zero = [5, 0, 0, 0, 5, 0, 0, 0, 0];
        assert_eq!(
            refused(&eof_on_zero),
            FrameError::Stream { kind: 5, stream: 0 }
        );
        let ping_on_one = [13, 0, 0, 0, 7, 1, 0, 0, 0];
        assert_eq!(
            refused(&ping_on_one),
            FrameError::Stream { kind: 7, stream: 1 }
        );
        let zero_credit = [9, 0, 0, 0, 4, 1, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(refused(&zero_credit), FrameError::ZeroCredit { stream: 1 });
        let latin1 = [8, 0, 0, 0, 9, 0, 0, 0, 0, 1, 0, 0xff];
        assert_eq!(refused(&latin1), FrameError::Reason { kind: 9 });
    }

    #[test]
    fn a_long_reason_is_clipped_between_characters() {
        let reason = "a".to_owned() + &"é".repeat(200);
        let bytes = encoded(Frame::Close {
            code: 1,
            reason: &reason,
        });
        let (frame, taken) = Frame::decode(&bytes).unwrap().unwrap();
        assert_eq!(taken, bytes.len());
        let Frame::Close { reason: got, .. } = frame else {
            panic!("{frame:?}")
        };
        assert_eq!(got.len(), 255);
        assert!(reason.starts_with(got));
    }

    #[test]
    fn the_largest_frame_fits_the_smallest_buffer_at_any_offset() {
        let body = vec![7; DATA_LEN_MAX];
        let mut wire = encoded(Frame::Eof { stream: 1 });
        wire.extend(encoded(Frame::Data {
            stream: 1,
            bytes: &body,
        }));
        let mut buffer = FrameBuffer::new(0);
        let mut fed = 0;
        let mut seen = 0;
        while seen < 2 {
            fed += buffer.push(&wire[fed..]);
            while let Some(frame) = buffer.next_frame().unwrap() {
                seen += 1;
                assert!(matches!(frame, Frame::Eof { .. } | Frame::Data { .. }));
            }
        }
        assert!(buffer.rest().is_empty());
    }

    #[derive(Debug, Clone)]
    enum Owned {
        Hello(Vec<u8>),
        Open(u32, u8, Vec<u8>),
        Data(u32, Vec<u8>),
        Credit(u32, u32),
        Eof(u32),
        Reset(u32, u16, String),
        Ping(u64),
        Pong(u64),
        Close(u16, String),
    }

    impl Owned {
        fn frame(&self) -> Frame<'_> {
            match self {
                Owned::Hello(body) => Frame::Hello(body),
                Owned::Open(stream, kind, payload) => Frame::Open {
                    stream: *stream,
                    kind: *kind,
                    payload,
                },
                Owned::Data(stream, bytes) => Frame::Data {
                    stream: *stream,
                    bytes,
                },
                Owned::Credit(stream, bytes) => Frame::Credit {
                    stream: *stream,
                    bytes: *bytes,
                },
                Owned::Eof(stream) => Frame::Eof { stream: *stream },
                Owned::Reset(stream, code, reason) => Frame::Reset {
                    stream: *stream,
                    code: *code,
                    reason,
                },
                Owned::Ping(number) => Frame::Ping(*number),
                Owned::Pong(number) => Frame::Pong(*number),
                Owned::Close(code, reason) => Frame::Close {
                    code: *code,
                    reason,
                },
            }
        }
    }

    fn any_frame() -> impl Strategy<Value = Owned> {
        let id = 1u32..;
        let reason = "[a-zé]{0,100}";
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..2000).prop_map(Owned::Hello),
            (
                id.clone(),
                any::<u8>(),
                prop::collection::vec(any::<u8>(), 0..2000)
            )
                .prop_map(|(stream, kind, payload)| Owned::Open(stream, kind, payload)),
            (id.clone(), prop::collection::vec(any::<u8>(), 1..4000))
                .prop_map(|(stream, bytes)| Owned::Data(stream, bytes)),
            (id.clone(), 1u32..).prop_map(|(stream, bytes)| Owned::Credit(stream, bytes)),
            id.clone().prop_map(Owned::Eof),
            (id, any::<u16>(), reason).prop_map(|(s, code, reason)| Owned::Reset(s, code, reason)),
            any::<u64>().prop_map(Owned::Ping),
            any::<u64>().prop_map(Owned::Pong),
            (any::<u16>(), reason).prop_map(|(code, reason)| Owned::Close(code, reason)),
        ]
    }

    proptest! {
        #[test]
        fn frames_survive_the_wire_in_any_pieces(
            frames in prop::collection::vec(any_frame(), 1..12),
            piece in 1usize..3000,
        ) {
            let mut wire = Vec::new();
            for frame in &frames {
                frame.frame().encode_into(&mut wire);
            }
            let mut buffer = FrameBuffer::new(0);
            let mut expected = frames.iter();
            for mut bytes in wire.chunks(piece) {
                while !bytes.is_empty() {
                    let count = buffer.push(bytes);
                    bytes = &bytes[count..];
                    while let Some(frame) = buffer.next_frame().unwrap() {
                        prop_assert_eq!(frame, expected.next().unwrap().frame());
                    }
                }
            }
            prop_assert!(expected.next().is_none());
            prop_assert!(buffer.rest().is_empty());
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_reencode_to_themselves(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            if let Ok(Some((frame, taken))) = Frame::decode(&bytes) {
                prop_assert_eq!(encoded(frame), &bytes[..taken]);
            }
        }

        #[test]
        fn plausible_bytes_never_panic_and_reencode_to_themselves(
            len in 0u8..40, kind in 0u8..11, stream in 0u8..3,
            body in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut bytes = vec![len, 0, 0, 0, kind, stream, 0, 0, 0];
            bytes.extend(body);
            if let Ok(Some((frame, taken))) = Frame::decode(&bytes) {
                prop_assert_eq!(encoded(frame), &bytes[..taken]);
            }
        }
    }
}
