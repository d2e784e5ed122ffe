//! Bytes that no client sends.

/// Numbers that look random and are the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }

    pub fn mutate(&mut self, bytes: &mut Vec<u8>) {
        const PIECES: [&[u8]; 16] = [
            b"\r\n",
            b"\n",
            b"\0",
            b" ",
            b":",
            b"\r\n\r\n",
            b"%",
            b"\xff",
            b"Content-Length: 5\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Host: x\r\n",
            b"HTTP/1.1",
            b"/../",
            b"99999999999999999999",
            b"{",
            b"\t",
        ];
        let at = self.below(bytes.len());
        match self.below(5) {
            0 => bytes[at] = self.below(256) as u8,
            1 if bytes.len() > 1 => drop(bytes.remove(at)),
            2 => bytes.truncate(at + 1),
            3 => drop(bytes.splice(at..at, PIECES[self.below(PIECES.len())].iter().copied())),
            _ => {
                let end = at + self.below(bytes.len() - at + 1);
                let copy = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, copy));
            }
        }
    }
}
