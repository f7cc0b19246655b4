//! Reads a tar stream entry by entry: ustar, GNU long names and sparse files, PAX headers (POSIX `pax`, section "Extended Header").
//!
//! The stream is a tenant's. What precedes an entry is bounded; a value of a PAX record may hold any byte (names with
//! newlines, capabilities); what is malformed is an error, never guessed at. Where readers differ, this one does as the
//! container engines do: an entry that has no content has size 0 whatever its header says.

use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

/// A tar stream comes in blocks of so many bytes.
const BLOCK: usize = 512;
/// Most bytes of one extended header or long name.
const EXTRA_MAX: u64 = 1024 * 1024;
/// Most pieces of a sparse file.
const PIECES_MAX: usize = 65_536;
/// Where the checksum is in a header; it counts as spaces.
const CHECKSUM: std::ops::Range<usize> = 148..156;

/// What precedes the content of one entry.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) kind: EntryType,
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) header: Header,
    /// PAX records, names and values.
    pub(super) records: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: Option<Sparse>,
}

/// Where the content of a sparse file belongs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Sparse {
    /// Offsets and lengths, in order and apart.
    pub(super) pieces: Vec<(u64, u64)>,
    /// Size of the whole file.
    pub(super) size: u64,
}

/// Headers that describe the next entry.
#[derive(Default)]
struct Before {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A tar stream.
#[derive(Debug)]
pub(super) struct Reader<R> {
    source: R,
    /// Bytes of the entry's content that were not read.
    left: u64,
    /// Bytes between the content and the next header.
    padding: u64,
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl<R: Read> Reader<R> {
    pub(super) fn new(source: R) -> Self {
        Self {
            source,
            left: 0,
            padding: 0,
        }
    }

    /// The next entry. Content of the one before that was not read is skipped.
    pub(super) fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut before = Before::default();
        loop {
            self.skip()?;
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let kind = header.entry_type();
            match kind {
                EntryType::XHeader => before.records = records(&self.extra(&header)?)?,
                EntryType::GNULongName => before.path = Some(text(self.extra(&header)?)),
                EntryType::GNULongLink => before.link = Some(text(self.extra(&header)?)),
                EntryType::XGlobalHeader => self.begin(header.entry_size()?),
                _ => return self.entry(header, before).map(Some),
            }
        }
    }

    fn entry(&mut self, header: Header, before: Before) -> io::Result<Entry> {
        let record = |name: &str| {
            let found = before.records.iter().rev();
            found
                .clone()
                .find(|(key, _)| key == name.as_bytes())
                .map(|(_, value)| value.clone())
        };
        let number = |name: &str| record(name).map(|value| decimal(&value)).transpose();
        let path = record("path").or(before.path);
        let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = record("linkpath").or(before.link);
        let link = link.or_else(|| header.link_name_bytes().map(|link| link.into_owned()));
        let mut kind = header.entry_type();
        if kind == EntryType::Regular && path.ends_with(b"/") {
            kind = EntryType::Directory;
        }
        let mut entry = Entry {
            kind,
            link: link.unwrap_or_default(),
            uid: number("uid")?.map_or_else(|| owner(&header.as_old().uid, header.uid()), Ok)?,
            gid: number("gid")?.map_or_else(|| owner(&header.as_old().gid, header.gid()), Ok)?,
            path,
            sparse: None,
            records: Vec::new(),
            header,
        };
        let has_content = matches!(
            kind,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse
        );
        if kind == EntryType::GNUSparse {
            entry.sparse = Some(self.sparse(&entry.header)?);
        }
        if has_content {
            self.begin(number("size")?.map_or_else(|| entry.header.entry_size(), Ok)?);
        }
        entry.records = before.records;
        Ok(entry)
    }

    /// A header whose checksum is right; `None` at the end of the archive.
    fn header(&mut self) -> io::Result<Option<Header>> {
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while filled < BLOCK {
            match self.source.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let counted = block
            .iter()
            .enumerate()
            .map(|(at, byte)| match CHECKSUM.contains(&at) {
                true => u32::from(b' '),
                false => u32::from(*byte),
            });
        if counted.sum::<u32>() != header.cksum()? {
            return Err(malformed("a header's checksum is wrong"));
        }
        Ok(Some(header))
    }

    fn begin(&mut self, size: u64) {
        self.left = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    /// The content of an extended header.
    fn extra(&mut self, header: &Header) -> io::Result<Vec<u8>> {
        let size = header.entry_size()?;
        if size > EXTRA_MAX {
            return Err(malformed("an extended header is too long"));
        }
        self.begin(size);
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        match bytes.len() as u64 == size {
            true => Ok(bytes),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn skip(&mut self) -> io::Result<()> {
        let rest = self.left.saturating_add(std::mem::take(&mut self.padding));
        self.left = 0;
        let skipped = io::copy(&mut (&mut self.source).take(rest), &mut io::sink())?;
        match skipped == rest {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// The map of a sparse file in GNU's old form: in the header, and in blocks behind it.
    fn sparse(&mut self, header: &Header) -> io::Result<Sparse> {
        let gnu = header.as_gnu();
        let gnu = gnu.ok_or_else(|| malformed("a sparse file without GNU's header"))?;
        let mut sparse = Sparse {
            pieces: Vec::new(),
            size: gnu.real_size()?,
        };
        sparse.add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            self.source.read_exact(block.as_mut_bytes())?;
            sparse.add(block.sparse())?;
            more = block.is_extended();
        }
        let stored: u64 = sparse.pieces.iter().map(|(_, len)| len).sum();
        match stored == header.entry_size()? {
            true => Ok(sparse),
            false => Err(malformed("a sparse file's pieces are not its content")),
        }
    }
}

impl<R: Read> Read for Reader<R> {
    /// Reads the entry's content.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        match self.source.read(&mut buffer[..most])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.left -= count as u64;
                Ok(count)
            }
        }
    }
}

impl Sparse {
    fn add(&mut self, pieces: &[GnuSparseHeader]) -> io::Result<()> {
        for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
            let (offset, len) = (piece.offset()?, piece.length()?);
            let before = self.pieces.last().map_or(0, |(offset, len)| offset + len);
            let end = offset.checked_add(len);
            if offset < before || end.is_none_or(|end| end > self.size) {
                return Err(malformed("a sparse file's pieces are not in order"));
            }
            if self.pieces.len() == PIECES_MAX {
                return Err(malformed("a sparse file has too many pieces"));
            }
            self.pieces.push((offset, len));
        }
        Ok(())
    }
}

/// An owner's number; a field with nothing in it means 0.
fn owner(field: &[u8; 8], parsed: io::Result<u64>) -> io::Result<u64> {
    match field.iter().all(|byte| matches!(byte, 0 | b' ')) {
        true => Ok(0),
        false => parsed,
    }
}

/// A long name without the zeros behind it.
fn text(mut bytes: Vec<u8>) -> Vec<u8> {
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    bytes
}

fn decimal(text: &[u8]) -> io::Result<u64> {
    let number = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok());
    number.ok_or_else(|| malformed("a number of an extended header is none"))
}

/// The records of a PAX header, each `LENGTH NAME=VALUE` and a newline; the length counts all of it.
fn records(mut bytes: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let wrong = || malformed("a record of an extended header is malformed");
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let space = bytes
            .iter()
            .position(|byte| *byte == b' ')
            .ok_or_else(wrong)?;
        let len = usize::try_from(decimal(&bytes[..space])?).map_err(|_| wrong())?;
        if len > bytes.len() || len < space + 2 || bytes[len - 1] != b'\n' {
            return Err(wrong());
        }
        let record = &bytes[space + 1..len - 1];
        let equals = record
            .iter()
            .position(|byte| *byte == b'=')
            .ok_or_else(wrong)?;
        found.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        bytes = &bytes[len..];
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tar::Builder;

    fn pax(name: &str, value: &[u8]) -> Vec<u8> {
        let rest = name.len() + value.len() + 3;
        let len = (1..8)
            .map(|digits| rest + digits)
            .find(|len| len.to_string().len() + rest == *len);
        let mut record = format!("{} {name}=", len.unwrap()).into_bytes();
        record.extend_from_slice(value);
        record.push(b'\n');
        record
    }

    #[test]
    fn values_of_records_hold_any_byte() {
        let mut bytes = pax("path", b"a\nb\0c=d");
        bytes.extend(pax("SCHILY.xattr.security.capability", &[1, 0, 10, 10, 0]));
        bytes.extend(pax("comment", b""));
        let found = records(&bytes).unwrap();
        assert_eq!(found[0], (b"path".to_vec(), b"a\nb\0c=d".to_vec()));
        assert_eq!(found[1].1, [1, 0, 10, 10, 0]);
        assert_eq!(found[2].1, b"");
        for bad in [
            "5", "x a=b\n", "6 a=b", "99 a=b\n", "4 a\n", "3 \n", "0 a=b\n", "-6 a=b\n",
        ] {
            assert!(records(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_precedes_an_entry_is_bounded_and_whole() {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::XHeader);
        header.set_size(EXTRA_MAX + 1);
        header.set_cksum();
        let error = Reader::new(&header.as_bytes()[..]).next().unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
        header.set_size(100);
        header.set_cksum();
        assert!(Reader::new(&header.as_bytes()[..]).next().is_err(), "cut");
        header.set_size(101);
        let error = Reader::new(&header.as_bytes()[..]).next().unwrap_err();
        assert!(error.to_string().contains("checksum"), "{error}");
    }

    #[test]
    fn entries_without_content_have_none() {
        let mut link = Header::new_gnu();
        link.set_entry_type(EntryType::Symlink);
        link.set_path("link").unwrap();
        link.set_size(1 << 40);
        link.set_cksum();
        let mut file = Header::new_gnu();
        file.set_path("dir/").unwrap();
        file.set_size(0);
        file.set_cksum();
        let bytes = [&link.as_bytes()[..], file.as_bytes()].concat();
        let mut reader = Reader::new(&bytes[..]);
        assert_eq!(reader.next().unwrap().unwrap().kind, EntryType::Symlink);
        assert_eq!(reader.next().unwrap().unwrap().kind, EntryType::Directory);
        assert!(reader.next().unwrap().is_none());
    }

    proptest! {
        #[test]
        fn what_a_builder_writes_is_read(
            files in prop::collection::vec(("[a-z\n]{1,300}", prop::collection::vec(any::<u8>(), 0..2000)), 0..6),
        ) {
            let mut builder = Builder::new(Vec::new());
            for (name, content) in &files {
                let mut header = Header::new_gnu();
                header.set_size(content.len() as u64);
                builder.append_data(&mut header, name, &content[..]).unwrap();
            }
            let bytes = builder.into_inner().unwrap();
            let mut reader = Reader::new(&bytes[..]);
            for (name, content) in &files {
                let entry = reader.next().unwrap().unwrap();
                prop_assert_eq!(&entry.path[..], name.as_bytes());
                let mut read = Vec::new();
                reader.read_to_end(&mut read).unwrap();
                prop_assert_eq!(&read, content);
            }
            prop_assert!(reader.next().unwrap().is_none());
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            kinds in prop::collection::vec(any::<u8>(), 1..5),
            noise in prop::collection::vec(any::<u8>(), 0..3000),
        ) {
            let mut bytes = Vec::new();
            for (at, kind) in kinds.iter().enumerate() {
                let mut header = Header::new_gnu();
                header.set_entry_type(EntryType::new(*kind));
                header.set_size(noise.len() as u64 / (at as u64 + 1));
                header.set_cksum();
                bytes.extend_from_slice(header.as_bytes());
                bytes.extend_from_slice(&noise);
            }
            let mut reader = Reader::new(&bytes[..]);
            while let Ok(Some(_)) = reader.next() {}
        }
    }
}
