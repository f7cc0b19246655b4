//! Server-sent events, as far as kiln's server sends them: `id`, `event`, `data`, comments.

/// Largest event, bytes.
const EVENT_MAX: usize = 4 << 20;

/// One event.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Frame {
    /// Its number, when it has one.
    pub(crate) id: Option<u64>,
    /// Its kind.
    pub(crate) kind: String,
    /// Its data.
    pub(crate) data: String,
}

/// Bytes on their way to events.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    rest: Vec<u8>,
}

/// An event is larger than any.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event has more than {EVENT_MAX} bytes")]
pub(crate) struct TooLarge;

impl Frames {
    /// Takes what arrived.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), TooLarge> {
        if self.rest.len() + bytes.len() > EVENT_MAX {
            return Err(TooLarge);
        }
        self.rest.extend_from_slice(bytes);
        Ok(())
    }

    /// The next whole event; comments are none.
    pub(crate) fn next(&mut self) -> Option<Frame> {
        loop {
            let end = self.rest.windows(2).position(|pair| pair == b"\n\n")?;
            let text = String::from_utf8_lossy(&self.rest[..end]).into_owned();
            self.rest.drain(..end + 2);
            let mut frame = Frame::default();
            for line in text.lines() {
                let (name, value) = line.split_once(':').unwrap_or((line, ""));
                let value = value.strip_prefix(' ').unwrap_or(value);
                match name {
                    "id" => frame.id = value.parse().ok(),
                    "event" => value.clone_into(&mut frame.kind),
                    "data" if frame.data.is_empty() => value.clone_into(&mut frame.data),
                    "data" => {
                        frame.data.push('\n');
                        frame.data.push_str(value);
                    }
                    _ => {}
                }
            }
            if frame != Frame::default() {
                return Some(frame);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_in_any_pieces() {
        let text = ": \n\nid: 7\nevent: phase\ndata: {\"a\":1}\n\n: still here\n\nevent: end\ndata: {}\n\nid: 9";
        for size in [1, 2, 3, 7, text.len()] {
            let mut frames = Frames::default();
            let mut seen = Vec::new();
            for piece in text.as_bytes().chunks(size) {
                frames.push(piece).expect("small");
                while let Some(frame) = frames.next() {
                    seen.push((frame.id, frame.kind, frame.data));
                }
            }
            let want = [
                (Some(7), "phase".to_owned(), "{\"a\":1}".to_owned()),
                (None, "end".to_owned(), "{}".to_owned()),
            ];
            assert_eq!(seen, want, "{size}");
        }
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut frames = Frames::default();
        assert_eq!(frames.push(&vec![b'x'; EVENT_MAX]), Ok(()));
        assert_eq!(frames.push(b"x"), Err(TooLarge));
    }
}
