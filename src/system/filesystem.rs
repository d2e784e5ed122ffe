//! The file system of a directory: its kind and its free space.

use std::io;
use std::path::Path;

use rustix::fs::{Access, access, statfs, statvfs};

/// The properties of a file system that openwork depends on.
pub struct Filesystem {
    /// The name of a network or user-space file system, where locks and syncs depend on another program;
    /// `None` for the local ones.
    pub remote: Option<&'static str>,
    /// Bytes that this user may still write.
    pub available: u64,
    /// Whether a new file would find an inode.
    pub has_inodes: bool,
}

impl Filesystem {
    /// The file system of a path.
    ///
    /// # Errors
    /// Those of statfs(2).
    pub fn of(path: &Path) -> io::Result<Filesystem> {
        let (kind, space) = (statfs(path)?.f_type, statvfs(path)?);
        // Some file systems count no inodes.
        let has_inodes = space.f_files == 0 || space.f_favail > 0;
        Ok(Filesystem {
            remote: remote(kind as u64),
            available: space.f_bavail.saturating_mul(space.f_frsize),
            has_inodes,
        })
    }
}

/// The name of a network or user-space file system, by its magic number (linux/magic.h, else the sources of the
/// file system).
fn remote(magic: u64) -> Option<&'static str> {
    // The field is signed on some architectures: only the low half counts.
    Some(match magic & 0xffff_ffff {
        0x6969 => "NFS",
        0x517b | 0xfe53_4d42 | 0xff53_4d42 => "SMB",
        0x0102_1997 => "9P",
        0x5346_414f => "AFS",
        0x00c3_6400 => "Ceph",
        0x0bd0_0bd0 => "Lustre",
        0x6573_5546 => "FUSE",
        _ => return None,
    })
}

/// Whether this user may list, enter and change a directory.
///
/// # Errors
/// The reason: `PermissionDenied`, `ReadOnlyFilesystem`, and the others of access(2).
pub fn may_change(directory: &Path) -> io::Result<()> {
    Ok(access(directory, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_network_file_systems_are_named() {
        // As stat(1) shows them: `stat -f -c %t`.
        let named =
            [("6969", "NFS"), ("1021997", "9P"), ("5346414f", "AFS"), ("c36400", "Ceph"), ("bd00bd0", "Lustre")];
        let smb = [("517b", "SMB"), ("fe534d42", "SMB"), ("ff534d42", "SMB")];
        for (magic, name) in named.into_iter().chain(smb).chain([("65735546", "FUSE")]) {
            assert_eq!(remote(u64::from_str_radix(magic, 16).unwrap()), Some(name));
        }
        // A number that was negative; then ext4, btrfs, tmpfs, overlay.
        assert_eq!(remote(0xff53_4d42u32 as i32 as i64 as u64), Some("SMB"));
        for local in [0xef53, 0x9123_683e, 0x0102_1994, 0x794c_7630] {
            assert_eq!(remote(local), None, "{local:x}");
        }
    }

    #[test]
    fn free_space_of_a_directory_is_measured() {
        let here = Filesystem::of(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
        assert!(here.available > 0 && here.has_inodes);
        may_change(&std::env::temp_dir()).unwrap();
        assert_eq!(may_change(Path::new("/no/such")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
