//! Writes cpio archives in the "new ASCII" format, which the Linux kernel unpacks as its first root.
//!
//! Source: Documentation/driver-api/early-userspace/buffer-format.rst. Deterministic: entries get
//! running inode numbers, time 0 and owner root. Read next: [`super::initrd`].

use std::io::{self, Write};

/// Magic of the format without checksums.
const MAGIC: &str = "070701";
/// Name that ends an archive.
const TRAILER: &str = "TRAILER!!!";
/// Type bits of a directory.
const S_IFDIR: u32 = 0o040_000;
/// Type bits of a regular file.
const S_IFREG: u32 = 0o100_000;
/// The kernel reads whole archives in steps of this size; archives are padded to it.
const BLOCK: usize = 512;

/// An archive being written.
#[derive(Debug)]
pub struct CpioWriter<W> {
    out: W,
    written: usize,
    inode: u32,
}

impl<W: Write> CpioWriter<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            inode: 0,
        }
    }

    /// Adds a directory. Parents come first.
    ///
    /// # Errors
    /// When the output cannot be written or the name is not acceptable.
    pub fn directory(&mut self, name: &str, mode: u32) -> io::Result<()> {
        self.entry(name, S_IFDIR | (mode & 0o7777), 2, &[])
    }

    /// Adds a file.
    ///
    /// # Errors
    /// When the output cannot be written, or name or content are not acceptable (4 GiB and more are not).
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, S_IFREG | (mode & 0o7777), 1, content)
    }

    /// Ends the archive and returns the output.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.header(TRAILER, 0, 1, 0)?;
        self.pad(BLOCK)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, links: u32, content: &[u8]) -> io::Result<()> {
        let relative = !name.is_empty() && !name.starts_with('/') && !name.contains('\0');
        if !relative || name == TRAILER {
            return Err(io::Error::other(format!(
                "{name:?} cannot be a name in an archive"
            )));
        }
        let length = u32::try_from(content.len()).map_err(io::Error::other)?;
        self.inode += 1;
        self.header(name, mode, links, length)?;
        self.put(content)?;
        self.pad(4)
    }

    fn header(&mut self, name: &str, mode: u32, links: u32, length: u32) -> io::Result<()> {
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        // inode, mode, uid, gid, links, time, length, device (2), device of a node (2), name size, checksum
        let fields = [
            self.inode, mode, 0, 0, links, 0, length, 0, 0, 0, 0, name_size, 0,
        ];
        let mut text = String::from(MAGIC);
        for field in fields {
            text.push_str(&format!("{field:08X}"));
        }
        self.put(text.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad(4)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len();
        Ok(())
    }

    fn pad(&mut self, to: usize) -> io::Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        self.put(&[0; BLOCK][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_documented_one() {
        let mut cpio = CpioWriter::new(Vec::new());
        cpio.directory("d", 0o755).expect("memory");
        cpio.file("d/f", 0o644, b"hello").expect("memory");
        let bytes = cpio.finish().expect("memory");
        assert_eq!(bytes.len() % BLOCK, 0);
        let header = &bytes[..110];
        assert_eq!(&header[..6], b"070701");
        assert_eq!(&header[14..22], b"000041ED", "mode of the directory");
        // 110 bytes of header, "d\0", to 112; the next header starts there.
        assert_eq!(&bytes[112..118], b"070701");
        assert_eq!(
            &bytes[112 + 54..112 + 62],
            b"00000005",
            "length of the file"
        );
        // 112 + 110 + "d/f\0" = 226, padded to 228.
        assert_eq!(&bytes[228..233], b"hello");
        let tail = String::from_utf8_lossy(&bytes);
        assert!(tail.contains(TRAILER));
    }

    #[test]
    fn names_that_would_break_the_archive_are_refused() {
        for bad in ["", "/a", "a\0b", TRAILER] {
            let mut cpio = CpioWriter::new(Vec::new());
            assert!(cpio.file(bad, 0o644, b"").is_err(), "{bad:?}");
        }
    }
}
