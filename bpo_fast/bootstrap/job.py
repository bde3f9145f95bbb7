"""All that decides what a run writes, and its claim on the folder that it writes to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bpo_fast.answers.given import GivenModel
from bpo_fast.bootstrap.filters import FilterOptions
from bpo_fast.bootstrap.kept import set_aside
from bpo_fast.bootstrap.maker import Maker
from bpo_fast.bootstrap.parts import DATA_FOLDER, PARTS_FOLDER, Part, cut, layout, made_key
from bpo_fast.data.annotations import Annotation, Skip
from bpo_fast.data.pairs import CARD_FILE, MANIFEST_FILE, METADATA_FILE
from bpo_fast.runs.files import write_json
from bpo_fast.runs.fingerprint import fingerprint
from bpo_fast.runs.folder import held, holds_run, read_run


@dataclass(frozen=True)
class Job:
    """A run as any process can work on it.

    Attributes:
        folder: of the run.
        samples: those that are selected, in the order of their records.
        skipped: the records that cannot be used.
        num_records: all that were read.
        image_folders: source -> folder that its image paths start from.
        makers: the kinds, each at most once, in the order of their table.
        given: the model.
        batch_size: samples a batch. It decides nothing that is written.
        rows_per_part: samples a part.
        filters: what pairs are left out.
        embed_images: shards hold the images themselves.
        selection: how the samples were selected, for the manifest.
    """

    folder: Path
    samples: Sequence[Annotation]
    skipped: Sequence[Skip]
    num_records: int
    image_folders: Mapping[str, str]
    makers: Sequence[Maker]
    given: GivenModel
    batch_size: int
    rows_per_part: int
    filters: FilterOptions
    embed_images: bool
    selection: Mapping[str, Any]

    @cached_property
    def parts(self) -> list[Part]:
        """What the run is cut into."""
        return cut(self.folder, self.samples, self.rows_per_part)

    @cached_property
    def layout(self) -> str:
        """See `parts.layout`."""
        return layout(self.parts)

    @cached_property
    def purpose(self) -> str:
        """What processes that share the folder must have in common."""
        answers = fingerprint(self.samples)
        return fingerprint([self.layout, answers, self.settings(), self._writing(), dict(self.selection)])

    def _writing(self):
        """What decides how pairs are made of responses."""
        return [asdict(self.filters), self.embed_images, dict(self.image_folders)]

    def settings(self) -> dict[str, Any]:
        """What decides the responses: of each kind, under its name, and of the model where a kind needs one.

        A model id has no commit before it has been downloaded.
        """
        model = self.given.settings() if any(maker.needs_model for maker in self.makers) else {}
        kinds = {f"{maker.kind}.{name}": value for maker in self.makers for name, value in maker.settings().items()}
        return {**model, **kinds}

    def keys(self, part: Part) -> Iterator[tuple[Annotation, Maker, str]]:
        """Every sample of a part with every kind, and what its responses are known by."""
        for maker in self.makers:
            for sample in part.samples:
                yield sample, maker, made_key(sample, maker, self.image_folders)

    def result(self, part: Part) -> str:
        """Fingerprint of all that decides what is written of a part."""
        keys = [key for *_, key in self.keys(part)]
        return fingerprint([part.shard.name, keys, [sample.answer for sample in part.samples], self._writing()])

    def check(self) -> dict | None:
        """What the folder's record of the run says, None if there is none yet.

        Raises:
            ValueError: the folder holds a run with other settings of the model or of one of the kinds; one that
                lacks a kind of these, or has others, is this run.
        """
        kept = read_run(self.folder)
        if kept is None:
            return None
        there, here = kept["settings"], self.settings()
        known = {setting_owner(name) for name in there}
        asked = {setting_owner(name) for name in here}
        shared = {name: value for name, value in here.items() if setting_owner(name) in known}
        others = {name: value for name, value in there.items() if setting_owner(name) not in asked}
        holds_run(self.folder, {**others, **shared})
        return kept

    def begin(self) -> dict[str, Any]:
        """Claim the folder before something is written, and say that the run is not whole; again and again at will.

        Returns:
            The settings that the folder keeps, which name the commit of a model that was downloaded.
        """
        with held(self.folder / ".claim.lock"):
            kept = self.check()
            if kept is not None and kept.get("layout") != self.layout:
                set_aside(self.folder)
            settings = {**self.settings(), **(kept["settings"] if kept else {})}
            write_json(self.folder / METADATA_FILE, {"settings": settings, "layout": self.layout})
            for name in (MANIFEST_FILE, CARD_FILE):
                (self.folder / name).unlink(missing_ok=True)
            for name in (PARTS_FOLDER, DATA_FOLDER):
                (self.folder / name).mkdir(exist_ok=True)
        return settings


def setting_owner(setting: str) -> str:
    """The kind that a setting is of, or the model."""
    kind, dot, _ = setting.partition(".")
    return kind if dot else "model"
