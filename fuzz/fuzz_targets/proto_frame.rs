//! Frames: arbitrary bytes in arbitrary pieces decode alike, and what decodes encodes to itself.
#![no_main]

use kiln_proto::frame::{Frame, FrameBuffer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&piece, bytes)) = input.split_first() else {
        return;
    };
    let mut whole = Vec::new();
    let mut rest = bytes;
    let end = loop {
        match Frame::decode(rest) {
            Ok(Some((frame, taken))) => {
                frame.encode_into(&mut whole);
                rest = &rest[taken..];
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    assert_eq!(whole, bytes[..whole.len()]);

    let mut buffer = FrameBuffer::new(0);
    let mut pieces = Vec::new();
    let mut verdict = Ok(());
    'all: for mut piece in bytes.chunks(usize::from(piece) + 1) {
        while !piece.is_empty() {
            let taken = buffer.push(piece);
            piece = &piece[taken..];
            loop {
                match buffer.next_frame() {
                    Ok(Some(frame)) => frame.encode_into(&mut pieces),
                    Ok(None) => break,
                    Err(error) => {
                        verdict = Err(error);
                        break 'all;
                    }
                }
            }
        }
    }
    assert_eq!((verdict, pieces), (end, whole));
});
