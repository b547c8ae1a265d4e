"""Where the images of records may be, apart from their root. This module imports nothing heavy, since recipe checks
use it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fusion_hf.common.errors import InputError
from fusion_hf.common.image_hosts import HostPolicy


@dataclass(frozen=True)
class ImagePlaces:
    """
    Where images may be, apart from the root of their records.

    Attributes:
        folders: resolved folders that absolute paths and symbolic links may point to.
        hosts: the hosts that images may be downloaded from.
    """

    folders: tuple[Path, ...] = ()
    hosts: HostPolicy = field(default_factory=HostPolicy)

    @classmethod
    def named(
        cls, folders: Iterable[str | Path] | None, hosts: Iterable[str] | None, private_hosts: Iterable[str] | None
    ) -> "ImagePlaces":
        """
        Make the places from the names that a user gives.

        Args:
            folders: the folders. None means no folder.
            hosts: the hosts. None means no host.
            private_hosts: the hosts of a private network or of this machine. None means no host.

        Raises:
            InputError: if a folder does not exist, or a host is invalid.
        """
        resolved = []
        for folder in map(Path, folders or ()):
            if not folder.expanduser().is_dir():
                raise InputError(f"`image_roots` must contain folders, got {folder}, which is not a folder.")
            resolved.append(folder.expanduser().resolve())
        return cls(tuple(resolved), HostPolicy.parse(hosts or (), private_hosts or ()))


NO_PLACES = ImagePlaces()
