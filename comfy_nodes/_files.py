"""Files that nodes save and load by name: in ComfyUI's models and output folders, never outside of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


NO_FILES = "none saved yet"


def check_name(name: str) -> bool | str:
    """For `validate_inputs`: True for a plain file name, else what is wrong with it."""
    plain = name.strip() and Path(name).name == name and not name.startswith(".") and "\\" not in name
    return bool(plain) or f"name is {name!r}: give a file name without folders"


@dataclass(frozen=True)
class SavedFiles:
    """Files of one kind: `models/<folder>` and `output/<folder>`.

    Args:
        folder: Name of both folders.
        suffix: With its dot.
        what: What such a file holds, for messages.
    """

    folder: str
    suffix: str
    what: str

    def folders(self) -> list[Path]:
        """The models folder, which hides equal names in the output folder, and the output folder."""
        import folder_paths

        return [Path(p) / self.folder for p in (folder_paths.models_dir, folder_paths.get_output_directory())]

    def by_name(self) -> dict[str, Path]:
        """All files that there are."""
        return {
            path.name: path for folder in reversed(self.folders()) for path in sorted(folder.glob("*" + self.suffix))
        }

    def options(self) -> list[str]:
        """Choices of a combo input, never empty."""
        return sorted(self.by_name()) or [NO_FILES]

    def find(self, name: str) -> Path:
        """The file of that name.

        Raises:
            ValueError: There is none.
        """
        path = self.by_name().get(name)
        if path is None:
            raise ValueError(f"no {self.what} {name!r} in models/{self.folder} or output/{self.folder}")
        return path

    def new(self, name: str) -> Path:
        """Where to save under that name: in the output folder, which is created.

        Raises:
            ValueError: It is no plain file name.
        """
        if check_name(name) is not True:
            raise ValueError(str(check_name(name)))
        path = self.folders()[1] / f"{name}{self.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
