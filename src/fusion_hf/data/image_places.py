"""Where the images of records may be, beside the root of these. Imports nothing heavy: recipes are checked by it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fusion_hf.common.errors import InputError
from fusion_hf.common.image_hosts import HostPolicy


@dataclass(frozen=True)
class ImagePlaces:
    """
    Where images may be beside the root of their records.

    Attributes:
        folders: resolved; absolute paths may lead there, and links below the root.
        hosts: of images at http(s) addresses.
    """

    folders: tuple[Path, ...] = ()
    hosts: HostPolicy = field(default_factory=HostPolicy)

    @classmethod
    def named(
        cls, folders: Iterable[str | Path] | None, hosts: Iterable[str] | None, private_hosts: Iterable[str] | None
    ) -> "ImagePlaces":
        """
        Places as a user names them; None stands for none.

        Raises:
            InputError: for a folder that is none, and what is no host.
        """
        resolved = []
        for folder in map(Path, folders or ()):
            if not folder.expanduser().is_dir():
                raise InputError(f"image_roots: {folder} is no folder; name one that images are under.")
            resolved.append(folder.expanduser().resolve())
        return cls(tuple(resolved), HostPolicy.parse(hosts or (), private_hosts or ()))


NO_PLACES = ImagePlaces()
