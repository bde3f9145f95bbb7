"""Results of a benchmark that has not ended, so that a run that is given again goes on where it was killed."""

import json

from measure import write_json


class Partial:
    """The file beside `output` that keeps them, for runs with equal settings, machine, versions and commit."""

    def __init__(self, output, settings, found_environment):
        same = {key: found_environment[key] for key in ("device", "cpu", "threads", "versions", "commit")}
        self.path = output.with_name(f"{output.stem}.partial.json")
        # As JSON gives it back: tuples are lists, keys are strings.
        self.identity = json.loads(json.dumps({"settings": settings, **same}))

    def load(self):
        """{key: result} of an earlier run of the same identity; empty if there is none."""
        if not self.path.exists():
            return {}
        found = json.loads(self.path.read_text())
        return found["done"] if found["identity"] == self.identity else {}

    def save(self, done):
        write_json(self.path, {"identity": self.identity, "done": done})

    def remove(self):
        self.path.unlink(missing_ok=True)
