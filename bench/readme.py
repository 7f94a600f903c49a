"""The README's generated sections: each stands between two comments, and a command writes it from filed results."""

from dataclasses import dataclass
from pathlib import Path

from visattn import files

README = Path(__file__).resolve().parent.parent / "README.md"


@dataclass(frozen=True)
class Section:
    """A section's name and the command that writes it, as its first comment has them."""

    name: str
    command: str

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: written by {self.command} -->"

    @property
    def end(self) -> str:
        return f"<!-- end of {self.name} -->"

    def replaced(self, text: str, new: str) -> str:
        """The text with `new` as its section.

        Raises:
            ValueError: it has no such section.
        """
        before, found, rest = text.partition(self.begin)
        _, closed, after = rest.partition(self.end)
        if not (found and closed):
            raise ValueError(f"README.md has no section between {self.begin} and {self.end}")
        return f"{before}{self.begin}\n{new}\n{self.end}{after}"

    def write(self, new: str) -> None:
        """Replaces the section in the README."""
        files.write(README, self.replaced(README.read_text(encoding="utf-8"), new))
