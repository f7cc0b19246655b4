//! Text that remembers where each of its bytes stood in the source file.
//!
//! An instruction may be spread over continuation lines; what is replaced in it must be found again in the file.

use std::ops::Range;

/// Bytes of a logical line with their offsets in the source file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spelled {
    text: String,
    at: Vec<u32>,
}

impl Spelled {
    /// Appends `piece`, which stands at `offset` in the source.
    pub(super) fn push(&mut self, piece: &str, offset: usize) {
        self.text.push_str(piece);
        // The file is at most 1 MiB, so offsets fit.
        let start = u32::try_from(offset).unwrap_or(u32::MAX);
        self.at.extend((0..piece.len() as u32).map(|i| start + i));
    }

    /// The text, continuations joined.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The part `range` (byte offsets in [`Self::text`], on character boundaries).
    pub(super) fn slice(&self, range: Range<usize>) -> Self {
        Self {
            text: self.text[range.clone()].to_owned(),
            at: self.at[range].to_vec(),
        }
    }

    /// Without white space at both ends.
    pub(super) fn trim(&self) -> Self {
        let start = self.text.len() - self.text.trim_start().len();
        let end = self.text.trim_end().len();
        self.slice(start..end.max(start))
    }

    /// From first to last byte in the source; `None` when empty.
    #[must_use]
    pub fn span(&self) -> Option<Range<usize>> {
        match (self.at.first(), self.at.last()) {
            (Some(first), Some(last)) => Some(*first as usize..*last as usize + 1),
            _ => None,
        }
    }

    /// Words separated by white space, no quoting.
    pub(super) fn words(&self) -> Vec<Self> {
        let mut words = Vec::new();
        let mut start = None;
        for (i, c) in self.text.char_indices() {
            match (c.is_whitespace(), start) {
                (true, Some(from)) => {
                    words.push(self.slice(from..i));
                    start = None;
                }
                (false, None) => start = Some(i),
                _ => {}
            }
        }
        if let Some(from) = start {
            words.push(self.slice(from..self.text.len()));
        }
        words
    }
}
