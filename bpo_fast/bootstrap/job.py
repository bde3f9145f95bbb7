"""All that decides what a run writes, and its claim on the folder that it writes to."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bpo_fast.answers.given import GivenModel
from bpo_fast.bootstrap.filters import FilterOptions
from bpo_fast.bootstrap.kept import set_aside
from bpo_fast.bootstrap.maker import Maker
from bpo_fast.bootstrap.parts import DATA_FOLDER, PARTS_FOLDER, Part, cut
from bpo_fast.data.annotations import Annotation
from bpo_fast.data.mixture import Samples
from bpo_fast.data.pairs import CARD_FILE, MANIFEST_FILE, METADATA_FILE
from bpo_fast.runs.files import write_json
from bpo_fast.runs.fingerprint import fingerprint
from bpo_fast.runs.folder import held, holds_run, read_run


@dataclass(frozen=True)
class Job:
    """A run as any process can work on it.

    Attributes:
        folder: of the run.
        samples: those that are selected.
        makers: the kinds, each at most once, in the order of their table.
        given: the model.
        batch_size: samples a batch. It decides nothing that is written.
        rows_per_part: samples a part.
        filters: what pairs are left out.
        embed_images: shards hold the images themselves.
        score_pairs: the model's log-probs of both responses are written.
        selection: how the samples were selected, for the manifest.
    """

    folder: Path
    samples: Samples
    makers: Sequence[Maker]
    given: GivenModel
    batch_size: int
    rows_per_part: int
    filters: FilterOptions
    embed_images: bool
    score_pairs: bool
    selection: Mapping[str, Any]

    @cached_property
    def parts(self) -> list[Part]:
        """What the run is cut into."""
        return cut(self.folder, len(self.samples), self.rows_per_part)

    @cached_property
    def layout(self) -> str:
        """Fingerprint of which sample lies in which part: journals of another layout are kept aside, see `kept.py`."""
        return fingerprint(self.samples.sample_ids[part.start : part.stop].tolist() for part in self.parts)

    @cached_property
    def image_folders(self) -> dict[str, str | None]:
        """Source -> the folder that its image paths start from."""
        folders = {name: source.folder for name, source in self.samples.sources.items()}
        return {name: None if folder is None else str(Path(folder).resolve()) for name, folder in folders.items()}

    @cached_property
    def purpose(self) -> str:
        """What processes that share the folder must have in common."""
        lengths = self.samples.lengths.tolist()
        return fingerprint([self.layout, lengths, self.settings, self._writing(), dict(self.selection)])

    def _writing(self):
        """What decides how pairs are made of responses."""
        return [asdict(self.filters), self.embed_images, self.score_pairs, self.image_folders]

    @cached_property
    def kind_settings(self) -> dict[str, dict[str, Any]]:
        """Kind -> its settings."""
        return {maker.kind: maker.settings() for maker in self.makers}

    @property
    def needs_model(self) -> bool:
        """Whether there is something to ask the model."""
        return self.score_pairs or any(maker.needs_model for maker in self.makers)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the responses, as it is found at first."""
        return self._settings_now()

    def _settings_now(self):
        """The settings of each kind, under its name, and of the model where it is asked.

        A model id may have no commit before it has been downloaded.
        """
        model = self.given.settings() if self.needs_model else {}
        kinds = self.kind_settings.items()
        return {**model, **{f"{kind}.{name}": value for kind, own in kinds for name, value in own.items()}}

    def samples_of(self, part: Part) -> list[Annotation]:
        """The samples of a part."""
        return self.samples.batch(part.start, part.stop)

    def key(self, sample: Annotation, maker: Maker) -> str:
        """What the responses of a kind to a sample are known by.

        The sample's id and texts, its image by name and size of its file: whatever else changes in a file of
        annotations leaves the responses as they are. The files of a large data set are not read again each time, and
        an image inside a table is known by its name. The annotated answer counts where the responses are made of it.
        """
        folder = self.image_folders[sample.source]
        try:
            size = None if folder is None else os.stat(os.path.join(folder, sample.image)).st_size
        except (OSError, ValueError):
            size = None
        asked = [sample.source, sample.id, sample.image, size, sample.history, sample.question]
        return fingerprint([maker.kind, *asked, sample.answer if maker.needs_answer else None])

    def result(self, part: Part) -> str:
        """Fingerprint of all that decides what is written of a part."""
        samples = self.samples_of(part)
        keys = [self.key(sample, maker) for maker in self.makers for sample in samples]
        return fingerprint([part.shard.name, keys, [sample.answer for sample in samples], self._writing()])

    def check(self, settings: Mapping[str, Any] | None = None) -> dict | None:
        """What the folder's record of the run says, None if there is none yet.

        Args:
            settings: those that decide the responses; None takes them as they were found at first.

        Raises:
            ValueError: the folder holds a run with other settings of the model or of one of the kinds; one that
                lacks a kind of these, or has others, is this run.
        """
        kept = read_run(self.folder)
        if kept is None:
            return None
        there, here = kept["settings"], settings or self.settings
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
            now = self._settings_now()
            kept = self.check(now)
            if kept is not None and kept.get("layout") != self.layout:
                set_aside(self.folder)
            settings = {**now, **(kept["settings"] if kept else {})}
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
